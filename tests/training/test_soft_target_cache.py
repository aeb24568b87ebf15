"""Soft targets on the disk: the same loss as the assistant's own, asked for once, and again for what has changed."""

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

from distill.data.corpus import Corpus
from distill.errors import RunError
from distill.models.backbone import Backbone
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.training import soft_target_cache
from distill.training.batches import Batch, encode
from distill.training.soft_target_cache import CachedTargets, bytes_per_token, keys, top_targets, write
from distill.training.soft_targets import SoftTargets
from distill.training.student import DistillationSettings, StudentModule, StudentSettings

TASKS: dict[Template, float] = {"reason": 1.0, "classify": 1.0}


class Desk:
    """A student, its assistant and a folder; `asked` are the samples that the assistant was asked about."""

    def __init__(self, make_backbone: Any, folder: Path, top_k: int = 0, temperature: float = 2.0) -> None:
        self.student, self.assistant = make_backbone(1), make_backbone(2, hidden=128)
        self.folder, self.top_k, self.temperature = folder, top_k, temperature
        self.asked: list[str] = []
        self.loaded = 0

    def encode(self, samples: Sequence[Sample]) -> Batch:
        self.asked += [sample.id for sample in samples]
        return encode(samples, self.student, TASKS, True)

    def load(self) -> SoftTargets:
        self.loaded += 1
        return SoftTargets(self.assistant, self.student)

    def write(self, samples: Sequence[Sample], weights: str = "a") -> CachedTargets:
        key = keys(self.student, list(TASKS), weights, self.top_k, self.temperature)
        write(self.folder, samples, key, self.encode, self.load, top_k=self.top_k, temperature=self.temperature)
        return CachedTargets(self.folder, key)

    def module(self, targets: Any) -> StudentModule:
        options = DistillationSettings(weight=0.5, temperature=self.temperature, top_k=self.top_k)
        return StudentModule(self.student, StudentSettings(distillation=options), targets)


def shards(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.name != "assistant.safetensors"]


@pytest.fixture
def rows(postcards: Corpus) -> list[Sample]:
    """Ragged ones: a rationale is missing, a picture is missing, a post is long, two rows share an id."""
    a, b, c, d = postcards.train[:4]
    again = replace(d, rationale=str(c.rationale))
    return [a, replace(b, rationale=None), replace(c, images=()), replace(d, text=d.text * 4), again]


@pytest.mark.parametrize("top_k", [0, 768])
def test_the_loss_is_that_of_the_assistant_asked_while_training(
    make_backbone: Any, rows: list[Sample], tmp_path: Path, top_k: int
) -> None:
    """In value and gradient; hidden states in bfloat16 cost three digits, all log-probabilities none."""
    desk = Desk(make_backbone, tmp_path, top_k)
    found = []
    for targets in (desk.load(), desk.write(rows)):
        module = desk.module(targets)
        loss = module.loss(module.encode(rows[::-1]))
        loss.total.backward()
        gradient = torch.cat([w.grad.flatten() for w in desk.student.model.parameters() if w.grad is not None])
        desk.student.model.zero_grad()
        found.append((loss, gradient))
    (online, expected), (cached, gradient) = found
    rough = 0.0 if top_k else 2e-2
    torch.testing.assert_close(cached.soft, online.soft, atol=1e-4 + rough, rtol=rough)
    torch.testing.assert_close(cached.total, online.total, atol=1e-5 + rough / 4, rtol=0)
    assert float(F.cosine_similarity(gradient, expected, 0)) > (1 - 1e-6 if top_k else 0.999)


@pytest.mark.parametrize("padded", ["student", "assistant"])
@pytest.mark.parametrize("top_k", [0, 768])
def test_padded_vocabularies_change_nothing(
    make_backbone: Any, rows: list[Sample], tmp_path: Path, padded: str, top_k: int
) -> None:
    plain, desk = Desk(make_backbone, tmp_path / "plain", top_k), Desk(make_backbone, tmp_path / "padded", top_k)
    {"student": desk.student, "assistant": desk.assistant}[padded].model.resize_token_embeddings(832)
    losses = []
    for each in (plain, desk):
        targets = each.write(rows)
        assert targets.vocabulary == 768
        module = each.module(targets)
        losses.append(module.loss(module.encode(rows)))
    torch.testing.assert_close(losses[0].soft, losses[1].soft, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(losses[0].hard, losses[1].hard, atol=1e-5, rtol=1e-4)


def test_a_few_likeliest_tokens_and_the_rest_never_say_more_than_all(
    make_backbone: Any, rows: list[Sample], tmp_path: Path
) -> None:
    desk = Desk(make_backbone, tmp_path, top_k=5)
    online, cached = (desk.module(targets) for targets in (desk.load(), desk.write(rows)))
    full, coarse = (module.loss(module.encode(rows)).soft for module in (online, cached))
    assert (coarse <= full + 1e-6).all() and float(coarse.sum()) > 0


def test_the_assistant_is_asked_once_and_need_not_be_loaded_again(
    make_backbone: Any, rows: list[Sample], tmp_path: Path
) -> None:
    desk = Desk(make_backbone, tmp_path)
    desk.write(rows)
    assert sorted(desk.asked) == sorted(sample.id for sample in rows) and desk.loaded == 1
    desk.write(rows)
    desk.write(rows[:2])
    assert desk.loaded == 1 and len(desk.asked) == len(rows)


@pytest.mark.parametrize("change", ["text", "answer", "label", "picture"])
def test_what_has_changed_is_asked_for_again_and_nothing_else(
    make_backbone: Any, rows: list[Sample], tmp_path: Path, change: str
) -> None:
    desk = Desk(make_backbone, tmp_path / "soft")
    desk.write(rows)
    desk.asked.clear()
    old = rows[0]
    other = tmp_path / "other.png"
    Image.new("RGB", (56, 56), "red").save(other)
    changed = {
        "text": replace(old, text="another"),
        "answer": replace(old, rationale=f"{old.rationale}."),
        "label": replace(old, label="neutral" if old.label != "neutral" else "positive"),
        "picture": replace(old, images=(other,)),
    }[change]
    targets = desk.write([changed, *rows[1:]])
    assert desk.asked == [old.id]
    module, online = desk.module(targets), desk.module(desk.load())
    torch.testing.assert_close(
        module.loss(module.encode([changed])).soft, online.loss(online.encode([changed])).soft, atol=2e-2, rtol=2e-2
    )


def test_another_assistant_processor_or_temperature_is_asked_anew(
    make_backbone: Any, rows: list[Sample], tmp_path: Path
) -> None:
    desk = Desk(make_backbone, tmp_path, top_k=3)
    desk.write(rows)
    desk.write(rows, weights="b")
    assert desk.loaded == 2
    assert len(shards(tmp_path)) == 1, "what nobody wants any more is gone"
    desk.temperature = 1.0
    desk.write(rows, weights="b")
    assert desk.loaded == 3
    desk.student.encoder.image_size = 84
    desk.write(rows, weights="b")
    assert desk.loaded == 4


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "garbage"])
def test_a_missing_or_torn_shard_is_written_again(
    make_backbone: Any, rows: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(soft_target_cache, "SHARD", 2)
    desk = Desk(make_backbone, tmp_path)
    desk.write(rows)
    files = shards(tmp_path)
    assert len(files) == 3
    before = desk.module(CachedTargets(tmp_path, desk.write(rows).key)).encode(rows).soft["hidden"]
    content = files[1].read_bytes()
    files[1].unlink()
    if damage != "missing":
        files[1].write_bytes({"truncated": content[:-7], "empty": b"", "garbage": b"x" * len(content)}[damage])
    desk.asked.clear()
    targets = desk.write(rows)
    assert 1 <= len(desk.asked) <= 2 and len(shards(tmp_path)) == 3
    assert torch.equal(desk.module(targets).encode(rows).soft["hidden"], before)


def test_a_torn_head_is_written_again(make_backbone: Any, rows: list[Sample], tmp_path: Path) -> None:
    desk = Desk(make_backbone, tmp_path)
    desk.write(rows)
    head = tmp_path / "assistant.safetensors"
    head.write_bytes(head.read_bytes()[:-1])
    assert torch.equal(desk.write(rows).head, desk.assistant.head)  # type: ignore[arg-type]


def test_what_was_written_before_a_crash_is_kept(
    make_backbone: Any, rows: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_target_cache, "SHARD", 2)
    desk = Desk(make_backbone, tmp_path)
    plain, calls = desk.encode, []

    def failing(samples: Sequence[Sample]) -> Batch:
        calls.append(samples)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(samples)

    desk.encode = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        desk.write(rows)
    desk.encode = plain  # type: ignore[method-assign]
    done = list(desk.asked)
    desk.write(rows)
    assert len(done) == 2 and sorted(desk.asked) == sorted(sample.id for sample in rows)


def test_a_sample_without_targets_is_one_sentence(make_backbone: Any, rows: list[Sample], tmp_path: Path) -> None:
    desk = Desk(make_backbone, tmp_path)
    targets = desk.write(rows)
    with pytest.raises(RunError, match="lacks those of stranger; the same command writes them"):
        targets.read([replace(rows[0], id="stranger")])
    for path in shards(tmp_path):
        path.unlink()
    with pytest.raises(RunError, match="lacks those of"):
        CachedTargets(tmp_path, targets.key).read(rows)


def test_a_shard_is_closed_when_it_is_large(
    make_backbone: Any, rows: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(make_backbone, tmp_path)
    desk.assistant.settings.batch_size = 2
    monkeypatch.setattr(soft_target_cache, "SHARD_BYTES", 1)
    targets = desk.write(rows)
    assert len(shards(tmp_path)) == 3 and sorted(desk.asked) == sorted(sample.id for sample in rows)
    assert len(targets.read(rows)["hidden"]) == int(encode(rows, desk.student, TASKS, True).sizes.sum())


def test_another_process_reads_what_this_one_has_open(make_backbone: Any, rows: list[Sample], tmp_path: Path) -> None:
    targets = Desk(make_backbone, tmp_path).write(rows)
    read = targets.read(rows)
    again = pickle.loads(pickle.dumps(targets)).read(rows)  # as strategies that spawn processes hand it over
    assert all(torch.equal(again[name], value) for name, value in read.items())


def test_a_token_takes_as_many_bytes_as_is_planned(make_backbone: Any, rows: list[Sample], tmp_path: Path) -> None:
    for top_k in (0, 16):
        desk = Desk(make_backbone, tmp_path / str(top_k), top_k)
        desk.write(rows)
        tokens = int(encode(rows, desk.student, TASKS, True).sizes.sum())
        with safe_open(shards(desk.folder)[0], "pt") as shard:
            taken = sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118
        assert taken == tokens * bytes_per_token(128, top_k)


def test_the_mass_of_the_rest_is_kept() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    found = top_targets(logits, 7, 2.0)
    q = (logits / 2).softmax(-1)
    assert torch.equal(found["ids"].long(), q.topk(7).indices) and found["ids"].dtype == torch.int32
    torch.testing.assert_close(found["log_q"].exp(), q.topk(7).values)
    torch.testing.assert_close(found["log_rest"].exp(), 1 - q.topk(7).values.sum(-1))
    whole = top_targets(logits, 99, 2.0)
    assert whole["ids"].shape == (4, 50) and (whole["log_rest"] == -torch.inf).all()


def test_the_key_belongs_to_this_student_and_these_tasks(backbone: Backbone, rows: list[Sample]) -> None:
    one = keys(backbone, ["reason", "classify"], "a", 0, 2.0)
    assert len({one(sample) for sample in rows}) == len(rows)
    assert one(rows[0]) == keys(backbone, ["reason", "classify"], "a", 0, 1.0)(rows[0]), "hidden states have none"
    others = [keys(backbone, ["reason"], "a", 0, 2.0), keys(backbone, ["reason", "classify"], "b", 0, 2.0)]
    assert len({key(rows[0]) for key in (one, *others)}) == 3

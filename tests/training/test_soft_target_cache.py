"""Cached soft targets: the same loss as with the assistant, computed once, and recomputed for what has changed."""

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

from distill.data.clips import ClipReader, VideoSettings
from distill.data.corpus import Corpus
from distill.errors import RunError
from distill.models.backbone import Backbone
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.training import soft_target_cache
from distill.training.batches import Batch, encode
from distill.training.soft_target_cache import CachedTargets, bytes_per_token, key_function, top_k_targets, write
from distill.training.soft_targets import OnlineTargets
from distill.training.student import DistillationSettings, StudentModule, StudentSettings

TASKS: dict[Template, float] = {"reason": 1.0, "classify": 1.0}


class Setup:
    """A student, its assistant and a cache folder.

    `computed` lists the ids of the samples whose soft targets were computed, `loaded` counts loads of the assistant.
    """

    def __init__(self, make_backbone: Any, folder: Path, top_k: int = 0, temperature: float = 2.0) -> None:
        self.student, self.assistant = make_backbone(1), make_backbone(2, hidden=128)
        self.folder, self.top_k, self.temperature = folder, top_k, temperature
        self.computed: list[str] = []
        self.loaded = 0

    def encode(self, samples: Sequence[Sample]) -> Batch:
        self.computed += [sample.id for sample in samples]
        return encode(samples, self.student, TASKS, True)

    def load(self) -> OnlineTargets:
        self.loaded += 1
        return OnlineTargets(self.assistant, self.student)

    def write(self, samples: Sequence[Sample], weights: str = "a") -> CachedTargets:
        key = key_function(self.student, list(TASKS), weights, self.top_k, self.temperature)
        write(self.folder, samples, key, self.encode, self.load, top_k=self.top_k, temperature=self.temperature)
        return CachedTargets(self.folder, key)

    def module(self, targets: Any) -> StudentModule:
        options = DistillationSettings(weight=0.5, temperature=self.temperature, top_k=self.top_k)
        return StudentModule(self.student, StudentSettings(distillation=options), targets)


def shards(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.name != "assistant.safetensors"]


@pytest.fixture
def rows(postcards: Corpus) -> list[Sample]:
    """Rows without a rationale, without an image, with a long text, and two rows with the same id."""
    a, b, c, d = postcards.train[:4]
    again = replace(d, rationale=str(c.rationale))
    return [a, replace(b, rationale=None), replace(c, images=()), replace(d, text=d.text * 4), again]


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("top_k", [0, 768])
def test_the_loss_equals_that_with_online_targets(
    make_backbone: Any, rows: list[Sample], tmp_path: Path, top_k: int, cap: float | None
) -> None:
    """In value and gradient; bfloat16 hidden states lose precision, log-probabilities of all tokens do not."""
    setup = Setup(make_backbone, tmp_path, top_k)
    setup.assistant.cap = cap
    found = []
    for targets in (setup.load(), setup.write(rows)):
        module = setup.module(targets)
        loss = module.loss(module.encode(rows[::-1]))
        loss.total.backward()
        gradient = torch.cat([w.grad.flatten() for w in setup.student.model.parameters() if w.grad is not None])
        setup.student.model.zero_grad()
        found.append((loss, gradient))
    (online, expected), (cached, gradient) = found
    tolerance = 0.0 if top_k else 2e-2
    torch.testing.assert_close(cached.soft, online.soft, atol=1e-4 + tolerance, rtol=tolerance)
    torch.testing.assert_close(cached.total, online.total, atol=1e-5 + tolerance / 4, rtol=0)
    assert float(F.cosine_similarity(gradient, expected, 0)) > (1 - 1e-6 if top_k else 0.999)


@pytest.mark.parametrize("padded", ["student", "assistant"])
@pytest.mark.parametrize("top_k", [0, 768])
def test_padded_vocabularies_do_not_change_the_loss(
    make_backbone: Any, rows: list[Sample], tmp_path: Path, padded: str, top_k: int
) -> None:
    plain, setup = Setup(make_backbone, tmp_path / "plain", top_k), Setup(make_backbone, tmp_path / "padded", top_k)
    {"student": setup.student, "assistant": setup.assistant}[padded].model.resize_token_embeddings(832)
    losses = []
    for each in (plain, setup):
        targets = each.write(rows)
        assert targets.vocabulary == 768
        module = each.module(targets)
        losses.append(module.loss(module.encode(rows)))
    torch.testing.assert_close(losses[0].soft, losses[1].soft, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(losses[0].hard, losses[1].hard, atol=1e-5, rtol=1e-4)


def test_the_top_k_divergence_is_a_lower_bound(make_backbone: Any, rows: list[Sample], tmp_path: Path) -> None:
    setup = Setup(make_backbone, tmp_path, top_k=5)
    online, cached = (setup.module(targets) for targets in (setup.load(), setup.write(rows)))
    full, coarse = (module.loss(module.encode(rows)).soft for module in (online, cached))
    assert (coarse <= full + 1e-6).all() and float(coarse.sum()) > 0


def test_the_assistant_runs_once_and_is_not_loaded_again(
    make_backbone: Any, rows: list[Sample], tmp_path: Path
) -> None:
    setup = Setup(make_backbone, tmp_path)
    setup.write(rows)
    assert sorted(setup.computed) == sorted(sample.id for sample in rows) and setup.loaded == 1
    setup.write(rows)
    setup.write(rows[:2])
    assert setup.loaded == 1 and len(setup.computed) == len(rows)


@pytest.mark.parametrize("change", ["text", "answer", "label", "image"])
def test_only_changed_samples_are_computed_again(
    make_backbone: Any, rows: list[Sample], tmp_path: Path, change: str
) -> None:
    setup = Setup(make_backbone, tmp_path / "soft")
    setup.write(rows)
    setup.computed.clear()
    old = rows[0]
    other = tmp_path / "other.png"
    Image.new("RGB", (56, 56), "red").save(other)
    changed = {
        "text": replace(old, text="another"),
        "answer": replace(old, rationale=f"{old.rationale}."),
        "label": replace(old, label="neutral" if old.label != "neutral" else "positive"),
        "image": replace(old, images=(other,)),
    }[change]
    targets = setup.write([changed, *rows[1:]])
    assert setup.computed == [old.id]
    module, online = setup.module(targets), setup.module(setup.load())
    torch.testing.assert_close(
        module.loss(module.encode([changed])).soft, online.loss(online.encode([changed])).soft, atol=2e-2, rtol=2e-2
    )


def test_another_assistant_processor_or_temperature_is_computed_anew(
    make_backbone: Any, rows: list[Sample], tmp_path: Path
) -> None:
    setup = Setup(make_backbone, tmp_path, top_k=3)
    setup.write(rows)
    setup.write(rows, weights="b")
    assert setup.loaded == 2
    assert len(shards(tmp_path)) == 1, "the unused shard is deleted"
    setup.temperature = 1.0
    setup.write(rows, weights="b")
    assert setup.loaded == 3
    setup.student.encoder.image_size = 84
    setup.write(rows, weights="b")
    assert setup.loaded == 4


def test_the_key_of_a_post_has_its_clips_and_their_sampling(
    backbone: Backbone, rows: list[Sample], tmp_path: Path
) -> None:
    def keys(post: Sample, frames: int) -> str:
        clips = ClipReader(VideoSettings(frames=frames))
        student = Backbone(backbone.model, backbone.processor, backbone.labels, backbone.settings, clips)
        return key_function(student, list(TASKS), "a", 0, 2.0)(post)

    (one := tmp_path / "a.mp4").write_bytes(b"one")
    (other := tmp_path / "b.mp4").write_bytes(b"other")
    with_video = replace(rows[0], video=one, audio=one)
    changed = [replace(with_video, video=other), replace(with_video, audio=None), rows[0]]
    assert len({keys(post, 8) for post in (with_video, *changed)} | {keys(with_video, 4)}) == 5
    assert keys(rows[0], 8) == keys(rows[0], 4), "of posts without clips it is as before"


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "garbage"])
def test_a_missing_or_damaged_shard_is_written_again(
    make_backbone: Any, rows: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(soft_target_cache, "SHARD_SAMPLES", 2)
    setup = Setup(make_backbone, tmp_path)
    setup.write(rows)
    files = shards(tmp_path)
    assert len(files) == 3
    before = setup.module(CachedTargets(tmp_path, setup.write(rows).key)).encode(rows).soft_targets["hidden"]
    content = files[1].read_bytes()
    files[1].unlink()
    if damage != "missing":
        files[1].write_bytes({"truncated": content[:-7], "empty": b"", "garbage": b"x" * len(content)}[damage])
    setup.computed.clear()
    targets = setup.write(rows)
    assert 1 <= len(setup.computed) <= 2 and len(shards(tmp_path)) == 3
    assert torch.equal(setup.module(targets).encode(rows).soft_targets["hidden"], before)


def test_a_file_of_others_is_not_deleted(make_backbone: Any, rows: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_text("mine")
    Setup(make_backbone, tmp_path).write(rows)
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


def test_a_damaged_head_is_written_again(make_backbone: Any, rows: list[Sample], tmp_path: Path) -> None:
    setup = Setup(make_backbone, tmp_path)
    setup.write(rows)
    head = tmp_path / "assistant.safetensors"
    head.write_bytes(head.read_bytes()[:-1])
    assert torch.equal(setup.write(rows).head, setup.assistant.head)  # type: ignore[arg-type]


def test_shards_written_before_a_crash_are_kept(
    make_backbone: Any, rows: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_target_cache, "SHARD_SAMPLES", 2)
    setup = Setup(make_backbone, tmp_path)
    encode_batch, calls = setup.encode, []

    def failing(samples: Sequence[Sample]) -> Batch:
        calls.append(samples)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode_batch(samples)

    setup.encode = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        setup.write(rows)
    setup.encode = encode_batch  # type: ignore[method-assign]
    done = list(setup.computed)
    setup.write(rows)
    assert len(done) == 2 and sorted(setup.computed) == sorted(sample.id for sample in rows)


def test_missing_targets_of_a_sample_are_an_error(make_backbone: Any, rows: list[Sample], tmp_path: Path) -> None:
    setup = Setup(make_backbone, tmp_path)
    targets = setup.write(rows)
    with pytest.raises(RunError, match="has no soft targets of sample stranger; the same command computes them again"):
        targets.read([replace(rows[0], id="stranger")])
    for path in shards(tmp_path):
        path.unlink()
    with pytest.raises(RunError, match="has no soft targets of sample"):
        CachedTargets(tmp_path, targets.key).read(rows)


def test_a_shard_is_closed_at_its_maximum_size(
    make_backbone: Any, rows: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(make_backbone, tmp_path)
    setup.assistant.settings.batch_size = 2
    monkeypatch.setattr(soft_target_cache, "SHARD_BYTES", 1)
    targets = setup.write(rows)
    assert len(shards(tmp_path)) == 3 and sorted(setup.computed) == sorted(sample.id for sample in rows)
    assert len(targets.read(rows)["hidden"]) == int(encode(rows, setup.student, TASKS, True).sizes.sum())


def test_targets_can_be_pickled_while_shards_are_open(make_backbone: Any, rows: list[Sample], tmp_path: Path) -> None:
    targets = Setup(make_backbone, tmp_path).write(rows)
    read = targets.read(rows)
    copied = pickle.loads(pickle.dumps(targets)).read(rows)  # as strategies that spawn processes do
    assert all(torch.equal(copied[name], value) for name, value in read.items())


def test_bytes_per_token_is_the_stored_size(make_backbone: Any, rows: list[Sample], tmp_path: Path) -> None:
    for top_k in (0, 16):
        setup = Setup(make_backbone, tmp_path / str(top_k), top_k)
        setup.write(rows)
        tokens = int(encode(rows, setup.student, TASKS, True).sizes.sum())
        with safe_open(shards(setup.folder)[0], "pt") as shard:
            stored = sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118
        assert stored == tokens * bytes_per_token(128, top_k)


def test_the_mass_of_the_other_tokens_is_stored() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    found = top_k_targets(logits, 7, 2.0)
    q = (logits / 2).softmax(-1)
    assert torch.equal(found["ids"].long(), q.topk(7).indices) and found["ids"].dtype == torch.int32
    torch.testing.assert_close(found["log_q"].exp(), q.topk(7).values)
    torch.testing.assert_close(found["log_rest"].exp(), 1 - q.topk(7).values.sum(-1))
    whole = top_k_targets(logits, 99, 2.0)
    assert whole["ids"].shape == (4, 50) and (whole["log_rest"] == -torch.inf).all()


def test_the_key_depends_on_student_tasks_and_assistant(backbone: Backbone, rows: list[Sample]) -> None:
    one = key_function(backbone, ["reason", "classify"], "a", 0, 2.0)
    assert len({one(sample) for sample in rows}) == len(rows)
    assert one(rows[0]) == key_function(backbone, ["reason", "classify"], "a", 0, 1.0)(rows[0]), (
        "hidden states do not depend on the temperature"
    )
    others = [
        key_function(backbone, ["reason"], "a", 0, 2.0),
        key_function(backbone, ["reason", "classify"], "b", 0, 2.0),
    ]
    assert len({key(rows[0]) for key in (one, *others)}) == 3

"""Label distributions of the assistant and of a server: asked once, unknown ones counted, across tokenizers."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from distill import chain
from distill.errors import RunError, SettingsError
from distill.models import tiny
from distill.recipe import Recipe
from tests import micro
from tests.commands import Command
from tests.models.openai_server import COLOURS, ChatRequest, Server, token
from tests.models.test_backbone import build_llava

LABELS_ONLY = {"weight": 0.0, "label_weight": 1.0}
TRAINING = micro.LEARNER | {"hard_labels_baseline": False, "trainer": {"max_epochs": 1}}
CHAIN: dict[str, Any] = {key: value for key, value in micro.RECORDED.items() if key not in ("evaluate", "export")}


def write(folder: Path, url: str = "", **changes: Any) -> Path:
    """A chain whose student learns label distributions, from a server if `url` is given."""
    content = CHAIN | {"student": TRAINING | {"distillation": LABELS_ONLY}}
    if url:
        content = {key: value for key, value in content.items() if key not in ("assistant", "augment")}
        endpoint = {"base_url": url, "model": "big-vl", "backoff_s": 0.01}
        content["annotate"] = {"endpoint": endpoint, "retries": 0}
        content["student"] = TRAINING | {"distillation": LABELS_ONLY | {"label_teacher": "teacher"}}
    return micro.write(folder, content, **changes)


def stored(recipe: Recipe) -> dict[str, list[float] | None]:
    path = recipe.folder / "student" / "soft_targets" / "labels.jsonl"
    return {row["id"]: row["probabilities"] for row in map(json.loads, path.read_text().splitlines())}


def asks_label(request: ChatRequest) -> bool:
    return request.text.endswith("<label>")


def logprobs(request: ChatRequest) -> list[dict[str, Any]]:
    """The label of the colour with a probability of 0.8, the others with 0.1 each."""
    top = {f" {name}": 0.8 if name == request.sentiment else 0.1 for name in COLOURS}
    return [token('"Prediction":'), token(f" {request.sentiment}", **top)]


def classified(server: Server) -> int:
    return sum(asks_label(request) for request in server.received)


def test_a_server_teaches_its_label_distribution_and_is_asked_once(tmp_path: Path) -> None:
    with Server(logprobs=logprobs) as server:
        recipe = micro.read(write(tmp_path, server.url))
        assert chain.run(recipe) == ["annotate", "student"]
        rows = stored(recipe)
        assert len(rows) == 27 + 9, "the unlabelled posts are among them"
        assert all(sorted(row) == pytest.approx([0.1, 0.1, 0.8]) for row in rows.values() if row)
        assert classified(server) == 36 and None not in rows.values()
        paid = server.requests
        again = micro.read(tmp_path / "recipe.yaml", "--student.distillation.divergence", "jsd")
        assert chain.run(again) == ["student"] and server.requests == paid
        assert "train/label_divergence" in (recipe.folder / "student" / "metrics.csv").read_text()


def test_what_annotate_has_paid_is_not_asked_again(tmp_path: Path) -> None:
    with Server(logprobs=logprobs) as server:
        recipe = micro.read(write(tmp_path, server.url, annotate__unlabelled="keep_confident"))
        chain.run(recipe, until="annotate")
        assert classified(server) == 9
        chain.run(recipe)
        assert classified(server) == 27 + 9


def test_posts_without_a_distribution_are_counted_and_named_and_have_null(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filtered = {"error": {"message": "refused", "code": "content_filter"}}

    def script(request: ChatRequest) -> tuple[int, Any] | None:
        refused = asks_label(request) and len(request.text) % 2
        return (400, filtered) if refused else None

    with Server(logprobs=logprobs, script=script) as server, caplog.at_level(logging.WARNING):
        recipe = micro.read(write(tmp_path, server.url))
        chain.run(recipe)
    unknown = [post for post, row in stored(recipe).items() if row is None]
    assert 0 < len(unknown) < 36
    assert f"student: big-vl gave no label probabilities for {len(unknown)} of 36 posts, such as {unknown[0]};" in (
        caplog.text
    )


def test_a_server_without_log_probabilities_is_not_asked_about_every_post(tmp_path: Path) -> None:
    with Server() as server:
        path = write(tmp_path, server.url, annotate__endpoint__concurrency=1)
        with pytest.raises(RunError) as failure:
            chain.run(micro.read(path))
        assert str(failure.value) == (
            "student.distillation: big-vl gave label probabilities for none of the 36 posts; "
            "set label_teacher to assistant, or label_weight to 0"
        )
        assert 0 < classified(server) < 36


def test_the_scores_of_the_assistant_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = micro.read(write(tmp_path))
    chain.run(recipe)
    first = stored(recipe)
    assert len(first) == 36 and None not in first.values()
    again = micro.read(tmp_path / "recipe.yaml", "--student.learning_rate", "1e-4")
    monkeypatch.setattr("distill.stages.context.Context.reasoner", None)  # the assistant is not loaded
    assert chain.run(again) == ["student"] and stored(again) == first


def test_a_model_on_this_machine_teaches_its_label_distribution(tmp_path: Path, model_folder: Path) -> None:
    model = {"path": str(model_folder), "image_size": 56, "batch_size": 16}
    options = {"annotate__model": model, "student__distillation": LABELS_ONLY | {"label_teacher": "teacher"}}
    recipe = micro.read(write(tmp_path, **options, assistant=None, augment=None))
    assert chain.run(recipe) == ["annotate", "student"]
    answers = (recipe.folder / "annotate" / "ledger.jsonl").read_text().splitlines()
    assert len(stored(recipe)) == len(answers) == 36 and None not in stored(recipe).values()
    assert not (recipe.folder / "student" / "ledger.jsonl").exists()


def test_a_teacher_that_the_chain_trains_teaches_its_label_distribution(tmp_path: Path) -> None:
    """Without rationales: the student depends on the teacher, and its scores are in the student's ledger."""
    learner = TRAINING | {"tasks": {"classify": 1.0}}
    student = learner | {"distillation": LABELS_ONLY | {"label_teacher": "teacher"}}
    teacher = {key: value for key, value in learner.items() if key != "hard_labels_baseline"}
    write(tmp_path, teacher=teacher, student=student, annotate=None, assistant=None, augment=None)
    recipe = micro.read(tmp_path / "recipe.yaml")
    assert chain.run(recipe) == ["teacher", "student"]
    assert len(stored(recipe)) == 36 and None not in stored(recipe).values()
    answers = (recipe.folder / "student" / "ledger.jsonl").read_text().splitlines()
    assert len(answers) == 36 and not (recipe.folder / "annotate").exists()
    assert chain.run(recipe) == []
    other = micro.read(tmp_path / "recipe.yaml", "--teacher.learning_rate", "1e-4")
    assert chain.run(other) == ["teacher", "student"]
    alone = ("--student.distillation.label_weight", "0")
    assert chain.run(micro.read(tmp_path / "recipe.yaml", *alone)) == ["teacher", "student"]
    assert chain.run(micro.read(tmp_path / "recipe.yaml", *alone, "--teacher.learning_rate", "1e-4")) == ["teacher"]


@pytest.mark.slow
def test_an_assistant_teaches_a_student_of_another_family(tmp_path: Path, model_folder: Path, distill: Command) -> None:
    """Qwen2.5-VL teaches LLaVA with another tokenizer, through all stages."""
    words = tiny.train_tokenizer(["a post of words", '"Prediction": negative neutral positive'] * 99, 400)
    build_llava(tmp_path / "llava", words)
    path = write(
        tmp_path,
        assistant__model={"path": str(model_folder), "image_size": 56, "batch_size": 16},
        student__model={"path": str(tmp_path / "llava"), "image_size": 56, "batch_size": 16},
        evaluate={"max_new_tokens": 20},
        export={"check_samples": 4},
    )
    result = distill("run", "--config", path)
    assert result.status == 0, result.err
    recipe = micro.read(path)
    assert None not in stored(recipe).values()
    assert json.loads((recipe.folder / "evaluate" / "metrics.json").read_text())["student"]["accuracy"] >= 0


def test_token_distributions_across_tokenizers_are_refused_with_the_remedy(tmp_path: Path) -> None:
    tiny_model = micro.MODEL | {"tiny": micro.MODEL["tiny"] | {"vocabulary": 500}}
    path = write(tmp_path, student__model=tiny_model, student__distillation={"label_weight": 1.0})
    with pytest.raises(SettingsError) as failure:
        chain.run(micro.read(path))
    assert str(failure.value) == (
        "student.distillation: student and assistant have different tokenizers; set its weight to 0, and its "
        "label_weight above 0 to learn from label distributions"
    )
    path = write(tmp_path, student__model=tiny_model)
    assert "student" in chain.run(micro.read(path))

"""The context of the stages: data, tokenizers, models, teachers and training samples."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from distill.chain import identities
from distill.errors import SettingsError
from distill.models.endpoint import Endpoint
from distill.models.reasoner import Reasoner
from distill.models.tiny import load_tokenizer
from distill.recipe import Recipe
from distill.stages.context import Context, progress
from distill.tracking import Tracker
from tests import micro


@pytest.fixture
def context(finished: Recipe) -> Context:
    return Context(finished, identities(finished))


def new_context(folder: Path, *flags: str, **changes: object) -> Context:
    recipe = micro.read(micro.write(folder, micro.RECORDED, **changes), *flags)
    return Context(recipe, identities(recipe))


def test_the_corpus_is_read_once_and_dropped_rows_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = new_context(tmp_path)
    assert context.corpus is context.corpus
    assert (context.folder / "quarantine.jsonl").read_text() == "" and not caplog.records
    image = context.corpus.train[3].images[0]
    image.write_bytes(b"not an image")
    again = new_context(tmp_path)
    with caplog.at_level(logging.WARNING, logger="distill"):
        assert len(again.corpus.train) == 35
    assert image.name in (again.folder / "quarantine.jsonl").read_text()
    assert "1 rows are dropped and listed in" in caplog.text and "train.jsonl row 4" in caplog.text


@pytest.mark.parametrize("too_long", ["truncate", "quarantine"])
def test_long_posts_are_cut_or_dropped_by_the_trained_models_tokenizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, too_long: str
) -> None:
    posts = [{"id": f"p{i}", "text": "Glad we came", "label": "positive"} for i in range(3)]
    posts.append({"id": "huge", "text": "so " * 20_000, "label": "neutral"})
    lines = [json.dumps(post) + "\n" for post in posts]
    for name in ("train", "validation", "test"):
        other = json.dumps(posts[0] | {"text": f"Here at the {name}"})
        (tmp_path / f"{name}.jsonl").write_text("".join(lines) if name == "train" else other)
    data = {"source": "jsonl", "root": str(tmp_path), "validation": ["validation.jsonl"], "too_long": too_long}
    context = new_context(tmp_path, data=data)
    with caplog.at_level(logging.WARNING, logger="distill"):
        train = context.corpus.train
    quarantine = (context.folder / "quarantine.jsonl").read_text()
    if too_long == "quarantine":
        assert len(train) == 3 and '"id": "huge"' in quarantine and "more than 2048 tokens" in quarantine
        return
    tokens = load_tokenizer(context.tokenizer(context.recipe.student.model))(train[3].text)["input_ids"]  # type: ignore[union-attr]
    assert 2000 < len(tokens) <= 2048 and quarantine == ""
    assert "1 posts are cut to 2048 tokens (data.max_tokens, data.too_long): huge" in caplog.text


def test_workers_of_a_distributed_training_do_not_write_the_report_of_dropped_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = new_context(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("DISTILL_ACTIVE_FIT", str(context.folder / "student"))
    assert len(context.corpus.train) == 36
    assert not (context.folder / "quarantine.jsonl").exists()


def test_a_tokenizer_is_shared_by_vocabulary_size_and_written_atomically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = new_context(tmp_path)
    assert context.recipe.student is not None
    settings = context.recipe.student.model
    folder = context.tokenizer(settings)
    assert len(load_tokenizer(folder)) == 600
    assert context.tokenizer(replace(settings, tiny=replace(settings.tiny, hidden=128))) == folder
    other = replace(settings, tiny=replace(settings.tiny, vocabulary=500))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="No space left"):
            context.tokenizer(other)
    assert len(load_tokenizer(context.tokenizer(other))) == 500


def test_the_name_of_a_trained_model_depends_on_stage_part_and_fingerprint(context: Context, tmp_path: Path) -> None:
    names = {context.reasoner("student").name, context.reasoner("student", "hard_labels").name}
    other = Context(context.recipe, context.fingerprints | {"student": "another"})
    assert len(names | {other.reasoner("student").name}) == 3


def test_the_teacher_is_the_one_that_the_recipe_sets(context: Context, tmp_path: Path) -> None:
    def annotates(context: Context) -> Reasoner | None:
        return context.teacher(context.recipe.annotating_teacher)

    def cascades(context: Context) -> Reasoner | None:
        return context.teacher(context.recipe.cascade_teacher)

    teacher = annotates(context)
    assert teacher is not None and teacher.name.startswith("teacher-")
    assert annotates(new_context(tmp_path)) is None  # a recording
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "big-vl"}
    remote = annotates(new_context(tmp_path, annotate={"endpoint": endpoint}))
    assert isinstance(remote, Endpoint) and remote.name == "big-vl"
    model = micro.MODEL | {"path": str(context.folder / "export")}
    ready = annotates(new_context(tmp_path, annotate={"model": model}))
    assert ready is not None and ready.name.startswith(str(context.folder / "export"))
    assert ready.classify(context.corpus.test[:2]).probabilities.shape == (2, 3)
    assert (same := cascades(context)) is not None and same.name == teacher.name
    another = {"endpoint": endpoint | {"model": "another"}}
    for sections in ({"calibrate": {}, "cascade": {"teacher": another}}, {"calibrate": another}):
        other = new_context(tmp_path, **sections)
        partner = cascades(other)
        assert annotates(other) is None and isinstance(partner, Endpoint) and partner.name == "another"
    local = new_context(tmp_path, calibrate={}, cascade={"teacher": {"model": model}})
    assert (name := cascades(local).name) == ready.name, name  # type: ignore[union-attr]


def test_training_samples_match_the_corpus(context: Context) -> None:
    train = {sample.id: sample for sample in context.corpus.train}
    samples = context.training_samples("annotate", "augment")
    assert len(samples) == len(context.rationales("annotate")) + len(context.rationales("augment"))
    for sample in samples:
        assert replace(sample, label=None, rationale=None) == replace(train[sample.id], label=None, rationale=None)
        assert sample.rationale
    more = context.training_samples("annotate", "augment", labelled_posts=True)
    assert more[: len(samples)] == samples
    without = {sample.id: sample for sample in more[len(samples) :]}
    labelled = {name for name, sample in train.items() if sample.label is not None}
    assert without.keys() == labelled - {sample.id for sample in samples}
    assert all(sample == replace(train[name], rationale=None) for name, sample in without.items())


def test_training_without_samples_raises(tmp_path: Path) -> None:
    context = new_context(tmp_path)
    with (
        Tracker(context.recipe.tracking, tmp_path, "x").stage("student", {}) as tracked,
        pytest.raises(SettingsError, match="student: no training rows are left"),
    ):
        context.train("student", lambda model: None, [], tracked)  # type: ignore[arg-type, return-value]


def test_a_progress_bar_is_cleared_after_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.logs.quiet", lambda: False)  # a command in this process may have set it
    with pytest.raises(RuntimeError), progress("annotate") as show:
        show(1, 3)
        raise RuntimeError
    shown = capsys.readouterr().err
    assert "annotate" in shown and shown.rpartition("\r")[2] == ""

"""Decisions of `distill review` in a chain: which stages run again, what they see, and that nothing is paid twice."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill import chain
from distill.annotation.curation import DECISIONS, Decision, append
from distill.chain import STAGES, run
from distill.errors import RunError, SettingsError
from distill.recipe import Recipe
from distill.stages import augment, student
from distill.stages.context import Context
from distill.task.rationale import parse, render
from distill.tracking.run import Guard, StageRun
from distill.tracking.settings import TrackingSettings
from tests import micro
from tests.fake_stages import Fakes
from tests.models.openai_server import ChatRequest, Server, rationale

ALL = [name for name in STAGES if name != "refine"]
AFTER_TEACHER = ALL[1:]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return micro.read(micro.write(tmp_path, micro.WITH_TEACHER))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fakes = Fakes(monkeypatch)
    fakes.extra["annotate"] = ["ledger.jsonl"]
    return fakes


def decide(recipe: Recipe, name: str, action: Any, label: str | None = None, text: str | None = None) -> None:
    append(recipe.folder / DECISIONS, Decision(name, action, label, text))


def rows(recipe: Recipe, name: str) -> dict[str, dict[str, Any]]:
    lines = (recipe.folder / "annotate" / name).read_text(encoding="utf-8").splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


# ---- which stages run ----


@pytest.mark.parametrize(
    "decision", [("edit", "neutral", rationale("neutral")), ("drop",), ("relabel", "neutral")], ids=lambda d: d[0]
)
def test_a_change_runs_annotate_and_what_follows_and_its_reset_does_so_again(
    decision: tuple[Any, ...], recipe: Recipe, fakes: Fakes
) -> None:
    assert run(recipe) == ALL
    before = chain.identities(recipe)
    decide(recipe, "train-0001", *decision)
    assert run(recipe) == AFTER_TEACHER
    assert run(recipe) == []
    assert {name for name, identity in chain.identities(recipe).items() if identity != before[name]} >= {"annotate"}
    decide(recipe, "train-0001", "reset")
    assert run(recipe) == AFTER_TEACHER
    assert chain.identities(recipe) == before
    assert run(recipe) == []


def test_a_kept_rationale_and_a_change_that_is_taken_back_run_nothing(recipe: Recipe, fakes: Fakes) -> None:
    run(recipe)
    decide(recipe, "train-0001", "keep")
    decide(recipe, "train-0002", "drop")
    decide(recipe, "train-0002", "reset")
    assert run(recipe) == []
    decide(recipe, "train-0002", "drop")
    assert run(recipe, until="annotate") == ["annotate"]
    decide(recipe, "train-0002", "keep")
    assert run(recipe) == ["annotate"]  # the later stages were made from the same data


def test_a_run_of_an_earlier_version_is_up_to_date_until_the_first_decision(recipe: Recipe, fakes: Fakes) -> None:
    run(recipe)
    (recipe.folder / "annotate" / "curated.jsonl").unlink()
    path = recipe.folder / "chain.json"
    content = json.loads(path.read_text())
    entry = content["stages"]["annotate"]
    entry["outputs"].remove("annotate/curated.jsonl")
    entry["files"].pop("curated.jsonl")
    path.write_text(json.dumps(content))
    assert run(recipe) == []
    decide(recipe, "train-0001", "drop")
    assert run(recipe) == AFTER_TEACHER


def test_decisions_survive_whatever_the_chain_does(recipe: Recipe, fakes: Fakes, tmp_path: Path) -> None:
    decide(recipe, "train-0001", "drop")  # before the first run
    content = (recipe.folder / DECISIONS).read_bytes()
    run(recipe)
    run(replace(recipe, seed=recipe.seed + 1))
    (recipe.folder / "chain.json").unlink()
    run(recipe)
    assert (recipe.folder / DECISIONS).read_bytes() == content
    assert "curation.jsonl" not in micro.manifest(recipe)["annotate"]["files"]


def test_an_invalid_line_stops_the_command_before_the_first_stage(recipe: Recipe, fakes: Fakes) -> None:
    decide(recipe, "train-0001", "drop")
    with (recipe.folder / DECISIONS).open("a") as file:
        file.write('{"id": "train-0002", "action": "delete"}\n')
    with pytest.raises(SettingsError, match=r"annotate/curation\.jsonl, row 2: action is 'delete'"):
        run(recipe)
    assert not fakes.folders


# ---- what the stages see ----


@pytest.fixture
def server() -> Any:
    """A teacher that predicts negative for every post, and explains what it is told."""

    def answer(request: ChatRequest) -> str:
        hint = request.text.partition("The sentiment is ")[2].partition(".")[0]
        return rationale(hint or "negative")

    with Server(answer=answer) as server:
        yield server


@pytest.fixture
def annotated(server: Server, tmp_path: Path) -> Recipe:
    """A run whose stage annotate has finished."""
    content = micro.RECORDED | {"annotate": {"endpoint": {"base_url": server.url, "model": "big-vl"}}}
    recipe = micro.read(micro.write(tmp_path, content))
    assert run(recipe, until="annotate") == ["annotate"]
    return recipe


def test_only_a_relabelled_post_needs_a_new_answer(annotated: Recipe, server: Server) -> None:
    kept = rows(annotated, "rationales.jsonl")
    gold = {label: [name for name, row in kept.items() if row["label"] == label] for label in annotated.labels.names}
    edited, dropped, known, new = gold["neutral"][0], gold["neutral"][1], gold["positive"][0], gold["positive"][1]
    text = rationale("neutral", "The words are labeled as neutral.")
    paid = server.paid
    decide(annotated, edited, "edit", "neutral", text)
    decide(annotated, dropped, "drop")
    decide(annotated, known, "relabel", "negative")  # which the teacher has predicted
    decide(annotated, gold["negative"][0], "keep")
    assert run(annotated, until="annotate") == ["annotate"]
    assert server.paid == paid
    now = rows(annotated, "rationales.jsonl")
    assert set(now) == set(kept) - {dropped} and not rows(annotated, "quarantine.jsonl")
    assert now[edited]["rationale"] == render(parse(text, annotated.labels))
    assert (now[edited]["source"], now[edited]["teacher_label"]) == ("edited", False)
    assert (now[known]["source"], now[known]["label"]) == ("predicted", "negative")
    assert all(now[name] == kept[name] for name in set(now) - {edited, known})
    summary = json.loads((annotated.folder / "annotate" / "summary.json").read_text())
    assert summary["curated"] == {"edited": 1, "dropped": 1, "relabelled": 1}
    assert summary["predicted"] + summary["explained"] + 1 == len(now)
    decide(annotated, new, "relabel", "neutral")
    assert run(annotated, until="annotate") == ["annotate"]
    assert server.paid == paid + 1
    assert rows(annotated, "rationales.jsonl")[new]["label"] == "neutral"
    for name in (edited, dropped, known, new):
        decide(annotated, name, "reset")
    assert run(annotated, until="annotate") == ["annotate"]
    assert server.paid == paid + 1 and rows(annotated, "rationales.jsonl") == kept


def test_the_message_says_that_all_posts_are_dropped(annotated: Recipe) -> None:
    for number in range(36):
        decide(annotated, f"train-{number:04d}", "drop")
    with pytest.raises(RunError, match=r"none of the 36 posts has a valid rationale \(36 dropped by a person\)$"):
        run(annotated, until="annotate")


def test_augment_and_student_see_the_posts_that_annotate_saw(
    annotated: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped, relabelled, edited, unlabelled = "train-0000", "train-0001", "train-0002", "train-0027"
    decide(annotated, dropped, "drop")
    decide(annotated, relabelled, "relabel", "neutral")
    decide(annotated, edited, "edit", "positive", rationale("positive"))
    decide(annotated, unlabelled, "drop")
    run(annotated, until="annotate")
    decide(annotated, "train-0003", "drop")  # while the chain goes on
    context = Context(annotated, {"assistant": "x"})
    seen: dict[str, list[Any]] = {}
    monkeypatch.setattr(augment, "augment", lambda posts, *_: iter(seen.setdefault("augment", posts)[:0]))
    monkeypatch.setattr(context, "reasoner", lambda stage: None)
    monkeypatch.setattr(context, "train", lambda stage, module, rows, *_, part="", **__: seen.update({part: rows}))
    monkeypatch.setattr(student, "label_targets", lambda context, rows: {})
    assert annotated.student is not None
    distillation = replace(annotated.student.distillation, label_weight=1.0)
    context.recipe = replace(annotated, student=replace(annotated.student, distillation=distillation))

    untracked = StageRun(None, Guard("test"), TrackingSettings(), "", annotated.folder)
    for stage in (augment, student):
        stage.run(context, untracked)
        (annotated.folder / "augment" / "rationales.jsonl").touch()
    labels = {"train-0001": "neutral", "train-0002": "positive"}
    for rows_seen in (seen["augment"], seen[""], seen[student.HARD_LABELS]):
        found = {post.id: post.label for post in rows_seen}
        assert dropped not in found and found["train-0003"] is not None
        assert {name: found[name] for name in labels} == labels
    assert {post.id for post in seen[""] if post.label is None} == {f"train-{n:04d}" for n in range(28, 36)}
    assert unlabelled not in {post.id for post in seen[""]}


def test_decisions_about_other_posts_are_named_once(annotated: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(5):
        decide(annotated, f"gone-{number}", "drop")
    caplog.set_level(logging.WARNING)
    run(annotated, until="annotate")
    about = [message for message in caplog.messages if "not in the training split" in message]
    assert about == [
        f"{annotated.folder / DECISIONS} has decisions about 5 posts that are not in the training split, such as "
        "gone-0, gone-1, gone-2"
    ]

"""The stages that ask the teacher, against a server in each mode of `bad_server`: a result without invented figures, or
one sentence; a rerun pays for no answer a second time."""

import csv
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from distill import chain
from distill.errors import RunError
from distill.models.local import Local
from distill.recipe import Recipe
from distill.stages import annotate, calibrate, cascade, evaluate
from distill.stages.context import Context
from distill.tracking import Tracker, TrackingSettings
from tests import micro
from tests.models.bad_server import MODES, completion, error
from tests.models.openai_server import COLOURS, ChatRequest, Server, token

STAGES = {"annotate": annotate, "evaluate": evaluate, "calibrate": calibrate, "cascade": cascade}
CLASSIFIER = micro.LEARNER | {
    "tasks": {"classify": 1.0},
    "trainer": {"max_epochs": 1},
    "distillation": {"weight": 0},
    "hard_labels_baseline": False,
}
SMALL: dict[str, Any] = {name: micro.RECORDED[name] for name in ("name", "seed", "trainer", "tracking")} | {
    "data": {
        "source": "postcards",
        "postcards": {"labelled": 24, "unlabelled": 0, "validation": 12, "test": 12, "image_size": 28},
    },
    "annotate": {"retries": 1},
    "stop_after_invalid": 20,
    "student": CLASSIFIER,
    "evaluate": {},
    "calibrate": {"budget": 0.5, "min_label_mass": 0.0},
    "cascade": {"resamples": 20},
}
LOGPROBS = ("max_tokens", "seed", "nothing can route it")  # modes with log-probabilities


def recipe_for(folder: Path, url: str, **endpoint: Any) -> Recipe:
    section = {"base_url": url, "model": "big-vl", "backoff_s": 0.005, "concurrency": 4} | endpoint
    return micro.read(micro.write(folder, SMALL, annotate__endpoint=section, annotate__max_new_tokens=300))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and a trained student, the same for all modes."""
    folder = tmp_path_factory.mktemp("student")
    with Server() as server:
        chain.run(recipe_for(folder, server.url), until="student")
    return folder


@pytest.fixture
def folder(student: Path, tmp_path: Path) -> Path:
    (folder := tmp_path / "run").mkdir()
    shutil.copytree(student / "runs" / "micro" / "student", folder / "runs" / "micro" / "student")
    shutil.copytree(student / "runs" / "micro" / "tokenizer", folder / "runs" / "micro" / "tokenizer")
    shutil.copytree(student / "data", folder / "data")
    return folder


def logprobs(request: ChatRequest) -> list[dict[str, Any]]:
    return [token(request.sentiment, **(dict.fromkeys(COLOURS, 0.1) | {request.sentiment: 0.8}))]


STUDENTS: dict[str, Local] = {}


class SharedStudent(Context):
    """A context that loads the student once: it is the same in all modes."""

    def reasoner(self, stage: str, part: str = "") -> Local:
        if stage not in STUDENTS:
            STUDENTS[stage] = super().reasoner(stage, part)
        return STUDENTS[stage]


def run_stages(recipe: Recipe) -> None:
    """Run the four stages, without the chain's check of what is up to date."""
    context = SharedStudent(recipe, dict.fromkeys(chain.stages_of(recipe), "same"))
    tracker = Tracker(TrackingSettings(mode="disabled"), recipe.folder, recipe.name)
    for name, stage in STAGES.items():
        with tracker.stage(name, {}) as tracked:
            stage.run(context, tracked)


def strict(path: Path) -> Any:
    """The JSON of a file, which must have no NaN and no infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} has {constant}")

    return (
        [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
        if (path.suffix == ".jsonl")
        else json.loads(path.read_text(), parse_constant=refuse)
    )


@pytest.mark.parametrize("name", MODES)
def test_a_bad_server_ends_in_a_table_or_in_a_sentence(folder: Path, name: str, capsys: Any) -> None:
    mode = MODES[name]
    with Server(script=mode.script(), logprobs=logprobs if name in LOGPROBS else lambda request: None) as server:
        recipe = recipe_for(folder, server.url, **mode.endpoint)
        if mode.ends:
            with pytest.raises(RunError, match=mode.ends) as caught:
                run_stages(recipe)
            assert "\n" not in str(caught.value)
            assert server.requests < 50, "before the fiftieth question"
            paid = len(strict(recipe.folder / "annotate" / "ledger.jsonl"))
            assert paid == (server.requests if mode.paid else 0)
            if mode.paid:
                with pytest.raises(RunError) as again:
                    run_stages(recipe)
                assert str(again.value) == str(caught.value) and server.requests == paid, "nothing is asked again"
            return
        run_stages(recipe)
        keys, requests = ledger_keys(recipe), server.requests
        assert len(set(keys)) == len(keys)
        run_stages(recipe)
        assert ledger_keys(recipe) == keys
        assert server.requests - requests == mode.filtered, "what was answered is not asked again"
    check_files(recipe, mode.filtered, name in LOGPROBS)


def accuracy(predictions: list[dict[str, Any]]) -> float:
    answered = [row for row in predictions if row["roles"]["teacher"]["label"] is not None]
    return sum(row["roles"]["teacher"]["label"] == row["gold"] for row in answered) / len(answered)


def ledger_keys(recipe: Recipe) -> list[str]:
    files = [recipe.folder / stage / "ledger.jsonl" for stage in ("annotate", "evaluate")]
    return [line["key"] for file in files for line in strict(file)]


def check_files(recipe: Recipe, filtered: int, has_logprobs: bool) -> None:
    folder = recipe.folder
    summary = strict(folder / "annotate" / "summary.json")
    quarantine = strict(folder / "annotate" / "quarantine.jsonl")
    reasons = Counter(item["reason"] for item in quarantine)
    assert summary["quarantined"]["by_reason"] == dict(reasons) == ({"filtered": filtered} if filtered else {})
    assert all(item["id"] and item["detail"] for item in quarantine)
    assert len(strict(folder / "annotate" / "rationales.jsonl")) == 24 - filtered

    metrics = strict(folder / "evaluate" / "metrics.json")["teacher"]
    predictions = strict(folder / "evaluate" / "predictions.jsonl")
    labels = [row["roles"]["teacher"]["label"] for row in predictions]
    assert metrics["n"] + metrics["unanswered"] == 12 and metrics["unanswered"] == labels.count(None) == 0
    assert metrics["accuracy"] == pytest.approx(accuracy(predictions)) and metrics["parse_rate"] == 1.0
    if has_logprobs:
        assert metrics["label_mass"] == pytest.approx(1.0) and 0 <= metrics["ece"] <= 1
    else:
        assert metrics["label_mass"] is metrics["ece"] is metrics["aurc"] is None
    fitted = strict(folder / "calibrate" / "calibration.json")["models"]["teacher"]
    cascade = strict(folder / "cascade" / "metrics.json")
    figures = (fitted["ece_before"], fitted["ece_after"], cascade["ece"], cascade["aurc"])
    assert [figure is not None for figure in figures] == [has_logprobs] * 4 and (
        "teacher" in cascade["selective"]
    ) == has_logprobs
    assert len(strict(folder / "cascade" / "decisions.jsonl")) == 12
    with (folder / "cascade" / "deferral_curve.csv").open() as file:
        cells = [cell for row in csv.DictReader(file) for name, cell in row.items() if name != "policy" and cell]
    assert cells and all(math.isfinite(float(cell)) for cell in cells)


def test_a_whole_chain_without_log_probabilities(tmp_path: Path, distill: Any) -> None:
    """Unknown values are null in the files and a dash in the table and in the report; a second run does nothing."""
    with Server() as server:
        recipe = recipe_for(tmp_path, server.url)
        result = distill("run", "--config", tmp_path / "recipe.yaml")
        assert result.status == 0, result.stderr
        requests = server.requests
        assert distill("run", "--config", tmp_path / "recipe.yaml").status == 0
        assert server.requests == requests
    check_files(recipe, 0, has_logprobs=False)
    header, teacher = (
        next(line for line in result.stdout.splitlines() if word in line) for word in ("accuracy", "teacher")
    )
    assert "ECE" in header and teacher.split().count("–") >= 2
    page = (recipe.folder / "report.html").read_text()
    assert not re.search(r"\bnan\b", page, re.IGNORECASE) and "<td>–" in page.replace(" ", "")


def test_posts_that_a_filter_refuses_on_test_data_have_no_label(folder: Path) -> None:
    """A teacher that answers only some posts is measured on those."""

    def script(request: ChatRequest) -> Any:
        refused = len(request.text.rpartition("Post: ")[2].partition("\n")[0]) % 2
        return error("filtered", code="content_filter") if refused else None

    with Server(script=script) as server:
        recipe = recipe_for(folder, server.url)
        run_stages(recipe)
    metrics = strict(recipe.folder / "evaluate" / "metrics.json")["teacher"]
    predictions = strict(recipe.folder / "evaluate" / "predictions.jsonl")
    refused = [row for row in predictions if len(f'"{row["text"]}"') % 2]
    assert metrics["unanswered"] == len(refused) > 0 and metrics["n"] == 12 - len(refused) > 0
    assert metrics["accuracy"] == pytest.approx(accuracy(predictions)) and metrics["parse_rate"] == 1.0
    for row in predictions:
        fields = row["roles"]["teacher"]
        unknown = [fields[name] is None for name in ("label", "probabilities", "rationale")]
        assert unknown == [row in refused] * 3
    for row in strict(recipe.folder / "cascade" / "decisions.jsonl"):
        if row["teacher"] is not None and not row["teacher"]["answered"]:
            assert row["teacher"]["label"] is row["teacher"]["probabilities"] is None and row["degraded"]


@pytest.mark.parametrize(("name", "model"), [("drops connections", "big-vl"), ("an apology", "better-vl")])
def test_a_chain_that_a_bad_server_ended_goes_on_with_a_good_one(
    tmp_path: Path, distill: Any, name: str, model: str
) -> None:
    """Unanswered questions are asked again; invalid answers are not, so another model is needed."""
    run = ("run", "--config", tmp_path / "recipe.yaml")
    with Server(script=MODES[name].script()) as bad:
        recipe = recipe_for(tmp_path, bad.url, max_attempts=2)
        results = [distill(*run)]
        asked = bad.requests
        results += [distill(*run)] if MODES[name].paid else []
        assert bad.requests == asked < 50
    for result in results:
        assert result.status == 1 and re.search(MODES[name].ends, result.error)
    assert [path.name for path in (recipe.folder / "annotate").iterdir()] == ["ledger.jsonl"]
    paid = strict(recipe.folder / "annotate" / "ledger.jsonl")
    with Server() as good:
        changes = ("--annotate.endpoint.base_url", good.url, "--annotate.endpoint.model", model)
        result = distill(*run, *changes)
        assert result.status == 0, result.stderr
        asked = good.requests
        assert distill(*run, *changes).status == 0 and good.requests == asked
    assert strict(recipe.folder / "annotate" / "ledger.jsonl")[: len(paid)] == paid
    check_files(recipe, 0, has_logprobs=False)


def test_labels_that_are_none_end_the_evaluation(folder: Path) -> None:
    """The teacher reasons in the format and names no label when it classifies."""

    def script(request: ChatRequest) -> Any:
        return completion("Who knows?") if request.text.endswith("<label>") else None

    with Server(script=script) as server:
        recipe = recipe_for(folder, server.url)
        for _ in range(2):
            with pytest.raises(RunError, match=r"^evaluate: the first 20 answers .* 'Who knows\?.*none names a label"):
                run_stages(recipe)
            assert server.requests <= 24 + 20 + 8 * 5
    assert not (folder / "evaluate" / "metrics.json").exists()

"""Stage `evaluate`: metrics of all roles, and predictions of all roles on all test posts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score

from distill import chain
from distill.data import jsonl
from distill.evaluation.regression import regression_metrics
from distill.recipe import Recipe
from distill.stages import report
from distill.task.rationale import InvalidRationale, parse
from tests import micro
from tests.models.openai_server import Server

ROLES = ("teacher", "assistant", "student", "student_hard_labels")
CLASSIFICATION = {"n", "accuracy", "weighted_f1", "macro_f1", "confusion", "ece", "aurc"}
REASONING = {"reasoned_accuracy", "parse_rate"}
OF_PARSED = {"consistency", "distinct1", "distinct2", "bleu4", "rouge_l"}


@pytest.fixture(scope="module")
def metrics(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "evaluate" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluate" / "predictions.jsonl").read_text().splitlines()]


def test_each_role_has_its_metrics(metrics: dict[str, dict]) -> None:
    """METEOR and similarity are only present if their resources are installed."""
    assert set(metrics) == {*ROLES, "majority_class"}
    for role in ROLES:
        assert set(metrics[role]) >= CLASSIFICATION and metrics[role]["n"] == 9
        assert (set(metrics[role]) >= REASONING) == (role != "student_hard_labels")
    assert set(metrics["assistant"]) >= OF_PARSED
    assert set(metrics["teacher"]) >= OF_PARSED - {"bleu4", "rouge_l"}
    assert not set(metrics["teacher"]) & {"bleu4", "rouge_l"}, "the reference is not compared with itself"
    assert set(metrics["majority_class"]) >= {"label", "accuracy", "macro_f1"}


def test_classification_metrics_agree_with_the_predictions(metrics: dict[str, dict], predictions: list[dict]) -> None:
    gold = [row["gold"] for row in predictions]
    for role in ROLES:
        labels = [row["roles"][role]["label"] for row in predictions]
        assert metrics[role]["accuracy"] == pytest.approx(accuracy_score(gold, labels))
        assert metrics[role]["macro_f1"] == pytest.approx(f1_score(gold, labels, average="macro", zero_division=0))
        assert metrics[role]["weighted_f1"] == pytest.approx(
            f1_score(gold, labels, average="weighted", zero_division=0)
        )
        assert sum(map(sum, metrics[role]["confusion"])) == 9
    train_majority = metrics["majority_class"]["label"]
    assert metrics["majority_class"]["accuracy"] == pytest.approx(gold.count(train_majority) / 9)


def test_reasoning_metrics_agree_with_the_texts(
    finished: Recipe, metrics: dict[str, dict], predictions: list[dict]
) -> None:
    for role in ("teacher", "assistant", "student"):
        parsed, correct, consistent = 0, 0, 0
        for row in predictions:
            answer = row["roles"][role]
            try:
                prediction = parse(answer["rationale"], finished.labels).prediction
            except InvalidRationale:
                continue
            parsed += 1
            correct += prediction == row["gold"]
            consistent += prediction == answer["label"]
        assert metrics[role]["parse_rate"] == pytest.approx(parsed / 9, abs=0.23)  # unfinished texts may parse too
        assert metrics[role]["reasoned_accuracy"] <= correct / 9 + 1e-9
        if parsed:
            assert 0 <= metrics[role]["consistency"] <= 1
    assert metrics["teacher"]["parse_rate"] > 0.5


def test_each_prediction_has_all_fields(finished: Recipe, predictions: list[dict]) -> None:
    assert len({row["id"] for row in predictions}) == len(predictions) == 9
    for row in predictions:
        assert set(row) == {"id", "text", "aspect", "images", "gold", "reference", "roles"}
        assert set(row["roles"]) == set(ROLES)
        assert (Path(finished.data.root) / row["images"][0]).is_file()
        for role, answer in row["roles"].items():
            assert sum(answer["probabilities"]) == pytest.approx(1)
            assert answer["label"] == finished.labels.names[answer["probabilities"].index(max(answer["probabilities"]))]
            assert 0 < answer["label_mass"] <= 1
            assert (answer["rationale"] is None) == (role == "student_hard_labels")


def test_grounded_is_the_share_of_attributes_that_the_rationales_name(
    finished: Recipe, metrics: dict[str, dict], predictions: list[dict]
) -> None:
    rows = (Path(finished.data.root) / "test.jsonl").read_text().splitlines()
    attributes = {row["id"]: row["attributes"].values() for row in map(json.loads, rows)}
    named = []
    for row in predictions:
        try:
            rationale = parse(row["roles"]["teacher"]["rationale"], finished.labels)
            words = " ".join(rationale.texts[:2]).replace(".", " ").split()
        except InvalidRationale:
            words = []
        named += [value in words for value in attributes[row["id"]]]
    assert metrics["teacher"]["grounded"] == pytest.approx(sum(named) / len(named), abs=1 / 9)
    assert 0 < metrics["teacher"]["grounded"] < 1


def test_an_endpoint_without_log_probabilities_has_no_label_mass(tmp_path: Path) -> None:
    """The files are strict JSON, which has no NaN."""
    names = ("name", "seed", "data", "trainer", "tracking")
    student = micro.LEARNER | {
        "tasks": {"classify": 1.0},
        "distillation": {"weight": 0.0},
        "trainer": {"max_epochs": 1},
    }
    stages = {"student": student | {"hard_labels_baseline": False}, "evaluate": {}}
    with Server() as server:
        endpoint = {"base_url": server.url, "model": "big-vl"}
        content = {name: micro.RECORDED[name] for name in names} | stages
        path = micro.write(tmp_path, content, annotate={"recorded": True, "endpoint": endpoint})
        recipe = micro.read(path)
        assert chain.run(recipe) == ["annotate", "student", "evaluate"]

    def strict(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    texts = {name: (recipe.folder / "evaluate" / name).read_text() for name in ("metrics.json", "predictions.jsonl")}
    metrics = json.loads(texts["metrics.json"], parse_constant=strict)
    assert metrics["teacher"]["label_mass"] is None and 0 < metrics["student"]["label_mass"] <= 1
    for row in (json.loads(line, parse_constant=strict) for line in texts["predictions.jsonl"].splitlines()):
        assert row["roles"]["teacher"]["label_mass"] is None
        assert 0 < row["roles"]["student"]["label_mass"] <= 1


# ---- labels on a scale, posts with and without images ----

TEXTS = ("dreadful", "it drags on", "as films go", "rather nice", "superb")
CLASSIFY: dict[str, Any] = micro.LEARNER | {"tasks": {"classify": 1.0}}
GRADED: dict[str, Any] = {name: micro.RECORDED[name] for name in ("seed", "trainer", "tracking", "export")} | {
    "name": "graded",
    "task": {"scale": {"low": -3, "high": 3}},
    "data": {"source": "mosi", "validation": ["dev.jsonl"]},
    "teacher": micro.LEARNER | {"tasks": {"classify": 1.0, "review": 0.5}},
    "student": CLASSIFY | {"distillation": {"weight": 0.0}, "hard_labels_baseline": False},
    "evaluate": {"modalities": True},
}


def write_graded(root: Path) -> None:
    """Write 30 training and 9 evaluation posts; every third has an image, and one extra label is outside the scale."""
    root.mkdir(parents=True)
    Image.new("RGB", (28, 28), "blue").save(root / "blue.png")
    for split, size in (("train", 30), ("dev", 9), ("test", 9)):
        rows = [
            {"id": f"{split}{n}", "text": f"{n} {TEXTS[n % 5]}", "label": round(1.3 * (n % 5 - 2), 1)}
            | ({"image": "blue.png"} if n % 3 == 0 else {})
            for n in range(size)
        ]
        rows += [{"id": f"{split}-far", "text": "off the scale", "label": 7.0}]
        jsonl.write_rows(root / f"{split}.jsonl", rows)


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("graded")
    write_graded(folder / "data")
    recipe = micro.read(micro.write(folder, GRADED))
    assert chain.run(recipe) == ["teacher", "student", "evaluate", "export"]
    return recipe


def test_on_a_scale_each_role_has_regression_metrics(graded: Recipe) -> None:
    metrics = json.loads((graded.folder / "evaluate" / "metrics.json").read_text())
    without = {"student_without_text", "student_without_images"}
    assert set(metrics) == {"teacher", "student", "majority_class", "trivial", *without}
    rows = [json.loads(line) for line in (graded.folder / "evaluate" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 9, "the label outside the scale is left out, with a reason"
    assert "label 7 is outside the scale from -3 to 3" in (graded.folder / "quarantine.jsonl").read_text()
    scale = graded.task.scale
    assert scale is not None
    gold = [row["value"] for row in rows]
    for role in ("teacher", "student"):
        values = [row["roles"][role]["value"] for row in rows]
        expected = regression_metrics(gold, values, scale)
        assert {name: metrics[role][name] for name in expected} == pytest.approx(expected)
        assert set(metrics[role]) >= CLASSIFICATION and len(metrics[role]["confusion"]) == 7
        assert metrics[role]["accuracy"] == np.mean([row["roles"][role]["label"] == row["gold"] for row in rows])
    train = [round(1.3 * (n % 5 - 2), 1) for n in range(30)]
    assert metrics["trivial"]["value"] == pytest.approx(np.mean(train))
    assert metrics["trivial"]["mae"] == pytest.approx(np.abs(np.array(gold) - np.mean(train)).mean())
    assert metrics["trivial"]["correlation"] is None


def test_the_student_is_evaluated_without_each_modality(graded: Recipe) -> None:
    metrics = json.loads((graded.folder / "evaluate" / "metrics.json").read_text())
    for name in ("student_without_text", "student_without_images"):
        assert set(metrics[name]) == set(metrics["student"]) and metrics[name]["n"] == 9
        assert metrics[name]["mae"] != metrics["student"]["mae"]
    row = json.loads((graded.folder / "evaluate" / "predictions.jsonl").read_text().splitlines()[0])
    assert set(row["roles"]) == {"teacher", "student"}, "the predictions are those of whole posts"
    assert "student, without images" in report.summary(graded)


def test_predictions_on_a_scale_have_bins_and_values(graded: Recipe) -> None:
    for line in (graded.folder / "evaluate" / "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["gold"] == graded.labels.name(row["value"])
        assert row["images"] == (["blue.png"] if int(row["id"].removeprefix("test")) % 3 == 0 else [])
        for answer in row["roles"].values():
            assert answer["value"] == pytest.approx(np.array(answer["probabilities"]) @ np.arange(-3, 4))
            assert answer["label"] in graded.labels.names


def test_posts_without_images_are_included_in_export_and_report(graded: Recipe) -> None:
    result = json.loads((graded.folder / "export" / "export.json").read_text())
    assert result["samples"] == result["labels_equal"] == 4  # the first has an image, the next two have none
    report.run(graded)
    page = (graded.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/") == 3 and all(f"test{n}" in page for n in range(9))
    assert "student" in report.summary(graded)

"""Stage `evaluate`: the metrics of every role, and every test post with every role's answers."""

import json
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, f1_score

from distill.recipe import Recipe
from distill.task.rationale import InvalidRationale, parse

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


def test_each_role_has_the_metrics_of_the_design(metrics: dict[str, dict]) -> None:
    """DESIGN section 3; METEOR and similarity are there only where their resources are."""
    assert set(metrics) == {*ROLES, "majority_class"}
    for role in ROLES:
        assert set(metrics[role]) >= CLASSIFICATION and metrics[role]["n"] == 9
        assert (set(metrics[role]) >= REASONING) == (role != "student_hard_labels")
    assert set(metrics["assistant"]) >= OF_PARSED
    assert set(metrics["teacher"]) >= OF_PARSED - {"bleu4", "rouge_l"}
    assert not set(metrics["teacher"]) & {"bleu4", "rouge_l"}, "the reference is not held against itself"
    assert set(metrics["majority_class"]) >= {"label", "accuracy", "macro_f1"}


def test_the_metrics_are_those_of_the_predictions(metrics: dict[str, dict], predictions: list[dict]) -> None:
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


def test_the_metrics_of_reasoning_are_those_of_the_texts(
    finished: Recipe, metrics: dict[str, dict], predictions: list[dict]
) -> None:
    for role in ("teacher", "assistant", "student"):
        parsed, right, consistent = 0, 0, 0
        for row in predictions:
            answer = row["roles"][role]
            try:
                prediction = parse(answer["rationale"], finished.labels).prediction
            except InvalidRationale:
                continue
            parsed += 1
            right += prediction == row["gold"]
            consistent += prediction == answer["label"]
        assert metrics[role]["parse_rate"] == pytest.approx(parsed / 9, abs=0.23)  # unfinished texts may parse too
        assert metrics[role]["reasoned_accuracy"] <= right / 9 + 1e-9
        if parsed:
            assert 0 <= metrics[role]["consistency"] <= 1
    assert metrics["teacher"]["parse_rate"] > 0.5


def test_a_prediction_has_what_a_reader_needs(finished: Recipe, predictions: list[dict]) -> None:
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


def test_grounded_is_what_the_rationales_name_of_the_pictures(
    finished: Recipe, metrics: dict[str, dict], predictions: list[dict]
) -> None:
    rows = (Path(finished.data.root) / "test.jsonl").read_text().splitlines()
    attributes = {row["id"]: row["attributes"].values() for row in map(json.loads, rows)}
    named = []
    for row in predictions:
        try:
            rationale = parse(row["roles"]["teacher"]["rationale"], finished.labels)
            said = f"{rationale.text_analysis} {rationale.image_analysis}".replace(".", " ").split()
        except InvalidRationale:
            said = []
        named += [value in said for value in attributes[row["id"]]]
    assert metrics["teacher"]["grounded"] == pytest.approx(sum(named) / len(named), abs=1 / 9)
    assert 0 < metrics["teacher"]["grounded"] < 1

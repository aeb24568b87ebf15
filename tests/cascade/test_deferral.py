"""Metrics of the cascade, compared with values recomputed from the decisions."""

import numpy as np
import pytest

from distill.cascade.cascade import Calibration, CascadePolicy, Decision, Prediction, run_cascade
from distill.cascade.deferral import FRACTIONS, cascade_metrics, deferral_rows, selective_metrics
from distill.evaluation.selective import aurc
from distill.models.reasoner import ClassScores, Cost
from distill.task.labels import LabelSpace, Scale
from distill.task.sample import Sample
from tests.cascade.test_calibration import FixedTeacher, answers

LABELS = LabelSpace()
POLICY = CascadePolicy(LABELS, Calibration("s", "t", "entropy", 1.2, 0.9, 0.5, 0.4))


class ReviewingTeacher(FixedTeacher):
    """A teacher whose reviews differ from its first answers. Each answer costs ten tokens and one second."""

    def __init__(self, posts: list[Sample], firsts: ClassScores, reviews: ClassScores) -> None:
        super().__init__(posts, firsts)
        self.reviews = FixedTeacher(posts, reviews)

    def classify(self, samples, earlier=None):  # type: ignore[no-untyped-def]
        found = (super() if earlier is None else self.reviews).classify(samples)
        return ClassScores(found.probabilities, found.label_mass, (Cost(1, 8, 2, 1.0),) * len(samples))


@pytest.fixture(scope="module")
def case() -> tuple[list[str], ClassScores, ClassScores, list[Decision]]:
    gold = np.random.default_rng(0).integers(3, size=300)
    student, teacher, reviews = (answers(gold, sharp, seed) for sharp, seed in ((4, 1), (9, 2), (5, 3)))
    student = ClassScores(student.probabilities, student.label_mass, (Cost(1, 5, 0, 0.1),) * 300)
    posts = [Sample(str(index), "x") for index in range(300)]
    decisions = run_cascade(posts, student, ReviewingTeacher(posts, teacher, reviews), POLICY)
    teacher = ClassScores(teacher.probabilities, teacher.label_mass, (Cost(1, 8, 2, 1.0),) * 300)
    return [LABELS.names[k] for k in gold], student, teacher, decisions


def price(cost: Cost) -> float:
    return 0.5 * cost.prompt_tokens + cost.completion_tokens


def test_the_metrics_follow_from_the_decisions(case: tuple) -> None:
    gold, student, teacher, decisions = case
    metrics = cascade_metrics(decisions, gold, LABELS, POLICY.teacher_predictions(teacher), price)
    labels = [POLICY.label(decision.probabilities) for decision in decisions]
    assert metrics["accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(labels, gold, strict=True)]))
    stages = [decision.stage for decision in decisions]
    assert {"student", "teacher_first", "teacher_review"} == set(stages), "the data cover all stages"
    for stage, share in metrics["stage_fractions"].items():
        assert share == pytest.approx(stages.count(stage) / 300)
        found = metrics["stages"][stage]
        right = [a == b for a, b, s in zip(labels, gold, stages, strict=True) if s == stage]
        assert found["n"] == len(right) and found["accuracy"] == pytest.approx(np.mean(right))
    deferred = 300 - stages.count("student")
    reviewed = stages.count("teacher_review")
    assert metrics["teacher_calls_per_sample"] == pytest.approx((deferred + reviewed) / 300)
    assert metrics["stages"]["teacher_first"]["asked"] == deferred
    assert metrics["stages"]["teacher_review"]["cost"]["seconds"] == pytest.approx(reviewed)
    assert metrics["cost_ratio"]["currency"] == pytest.approx((deferred + reviewed) / 300)
    assert metrics["cost_ratio"]["seconds"] == pytest.approx((30 + deferred + reviewed) / 300)
    alone = student.probabilities.argmax(1)
    assert metrics["student_accuracy"] == pytest.approx(
        np.mean([LABELS.names[k] == g for k, g in zip(alone, gold, strict=True)])
    )
    assert metrics["teacher_accuracy"] > metrics["student_accuracy"]


def test_review_flips_are_relative_to_the_teachers_first_answer(case: tuple) -> None:
    gold, _, teacher, decisions = case
    flips = cascade_metrics(decisions, gold, LABELS, POLICY.teacher_predictions(teacher), price)["review_flips"]
    corrected = broken = 0
    for decision, label in zip(decisions, gold, strict=True):
        if decision.teacher is not None and decision.review is not None:
            corrected += decision.teacher.label != label == decision.review.label
            broken += decision.teacher.label == label != decision.review.label
    assert corrected and broken
    assert (flips["wrong_to_right"], flips["right_to_wrong"]) == (corrected, broken)
    assert flips["still_right"] + flips["still_wrong"] == flips["reviewed"] - corrected - broken


def test_the_cost_of_a_teacher_on_deferred_posts_only_is_extrapolated_from_their_mean(case: tuple) -> None:
    gold, _, _, decisions = case
    metrics = cascade_metrics(decisions, gold, LABELS, None, price)
    assert "teacher_accuracy" not in metrics
    assert metrics["cost_ratio"]["currency"] == pytest.approx(metrics["teacher_calls_per_sample"])
    assert cascade_metrics(decisions, gold, LABELS, None, lambda _: None)["cost_ratio"]["currency"] is None


def test_a_cascade_without_deferred_posts_has_metrics() -> None:
    sure = ClassScores(np.array([[0.98, 0.01, 0.01]]), np.ones(1))
    decisions = run_cascade(
        [Sample("a", "x")], sure, FixedTeacher([], ClassScores(np.zeros((0, 3)), np.zeros(0))), POLICY
    )
    metrics = cascade_metrics(decisions, ["negative"], LABELS, None, price)
    assert metrics["accuracy"] == 1 and metrics["teacher_calls_per_sample"] == 0
    assert set(metrics["review_flips"].values()) == {0}
    assert metrics["cost_ratio"] == {"seconds": None, "currency": None}


def unsure(predictions: list[Prediction]) -> np.ndarray:
    return np.array([prediction.uncertainty for prediction in predictions])


def test_the_deferral_curve_runs_from_the_student_to_the_teacher(case: tuple) -> None:
    gold, student, teacher, _ = case
    student_alone, teacher_alone = POLICY.student_predictions(student), POLICY.teacher_predictions(teacher)
    rows = deferral_rows(student_alone, teacher_alone, gold, LABELS, price, 50, unsure(student_alone))
    policies = dict.fromkeys(row["policy"] for row in rows)
    assert list(policies) == ["entropy", "max_probability", "margin", "error", "random", "oracle"]
    curves = {name: np.array([row["quality"] for row in rows if row["policy"] == name]) for name in policies}

    def accuracy(predictions: list[Prediction]) -> float:
        return float(np.mean([prediction.label == label for prediction, label in zip(predictions, gold, strict=True)]))

    for curve in curves.values():
        assert len(curve) == len(FRACTIONS)
        assert curve[0] == pytest.approx(accuracy(student_alone)) and curve[-1] == pytest.approx(
            accuracy(teacher_alone)
        )
        assert (curve <= curves["oracle"] + 1e-9).all()
    inner = slice(5, 96)
    assert (curves["entropy"][inner] > curves["random"][inner]).all()
    assert all(row["low"] <= row["quality"] + 0.03 and row["quality"] - 0.03 <= row["high"] for row in rows)
    ends = [row for row in rows if row["policy"] == "entropy" and row["deferred"] in (0.0, 1.0)]
    assert [row["seconds"] for row in ends] == pytest.approx([0.1, 1.1])
    assert [row["currency"] for row in ends] == pytest.approx([0.0, price(Cost(1, 8, 2, 1.0))])
    unpriced = deferral_rows(student_alone, teacher_alone, gold, LABELS, lambda _: None, 5, unsure(student_alone))
    assert {row["currency"] for row in unpriced} == {None}


def test_selective_metrics_rank_by_the_uncertainty_of_the_cascade(case: tuple) -> None:
    gold, student, _, _ = case
    predictions = POLICY.student_predictions(student)
    plain = CascadePolicy(LABELS, Calibration("s", "t", "entropy", 1.0, 1.0, 0.5, 0.4))
    found = selective_metrics(plain.student_predictions(student), predictions, gold, LABELS)
    errors = np.array(
        [prediction.label != label for prediction, label in zip(predictions, gold, strict=True)], dtype=float
    )
    uncertainty = np.array([prediction.uncertainty for prediction in predictions])
    assert found["after"]["aurc"] == pytest.approx(aurc(errors, -uncertainty))
    by_confidence = aurc(errors, np.array([prediction.confidence for prediction in predictions]))
    assert found["after"]["aurc"] != pytest.approx(by_confidence, abs=1e-9)
    for when in ("before", "after"):
        bins = found[when]["reliability"]
        gaps = [
            count * abs(a - c)
            for a, c, count in zip(bins["accuracy"], bins["confidence"], bins["count"], strict=True)
            if count
        ]
        assert sum(gaps) / 300 == pytest.approx(found[when]["ece"], abs=1e-6)
        assert len(found[when]["risk_coverage"]["risk"]) == 300


def test_on_a_scale_the_metrics_are_of_values() -> None:
    labels = LabelSpace.from_scale(Scale(-1, 1, 3))
    policy = CascadePolicy(labels, Calibration("s", "t", "entropy", 1.0, 1.0, 0.5, 0.5))
    gold = [-0.9, 0.4, 0.8, -0.3]
    rows = np.array([[0.9, 0.05, 0.05], [0.2, 0.4, 0.4], [0.3, 0.4, 0.3], [0.4, 0.3, 0.3]])
    better = np.array([[0.9, 0.1, 0.0], [0.0, 0.6, 0.4], [0.0, 0.2, 0.8], [0.3, 0.7, 0.0]])
    posts = [Sample(str(index), "x") for index in range(4)]
    student, teacher = ClassScores(rows, np.ones(4)), ClassScores(better, np.ones(4))
    decisions = run_cascade(posts, student, FixedTeacher(posts, teacher), policy)
    students, teachers = policy.student_predictions(student), policy.teacher_predictions(teacher)
    metrics = cascade_metrics(decisions, gold, labels, teachers, price)
    values = np.array([policy.label(decision.probabilities) for decision in decisions])
    assert metrics["mae"] == pytest.approx(np.abs(values - gold).mean())
    assert metrics["teacher_mae"] == pytest.approx(np.abs(better @ [-1, 0, 1] - gold).mean())
    assert metrics["teacher_mae"] < metrics["student_mae"]
    answered = [stage for stage in metrics["stages"].values() if stage["n"]]
    assert all({"mae", "correlation"} <= set(stage) for stage in answered)
    curve = deferral_rows(students, teachers, gold, labels, price, 5, unsure(students))
    assert curve[0]["quality"] == pytest.approx(-metrics["student_mae"])

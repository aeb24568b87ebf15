"""Calibration on validation predictions: fitted values, guarantees and errors."""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from distill.cascade.calibration import CalibrateSettings, calibrate
from distill.cascade.cascade import Calibration, CascadePolicy, run_cascade
from distill.cascade.uncertainty import Signal, fit_temperature, temper
from distill.errors import RunError, SettingsError
from distill.models.reasoner import UNKNOWN_CONFIDENCE, ClassScores
from distill.task.labels import LabelSpace, Scale
from distill.task.prompts import EarlierAnswers
from distill.task.sample import Sample

LABELS = LabelSpace()
NAMES = ("student-1", "teacher-1")


def answers(gold: np.ndarray, sharpness: float, seed: int, sharpen: float = 1.0) -> ClassScores:
    """Random scores that are calibrated to `gold`, with logits multiplied by `sharpen` to make them overconfident."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(len(gold), 3)) + sharpness * np.eye(3)[gold] * random.random((len(gold), 1))
    probabilities = np.exp(logits * sharpen)
    return ClassScores(probabilities / probabilities.sum(1, keepdims=True), np.ones(len(gold)))


def validation(n: int = 600, seed: int = 0) -> tuple[list[str], ClassScores, ClassScores]:
    gold = np.random.default_rng(seed).integers(3, size=n)
    return [LABELS.names[k] for k in gold], answers(gold, 5, seed + 1, 3.0), answers(gold, 12, seed + 2)


class FixedTeacher:
    """A teacher that returns the given scores."""

    name = NAMES[1]

    def __init__(self, posts: Sequence[Sample], scores: ClassScores) -> None:
        self.rows = {post.id: row for post, row in zip(posts, scores.probabilities, strict=True)}

    def classify(self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None) -> ClassScores:
        return ClassScores(np.array([self.rows[sample.id] for sample in samples]), np.ones(len(samples)))

    def reason(self, *_: object, **__: object) -> None:
        raise AssertionError


def test_the_budget_is_kept_by_the_cascade(tmp_path: Path) -> None:
    gold, student, teacher = validation()
    content = calibrate(gold, student, teacher, NAMES, LABELS, CalibrateSettings(budget=0.4))
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(content))
    policy = CascadePolicy(LABELS, Calibration.read(path, NAMES[0]))
    posts = [Sample(str(index), "x") for index in range(len(gold))]
    decisions = run_cascade(posts, student, FixedTeacher(posts, teacher), policy)
    calls = np.mean([decision.teacher_calls for decision in decisions])
    assert calls == pytest.approx(content["validation"]["teacher_calls_per_sample"])
    assert calls == pytest.approx(0.4, abs=0.01)
    assert any(decision.stage == "teacher_review" for decision in decisions), "the budget includes reviews"
    promise = content["promise"]
    assert promise["calls_low"] < 0.4 < promise["calls_high"] and promise["n"] == content["n"] == 600
    assert "600 validation posts" in promise["says"] and "0.400 teacher calls" in promise["says"]
    fresh_gold, fresh, fresh_teacher = validation(20_000, 77)
    posts = [Sample(str(index), "x") for index in range(len(fresh_gold))]
    realised = np.mean([d.teacher_calls for d in run_cascade(posts, fresh, FixedTeacher(posts, fresh_teacher), policy)])
    assert promise["calls_low"] < realised < promise["calls_high"]


def test_without_reviews_each_deferred_post_costs_one_call() -> None:
    gold, student, teacher = validation()
    settings = CalibrateSettings(budget=0.4)
    content = calibrate(gold, student, teacher, NAMES, LABELS, settings, reviews=False)
    assert content["reviews"] is False and calibrate(gold, student, teacher, NAMES, LABELS, settings)["reviews"] is True
    calls = content["validation"]["teacher_calls_per_sample"]
    assert calls == content["validation"]["deferred"] == pytest.approx(0.4, abs=0.01)


def test_the_share_of_reviews_is_bounded() -> None:
    gold, student, teacher = validation()
    policy = CascadePolicy(
        LABELS, _calibration(calibrate(gold, student, teacher, NAMES, LABELS, CalibrateSettings(review=0.2)))
    )
    uncertainties = np.array([prediction.uncertainty for prediction in policy.teacher_predictions(teacher)])
    assert (uncertainties > policy.calibration.teacher_threshold).mean() == pytest.approx(0.2, abs=0.01)


def test_temperature_scaling_corrects_overconfidence() -> None:
    gold, student, teacher = validation()
    content = calibrate(gold, student, teacher, NAMES, LABELS, CalibrateSettings())
    assert content["student_temperature"] > 2, "the logits are multiplied by three"
    found = content["models"]["student"]
    assert found["ece_after"] < 0.6 * found["ece_before"]
    knots = found["error_probability"]
    assert knots["error"] == sorted(knots["error"]) and len(knots["error"]) == len(knots["uncertainty"])


def test_a_risk_target_is_kept_or_refused_with_the_smallest_supported_one() -> None:
    gold, student, teacher = validation(400)
    content = calibrate(gold, student, teacher, NAMES, LABELS, CalibrateSettings(by="risk", risk=0.25))
    assert content["validation"]["student_risk"] < 0.25 and content["promise"]["confidence"] == 0.9
    assert "at most 25.0% of the posts that the student answers alone are wrong" in content["promise"]["says"]
    with pytest.raises(SettingsError, match=r"calibrate\.risk: .*cannot support.*smallest") as refused:
        calibrate(
            gold[:40], _first(student, 40), _first(teacher, 40), NAMES, LABELS, CalibrateSettings(by="risk", risk=0.001)
        )
    smallest = float(str(refused.value).split()[-1])
    calibrate(
        gold[:40], _first(student, 40), _first(teacher, 40), NAMES, LABELS, CalibrateSettings(by="risk", risk=smallest)
    )


@pytest.mark.parametrize("signal", ["entropy", "margin", "error"])
def test_a_quality_is_kept_by_the_cascade_with_the_fewest_calls(signal: Signal, tmp_path: Path) -> None:
    gold, student, teacher = validation()
    settings = CalibrateSettings(by="quality", quality=0.9, signal=signal, teacher_threshold=1.0)
    content = calibrate(gold, student, teacher, NAMES, LABELS, settings)
    (path := tmp_path / "calibration.json").write_text(json.dumps(content))
    policy = CascadePolicy(LABELS, Calibration.read(path, NAMES[0]))
    assert policy.calibration.signal == signal
    posts, promise = [Sample(str(index), "x") for index in range(len(gold))], content["promise"]
    decisions = run_cascade(posts, student, FixedTeacher(posts, teacher), policy)
    right = np.mean([policy.label(each.probabilities) == label for each, label in zip(decisions, gold, strict=True)])
    assert right == pytest.approx(promise["reached"]) and promise["reached_low"] < 0.9 < promise["reached"]
    assert np.mean([each.teacher_calls for each in decisions]) == pytest.approx(promise["calls"])
    assert 0 < promise["calls"] < 0.9 and "an accuracy of at least 0.9 at a confidence of 90%" in promise["says"]
    with pytest.raises(SettingsError, match=r"calibrate\.quality: 600 validation posts .* largest is 0\.\d+$"):
        calibrate(gold, student, teacher, NAMES, LABELS, replace(settings, quality=0.999))
    with pytest.raises(SettingsError, match=r"calibrate\.quality is 1; it takes a number above 0 and below 1"):
        calibrate(gold, student, teacher, NAMES, LABELS, replace(settings, quality=1.0))


def test_the_error_signal_is_the_estimated_probability_of_an_error() -> None:
    gold, student, teacher = validation()
    content = calibrate(gold, student, teacher, NAMES, LABELS, CalibrateSettings(signal="error"))
    policy = CascadePolicy(LABELS, _calibration(content))
    predictions = policy.student_predictions(student)
    unsure = np.array([prediction.uncertainty for prediction in predictions])
    wrong = np.array([prediction.label != label for prediction, label in zip(predictions, gold, strict=True)])
    for value in np.unique(unsure):  # isotonic regression: within a block the estimate is the share of errors
        if (block := np.isclose(unsure, value)).sum() > 20:
            assert wrong[block].mean() == pytest.approx(value, abs=0.02)
    by_entropy = calibrate(gold, student, teacher, NAMES, LABELS, CalibrateSettings())
    assert content["models"] == by_entropy["models"] and by_entropy["student_errors"] is None


def test_the_error_signal_keeps_1_for_answers_that_are_never_accepted() -> None:
    calibration = Calibration(
        "s", "t", "entropy", 1.0, 1.0, 1.0, 1.0, 0.0, student_errors=([0.0, 0.5], [0.1, 1.0]), teacher_errors=None
    )
    rows = np.array([[0.98, 0.01, 0.01], [0.4, 0.3, 0.3], [1 / 3, 1 / 3, 1 / 3]])
    policy = CascadePolicy(LABELS, calibration)
    sure, wrong, unanswered = policy.student_predictions(ClassScores(rows, np.array([1.0, 1.0, 0.0])))
    assert 0.1 < sure.uncertainty < 0.5 and not unanswered.answered
    assert 0.99 < wrong.uncertainty < 1 == unanswered.uncertainty
    assert policy.accept_student(wrong) is not None and policy.accept_student(unanswered) is None


@pytest.mark.parametrize(
    "change",
    [
        {"student_errors": "x"}, {"student_errors": [1, 2]}, {"teacher_errors": [[], []]},
        {"student_threshold": "a"}, {"teacher_threshold": None}, {"student_temperature": True},
    ],
)  # fmt: skip
def test_a_damaged_calibration_is_refused(change: dict, tmp_path: Path) -> None:
    gold, student, teacher = validation(60)
    content = calibrate(gold, student, teacher, NAMES, LABELS, CalibrateSettings(signal="error"))
    (path := tmp_path / "calibration.json").write_text(json.dumps(content | change))
    with pytest.raises(SettingsError, match="is not a valid calibration"):
        Calibration.read(path, NAMES[0])


def test_on_a_scale_the_quality_is_the_mean_absolute_error() -> None:
    random, scale = np.random.default_rng(0), Scale(-3, 3, 7)
    labels, gold = LabelSpace.from_scale(scale), np.random.default_rng(1).uniform(-3, 3, size=400)

    def scores(noise: float) -> ClassScores:
        seen = (gold + random.normal(0, noise, size=len(gold))).clip(-3, 3)
        return ClassScores(scale.targets(seen), np.ones(len(gold)))

    student, teacher = scores(1.0), scores(0.2)
    values = [float(value) for value in gold]
    content = calibrate(values, student, teacher, NAMES, labels, CalibrateSettings(by="quality", quality=0.6))
    promise = content["promise"]
    assert promise["quality"] == pytest.approx(0.6)
    assert promise["reached_low"] < promise["reached"] < promise["reached_high"] and promise["reached"] < 0.6
    with pytest.raises(SettingsError, match=r"cannot support a mean absolute error of 0\.01 .* the smallest is 0"):
        calibrate(values, student, teacher, NAMES, labels, CalibrateSettings(by="quality", quality=0.01))
    with pytest.raises(SettingsError, match="it takes a number above 0 and below 6"):
        calibrate(values, student, teacher, NAMES, labels, CalibrateSettings(by="quality", quality=6.0))


def test_a_calibration_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    gold, student, teacher = validation()
    content = calibrate(gold, student, teacher, NAMES, LABELS, CalibrateSettings(measure="margin"))
    assert content.pop("student_errors") is content.pop("teacher_errors") is None
    (path := tmp_path / "calibration.json").write_text(json.dumps(content))
    assert Calibration.read(path, NAMES[0]).signal == "margin"


def test_unanswered_posts_are_left_out_and_counted() -> None:
    gold, student, teacher = validation(200)
    mass = np.ones(200)
    mass[::4] = 0
    content = calibrate(gold, student, ClassScores(teacher.probabilities, mass), NAMES, LABELS, CalibrateSettings())
    assert (content["n"], content["unanswered"]) == (150, 50)
    answered = mass > 0
    fewer = [label for label, keep in zip(gold, answered, strict=True) if keep]
    alone = calibrate(fewer, student.select(answered), teacher.select(answered), NAMES, LABELS, CalibrateSettings())
    assert content | {"unanswered": 0} == alone
    unanswered = ClassScores(teacher.probabilities, np.zeros(200))
    with pytest.raises(RunError, match="no validation post was answered by both"):
        calibrate(gold, student, unanswered, NAMES, LABELS, CalibrateSettings())


@pytest.mark.parametrize("mass", [np.nan, UNKNOWN_CONFIDENCE])
def test_agreement_of_samples_has_no_calibration_error(mass: float) -> None:
    gold, student, teacher = validation(200)
    agreement = ClassScores(teacher.probabilities, np.full(200, mass))
    models = calibrate(gold, student, agreement, NAMES, LABELS, CalibrateSettings())["models"]
    assert models["teacher"]["ece_before"] is None and models["teacher"]["ece_after"] is None
    assert models["student"]["ece_before"] > 0


def test_deferring_posts_with_uncertainty_1_exceeds_a_small_budget_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    gold, student, teacher = validation(200)
    off_format = ClassScores(student.probabilities, np.where(np.arange(200) % 2, 1.0, 0.1))
    content = calibrate(gold, off_format, teacher, NAMES, LABELS, CalibrateSettings(budget=0.1))
    assert content["validation"]["deferred"] == 0.5 and content["promise"]["calls"] >= 0.5
    assert content["validation"]["teacher_calls_per_sample"] == pytest.approx(content["promise"]["calls"])
    assert "student uncertainty 1" in caplog.text and "more than the budget of 0.1" in caplog.text


def test_fixed_thresholds_are_used_as_given_without_a_guarantee() -> None:
    settings = CalibrateSettings(by="fixed", student_threshold=0.25, teacher_threshold=0.5)
    content = calibrate(*validation(60), NAMES, LABELS, settings)
    assert (content["student_threshold"], content["teacher_threshold"]) == (0.25, 0.5)
    assert content["promise"] == {"by": "fixed", "says": "The thresholds are set in the recipe; nothing is guaranteed."}


def test_on_a_scale_an_error_is_a_wrong_polarity() -> None:
    labels = LabelSpace.from_scale(Scale(-1, 1, 3))
    gold = [-0.9, 0.0, 0.2, 0.8, -0.2, 1.0]
    rows = np.array(
        [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.5, 0.4], [0.1, 0.1, 0.8], [0.1, 0.3, 0.6], [0.1, 0.1, 0.8]]
    )
    scores = ClassScores(rows, np.ones(6))
    settings = CalibrateSettings(by="fixed", student_threshold=1.0)
    content = calibrate(gold, scores, scores, NAMES, labels, settings)
    assert content["validation"]["student_risk"] == pytest.approx(1 / 6), "only -0.2 is predicted with another sign"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 2.5}, r"^budget is 2\.5; it takes 0 to 2"),
        ({"risk": 0.0}, r"^risk is 0\.0"),
        ({"confidence": 1.0}, r"^confidence"),
        ({"by": "fixed"}, r"calibrate\.student_threshold must be set if"),
        ({"student_threshold": 0.5}, r"calibrate\.student_threshold must be set if"),
        ({"by": "quality"}, r"calibrate\.quality must be set if"),
        ({"quality": 0.9}, r"calibrate\.quality must be set if"),
        ({"by": "quality", "quality": 0.0}, r"^quality is 0\.0"),
        ({"teacher_threshold": 1.5}, r"^teacher_threshold is 1\.5"),
    ],
)
def test_invalid_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        CalibrateSettings(**settings)


def _calibration(content: dict) -> Calibration:
    return Calibration(**{item.name: content[item.name] for item in fields(Calibration)})


def _first(scores: ClassScores, n: int) -> ClassScores:
    return ClassScores(scores.probabilities[:n], scores.label_mass[:n])


def test_posts_with_the_same_modalities_have_their_own_temperature_if_there_are_enough() -> None:
    random = np.random.default_rng(3)
    kinds = ["text+video"] * 150 + ["text"] * 120 + ["video"] * 20
    truth = random.integers(0, 3, len(kinds))
    sharp = np.where(np.arange(len(kinds)) < 150, 3.0, 0.8)[:, None]  # over-confident with a video, else the reverse
    logits = (2 * np.eye(3)[truth] + random.normal(size=(len(kinds), 3))) * sharp
    rows = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gold = [LABELS.names[index] for index in truth]
    both = ClassScores(rows, np.ones(len(rows)))
    content = calibrate(gold, both, both, ("s", "t"), LABELS, CalibrateSettings(), modalities=kinds)
    fitted = content["student_by_modalities"]
    assert fitted.keys() == {"text+video", "text"} and fitted == content["teacher_by_modalities"]
    for name in fitted:
        own = np.array(kinds) == name
        assert fitted[name] == fit_temperature(rows[own], truth[own])
    assert fitted["text"] < content["student_temperature"] < fitted["text+video"]
    calibration = Calibration(**{name: content[name] for name in Calibration.__dataclass_fields__})
    policy = CascadePolicy(LABELS, calibration)
    for kind, temperature in {**fitted, "video": content["student_temperature"]}.items():
        found = policy.student_predictions(ClassScores(rows[:1], np.ones(1)), [kind])[0].probabilities
        np.testing.assert_allclose(found, temper(rows[:1], temperature)[0])


def test_posts_that_all_have_the_same_modalities_have_one_temperature() -> None:
    rows = np.tile([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]], (100, 1))
    both, gold = ClassScores(rows, np.ones(200)), ["negative", "neutral"] * 100
    content = calibrate(gold, both, both, ("s", "t"), LABELS, CalibrateSettings(), modalities=["text+audio"] * 200)
    assert content["student_by_modalities"] == content["teacher_by_modalities"] == {}

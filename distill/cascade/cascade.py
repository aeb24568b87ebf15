"""The three stages of U-ACS (arXiv 2509.04459): the student, the teacher, the teacher once more.

`CascadePolicy` decides about one post and knows neither models nor servers. `run` takes many posts through it, one
batch per stage; the gateway in `serving/` takes each request through the same policy.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distill.cascade.uncertainty import Measure, temper, uncertainty
from distill.errors import SettingsError
from distill.files import read_json
from distill.models.reasoner import ClassScores, Cost, Reasoner
from distill.task.labels import LabelSpace
from distill.task.prompts import EarlierAnswers
from distill.task.sample import Sample

Stage = Literal["student", "teacher_first", "teacher_review"]


@dataclass
class CascadeSettings:
    """How the two models share the work; the thresholds come from `calibrate`."""

    on_agreement: Literal["teacher", "average"] = "teacher"
    """Whose answer stands where an uncertain teacher has the student's polarity: teacher, or average, weighted by how
    certain each is (the paper's first version)."""
    deferral_curve: bool = True
    """Ask the teacher about every test post, so that the whole curve can be drawn; false: about deferred ones alone."""
    resamples: int = 1000
    """Bootstrap resamples behind each 95% interval."""


@dataclass(frozen=True)
class Calibration:
    """What the stages need of `calibration.json`: how probabilities are tempered, and when an answer stands.

    `student` and `teacher` name the models that it was made with.
    """

    student: str
    teacher: str
    measure: Measure
    student_temperature: float
    teacher_temperature: float
    student_threshold: float
    teacher_threshold: float
    min_label_mass: float = 0.5

    @classmethod
    def read(cls, path: Path, student: str) -> "Calibration":
        """The calibration of one student.

        Raises:
            SettingsError: the file is missing or broken, or was made with another student.
        """
        try:
            content = read_json(path)
            found = cls(**{name: content[name] for name in cls.__dataclass_fields__})
        except OSError:
            raise SettingsError(f"{path} is missing; run: distill calibrate with the same recipe") from None
        except (ValueError, LookupError, TypeError) as error:
            raise SettingsError(f"{path} is not a calibration ({error}); run: distill calibrate anew") from None
        if found.student != student:
            raise SettingsError(
                f"{path} was made with another student ({found.student}, now {student}); run: distill calibrate"
            )
        return found


@dataclass(frozen=True)
class Prediction:
    """What one model says of one post: tempered probabilities [K] and what follows from them."""

    label: str
    probabilities: np.ndarray
    uncertainty: float
    polarity: int
    answered: bool
    cost: Cost

    @property
    def confidence(self) -> float:
        """Probability of the label."""
        return float(self.probabilities.max())


@dataclass(frozen=True)
class Decision:
    """The final answer about one post: which stage gave it and why, and every prediction on the way.

    `degraded` says that the teacher was wanted and could not be had, so that the student's answer stands.
    """

    stage: Stage
    reason: str
    probabilities: np.ndarray
    student: Prediction
    teacher: Prediction | None = None
    review: Prediction | None = None
    degraded: bool = False

    @property
    def teacher_calls(self) -> int:
        """How often the teacher was asked."""
        return (self.teacher is not None) + (self.review is not None)

    @property
    def cost(self) -> Cost:
        """What all predictions took."""
        asked = (self.student, self.teacher, self.review)
        return sum((prediction.cost for prediction in asked if prediction is not None), Cost())


@dataclass(frozen=True)
class CascadePolicy:
    """When an answer stands. Each stage returns a decision, or None where the next stage must be asked."""

    labels: LabelSpace
    calibration: Calibration
    on_agreement: Literal["teacher", "average"] = "teacher"

    def student(self, scores: ClassScores) -> list[Prediction]:
        """The student's predictions on B samples."""
        return self._predictions(scores, self.calibration.student_temperature)

    def teacher(self, scores: ClassScores) -> list[Prediction]:
        """The teacher's predictions on B samples, be they first ones or reviews."""
        return self._predictions(scores, self.calibration.teacher_temperature)

    def first(self, student: Prediction) -> Decision | None:
        """Stage 1: the student's answer stands where it is certain enough; entirely uncertain, it never does."""
        if student.uncertainty <= self.calibration.student_threshold and student.uncertainty < 1:
            return Decision("student", "the student is certain", student.probabilities, student)
        return None

    def second(self, student: Prediction, teacher: Prediction) -> Decision | None:
        """Stage 2: the teacher's answer stands where it is certain enough or has the student's polarity."""
        if not teacher.answered:
            return self.without_teacher(student, "the teacher did not answer", teacher)
        if teacher.uncertainty <= self.calibration.teacher_threshold and teacher.uncertainty < 1:
            return Decision("teacher_first", "the teacher is certain", teacher.probabilities, student, teacher)
        if not student.answered:
            return Decision("teacher_first", "only the teacher answered", teacher.probabilities, student, teacher)
        if teacher.polarity != student.polarity:
            return None
        final = teacher.probabilities if self.on_agreement == "teacher" else self._average(student, teacher)
        return Decision("teacher_first", "both have one polarity", final, student, teacher)

    def third(self, student: Prediction, teacher: Prediction, review: Prediction) -> Decision:
        """Stage 3: the review is final; where none came, the teacher's first answer stands."""
        if not review.answered:
            return Decision(
                "teacher_first", "the review was not answered", teacher.probabilities, student, teacher, review, True
            )
        return Decision("teacher_review", "reviewed", review.probabilities, student, teacher, review)

    def without_teacher(self, student: Prediction, why: str, teacher: Prediction | None = None) -> Decision:
        """The student's answer, where the teacher was wanted and could not be had."""
        return Decision("student", why, student.probabilities, student, teacher, degraded=True)

    def earlier(self, student: Prediction, teacher: Prediction) -> EarlierAnswers:
        """What the review prompt tells of the first two answers."""
        return EarlierAnswers(student.label, student.confidence, teacher.label, teacher.confidence)

    def label(self, probabilities: np.ndarray) -> str | float:
        """The answer that probabilities [K] give: a label name, or the value on a scale."""
        if self.labels.scale is not None:
            return float(self.labels.scale.expectation(probabilities))
        return self.labels.names[int(np.argmax(probabilities))]

    def _predictions(self, scores: ClassScores, temperature: float) -> list[Prediction]:
        probabilities = temper(scores.probabilities, temperature)
        doubt = uncertainty(probabilities, self.calibration.measure)
        # an answer off the format, or none at all, is no answer to be certain of; NaN: nobody knows the mass
        doubt = np.where(scores.label_mass < self.calibration.min_label_mass, 1.0, doubt)
        costs = scores.costs or (Cost(),) * len(probabilities)
        return [
            Prediction(self.labels.names[int(row.argmax())], row, float(u), int(polarity), bool(answered), cost)
            for row, u, polarity, answered, cost in zip(
                probabilities, doubt, self.labels.polarities(probabilities), scores.answered, costs, strict=True
            )
        ]

    @staticmethod
    def _average(student: Prediction, teacher: Prediction) -> np.ndarray:
        weights = np.array([1 - student.uncertainty, 1 - teacher.uncertainty]) + 1e-12
        return weights / weights.sum() @ np.stack([student.probabilities, teacher.probabilities])


def run(samples: Sequence[Sample], student: ClassScores, teacher: Reasoner, policy: CascadePolicy) -> list[Decision]:
    """Take B samples through the three stages, each stage one batch.

    Args:
        student: what the student says of the samples (`Reasoner.classify`).

    Raises:
        RunError: the teacher cannot be reached at all.
    """
    predictions = policy.student(student)
    decisions: list[Decision | None] = [policy.first(prediction) for prediction in predictions]
    asked = [index for index, decision in enumerate(decisions) if decision is None]
    firsts = (
        dict(zip(asked, policy.teacher(teacher.classify([samples[i] for i in asked])), strict=True)) if asked else {}
    )
    for index in asked:
        decisions[index] = policy.second(predictions[index], firsts[index])
    doubtful = [index for index in asked if decisions[index] is None]
    if doubtful:
        earlier = [policy.earlier(predictions[index], firsts[index]) for index in doubtful]
        reviews = policy.teacher(teacher.classify([samples[index] for index in doubtful], earlier))
        for index, review in zip(doubtful, reviews, strict=True):
            decisions[index] = policy.third(predictions[index], firsts[index], review)
    return [decision for decision in decisions if decision is not None]


def describe(decision: Decision) -> dict[str, Any]:
    """A decision as JSON holds it."""

    def prediction(found: Prediction | None) -> dict[str, Any] | None:
        return None if found is None else asdict(found) | {"probabilities": found.probabilities.tolist()}

    return {
        "stage": decision.stage,
        "reason": decision.reason,
        "degraded": decision.degraded,
        "probabilities": decision.probabilities.tolist(),
        "student": prediction(decision.student),
        "teacher": prediction(decision.teacher),
        "review": prediction(decision.review),
        "teacher_calls": decision.teacher_calls,
        "cost": asdict(decision.cost),
    }

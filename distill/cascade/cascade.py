"""The three stages of U-ACS (arXiv 2509.04459): student, teacher, review by the teacher.

`CascadePolicy` decides about one post from the predictions on it and calls no model. `run_cascade` applies the policy
to a data set, with one batch per stage; the gateway in `serving/` applies the same policy to single requests.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from distill.cascade.uncertainty import Knots, Measure, error_probability, temper, uncertainty
from distill.errors import SettingsError
from distill.files import read_json
from distill.models.reasoner import ClassScores, Cost, Reasoner
from distill.settings import Range, Settings
from distill.task.labels import LabelSpace
from distill.task.prompts import EarlierAnswers
from distill.task.sample import Sample

Stage = Literal["student", "teacher_first", "teacher_review"]


@dataclass
class CascadeSettings(Settings):
    """The cascade on the test split; its temperatures and thresholds come from `calibrate`."""

    on_agreement: Literal["teacher", "average"] = "teacher"
    """Final answer if the teacher is uncertain and has the student's polarity: teacher, or average of both models'
    probabilities, weighted by certainty (first version of the paper)."""
    deferral_curve: bool = True
    """Classify every test post with the teacher, for the deferral curve; false: only the deferred posts."""
    resamples: Annotated[int, Range(1, 1_000_000)] = 1000
    """Number of bootstrap resamples for each 95% interval."""


_EARLIER: dict[str, Any] = {
    "student_errors": None, "teacher_errors": None, "student_by_modalities": {}, "teacher_by_modalities": {},
}  # fmt: skip
"""Fields that the calibrations of earlier versions do not have."""


def modalities_of(samples: Iterable[Sample]) -> list[str]:
    """What each post has, such as `text+video+audio`."""
    return ["+".join(sample.modalities) for sample in samples]


@dataclass(frozen=True)
class Calibration:
    """Temperatures and thresholds from `calibration.json`.

    `student` and `teacher` are the names of the models that it was fitted to. `student_errors` and `teacher_errors` map
    the measure to the probability of an error; None if answers are ranked by the measure itself.
    `student_by_modalities` and `teacher_by_modalities` are the temperatures for posts with certain modalities
    (`modalities_of`); other posts have `student_temperature` and `teacher_temperature`.
    """

    student: str
    teacher: str
    measure: Measure
    student_temperature: float
    teacher_temperature: float
    student_threshold: float
    teacher_threshold: float
    min_label_mass: float = 0.5
    student_errors: Knots | None = None
    teacher_errors: Knots | None = None
    student_by_modalities: Mapping[str, float] = field(default_factory=dict)
    teacher_by_modalities: Mapping[str, float] = field(default_factory=dict)

    @property
    def signal(self) -> str:
        """What answers are ranked by."""
        return self.measure if self.student_errors is None else "error"

    @classmethod
    def read(cls, path: Path, student: str) -> "Calibration":
        """Read the calibration of one student.

        Raises:
            SettingsError: the file is missing or invalid, or was made with another student.
        """
        try:
            content = read_json(path)
            content = _EARLIER | content
            calibration = cls(**{name: content[name] for name in cls.__dataclass_fields__})
            calibration._check()
        except OSError:
            raise SettingsError(f"{path} is missing; run: distill calibrate with the same recipe") from None
        except (ValueError, LookupError, TypeError) as error:
            raise SettingsError(f"{path} is not a valid calibration ({error}); run: distill calibrate") from None
        if calibration.student != student:
            raise SettingsError(
                f"{path} was made with another student ({calibration.student}, now {student}); run: distill calibrate"
            )
        return calibration

    def _check(self) -> None:
        """Raise TypeError or ValueError for values of other types."""
        for name in ("student_temperature", "teacher_temperature", "student_threshold", "teacher_threshold"):
            if not isinstance(value := getattr(self, name), int | float) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}")
        for name in ("student_by_modalities", "teacher_by_modalities"):
            if not all(isinstance(value, float) for value in dict(getattr(self, name)).values()):
                raise TypeError(f"{name} has values that are no numbers")
        for name in ("student_errors", "teacher_errors"):
            if (knots := getattr(self, name)) is not None:
                values = np.array(knots, dtype=np.float64)  # ValueError if it is no table of numbers
                if values.ndim != 2 or len(values) != 2 or not values.size:
                    raise ValueError(f"{name} has no two rows of numbers")


@dataclass(frozen=True)
class Prediction:
    """One model's prediction on one post.

    `probabilities` [K] are temperature-scaled; label, polarity and uncertainty are derived from them. `answered` is
    false if the model returned no answer.
    """

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
    """The final answer on one post: its stage, the reason, and all predictions made on the way.

    `probabilities` [K] are the final ones. `degraded` is true if the teacher, or its review, was needed and not
    available, so that an earlier answer is final.
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
        """Number of calls to the teacher: 0, 1 or 2."""
        return (self.teacher is not None) + (self.review is not None)

    @property
    def cost(self) -> Cost:
        """Total cost of the predictions."""
        predictions = (self.student, self.teacher, self.review)
        return sum((prediction.cost for prediction in predictions if prediction is not None), Cost())

    @property
    def teacher_cost(self) -> Cost:
        """Cost of the teacher's predictions."""
        return sum((prediction.cost for prediction in (self.teacher, self.review) if prediction is not None), Cost())

    def to_json(self) -> dict[str, Any]:
        """The decision as a row of `decisions.jsonl`; a prediction without an answer has no label and no numbers."""

        def prediction_json(prediction: Prediction | None) -> dict[str, Any] | None:
            if prediction is None:
                return None
            fields = asdict(prediction) | {"probabilities": prediction.probabilities.tolist()}
            unknown = () if prediction.answered else ("label", "probabilities", "uncertainty", "polarity")
            return fields | dict.fromkeys(unknown)

        return {
            "stage": self.stage,
            "reason": self.reason,
            "degraded": self.degraded,
            "probabilities": self.probabilities.tolist(),
            "student": prediction_json(self.student),
            "teacher": prediction_json(self.teacher),
            "review": prediction_json(self.review),
            "teacher_calls": self.teacher_calls,
            "cost": asdict(self.cost),
        }


@dataclass(frozen=True)
class CascadePolicy:
    """Decides which prediction on a post is final. A stage returns a decision, or None if the next stage is needed.

    `reviews` is false if the teacher was not trained on the *review* task: its first answer is then always final.
    `explains` is false if it was not trained on *explain*: it is then asked to *predict* when a rationale is needed.
    """

    labels: LabelSpace
    calibration: Calibration
    on_agreement: Literal["teacher", "average"] = "teacher"
    reviews: bool = True
    explains: bool = True

    @property
    def explaining(self) -> Literal["explain", "predict"]:
        """The prompt that asks the teacher for a rationale."""
        return "explain" if self.explains else "predict"

    def student_predictions(self, scores: ClassScores, modalities: Sequence[str] | None = None) -> list[Prediction]:
        """The student's predictions on B samples, given `modalities_of` them; None if these are not known."""
        fitted = self.calibration
        temperatures = _temperatures(fitted.student_temperature, fitted.student_by_modalities, modalities)
        return self._predictions(scores, temperatures, fitted.student_errors)

    def teacher_predictions(self, scores: ClassScores, modalities: Sequence[str] | None = None) -> list[Prediction]:
        """The teacher's predictions on B samples, first answers or reviews; see `student_predictions`."""
        fitted = self.calibration
        temperatures = _temperatures(fitted.teacher_temperature, fitted.teacher_by_modalities, modalities)
        return self._predictions(scores, temperatures, fitted.teacher_errors)

    def accept_student(self, student: Prediction) -> Decision | None:
        """Stage 1: accept the student's answer if its uncertainty is at most the threshold and below 1."""
        if student.uncertainty <= self.calibration.student_threshold and student.uncertainty < 1:
            return Decision("student", "the student is certain", student.probabilities, student)
        return None

    def accept_teacher(self, student: Prediction, teacher: Prediction) -> Decision | None:
        """Stage 2: accept the teacher's answer if it is certain enough or has the student's polarity."""
        if not teacher.answered:
            return self.fallback_to_student(student, "the teacher did not answer", teacher)
        if teacher.uncertainty <= self.calibration.teacher_threshold and teacher.uncertainty < 1:
            return Decision("teacher_first", "the teacher is certain", teacher.probabilities, student, teacher)
        if not student.answered:
            return Decision("teacher_first", "only the teacher answered", teacher.probabilities, student, teacher)
        if teacher.polarity != student.polarity:
            if self.reviews:
                return None
            return Decision("teacher_first", "the teacher does not review", teacher.probabilities, student, teacher)
        final = teacher.probabilities if self.on_agreement == "teacher" else self._average(student, teacher)
        return Decision("teacher_first", "both have one polarity", final, student, teacher)

    def accept_review(self, student: Prediction, teacher: Prediction, review: Prediction) -> Decision:
        """Stage 3: accept the review, or the teacher's first answer if the review was not answered."""
        if not review.answered:
            return Decision(
                "teacher_first", "the review was not answered", teacher.probabilities, student, teacher, review, True
            )
        return Decision("teacher_review", "reviewed", review.probabilities, student, teacher, review)

    def fallback_to_student(self, student: Prediction, reason: str, teacher: Prediction | None = None) -> Decision:
        """Accept the student's answer because the teacher was needed and is not available."""
        return Decision("student", reason, student.probabilities, student, teacher, degraded=True)

    def earlier_answers(self, student: Prediction, teacher: Prediction) -> EarlierAnswers:
        """Both earlier answers for the review prompt."""
        return EarlierAnswers(student.label, student.confidence, teacher.label, teacher.confidence)

    def label(self, probabilities: np.ndarray) -> str | float:
        """The label name of probabilities [K], or the value on a scale."""
        if self.labels.scale is not None:
            return float(self.labels.scale.expectation(probabilities))
        return self.labels.names[int(np.argmax(probabilities))]

    def _predictions(
        self, scores: ClassScores, temperature: float | np.ndarray, errors: Knots | None
    ) -> list[Prediction]:
        probabilities = temper(scores.probabilities, temperature)
        uncertainties = uncertainty(probabilities, self.calibration.measure)
        if errors is not None:  # 1 is for answers that are never accepted
            uncertainties = error_probability(uncertainties, errors).clip(max=np.nextafter(1.0, 0.0))
        # An answer off the format, or a missing one, must be deferred. A NaN mass is unknown and compares as false.
        off_format = (scores.label_mass < self.calibration.min_label_mass) | ~scores.answered
        uncertainties = np.where(off_format, 1.0, uncertainties)
        costs = scores.costs or (Cost(),) * len(probabilities)
        polarities = self.labels.polarities(probabilities)
        return [
            Prediction(self.labels.names[int(row.argmax())], row, float(u), int(polarity), bool(answered), cost)
            for row, u, polarity, answered, cost in zip(
                probabilities, uncertainties, polarities, scores.answered, costs, strict=True
            )
        ]

    @staticmethod
    def _average(student: Prediction, teacher: Prediction) -> np.ndarray:
        weights = np.array([1 - student.uncertainty, 1 - teacher.uncertainty]) + 1e-12
        return weights / weights.sum() @ np.stack([student.probabilities, teacher.probabilities])


def _temperatures(overall: float, fitted: Mapping[str, float], modalities: Sequence[str] | None) -> float | np.ndarray:
    """The temperature of each of B posts, [B]; a number if all have the same."""
    if modalities is None or not fitted:
        return overall
    return np.array([fitted.get(name, overall) for name in modalities])


def run_cascade(
    samples: Sequence[Sample], student_scores: ClassScores, teacher: Reasoner, policy: CascadePolicy
) -> list[Decision]:
    """Run B samples through the three stages, with one batch per stage.

    Args:
        student_scores: the student's scores of the B samples (`Reasoner.classify`).

    Raises:
        RunError: the teacher cannot be reached.
    """
    modalities = modalities_of(samples)
    students = policy.student_predictions(student_scores, modalities)
    decisions: list[Decision | None] = [policy.accept_student(student) for student in students]
    deferred = [index for index, decision in enumerate(decisions) if decision is None]
    teachers: dict[int, Prediction] = {}
    if deferred:
        scores = teacher.classify([samples[index] for index in deferred])
        teachers = dict(
            zip(deferred, policy.teacher_predictions(scores, [modalities[n] for n in deferred]), strict=True)
        )
    for index in deferred:
        decisions[index] = policy.accept_teacher(students[index], teachers[index])
    undecided = [index for index in deferred if decisions[index] is None]
    if undecided:
        earlier = [policy.earlier_answers(students[index], teachers[index]) for index in undecided]
        scores = teacher.classify([samples[index] for index in undecided], earlier)
        reviews = policy.teacher_predictions(scores, [modalities[index] for index in undecided])
        for index, review in zip(undecided, reviews, strict=True):
            decisions[index] = policy.accept_review(students[index], teachers[index], review)
    return [decision for decision in decisions if decision is not None]

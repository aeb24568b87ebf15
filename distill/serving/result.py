"""What the cascade answers to one post."""

from dataclasses import dataclass, field
from typing import Literal

from distill.cascade.cascade import Decision, Prediction
from distill.models.reasoner import Cost
from distill.task.rationale import Rationale


@dataclass(frozen=True)
class Explanation:
    """A rationale that argues for the label, and who wrote it; both are None if there is none.

    `student` and `teacher` are what both have cost for it, in vain perhaps. `teacher` is None if it was not asked.
    """

    rationale: Rationale | None = None
    by: Literal["student", "teacher"] | None = None
    student: Cost = field(default_factory=Cost)
    teacher: Cost | None = None


@dataclass(frozen=True)
class CascadeResult:
    """A decision with its label, the explanation and the price.

    `value` is the expected value if the labels are on a scale. `price` is in the currency of the teacher's prices; None
    without prices.
    """

    decision: Decision
    label: str
    value: float | None
    explanation: Explanation
    price: float | None

    @property
    def teacher_calls(self) -> int:
        """Calls to the teacher: 0 to 2 for the label, and one for the rationale."""
        return self.decision.teacher_calls + (self.explanation.teacher is not None)

    @property
    def cost(self) -> Cost:
        """Total cost of label and rationale."""
        return self.decision.cost + self.explanation.student + (self.explanation.teacher or Cost())

    @property
    def prediction(self) -> Prediction:
        """The prediction that is final."""
        decision = self.decision
        by_stage = {"student": decision.student, "teacher_first": decision.teacher}
        prediction = by_stage.get(decision.stage, decision.review)
        assert prediction is not None
        return prediction

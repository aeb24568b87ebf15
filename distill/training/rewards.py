"""Rewards of a student's generated answers for `refine`, by the definitions of the rationale and of the evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from distill.errors import SettingsError
from distill.evaluation.evaluate import parse_or_none
from distill.evaluation.reasoning import grounding
from distill.settings import NonNegative, Settings
from distill.task.labels import LabelSpace


@dataclass
class RewardSettings(Settings):
    """The weights of the rewards of an answer, each of which is 0 to 1; the reward is their weighted sum."""

    format: NonNegative = 1.0
    """Weight of: the answer is a valid rationale that ended by itself."""
    label: NonNegative = 1.0
    """Weight of: the rationale predicts the label of the post, gold or the teacher's."""
    consistency: NonNegative = 1.0
    """Weight of: the rationale predicts the label that the student's own label scoring gives the post at this step."""
    grounded: NonNegative = 0.0
    """Weight of: the share of the post's gold attributes that the text or image analysis names; needs posts with
    `attributes`, as the postcards have."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self.weights.values()):
            raise SettingsError("format, label, consistency and grounded are all 0; one must be above")

    @property
    def weights(self) -> dict[str, float]:
        """The weights by name."""
        return {name: getattr(self, name) for name in ("format", "label", "consistency", "grounded")}


class Answered(NamedTuple):
    """What is known about the post of an answer.

    Attributes:
        text: of the post.
        label: its label; None: unknown.
        classified: the label that label scoring gives it.
        attributes: its gold attributes, if it has any.
    """

    text: str
    label: str | None
    classified: str
    attributes: Mapping[str, str]


def rewards(
    answers: Sequence[str], finished: Sequence[bool], posts: Sequence[Answered], labels: LabelSpace
) -> dict[str, list[float | None]]:
    """The rewards of B answers by name, each in [0, 1]; None where a reward is not defined for the post.

    `format` is 1 if the evaluation would parse the answer (`parse_rate`). The other rewards are 0 for an answer that it
    would not: `label` is 1 if the prediction is right (`reasoned_accuracy`), `consistency` if it is the classified
    label, and `grounded` is the share of the attributes that the analyses name.

    Args:
        finished: whether each answer ended by itself, not by the token limit.
    """
    found: dict[str, list[float | None]] = {name: [] for name in ("format", "label", "consistency", "grounded")}
    for answer, ended, post in zip(answers, finished, posts, strict=True):
        rationale = parse_or_none(answer, labels, finished=ended, post=post.text)
        prediction = None if rationale is None else rationale.prediction
        named = grounding(rationale, post.attributes)
        found["format"].append(float(rationale is not None))
        found["label"].append(None if post.label is None else float(prediction == post.label))
        found["consistency"].append(float(prediction == post.classified))
        found["grounded"].append(float(np.mean(named)) if named else None)
    return found

"""Bounds on teacher requests, against teachers that need the fewest and the most."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.annotation.annotate import AnnotateSettings, AnnotationCounts, annotate
from distill.annotation.ledger import Ledger
from distill.models.reasoner import Answer
from distill.planning.teacher_requests import RequestForecast, rationale_request_bounds
from distill.task.labels import LabelSpace
from distill.task.sample import Sample
from tests.annotation.test_annotate import Scripted, right
from tests.models.openai_server import rationale

LABELS = LabelSpace()
NONSENSE = Answer("no idea", True, 10, 5)
POSTS = [
    Sample("gold", "a", label="positive"),
    Sample("recorded", "b", label="neutral", rationale=rationale("neutral")),
    Sample("wrong", "c", label="neutral", rationale=rationale("negative")),
    Sample("open", "d"),
]


def count_requests(folder: Path, teacher: Scripted, settings: AnnotateSettings) -> int:
    """Return the number of rationale requests that the teacher receives."""
    with Ledger(folder / "ledger.jsonl") as ledger:
        list(annotate(POSTS, LABELS, teacher, settings, ledger, AnnotationCounts()))
    return sum(template != "classify" for _, template, _, _ in teacher.asked)


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("unlabelled", ["skip", "keep_confident"])
def test_the_best_and_the_worst_teacher_receive_the_forecast_number_of_requests(
    tmp_path: Path, retries: int, recorded: bool, unlabelled: Any
) -> None:
    settings = AnnotateSettings(retries=retries, recorded=recorded, unlabelled=unlabelled)

    def worst(_: Sample, template: str, attempt: int) -> Answer:
        return right("negative") if template == "predict" and attempt == retries else NONSENSE

    best: Callable[..., Answer] = lambda sample, *_: right(sample.label or "negative")  # noqa: E731
    lucky = Scripted(best, {"open": [0.4, 0.3, 0.3]})
    unlucky = Scripted(worst, {"open": [0.02, 0.96, 0.02]})
    minimum, maximum = rationale_request_bounds(POSTS, LABELS, settings)
    assert minimum == count_requests(tmp_path / "best", lucky, settings)
    assert maximum == count_requests(tmp_path / "worst", unlucky, settings)
    assert minimum < maximum


def test_the_cost_is_that_of_the_tokens() -> None:
    requests = RequestForecast("annotate", "rationales", 10, 30, prompt_tokens=1000, answer_tokens=(200, 500))
    assert requests.cost(2.0, 8.0) == pytest.approx((10 * 0.0036, 30 * 0.006))

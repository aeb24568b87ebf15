"""The metrics in Prometheus' text format."""

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from distill.cascade.cascade import Decision
from distill.models.reasoner import ClassScores
from distill.serving.metrics import Metrics
from tests.serving.conftest import policy


def read(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Values by name and labels, parsed with Prometheus' own parser."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_decisions_are_counted_by_stage_with_teacher_calls_per_post() -> None:
    metrics = Metrics()
    prediction = policy().student_predictions(ClassScores(np.array([[0.2, 0.3, 0.5]]), np.ones(1)))[0]
    for decision in (
        Decision("student", "the student is certain", prediction.probabilities, prediction),
        Decision("student", "the teacher is busy", prediction.probabilities, prediction, degraded=True),
        Decision("teacher_first", "the teacher is certain", prediction.probabilities, prediction, prediction),
        Decision("teacher_review", "reviewed", prediction.probabilities, prediction, prediction, prediction),
    ):
        metrics.decision(decision, decision.teacher_calls)
    found = read(metrics)
    assert found["distill_posts_total", "student"] == 2 and found["distill_posts_total", "teacher_review"] == 1
    assert found["distill_degraded_total", "the teacher is busy"] == 1
    assert found["distill_teacher_calls_total",] == 3 and found["distill_teacher_share",] == 3 / 4


def test_requests_and_batches_are_counted() -> None:
    metrics = Metrics()
    metrics.request("/v1/sentiment", 200, 0.03)
    metrics.request("/v1/sentiment", 429, 0.001)
    metrics.batch("classify", 5)
    metrics.batch_seconds("classify", 5, 0.2)
    metrics.batch_seconds("classify", 5, 0.4)
    found = read(metrics)
    assert found["distill_student_batch_seconds_sum", "classify", "5"] == pytest.approx(0.6)
    assert found["distill_student_batch_seconds_count", "classify", "5"] == 2
    assert found["distill_requests_total", "/v1/sentiment", "429"] == 1
    assert found["distill_request_seconds_count", "/v1/sentiment"] == 2
    assert found["distill_request_seconds_bucket", "0.05", "/v1/sentiment"] == 2
    assert found["distill_student_batch_size_sum", "classify"] == 5


def test_gateways_in_one_process_have_separate_metrics() -> None:
    one, two = Metrics(), Metrics()
    one.batch("classify", 5)
    assert ("distill_student_batch_size_sum", "classify") not in read(two)

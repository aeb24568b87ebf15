"""One role on the test split: what is asked, what is read, and which metrics come of it."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from distill.data.corpus import Corpus
from distill.evaluation.evaluate import EvaluateSettings, Judged, gold_values, judge, read, role_metrics
from distill.models.reasoner import Answer, ClassScores, Sampling
from distill.task.labels import LabelSpace, Scale
from distill.task.prompts import Template
from distill.task.rationale import Rationale, parse
from distill.task.sample import Sample
from tests.models.openai_server import rationale

LABELS = LabelSpace()
SETTINGS = EvaluateSettings(max_new_tokens=77)
POSTS = [Sample(f"p{n}", f"post {n}", label=LABELS.names[n]) for n in range(3)]


class Role:
    """Is sure of the gold label, and answers with `texts`, in another order than it was asked."""

    name = "role"

    def __init__(self, texts: Sequence[Answer]) -> None:
        self.texts = texts
        self.asked: list[tuple[Template, Sampling]] = []

    def classify(self, samples: Sequence[Sample]) -> ClassScores:
        probabilities = np.full((len(samples), 3), 0.1)
        for row, sample in zip(probabilities, samples, strict=True):
            row[LABELS.index(sample.label)] = 0.8
        return ClassScores(probabilities, np.linspace(0.5, 1, len(samples)))

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        self.asked.append((template, sampling))
        yield from reversed(list(enumerate(self.texts)))


def test_answers_are_put_in_the_order_of_the_samples_and_read() -> None:
    texts = [rationale("negative"), "no answer", rationale("negative")]
    role = Role([Answer(texts[0], True), Answer(texts[1], True), Answer(texts[2], finished=False)])
    told: list[tuple[int, int]] = []
    judged = judge(role, POSTS, LABELS, SETTINGS, "predict", lambda done, total: told.append((done, total)))
    assert judged.texts == texts
    assert judged.rationales == [parse(texts[0], LABELS), None, None]  # the last was cut by the token limit
    assert role.asked == [("predict", Sampling(0.0, 77))], "greedy, so that it can be done again"
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert [judged.label(index, LABELS) for index in range(3)] == list(LABELS.names)


def test_a_role_without_reasoning_is_not_asked_to_reason() -> None:
    role = Role([])
    judged = judge(role, POSTS, LABELS, SETTINGS, None)
    assert judged.texts is None and judged.rationales is None and role.asked == []
    metrics = role_metrics(judged, POSTS, [None] * 3, LABELS, SETTINGS)
    assert set(metrics) == {"n", "accuracy", "weighted_f1", "macro_f1", "confusion", "ece", "aurc", "label_mass"}
    assert (metrics["n"], metrics["accuracy"], metrics["label_mass"]) == (3, 1.0, 0.75)


def test_a_role_that_reads_once_is_asked_once_for_both() -> None:
    class Once(Role):
        def classify_and_reason(
            self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
        ) -> Iterator[tuple[int, ClassScores, Answer]]:
            self.asked.append((template, sampling))
            scores = super().classify(samples)
            yield from reversed([(index, scores.row(index), answer) for index, answer in enumerate(self.texts)])

        def classify(self, samples: Sequence[Sample]) -> ClassScores:
            raise AssertionError("it has been asked before")

    texts = [Answer(rationale("negative"), True), Answer("no answer", True), Answer(rationale("positive"), True)]
    role = Once(texts)
    judged = judge(role, POSTS, LABELS, SETTINGS)
    expected = judge(Role(texts), POSTS, LABELS, SETTINGS)
    assert role.asked == [("reason", Sampling(0.0, 77))]
    assert (judged.texts, judged.rationales) == (expected.texts, expected.rationales)
    np.testing.assert_array_equal(judged.scores.probabilities, expected.scores.probabilities)
    np.testing.assert_array_equal(judged.scores.label_mass, expected.scores.label_mass)


def judged_with(rationales: list[Rationale | None]) -> Judged:
    scores = Role([]).classify(POSTS)
    return Judged(scores, [""] * 3, rationales)


def test_the_metrics_of_reasoning_count_what_does_not_parse() -> None:
    """Right and consistent, then wrong and inconsistent, then in no format."""
    found: list[Rationale | None] = [parse(rationale(label), LABELS) for label in ("negative", "positive")]
    metrics = role_metrics(judged_with([*found, None]), POSTS, [*found, None], LABELS, SETTINGS)
    assert metrics["parse_rate"] == pytest.approx(2 / 3)
    assert metrics["reasoned_accuracy"] == pytest.approx(1 / 3)
    assert metrics["consistency"] == pytest.approx(1 / 2)
    assert metrics["bleu4"] == pytest.approx(1.0) and metrics["rouge_l"] == pytest.approx(1.0)
    assert "grounded" not in metrics  # these posts have no gold attributes


def test_gold_rationales_are_wholly_grounded_and_others_as_far_as_they_name_what_is_there(postcards: Corpus) -> None:
    posts = postcards.test[:9]
    gold = [read(post.rationale, LABELS) for post in posts]
    assert all(gold) and all(len(post.attributes) == 4 for post in posts)
    scores = Role([]).classify(posts)

    def grounded(rationales: list[Rationale | None]) -> float:
        judged = Judged(scores, [""] * 9, rationales)
        return float(role_metrics(judged, posts, [None] * 9, LABELS, SETTINGS)["grounded"])

    assert grounded(gold) == 1.0
    assert grounded([None] * 9) == 0.0
    assert grounded([gold[0], *[None] * 8]) == pytest.approx(1 / 9)
    blind = Rationale("The words are there.", "There is a picture, unsmiling.", "They agree.", "So it is.", "negative")
    assert grounded([blind] * 9) == 0.0  # part of a word names nothing


def test_a_rationale_that_breaks_the_format_reads_as_none() -> None:
    assert read(None, LABELS) is None
    assert read("nothing of the kind", LABELS) is None
    assert read(rationale("neutral"), LABELS, finished=False) is None
    assert read(rationale("neutral"), LABELS) == parse(rationale("neutral"), LABELS)


# ---- labels on a scale ----

BINS = LabelSpace.from_scale(Scale())


def test_on_a_scale_the_figures_of_bins_and_of_values_stand_side_by_side() -> None:
    posts = [Sample(f"p{n}", "x", label=value) for n, value in enumerate([-2.0, 0.4, 2.2])]
    probabilities = np.eye(7)[[1, 3, 6]] * 0.5
    probabilities[:, 3] += 0.5
    judged = Judged(ClassScores(probabilities, np.ones(3)), None, None)
    metrics = role_metrics(judged, posts, [None] * 3, BINS, SETTINGS)
    assert [judged.value(index, BINS) for index in range(3)] == [-1.0, 0.0, 1.5]
    assert judged.value(0, LABELS) is None
    assert metrics["n"] == 3 and np.shape(metrics["confusion"]) == (7, 7)
    assert metrics["mae"] == pytest.approx((1.0 + 0.4 + 0.7) / 3)
    assert metrics["acc2_without_zero"] == pytest.approx(2 / 3)
    assert metrics["acc2_with_zero"] == 1.0
    assert {"ece", "aurc", "correlation", "acc7", "acc5", "f1_with_zero", "f1_without_zero"} <= set(metrics)


def test_the_values_of_samples_are_those_that_are_numbers() -> None:
    assert gold_values([Sample("a", "x", label=0.0), Sample("b", "x"), Sample("c", "x", label=-1.5)]) == [0.0, -1.5]

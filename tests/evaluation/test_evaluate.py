"""Evaluation of one role: requests, parsing of answers, and metrics."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from distill.data.corpus import Corpus
from distill.evaluation.evaluate import (
    EvaluateSettings,
    RoleOutputs,
    evaluate_role,
    gold_values,
    parse_or_none,
    role_metrics,
)
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
    """A reasoner that predicts the gold label and returns `texts` in reverse order."""

    name = "role"

    def __init__(self, texts: Sequence[Answer]) -> None:
        self.texts = texts
        self.requests: list[tuple[Template, Sampling]] = []

    def classify(self, samples: Sequence[Sample]) -> ClassScores:
        probabilities = np.full((len(samples), 3), 0.1)
        for row, sample in zip(probabilities, samples, strict=True):
            row[LABELS.index(sample.label)] = 0.8
        return ClassScores(probabilities, np.linspace(0.5, 1, len(samples)))

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        self.requests.append((template, sampling))
        yield from reversed(list(enumerate(self.texts)))


def test_answers_are_parsed_and_returned_in_the_order_of_the_samples() -> None:
    texts = [rationale("negative"), "no answer", rationale("negative")]
    role = Role([Answer(texts[0], True), Answer(texts[1], True), Answer(texts[2], finished=False)])
    progress: list[tuple[int, int]] = []
    outputs = evaluate_role(role, POSTS, LABELS, SETTINGS, "predict", lambda *counts: progress.append(counts))
    assert outputs.texts == texts
    assert outputs.rationales == [parse(texts[0], LABELS), None, None]  # the token limit cut the last one
    assert role.requests == [("predict", Sampling(0.0, 77))], "greedy, so that results are reproducible"
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert [outputs.label(index, LABELS) for index in range(3)] == list(LABELS.names)


def test_a_role_without_reasoning_only_classifies() -> None:
    role = Role([])
    outputs = evaluate_role(role, POSTS, LABELS, SETTINGS, None)
    assert outputs.texts is None and outputs.rationales is None and role.requests == []
    metrics = role_metrics(outputs, POSTS, [None] * 3, LABELS, SETTINGS)
    assert set(metrics) == {
        "n", "unanswered", "accuracy", "weighted_f1", "macro_f1", "confusion", "ece", "aurc", "label_mass",
    }  # fmt: skip
    assert (metrics["n"], metrics["accuracy"], metrics["label_mass"]) == (3, 1.0, 0.75)


def test_a_joint_reasoner_receives_one_request_for_scores_and_rationale() -> None:
    class Joint(Role):
        def classify_and_reason(
            self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
        ) -> Iterator[tuple[int, ClassScores, Answer]]:
            self.requests.append((template, sampling))
            scores = super().classify(samples)
            yield from reversed([(index, scores.row(index), answer) for index, answer in enumerate(self.texts)])

        def classify(self, samples: Sequence[Sample]) -> ClassScores:
            raise AssertionError("a joint reasoner needs no separate classify")

    texts = [Answer(rationale("negative"), True), Answer("no answer", True), Answer(rationale("positive"), True)]
    role = Joint(texts)
    outputs = evaluate_role(role, POSTS, LABELS, SETTINGS)
    expected = evaluate_role(Role(texts), POSTS, LABELS, SETTINGS)
    assert role.requests == [("reason", Sampling(0.0, 77))]
    assert (outputs.texts, outputs.rationales) == (expected.texts, expected.rationales)
    np.testing.assert_array_equal(outputs.scores.probabilities, expected.scores.probabilities)
    np.testing.assert_array_equal(outputs.scores.label_mass, expected.scores.label_mass)


def outputs_with(rationales: list[Rationale | None]) -> RoleOutputs:
    scores = Role([]).classify(POSTS)
    return RoleOutputs(scores, [""] * 3, rationales)


def test_reasoning_metrics_count_answers_that_do_not_parse() -> None:
    """The first is correct and consistent, the second wrong and inconsistent, the third does not parse."""
    found: list[Rationale | None] = [parse(rationale(label), LABELS) for label in ("negative", "positive")]
    metrics = role_metrics(outputs_with([*found, None]), POSTS, [*found, None], LABELS, SETTINGS)
    assert metrics["parse_rate"] == pytest.approx(2 / 3)
    assert metrics["reasoned_accuracy"] == pytest.approx(1 / 3)
    assert metrics["consistency"] == pytest.approx(1 / 2)
    assert metrics["bleu4"] == pytest.approx(1.0) and metrics["rouge_l"] == pytest.approx(1.0)
    assert "grounded" not in metrics  # these posts have no gold attributes


def test_published_metrics_are_those_of_the_answered_posts_and_their_own_references() -> None:
    """The post in the middle has no rationale; its reference must not shift those of the others."""
    texts = [rationale("negative"), None, rationale("positive")]
    outputs = RoleOutputs(Role([]).classify(POSTS), texts, [None] * 3)
    metrics = role_metrics(outputs, POSTS, [None] * 3, LABELS, SETTINGS, [texts[0], "another text", texts[2]])
    assert metrics["published_rouge_l"] == pytest.approx(1.0)
    assert metrics["parse_rate"] == 0.0, "published metrics are of raw texts"


def test_grounded_is_the_share_of_attributes_that_the_rationales_name(postcards: Corpus) -> None:
    posts = postcards.test[:9]
    gold = [parse_or_none(post.rationale, LABELS) for post in posts]
    assert all(gold) and all(len(post.attributes) == 3 for post in posts)
    scores = Role([]).classify(posts)

    def grounded(rationales: list[Rationale | None]) -> float:
        outputs = RoleOutputs(scores, [""] * 9, rationales)
        return float(role_metrics(outputs, posts, [None] * 9, LABELS, SETTINGS)["grounded"])

    assert grounded(gold) == 1.0
    assert grounded([None] * 9) == 0.0
    assert grounded([gold[0], *[None] * 8]) == pytest.approx(1 / 9)
    ungrounded = Rationale(("Some words.", "An image, unsmiling.", "They agree.", "Thus."), "negative")
    assert grounded([ungrounded] * 9) == 0.0  # a part of a word does not count


def test_an_invalid_rationale_is_parsed_as_none() -> None:
    assert parse_or_none(None, LABELS) is None
    assert parse_or_none("not a rationale", LABELS) is None
    assert parse_or_none(rationale("neutral"), LABELS, finished=False) is None
    assert parse_or_none(rationale("neutral"), LABELS) == parse(rationale("neutral"), LABELS)


# ---- labels on a scale ----

BINS = LabelSpace.from_scale(Scale())


def test_on_a_scale_there_are_metrics_of_bins_and_of_values() -> None:
    posts = [Sample(f"p{n}", "x", label=value) for n, value in enumerate([-2.0, 0.4, 2.2])]
    probabilities = np.eye(7)[[1, 3, 6]] * 0.5
    probabilities[:, 3] += 0.5
    outputs = RoleOutputs(ClassScores(probabilities, np.ones(3)), None, None)
    metrics = role_metrics(outputs, posts, [None] * 3, BINS, SETTINGS)
    assert [outputs.value(index, BINS) for index in range(3)] == [-1.0, 0.0, 1.5]
    assert outputs.value(0, LABELS) is None
    assert metrics["n"] == 3 and np.shape(metrics["confusion"]) == (7, 7)
    assert metrics["mae"] == pytest.approx((1.0 + 0.4 + 0.7) / 3)
    assert metrics["acc2_without_zero"] == pytest.approx(2 / 3)
    assert metrics["acc2_with_zero"] == 1.0
    assert {"ece", "aurc", "correlation", "acc7", "acc5", "f1_with_zero", "f1_without_zero"} <= set(metrics)


def test_gold_values_are_the_numeric_labels() -> None:
    assert gold_values([Sample("a", "x", label=0.0), Sample("b", "x"), Sample("c", "x", label=-1.5)]) == [0.0, -1.5]

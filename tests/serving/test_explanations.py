"""A rationale whenever one is asked for: it argues for the label, or it is null."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from distill.models.backbone import Backbone
from distill.models.local import Local
from distill.models.reasoner import Answer, Sampling
from distill.task.prompts import Template
from distill.task.sample import Sample
from tests.models.openai_server import ChatRequest, Server, rationale
from tests.serving.conftest import DEFER_ALL, metric, policy, running
from tests.serving.test_cascade_service import LABELS, ask, teacher_at, with_confidence


class Scripted(Local):
    """A student whose rationale argues against the label of its answer, or for it.

    `explains`: whether its explanations argue for the label that they are given.
    """

    def __init__(self, backbone: Backbone, argues: bool = False, explains: bool = True) -> None:
        super().__init__(backbone, "scripted")
        self.argues, self.explains = argues, explains
        self.asked: list[Template] = []

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        labels = self.classify(samples).probabilities.argmax(1)
        for index, sample in enumerate(samples):
            self.asked.append(template)
            own = LABELS.names[labels[index]]
            label = str(sample.label) if template == "explain" else own
            if not (self.explains if template == "explain" else self.argues):
                label = next(name for name in LABELS.names if name != label)
            yield index, Answer(rationale(label), True, 10, 20, seconds=0.1)


def test_the_teacher_explains_the_label_of_the_student(fluent: Backbone) -> None:
    with Server() as server:
        teacher = teacher_at(server.url, deadline_s=30, prompt_price=1.0, completion_price=2.0)
        with running(Scripted(fluent), teacher, policy(), explain="teacher") as client:
            found = ask(client, rationale=True)
            assert (found["stage"], found["rationale_by"], found["teacher_calls"]) == ("student", "teacher", 1)
            assert found["rationale"]["Prediction"] == found["label"] and not found["degraded"]
            assert found["cost"]["price"] == pytest.approx((100 * 1.0 + 10 * 2.0) / 1e6)
            assert found["cost"]["calls"] == 3  # label and rationale of the student, explanation
            assert metric(client, "distill_teacher_calls_total") == 1
        (request,) = server.received
        assert f"The sentiment is {found['label']}." in request.text


def test_the_teacher_explains_its_own_label(fluent: Backbone) -> None:
    with Server(logprobs=with_confidence(0.98)) as server:
        teacher = teacher_at(server.url, deadline_s=30)
        with running(Scripted(fluent, explains=False), teacher, DEFER_ALL, explain="teacher") as client:
            (label,) = {ask(client, rationale=False)["label"]}
            found = ask(client, rationale=True)
    assert (found["label"], found["stage"]) == (label, "teacher_first")
    if found["rationale_by"] == "student":  # its first rationale happens to argue for the teacher's label
        assert found["teacher_calls"] == 1
    else:
        assert (found["rationale_by"], found["teacher_calls"]) == ("teacher", 2)
    assert found["rationale"]["Prediction"] == label


@pytest.mark.parametrize("agrees", [True, False])
def test_a_teacher_that_has_not_learned_to_explain_predicts(agrees: bool, fluent: Backbone) -> None:
    student, cascade = Scripted(fluent), replace(policy(), explains=False)

    def answer(request: ChatRequest) -> str:
        return rationale(label if agrees else next(name for name in LABELS.names if name != label))

    with Server(answer=answer) as server:
        with running(student, teacher_at(server.url, deadline_s=30), cascade, explain="teacher") as client:
            label = ask(client, rationale=False)["label"]
            found = ask(client, rationale=True)
        (request,) = server.received
    assert "The sentiment is " not in request.text and "Final_conclusion" in request.text
    assert (found["label"], found["teacher_calls"]) == (label, 1)
    assert found["rationale_by"] == ("teacher" if agrees else None)
    assert (found["rationale"] is not None) == agrees


def test_the_student_explains_the_label_by_default(fluent: Backbone) -> None:
    student = Scripted(fluent)
    with Server() as server, running(student, teacher_at(server.url, deadline_s=30), policy()) as client:
        found = ask(client, rationale=True)
        assert (found["rationale_by"], found["teacher_calls"], server.requests) == ("student", 0, 0)
        assert found["rationale"]["Prediction"] == found["label"]
        assert found["cost"]["calls"] == 3
    assert student.asked.count("explain") == 1


def test_a_rationale_for_the_label_needs_no_explanation(fluent: Backbone) -> None:
    student = Scripted(fluent, argues=True)
    with Server() as server:
        with running(student, teacher_at(server.url, deadline_s=30), policy(), explain="teacher") as client:
            found = ask(client, rationale=True)
        assert (found["rationale_by"], found["teacher_calls"], server.requests) == ("student", 0, 0)


def leaking(request: ChatRequest) -> str:
    label = request.text.partition("\nThe sentiment is ")[2].partition(".")[0]
    return rationale(label, f"the given label is {label}")


@pytest.mark.parametrize(
    ("answer", "settings"),
    [
        (lambda request: rationale("negative") + "\n" + rationale("positive"), {"explain": "teacher"}),
        (leaking, {"explain": "teacher"}),
        (lambda request: "I cannot explain this.", {"explain": "teacher"}),
        (lambda request: "", {"explain": "student"}),
        (lambda request: "", {"explain": "none"}),
    ],
    ids=["two labels", "leak", "refusal", "student", "none"],
)
def test_no_other_rationale_is_shown(answer: Any, settings: dict[str, Any], fluent: Backbone) -> None:
    with Server(answer=answer) as server:
        teacher = teacher_at(server.url, deadline_s=30)
        with running(Scripted(fluent, explains=False), teacher, policy(), **settings) as client:
            found = ask(client, rationale=True)
            assert (found["rationale"], found["rationale_by"]) == (None, None)
            asked = int(settings["explain"] == "teacher")
            assert found["teacher_calls"] == metric(client, "distill_teacher_calls_total") == asked
        assert (server.requests > 0) == bool(asked)


def test_without_a_teacher_nobody_explains(fluent: Backbone) -> None:
    with running(Scripted(fluent), None, policy(), explain="teacher") as client:
        found = ask(client, rationale=True)
    assert (found["rationale"], found["rationale_by"], found["teacher_calls"]) == (None, None, 0)


def test_a_teacher_that_fails_to_explain_leaves_the_label(fluent: Backbone) -> None:
    with (
        Server(refuse=lambda body: (500, "broken")) as server,
        running(Scripted(fluent), teacher_at(server.url), policy(), explain="teacher") as client,
    ):
        found, without = ask(client, rationale=True), ask(client, rationale=False)
    assert (found["stage"], found["degraded"], found["rationale"]) == ("student", False, None)
    assert found["label"] == without["label"]

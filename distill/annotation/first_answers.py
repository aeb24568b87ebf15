"""Stops a stage whose first answers are all invalid: the fault is the model's or the prompt's, and every further answer
would be paid for in vain."""

import threading
from collections import Counter
from dataclasses import dataclass

from distill.annotation.scores import read_reply, read_scores
from distill.errors import RunError
from distill.models.reasoner import Answer
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.prompts import Template
from distill.task.rationale import InvalidRationale, check
from distill.task.sample import Sample

_QUOTED = 80  # characters of an answer in a message

GivenAnswer = tuple[Sample, Template, Answer]
"""An answer with the sample that it is about and the template of its prompt."""


@dataclass(frozen=True)
class _Invalid:
    """An invalid answer: what is wrong, what to change, its text, and the number of answers that it stands for."""

    problem: str
    remedy: str
    text: str
    count: int


class FirstAnswers:
    """The first answers of a stage. Labels and rationales are counted separately; retries count. Thread-safe.

    Requests without an answer, such as those that a content filter refuses, say nothing and are not counted.

    Args:
        stage: for messages.
        limit: number of invalid answers without a valid one that end the stage; 0: none do.
    """

    def __init__(self, stage: str, labels: LabelSpace, limit: int) -> None:
        self.stage, self.labels, self.limit = stage, labels, limit
        self._valid: set[str] = set()  # kinds with a valid answer
        self._invalid: dict[str, list[_Invalid]] = {}  # by kind, as long as there is no valid one
        self._lock = threading.Lock()

    def add(self, *answers: GivenAnswer) -> None:
        """Count answers. Raises RunError if `limit` answers or more are all invalid."""
        if not self.limit:
            return
        with self._lock:
            for sample, template, answer in answers:
                kind = _kind(template)
                if answer.error is not None or kind in self._valid:
                    continue
                if (invalid := self._check(sample, template, answer)) is not None:
                    self._invalid.setdefault(kind, []).append(invalid)
                else:
                    self._valid.add(kind)
                    self._invalid.pop(kind, None)
            self._stop(self.limit)

    def has_valid(self, template: Template) -> bool:
        """Whether an answer of this kind was valid; always without a limit."""
        with self._lock:
            return not self.limit or _kind(template) in self._valid

    def recall(self, *answers: GivenAnswer) -> None:
        """Judge the answers of an earlier run before the stage asks. They are counted again when the stage uses them.

        Raises:
            RunError: `limit` answers or more are all invalid, so asking for others would change nothing.
        """
        earlier = FirstAnswers(self.stage, self.labels, self.limit)
        earlier.add(*answers)
        with self._lock:
            self._valid |= earlier._valid

    def begin_anew(self) -> None:
        """Forget invalid answers that another process has got: they are counted when the stage uses them."""
        with self._lock:
            self._invalid.clear()

    def end(self) -> None:
        """Raise RunError if a stage that ends had only invalid answers, although fewer than `limit`."""
        with self._lock:
            self._stop(1)

    def _stop(self, limit: int) -> None:
        for invalid in self._invalid.values():
            if (count := sum(item.count for item in invalid)) < limit:
                continue
            problems = Counter((item.problem, item.remedy) for item in invalid)
            (problem, remedy), _ = min(problems.items(), key=lambda item: (-item[1], item[0]))
            text = min(item.text for item in invalid if item.problem == problem)
            number = min(count, self.limit)
            quote = repr(text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…")
            raise RunError(
                f"{self.stage}: the first {number} answers are all invalid, such as {quote} ({problem}); "
                f"{remedy}, or set stop_after_invalid to 0"
            )

    def _check(self, sample: Sample, template: Template, answer: Answer) -> _Invalid | None:
        """What is wrong with an answer by itself, whatever the label of its post; None if it is valid."""
        count = max(answer.calls, 1)
        if template in prompts.SCORED:
            if read_scores(answer)[1] != 0:
                return None
            problem = f"none names a label of task.labels: {', '.join(self.labels.names)}"
            return _Invalid(problem, "use another model or other labels", read_reply(answer), count)
        try:
            check(answer.text, self.labels, finished=answer.finished, post=sample.text)
        except InvalidRationale as invalid:
            remedy = "use another model"
            if invalid.reason == "unfinished":
                remedy = f"raise {self.stage}.max_new_tokens or use another model"
            elif invalid.detail.endswith("not one label"):
                remedy = "use another model or other labels in task.labels"
            return _Invalid(invalid.detail, remedy, answer.text, count)
        return None


def _kind(template: Template) -> str:
    return "label" if template in prompts.SCORED else "rationale"

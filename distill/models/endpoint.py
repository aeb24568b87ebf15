"""A Reasoner behind any server that speaks the OpenAI chat protocol: vLLM, SGLang, llama.cpp, or a paid service."""

import base64
import io
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from distill.data.images import ImageError, decode
from distill.errors import RunError
from distill.models.chat import Chat, EndpointSettings, Tokens
from distill.models.reasoner import Answer, ClassScores, Sampling
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.rationale import FIELDS
from distill.task.sample import Sample

__all__ = ["Endpoint", "EndpointSettings", "Scored", "agreement", "label_probabilities"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_CLASSIFY_TOKENS = 32
_PREDICTION = re.compile(r"(?:^|[{,])[ \t\"'*#>\u0120\u2581-]*prediction[\"'*]*[ \t]*:", re.IGNORECASE | re.MULTILINE)
_QUOTES = " \t\r\n\"'`*_.,;:{}[]\u0120\u2581"  # and the two signs by which tokenizers write a space
_FLOOR = 1e-12  # no label is impossible


@dataclass(frozen=True)
class Scored:
    """One classification: probabilities [K], the label mass before normalising, and the answer it was read from.

    Where the answer has an error the labels are equally likely, at a mass of 0.
    """

    probabilities: np.ndarray
    label_mass: float
    answer: Answer


class Endpoint:
    """A remote model as a `Reasoner`. What a server turns out not to know is left out from then on, with a warning.

    Raises:
        SettingsError: the environment variable that `api_key_env` names is not set.
    """

    def __init__(self, settings: EndpointSettings, labels: LabelSpace, max_pixels: int = 50_000_000) -> None:
        self.name = settings.model
        self.settings = settings
        self.labels = labels
        self._max_pixels = max_pixels
        self._chat = Chat(settings)

    def close(self) -> None:
        """Close the connections."""
        self._chat.close()

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What so many tokens cost, in the currency of the prices; None without prices."""
        prompt, completion = self.settings.prompt_price, self.settings.completion_price
        if prompt is None and completion is None:
            return None
        return (prompt_tokens * (prompt or 0.0) + completion_tokens * (completion or 0.0)) / 1e6

    def reason(
        self, samples: Sequence[Sample], template: prompts.Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        """Answers in the order of their completion; a consumer that stops early loses only those in flight.

        Raises:
            RunError: the endpoint is not there, has stopped answering, refuses the key or does not serve the model.
        """
        schema = _schema(self.labels)

        def ask(index: int, stop: threading.Event) -> Answer:
            sample = samples[index]
            try:
                content = self._content(sample, prompts.render(template, sample, self.labels))
            except (ImageError, OSError) as error:
                return Answer("", False, error=str(error))
            return self._chat.ask(content, sampling, stop, schema=schema)[0]

        return self._as_completed(ask, len(samples))

    def classify(self, samples: Sequence[Sample]) -> ClassScores:
        """Label probabilities of B samples; a sample without an answer is undecided, at a label mass of 0.

        Raises:
            RunError: as `reason`.
        """
        scores = ClassScores(np.zeros((len(samples), len(self.labels))), np.zeros(len(samples)))
        for index, scored in self.scores(samples):
            scores.probabilities[index], scores.label_mass[index] = scored.probabilities, scored.label_mass
            if scored.answer.error is not None:
                log.warning("sample %s counts as undecided: %s", samples[index].id, scored.answer.error)
        return scores

    def scores(self, samples: Sequence[Sample]) -> Iterator[tuple[int, Scored]]:
        """The parts of `classify` as they come, each with what was paid for it."""

        def score(index: int, stop: threading.Event) -> Scored:
            return self._score(samples[index], stop)

        return self._as_completed(score, len(samples))

    def _as_completed(self, work: Callable[[int, threading.Event], T], count: int) -> Iterator[tuple[int, T]]:
        """Results of `work(0 .. count - 1)`; at most `concurrency` are under way or not handed over yet.

        After a RunError nothing more is begun, but what is under way is paid for and still handed over before it.
        """
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.settings.concurrency)
        waiting = iter(range(count))
        running: dict[Future[T], int] = {}

        def begin(how_many: int) -> None:
            for _, index in zip(range(how_many), waiting, strict=False):
                running[pool.submit(work, index, stop)] = index

        failure: RunError | None = None
        try:
            begin(self.settings.concurrency)
            while running:
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running.pop(done)
                    try:
                        result = done.result()
                    except RunError as error:
                        failure = failure or error
                        stop.set()
                        continue
                    if failure is None:
                        begin(1)
                    yield index, result
            if failure is not None:
                raise failure
        finally:
            stop.set()  # wakes those that wait for a retry
            pool.shutdown(wait=False, cancel_futures=True)

    def _score(self, sample: Sample, stop: threading.Event) -> Scored:
        undecided = np.full(len(self.labels), 1 / len(self.labels))
        question = prompts.render("classify", sample, self.labels)
        try:
            content = self._content(sample, question)
        except (ImageError, OSError) as error:
            return Scored(undecided, 0.0, Answer("", False, error=str(error)))
        paid: list[Answer] = []
        if self._chat.top_logprobs:
            # Without a schema: a grammar would force a label, and the label mass would tell nothing.
            answer, tokens = self._chat.ask(content, Sampling(0.0, _CLASSIFY_TOKENS), stop, logprobs=True)
            if answer.error is not None or not answer.text.strip():
                return Scored(undecided, 0.0, answer)
            if tokens:
                return Scored(*label_probabilities(tokens, self.labels), answer)
            self._chat.without_logprobs("gives no log-probabilities")
            paid.append(answer)
        drawn: list[Answer] = []
        for attempt in range(self.settings.agreement_samples):
            answer, _ = self._chat.ask(content, Sampling(1.0, _CLASSIFY_TOKENS, attempt), stop)
            if answer.error is None:
                drawn.append(answer)
        if not drawn:
            return Scored(undecided, 0.0, answer)
        prompt_tokens = sum(answer.prompt_tokens for answer in paid + drawn)
        completion_tokens = sum(answer.completion_tokens for answer in paid + drawn)
        texts = [answer.text for answer in drawn]
        total = Answer("\n".join(texts), True, prompt_tokens, completion_tokens)
        return Scored(agreement(texts, self.labels), math.nan, total)

    def _content(self, sample: Sample, text: str) -> str | list[dict[str, Any]]:
        """A message: the pictures as `data:` URIs, then the text. Raises ImageError."""
        if not sample.images:
            return text
        return [*map(self._picture, sample.images), {"type": "text", "text": text}]

    def _picture(self, path: Path) -> dict[str, Any]:
        picture = decode(path, self._max_pixels)
        picture.thumbnail((self.settings.max_image_side, self.settings.max_image_side))
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=95)
        data = base64.b64encode(jpeg.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def label_probabilities(tokens: Tokens, labels: LabelSpace) -> tuple[np.ndarray, float]:
    """Label probabilities [K] from the tokens of an answer to *classify*, and the label mass.

    They are read where the label begins: after the last `"Prediction":` that opens a line or a JSON field, otherwise
    at the answer's first token. A likely token counts for the one label that it begins, and for none if it begins two.
    A label that no likely token begins has at most the probability of the least likely of them, and at most what they
    leave; it is given that bound. The mass is the sum before normalising, 1 at most.
    """
    begin = _label_begins("".join(token for token, _ in tokens), labels)
    end, likely = 0, None
    for token, top in tokens:
        start, end = end, end + len(token)
        if end > begin and token[max(0, begin - start) :].strip(_QUOTES):
            likely = top
            break
    if not likely:
        return np.full(len(labels), 1 / len(labels)), 0.0
    mass = np.zeros(len(labels))
    names = [name.casefold() for name in labels.names]
    for token, logprob in likely.items():
        stem = token.strip(_QUOTES).casefold()
        begun = [k for k, name in enumerate(names) if stem and name.startswith(stem)]
        if len(begun) == 1:
            mass[begun[0]] += math.exp(min(logprob, 0.0))
    seen = [math.exp(min(logprob, 0.0)) for logprob in likely.values()]
    mass[mass == 0] = max(min(min(seen), 1 - sum(seen)), _FLOOR)
    return mass / mass.sum(), min(float(mass.sum()), 1.0)


def agreement(answers: Sequence[str], labels: LabelSpace) -> np.ndarray:
    """Label probabilities [K] from k answers to *classify*: their shares, smoothed by one more answer for all alike.

    p_j = (n_j + (1 + r) / K) / (k + 1), where r of the k answers name no label.
    """
    found = [labels.find(_first_line(answer[_label_begins(answer, labels) :])) for answer in answers]
    counts = np.array([found.count(name) for name in labels.names], dtype=float)
    return (counts + (1 + found.count(None)) / len(labels)) / (len(answers) + 1)


def _label_begins(text: str, labels: LabelSpace) -> int:
    """Where an answer to *classify* begins to name its label; an answer that is the bare label names it at once."""
    headers = list(_PREDICTION.finditer(text))
    return headers[-1].end() if headers and labels.find(_first_line(text)) is None else 0


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip(_QUOTES)), "")


def _schema(labels: LabelSpace) -> dict[str, Any]:
    fields: dict[str, dict[str, Any]] = {name: {"type": "string"} for name in FIELDS}
    fields["Prediction"]["enum"] = list(labels.names)
    return {"type": "object", "properties": fields, "required": list(FIELDS), "additionalProperties": False}

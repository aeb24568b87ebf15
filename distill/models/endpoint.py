"""A Reasoner behind any server that speaks the OpenAI chat protocol: vLLM, SGLang, llama.cpp, or a paid service."""

import base64
import contextlib
import io
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from distill.data.images import ImageError, decode
from distill.errors import RunError
from distill.models.chat import Chat, EndpointSettings, unanswered
from distill.models.connection import Failed
from distill.models.reading import agreement, label_probabilities
from distill.models.reasoner import Answer, ClassScores, Cost, Sampling
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.prompts import Earlier, Template
from distill.task.rationale import FIELDS
from distill.task.sample import Sample

__all__ = ["Endpoint", "EndpointSettings", "Scored", "agreement", "label_probabilities"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_CLASSIFY_TOKENS = 32
_FLOOR = 1e-12  # of a label mass: 0 would say that there is no answer


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
        self._lock = threading.Lock()
        self._token_ids: list[int] | None = None

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
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
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
                return unanswered(str(error))
            return self._chat.ask(content, sampling, stop, schema=schema)[0]

        return self._as_completed(ask, len(samples))

    def classify(self, samples: Sequence[Sample], earlier: Sequence[Earlier] | None = None) -> ClassScores:
        """Label probabilities of B samples; a sample without an answer is undecided, at a label mass of 0.

        They are read from log-probabilities (`label_probabilities`): of the labels' own tokens where the server knows
        `logprob_token_ids` and `/tokenize`, as vLLM does, otherwise of the likeliest tokens. Where it gives none, the
        greedy answer and further ones drawn at temperature 1 are counted (`agreement`).

        Raises:
            RunError: as `reason`.
        """
        probabilities, mass = np.zeros((len(samples), len(self.labels))), np.zeros(len(samples))
        costs = [Cost()] * len(samples)
        for index, scored in self.scores(samples, earlier):
            probabilities[index], mass[index], costs[index] = (
                scored.probabilities,
                scored.label_mass,
                scored.answer.cost,
            )
            if scored.answer.error is not None:
                log.warning("sample %s counts as undecided: %s", samples[index].id, scored.answer.error)
        return ClassScores(probabilities, mass, tuple(costs))

    def scores(
        self, samples: Sequence[Sample], earlier: Sequence[Earlier] | None = None
    ) -> Iterator[tuple[int, Scored]]:
        """The parts of `classify` as they come, each with what was paid for it."""

        def score(index: int, stop: threading.Event) -> Scored:
            return self._score(samples[index], None if earlier is None else earlier[index], stop)

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

    def _score(self, sample: Sample, earlier: Earlier | None, stop: threading.Event) -> Scored:
        undecided = np.full(len(self.labels), 1 / len(self.labels))
        template: Template = "classify" if earlier is None else "review"
        try:
            content = self._content(sample, prompts.render(template, sample, self.labels, earlier))
        except (ImageError, OSError) as error:
            return Scored(undecided, 0.0, unanswered(str(error)))
        # Without a schema: a grammar would force a label, and the label mass would tell nothing.
        greedy = Sampling(0.0, _CLASSIFY_TOKENS)
        answer, tokens = self._chat.ask(content, greedy, stop, logprobs=True, token_ids=self._label_token_ids())
        if answer.error is not None or not answer.text.strip():
            return Scored(undecided, 0.0, answer)
        if tokens:
            return Scored(*label_probabilities(tokens, self.labels), answer)
        self._chat.without_logprobs("gives no log-probabilities")
        asked = [answer]
        for attempt in range(1, self.settings.agreement_samples):
            asked.append(self._chat.ask(content, Sampling(1.0, _CLASSIFY_TOKENS, attempt), stop)[0])
        texts = [answer.text for answer in asked if answer.error is None]
        cost = sum((answer.cost for answer in asked), Cost())
        # one draw agrees with nothing: it does not tell how sure the model is, and must not look certain
        mass = math.nan if self.settings.agreement_samples > 1 else _FLOOR
        return Scored(agreement(texts, self.labels), mass, Answer("\n".join(texts), True, **asdict(cost)))

    def _label_token_ids(self) -> Sequence[int]:
        """The tokens by which the server's tokenizer writes the labels, with and without a space before them.

        Asked for once; none where the server does not tell, or cannot be reached just now.
        """
        with self._lock:
            if self._token_ids is None and self._chat.top_logprobs:
                with contextlib.suppress(Failed):
                    self._token_ids = self._ask_for_token_ids()
            return self._token_ids or ()

    def _ask_for_token_ids(self) -> list[int]:
        prefix = self._chat.tokenize(prompts.CLASSIFY_PREFIX)
        if prefix is None:
            return []
        found: dict[int, None] = {}  # in order, each once
        for name in self.labels.names:
            behind = self._chat.tokenize(f"{prompts.CLASSIFY_PREFIX} {name}")
            alone = self._chat.tokenize(name)
            if behind is None or alone is None:
                return []
            same = behind[: len(prefix)] == prefix
            found |= dict.fromkeys([*(behind[len(prefix) :] if same else []), *alone])
        return list(found)

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


def _schema(labels: LabelSpace) -> dict[str, Any]:
    fields: dict[str, dict[str, Any]] = {name: {"type": "string"} for name in FIELDS}
    fields["Prediction"]["enum"] = list(labels.names)
    return {"type": "object", "properties": fields, "required": list(FIELDS), "additionalProperties": False}

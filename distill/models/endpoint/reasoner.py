"""A Reasoner behind any server that speaks the OpenAI chat protocol: vLLM, SGLang, llama.cpp, or a paid service."""

import base64
import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.images import ImageError, jpeg
from distill.models.endpoint.client import ChatClient, unanswered
from distill.models.endpoint.http import RequestFailed
from distill.models.endpoint.logprobs import agreement, label_probabilities
from distill.models.endpoint.pool import as_completed
from distill.models.endpoint.settings import EndpointSettings
from distill.models.reasoner import Answer, ClassScores, Cost, Sampling
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.prompts import EarlierAnswers, Template
from distill.task.rationale import FIELDS
from distill.task.sample import Sample

log = logging.getLogger(__name__)

_CLASSIFY_TOKENS = 32
_TOKENIZE_PAUSE_S = 60.0
_FLOOR = 1e-12  # of a label mass: 0 would say that there is no answer


@dataclass(frozen=True)
class LabelScore:
    """One classification: probabilities [K], the label mass before normalising, and the answer it was read from.

    Where the answer has an error the labels are equally likely, at a mass of 0.
    """

    probabilities: np.ndarray
    label_mass: float
    answer: Answer


class UserMessage:
    """A sample as the content of messages. Its pictures are encoded once, when they are first wanted."""

    def __init__(self, sample: Sample, max_side: int, max_pixels: int) -> None:
        self.sample = sample
        self._max_side = max_side
        self._max_pixels = max_pixels
        self._pictures: list[bytes] | None = None

    def content(self, text: str) -> list[bytes]:
        """What a message holds, as pieces of JSON: the pictures as `data:` URIs, then the text.

        Raises:
            ImageError, OSError: a picture cannot be read.
        """
        if not self.sample.images:
            return [json.dumps(text).encode()]
        self.encode()
        return [b"[", *(self._pictures or ()), json.dumps({"type": "text", "text": text}).encode(), b"]"]

    def encode(self) -> None:
        """Encode the pictures, unless that is done. Raises ImageError, OSError."""
        if self._pictures is None:
            self._pictures = [self._picture(path) for path in self.sample.images]

    def _picture(self, path: Path) -> bytes:
        data = base64.b64encode(jpeg(path, self._max_side, self._max_pixels))  # nothing in it that JSON would escape
        return b'{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,%b"}}, ' % data


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
        self._chat = ChatClient(settings)
        self._schema = _schema(labels)
        self._lock = threading.Lock()
        self._token_ids: list[int] | None = None
        self._tokenize_after = 0.0

    def close(self) -> None:
        """Close the connections."""
        self._chat.close()

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What so many tokens cost, in the currency of the prices; None without prices."""
        prompt, completion = self.settings.prompt_price, self.settings.completion_price
        if prompt is None and completion is None:
            return None
        return (prompt_tokens * (prompt or 0.0) + completion_tokens * (completion or 0.0)) / 1e6

    def open(self, sample: Sample) -> UserMessage:
        """A sample about which one or more questions are to be asked."""
        return UserMessage(sample, self.settings.max_image_side, self._max_pixels)

    def ask(self, post: UserMessage, template: Template, sampling: Sampling, stop: threading.Event) -> Answer:
        """The answer to one question; `stop` is set when nobody waits for it any more.

        Raises:
            RunError: the endpoint is not there, has stopped answering, refuses the key or does not serve the model.
        """
        try:
            content = post.content(prompts.render(template, post.sample, self.labels))
        except (ImageError, OSError) as error:
            return unanswered(str(error))
        return self._chat.ask(content, sampling, stop, schema=self._schema)[0]

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        """Answers in the order of their completion; a consumer that stops early loses only those in flight.

        Raises:
            RunError: as `ask`.
        """

        def ask(index: int, stop: threading.Event) -> Answer:
            return self.ask(self.open(samples[index]), template, sampling, stop)

        return as_completed(ask, range(len(samples)), self.settings.concurrency)

    def classify(self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None) -> ClassScores:
        """Label probabilities of B samples; a sample without an answer is undecided, at a label mass of 0.

        They are read from log-probabilities (`label_probabilities`): of the labels' own tokens where the server knows
        `logprob_token_ids` and `/tokenize`, as vLLM does, otherwise of the likeliest tokens. Where it gives none, the
        greedy answer and further ones drawn at temperature 1 are counted (`agreement`).

        Raises:
            RunError: as `ask`.
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
        self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None
    ) -> Iterator[tuple[int, LabelScore]]:
        """The parts of `classify` as they come, each with what was paid for it."""

        def score(index: int, stop: threading.Event) -> LabelScore:
            return self.score(self.open(samples[index]), None if earlier is None else earlier[index], stop)

        return as_completed(score, range(len(samples)), self.settings.concurrency)

    def score(self, post: UserMessage, earlier: EarlierAnswers | None, stop: threading.Event) -> LabelScore:
        """One part of `classify`; with earlier answers it is a review.

        Raises:
            RunError: as `ask`.
        """
        undecided = np.full(len(self.labels), 1 / len(self.labels))
        template: Template = "classify" if earlier is None else "review"
        try:
            content = post.content(prompts.render(template, post.sample, self.labels, earlier))
        except (ImageError, OSError) as error:
            return LabelScore(undecided, 0.0, unanswered(str(error)))
        # Without a schema: a grammar would force a label, and the label mass would tell nothing.
        greedy = Sampling(0.0, _CLASSIFY_TOKENS)
        answer, tokens = self._chat.ask(content, greedy, stop, logprobs=True, token_ids=self._label_token_ids())
        if answer.error is not None or not answer.text.strip():
            return LabelScore(undecided, 0.0, answer)
        if tokens:
            return LabelScore(*label_probabilities(tokens, self.labels), answer)
        self._chat.without_logprobs("gives no log-probabilities")
        asked = [answer]
        for attempt in range(1, self.settings.agreement_samples):
            asked.append(self._chat.ask(content, Sampling(1.0, _CLASSIFY_TOKENS, attempt), stop)[0])
        if stop.is_set() and any(answer.error is not None for answer in asked):
            return LabelScore(undecided, 0.0, unanswered("cut short"))  # fewer draws would pass for all of them
        texts = [answer.text for answer in asked if answer.error is None]
        cost = sum((answer.cost for answer in asked), Cost())
        # one draw agrees with nothing: it does not tell how sure the model is, and must not look certain
        mass = math.nan if self.settings.agreement_samples > 1 else _FLOOR
        return LabelScore(agreement(texts, self.labels), mass, Answer("\n".join(texts), True, **asdict(cost)))

    def _label_token_ids(self) -> Sequence[int]:
        """The tokens by which the server's tokenizer writes the labels, with and without a space before them.

        Asked for once; none where the server does not tell, or could not be reached within the last minute.
        """
        with self._lock:
            if self._token_ids is None and self._chat.top_logprobs and time.monotonic() >= self._tokenize_after:
                try:
                    self._token_ids = self._ask_for_token_ids()
                except RequestFailed:  # all others wait meanwhile
                    self._tokenize_after = time.monotonic() + _TOKENIZE_PAUSE_S
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


def _schema(labels: LabelSpace) -> dict[str, Any]:
    fields: dict[str, dict[str, Any]] = {name: {"type": "string"} for name in FIELDS}
    fields["Prediction"]["enum"] = list(labels.names)
    return {"type": "object", "properties": fields, "required": list(FIELDS), "additionalProperties": False}

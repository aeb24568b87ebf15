"""A `Reasoner` over an OpenAI-compatible server: vLLM, SGLang, llama.cpp, or a hosted service."""

import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from distill.data.clips import ClipReader
from distill.models.endpoint.client import ChatClient, unanswered
from distill.models.endpoint.logprobs import agreement, continued_probabilities, label_probabilities
from distill.models.endpoint.message import MediaError, UserMessage
from distill.models.endpoint.negotiation import ChatRequest
from distill.models.endpoint.pool import as_completed
from distill.models.endpoint.replicas import ReplicaState
from distill.models.endpoint.replies import RequestFailed, Tokens
from distill.models.endpoint.settings import EndpointSettings, cost
from distill.models.reasoner import UNKNOWN_CONFIDENCE, Answer, ClassScores, Cost, Sampling
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.prompts import EarlierAnswers, Template
from distill.task.sample import Sample

log = logging.getLogger(__name__)

_CLASSIFY_MAX_TOKENS = 32
_TOKENIZE_RETRY_S = 60.0


@dataclass(frozen=True)
class LabelScore:
    """One classification: probabilities [K], the label mass before normalisation, and the answer they come from.

    If the answer has an error or names no label, the probabilities are uniform and the label mass is 0.
    """

    probabilities: np.ndarray
    label_mass: float
    answer: Answer


class Endpoint:
    """A remote model as a `Reasoner`. Optional request fields that the server refuses are omitted from then on.

    Args:
        max_pixels: most pixels of an image.
        clips: reads videos and sounds; None: with the default settings.
        forced_prefix: classify as a local model does: the server continues the forced prefix of a label. It must take
            vLLM's `continue_final_message`; otherwise labels are read from whole answers.
        image_size: how images are sent; see `UserMessage`.

    Raises:
        SettingsError: the environment variable named by `api_key_env` is not set.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        labels: LabelSpace,
        max_pixels: int = 50_000_000,
        clips: ClipReader | None = None,
        forced_prefix: bool = False,
        image_size: int | None = None,
    ) -> None:
        self.name = settings.model
        self.settings = settings
        self.labels = labels
        self.clips = clips or ClipReader()
        self._max_pixels, self._image_size = max_pixels, image_size
        self._beginning = labels.wording.prefix if forced_prefix else ""
        self._client = ChatClient(settings)
        self._schema = _schema(labels)
        self._lock = threading.Lock()
        self._token_ids: list[int] | None = None
        self._next_tokenize = 0.0  # time.monotonic() of the next attempt, after a failed one

    def __reduce__(self) -> tuple[Any, ...]:  # a copy in another process has connections and a key of its own
        return Endpoint, (self.settings, self.labels, self._max_pixels, self.clips)

    @property
    def returns_logprobs(self) -> bool:
        """Whether the server returns log-probabilities, as far as its replies have shown."""
        return self._client.optional.top_logprobs > 0

    @property
    def given_up(self) -> list[str]:
        """The optional request fields that the server has not taken, each with what happens instead."""
        return self._client.optional.given_up

    @property
    def replicas(self) -> list[ReplicaState]:
        """The state of each server, in the order of the settings."""
        return self._client.replicas.states

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Cost of these tokens, in the currency of the prices; None without prices."""
        return cost(self.settings, prompt_tokens, completion_tokens)

    def message(self, sample: Sample) -> UserMessage:
        """A sample as message content, reusable for several requests."""
        return UserMessage(sample, self.settings, self._max_pixels, self.clips, self._image_size)

    def encode(self, message: UserMessage) -> None:
        """Encode the media of a message in the form that the server takes, if this has not been done.

        Raises:
            MediaError: an image, video or sound cannot be read.
        """
        message.encode(self._client.optional.shows_frames())

    def ask(
        self,
        message: UserMessage,
        template: Template,
        sampling: Sampling,
        stop: threading.Event,
        *,
        logprobs: bool = False,
    ) -> Answer:
        """Request one answer.

        Args:
            stop: set when the answer is no longer needed.
            logprobs: request log-probabilities as well, so that `returns_logprobs` is known afterwards.

        Raises:
            RunError: the server cannot be reached, no longer answers, refuses the key or does not serve the model.
        """
        text = prompts.render(template, message.sample, self.labels)
        try:
            answer, tokens = self._request(message, text, stop, sampling, schema=self._schema, logprobs=logprobs)
        except MediaError as error:
            return unanswered(str(error))
        if logprobs and answer.error is None and not tokens:
            self._client.optional.disable_logprobs("its replies have none")
        return answer

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        """Answers in completion order; if the consumer stops early, only answers in flight are lost.

        Raises:
            RunError: see `ask`.
        """

        def ask(index: int, stop: threading.Event) -> Answer:
            return self.ask(self.message(samples[index]), template, sampling, stop)

        return as_completed(ask, range(len(samples)), self.settings.concurrency)

    def classify(self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None) -> ClassScores:
        """Label probabilities of B samples; uniform with a label mass of 0 for a sample without an answer.

        They are computed from log-probabilities (`label_probabilities`): those of the label tokens if the server
        supports `logprob_token_ids` and `/tokenize`, as vLLM does, otherwise those of the top-k tokens. If the server
        returns no log-probabilities, `agreement_samples` answers are sampled, the first one greedily and the others at
        temperature 1, and their frequencies are used (`agreement`).

        Raises:
            RunError: see `ask`.
        """
        probabilities, mass = np.zeros((len(samples), len(self.labels))), np.zeros(len(samples))
        costs = [Cost()] * len(samples)
        for index, score in self.scores(samples, earlier):
            probabilities[index], mass[index], costs[index] = score.probabilities, score.label_mass, score.answer.cost
            if score.answer.error is not None:
                log.warning(
                    "sample %s has no answer and counts as undecided: %s", samples[index].id, score.answer.error
                )
        return ClassScores(probabilities, mass, tuple(costs))

    def scores(
        self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None
    ) -> Iterator[tuple[int, LabelScore]]:
        """Scores of single samples, in completion order, each with its answer; see `classify`."""

        def score(index: int, stop: threading.Event) -> LabelScore:
            return self.score(self.message(samples[index]), None if earlier is None else earlier[index], stop)

        return as_completed(score, range(len(samples)), self.settings.concurrency)

    def score(self, message: UserMessage, earlier: EarlierAnswers | None, stop: threading.Event) -> LabelScore:
        """Classify one sample, or *review* it if `earlier` is given; see `classify`.

        Raises:
            RunError: see `ask`.
        """
        undecided = np.full(len(self.labels), 1 / len(self.labels))
        template: Template = "classify" if earlier is None else "review"
        text = prompts.render(template, message.sample, self.labels, earlier)
        # No schema: constrained decoding would force a label, and the label mass would be meaningless.
        greedy = Sampling(0.0, _CLASSIFY_MAX_TOKENS)
        try:
            self.encode(message)
            token_ids = self._label_token_ids()
            scored: dict[str, Any] = {"logprobs": True, "token_ids": token_ids, "beginning": self._beginning}
            answer, tokens = self._request(message, text, stop, greedy, **scored)
        except MediaError as error:
            return LabelScore(undecided, 0.0, unanswered(str(error)))
        if answer.error is not None or not answer.text.strip():
            return LabelScore(undecided, 0.0, answer)
        if tokens:
            forced = self._beginning and self._client.optional.continues
            found = continued_probabilities(tokens, self.labels) if forced else None
            return LabelScore(*(found or label_probabilities(tokens, self.labels)), answer)
        self._client.optional.disable_logprobs("its replies have none")
        sampled = [answer]
        for attempt in range(1, self.settings.agreement_samples):
            sampled.append(self._request(message, text, stop, Sampling(1.0, _CLASSIFY_MAX_TOKENS, attempt))[0])
        if stop.is_set() and any(answer.error is not None for answer in sampled):
            return LabelScore(undecided, 0.0, unanswered("the request was cancelled"))  # never store an incomplete set
        texts = [answer.text for answer in sampled if answer.error is None]
        cost = sum((answer.cost for answer in sampled), Cost())
        # A single sample says nothing about the confidence, so it must not look certain.
        mass = math.nan if self.settings.agreement_samples > 1 else UNKNOWN_CONFIDENCE
        if all(self.labels.find(text) is None for text in texts):
            mass = 0.0  # the answers are no answer to the question
        return LabelScore(agreement(texts, self.labels), mass, Answer("\n".join(texts), True, **asdict(cost)))

    def body(
        self,
        message: UserMessage,
        template: Template,
        sampling: Sampling,
        earlier: EarlierAnswers | None = None,
        *,
        tokenize: bool = True,
    ) -> bytes:
        """The body of the request that `ask`, or for labels `score`, would send, as JSON.

        Args:
            tokenize: ask the server for the tokens of the labels, as `score` does; False: nothing is asked.

        Raises:
            MediaError: an image, video or sound cannot be read.
        """
        text = prompts.render(template, message.sample, self.labels, earlier)
        asked: dict[str, Any] = {"schema": self._schema}
        if template in prompts.SCORED:
            sampling = Sampling(0.0, _CLASSIFY_MAX_TOKENS)
            asked = {"logprobs": True, "token_ids": self._label_token_ids() if tokenize else ()}
        request = ChatRequest(sampling, video=message.has_video, sound=message.has_sound, **asked)
        return self._client.body(partial(message.content, text), request)

    def read(self, status: int, text: str) -> Answer:
        """The answer in a reply to `body` that was sent elsewhere. Raises what `HttpClient.send` raises."""
        return self._client.read(status, text)[0]

    def read_score(self, status: int, text: str) -> LabelScore | None:
        """The classification in such a reply; None without log-probabilities. Raises what `HttpClient.send` raises."""
        answer, tokens = self._client.read(status, text)
        return LabelScore(*label_probabilities(tokens, self.labels), answer) if tokens else None

    def _request(
        self, message: UserMessage, text: str, stop: threading.Event, sampling: Sampling, **asked: Any
    ) -> tuple[Answer, Tokens]:
        """Request one answer to a message with this text. Raises MediaError, RunError."""
        request = ChatRequest(sampling, video=message.has_video, sound=message.has_sound, **asked)
        return self._client.ask(partial(message.content, text), request, stop)

    def _label_token_ids(self) -> Sequence[int]:
        """Token ids of the labels in the server's tokenizer, with and without a leading space.

        They are requested once. Empty if the server does not return them, or could not be reached in the last minute.
        """
        with self._lock:
            if (
                self._token_ids is None
                and self._client.optional.top_logprobs
                and time.monotonic() >= self._next_tokenize
            ):
                try:
                    self._token_ids = self._request_token_ids()
                except RequestFailed:  # other threads wait for this lock, so do not retry at once
                    self._next_tokenize = time.monotonic() + _TOKENIZE_RETRY_S
            return self._token_ids or ()

    def _request_token_ids(self) -> list[int]:
        prefix = self._client.tokenize(self.labels.wording.prefix)
        if prefix is None:
            return []
        token_ids: dict[int, None] = {}  # an ordered set
        for name in self.labels.names:
            prefixed = self._client.tokenize(f"{self.labels.wording.prefix} {name}")
            alone = self._client.tokenize(name)
            if prefixed is None or alone is None:
                return []
            after_prefix = prefixed[len(prefix) :] if prefixed[: len(prefix)] == prefix else []
            token_ids |= dict.fromkeys([*after_prefix, *alone])
        return list(token_ids)


def _schema(labels: LabelSpace) -> dict[str, Any]:
    fields: dict[str, dict[str, Any]] = {name: {"type": "string"} for name in labels.wording.names}
    fields[labels.wording.names[-1]]["enum"] = list(labels.names)
    return {
        "type": "object",
        "properties": fields,
        "required": list(labels.wording.names),
        "additionalProperties": False,
    }

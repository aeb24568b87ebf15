"""`Local`, a Reasoner in this process: label scoring in one forward pass, and generation with transformers."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import DynamicCache, DynamicLayer

from distill.errors import NonFiniteError, SettingsError
from distill.models.backbone import Backbone
from distill.models.encoding import Features, Prompt
from distill.models.generation import LogprobRecorder, Token, end_tokens, generate
from distill.models.memory import memory_errors
from distill.models.reasoner import Answer, ClassScores, Cost, Sampling, classify_then_reason
from distill.models.scoring import (
    ScoredPrefill,
    label_log_probabilities,
    normalise_labels,
    score_and_prefill,
    score_labels,
)
from distill.task.prompts import SCORED, EarlierAnswers, Template
from distill.task.sample import Sample

__all__ = ["Completion", "Local", "Token", "label_log_probabilities", "normalise_labels", "score_labels"]

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """One answer of `Local.chat`.

    Attributes:
        finished: False if the token limit cut the answer.
        tokens: all generated tokens with the end token; empty if no log-probabilities were requested.
    """

    text: str
    finished: bool
    prompt_tokens: int
    completion_tokens: int
    tokens: tuple[Token, ...] = ()


class Local:
    """Teacher, assistant or student in this process."""

    def __init__(self, backbone: Backbone, name: str, device: torch.device | str = "cpu") -> None:
        self.backbone = backbone
        self.name = name
        self._joint_prefill: bool | None = None  # None: not checked yet
        backbone.model.to(device).eval()

    @torch.inference_mode()
    def classify(self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None) -> ClassScores:
        """Label scores of B samples, one forward pass per batch; see `Reasoner.classify`."""
        parts, costs = [], []
        template: Template = "classify" if earlier is None else "review"
        for first, batch in self._batches(samples):
            begin = time.perf_counter()
            batch_earlier = None if earlier is None else earlier[first : first + len(batch)]
            with _naming(batch):
                features = self.backbone.encode(batch, template, earlier=batch_earlier)
                parts.append(score_labels(self.backbone, self._to_device(features)))
                self._require_finite(parts[-1][0], batch)
            seconds = (time.perf_counter() - begin) / len(batch)
            costs += [Cost(1, length, 0, seconds) for length in features["attention_mask"].sum(1).tolist()]
        if not parts:
            return ClassScores(np.zeros((0, len(self.backbone.labels))), np.zeros(0))
        probabilities, mass = zip(*parts, strict=True)
        return _class_scores(probabilities, mass, costs)

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        """Generate answers batch by batch, in the order of the samples; the same seed gives the same answers."""
        for first, batch in self._batches(samples):
            begin = time.perf_counter()
            with _naming(batch):
                features = self.backbone.encode(batch, template, padding_side="left")
                completions = self._generate(self._to_device(features), sampling, first, posts=batch)
            seconds = (time.perf_counter() - begin) / len(batch)
            for index, c in enumerate(completions, first):
                yield index, Answer(c.text, c.finished, c.prompt_tokens, c.completion_tokens, seconds=seconds)

    def classify_and_reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, ClassScores, Answer]]:
        """Results of `classify` and `reason`, with one prefill of the common prompt prefix per sample.

        The scores have the cost of `classify`, the answer only the additional cost. If the model does not support a
        joint prefill, both are computed separately.
        """
        if template in SCORED or not samples or not self._supports_joint_prefill(samples):
            yield from classify_then_reason(self, samples, template, sampling)
            return
        for first, batch in self._batches(samples):
            yield from self._score_and_generate(batch, template, sampling, first)

    def chat(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),
        logprobs: int = 0,
        token_ids: Sequence[int] = (),
        beginning: str = "",
    ) -> list[Completion]:
        """Answers to B user messages, encoded like the prompts of samples.

        Log-probabilities are those of the model before temperature is applied.

        Args:
            prompts: B pairs of a text and the media placed before it.
            logprobs: number of most probable tokens to return per position.
            token_ids: tokens whose log-probabilities are returned at every position.
            beginning: of the answers, which are continued.

        Raises:
            ImageError, ClipError: an image, a video or a sound cannot be read.
        """
        completions: list[Completion] = []
        for first, batch in self._batches(prompts):
            begun = [self.tokenize(beginning)] * len(batch)
            features = self.backbone.encoder.encode(batch, begun, padding_side="left")
            recorder = LogprobRecorder(logprobs, token_ids, self.backbone.device) if logprobs or token_ids else None
            completions += self._generate(self._to_device(features), sampling, first, recorder)
        return completions

    def tokenize(self, text: str) -> list[int]:
        """Tokenize a text as part of a message: control tokens are escaped."""
        return self.backbone.encoder.tokens(text)

    def _score_and_generate(
        self, batch: Sequence[Sample], template: Template, sampling: Sampling, first: int
    ) -> list[tuple[int, ClassScores, Answer]]:
        """One batch of `classify_and_reason`."""
        begin = time.perf_counter()
        with _naming(batch):
            prefill = self._score_and_prefill(batch, template)
            self._require_finite(prefill.probabilities, batch)
            scored = time.perf_counter()
            completions = self._generate(prefill.prompt, sampling, first, posts=batch)
        scoring_seconds, seconds = (scored - begin) / len(batch), (time.perf_counter() - scored) / len(batch)
        costs = [Cost(1, length, 0, scoring_seconds) for length in prefill.classify_lengths.tolist()]
        scores = _class_scores([prefill.probabilities], [prefill.mass], costs)
        answers = [
            Answer(c.text, c.finished, added, c.completion_tokens, seconds=seconds)
            for c, added in zip(completions, prefill.added_lengths.tolist(), strict=True)
        ]
        return [(first + row, scores.row(row), answer) for row, answer in enumerate(answers)]

    @torch.inference_mode()
    def _score_and_prefill(self, samples: Sequence[Sample], template: Template) -> ScoredPrefill:
        return score_and_prefill(self.backbone, samples, template)

    def _supports_joint_prefill(self, samples: Sequence[Sample]) -> bool:
        """Whether a joint prefill gives the same label scores as `classify`: checked once, on the sample with the most
        media."""
        if self._joint_prefill is None:
            flash = self.backbone.settings.attention == "flash_attention_2"
            supported = self.backbone.packs and not flash and _has_full_cache(self.backbone)
            sample = max(samples, key=lambda sample: sample.media.extent)
            if supported:
                try:
                    joint = self._score_and_prefill([sample], "reason").probabilities.double().cpu().numpy()
                except SettingsError:  # the chat template places images after the text
                    supported = False
                else:
                    separate = self.classify([sample]).probabilities
                    exact = self.backbone.settings.dtype == "float32"
                    if exact:  # logarithms, which also differ if one label is certain
                        joint, separate = np.log(joint.clip(1e-9)), np.log(separate.clip(1e-9))
                    supported = bool(abs(joint - separate).max() < (0.01 if exact else 0.1))
            if not supported:
                log.info("%s does not support joint prefill: labels and rationales are computed separately", self.name)
            self._joint_prefill = supported
        return self._joint_prefill

    def _generate(
        self,
        features: dict[str, Any],
        sampling: Sampling,
        first: int,
        recorder: LogprobRecorder | None = None,
        posts: Sequence[Sample] = (),
    ) -> list[Completion]:
        """Answers to B left-padded prompts.

        Args:
            first: index of the first prompt among all prompts of the call; part of the seed.
            posts: the B samples of the prompts, which an error names.
        """

        def check(logits: torch.Tensor, rows: Sequence[int]) -> None:
            self._require_finite(logits, [posts[row] for row in rows] if posts else [])

        seed = hash((sampling.seed, sampling.attempt, first))
        prompts = features["attention_mask"].sum(1).tolist()
        answers = generate(self.backbone, features, sampling, seed, check, recorder)
        tokenizer, stops = self.backbone.processor.tokenizer, end_tokens(self.backbone)
        completions = []
        for row, answer in enumerate(answers):
            finished = answer[-1] in stops
            text = tokenizer.decode(answer[: len(answer) - finished], skip_special_tokens=True)
            tokens = recorder.tokens(row, tokenizer) if recorder is not None else ()
            completions.append(Completion(text, finished, prompts[row], len(answer), tokens))
        return completions

    def _require_finite(self, values: torch.Tensor, posts: Sequence[Sample]) -> None:
        """Raise NonFiniteError if a row of probabilities or logits [B, K] has a NaN or no finite value."""
        broken = ~values.amax(-1).isfinite()  # NaN if the row has one
        if broken.any():
            ids = [post.id for post, bad in zip(posts, broken.tolist(), strict=False) if bad]
            raise NonFiniteError(f"the probabilities of {self.name} are", ids, "its weights or precision are at fault")

    def _batches(self, items: Sequence[T]) -> Iterator[tuple[int, Sequence[T]]]:
        size = self.backbone.settings.batch_size
        return ((first, items[first : first + size]) for first in range(0, len(items), size))

    def _to_device(self, features: Features) -> Features:
        return {name: value.to(self.backbone.device) for name, value in features.items()}


def _naming(batch: Sequence[Sample]) -> AbstractContextManager[None]:
    """Name the posts of a batch in an out-of-memory error."""
    remedy = "reduce model.batch_size, data.max_tokens or model.image_size"
    return memory_errors([sample.id for sample in batch], remedy)


def _class_scores(
    probabilities: Sequence[torch.Tensor], mass: Sequence[torch.Tensor], costs: Sequence[Cost]
) -> ClassScores:
    """Concatenate the probabilities [B, K] and masses [B] of batches."""
    all_probabilities, all_mass = (
        torch.cat([part.cpu() for part in parts]).double().numpy() for parts in (probabilities, mass)
    )
    return ClassScores(all_probabilities, all_mass, tuple(costs))


def _has_full_cache(backbone: Backbone) -> bool:
    """Whether all layers cache keys and values of every token, so that the cache can be truncated."""
    config: Any = backbone.model.config
    if getattr(config.get_text_config(), "cross_attention_layers", None):  # these cache the pictures
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)

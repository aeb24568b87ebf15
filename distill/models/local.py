"""A Reasoner over a backbone on this machine: label scoring in one forward pass, and generation."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import DynamicCache, DynamicLayer, LogitsProcessor, LogitsProcessorList

from distill.errors import SettingsError
from distill.models.backbone import Backbone
from distill.models.encoding import Features, Prompt
from distill.models.reasoner import Answer, ClassScores, Cost, Sampling, classify_then_reason
from distill.models.scoring import Reading, label_log_probabilities, normalise_labels, read_both, score_labels
from distill.task.prompts import SCORED, EarlierAnswers, Template
from distill.task.sample import Sample

__all__ = ["Completion", "Local", "Token", "label_log_probabilities", "normalise_labels", "score_labels"]

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Token:
    """One generated token: its text, its log-probability, and those of the tokens that were asked about."""

    text: str
    logprob: float
    likely: Mapping[str, float]


@dataclass(frozen=True)
class Completion:
    """One answer of `Local.chat`. `finished` is False where the token limit cut it.

    `tokens` are all generated tokens, the end token included; empty where no log-probabilities were asked for.
    """

    text: str
    finished: bool
    prompt_tokens: int
    completion_tokens: int
    tokens: tuple[Token, ...] = ()


class Local:
    """Teacher, assistant or student as a model in this process."""

    def __init__(self, backbone: Backbone, name: str, device: torch.device | str = "cpu") -> None:
        self.backbone = backbone
        self.name = name
        self._exact: bool | None = None
        backbone.model.to(device).eval()

    @torch.inference_mode()
    def classify(self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None) -> ClassScores:
        """Label probabilities of B samples by label scoring (DESIGN section 6)."""
        parts, costs = [], []
        template: Template = "classify" if earlier is None else "review"
        for first, batch in self._batches(samples):
            begin = time.perf_counter()
            said = None if earlier is None else earlier[first : first + len(batch)]
            features = self.backbone.encode(batch, template, earlier=said)
            parts.append(score_labels(self.backbone, self._moved(features)))
            seconds = (time.perf_counter() - begin) / len(batch)
            costs += [Cost(1, length, 0, seconds) for length in features["attention_mask"].sum(1).tolist()]
        if not parts:
            return ClassScores(np.zeros((0, len(self.backbone.labels))), np.zeros(0))
        probabilities, mass = zip(*parts, strict=True)
        return _scores(probabilities, mass, costs)

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        """Generated answers, a batch at a time, in the samples' order; the same seed draws the same answers."""
        for first, batch in self._batches(samples):
            begin = time.perf_counter()
            features = self.backbone.encode(batch, template, padding_side="left")
            found = self._generate(self._moved(features), sampling, first)
            seconds = (time.perf_counter() - begin) / len(batch)
            for index, one in enumerate(found, first):
                yield index, Answer(one.text, one.finished, one.prompt_tokens, one.completion_tokens, seconds=seconds)

    def classify_and_reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, ClassScores, Answer]]:
        """What `classify` and `reason` say of each sample, of which the model reads what both have in common once.

        A label costs what it costs alone, the answer what it took beyond that. Where the model cannot read two
        questions at once, they are put apart.
        """
        if template in SCORED or not samples or not self._reads_both(samples):
            yield from classify_then_reason(self, samples, template, sampling)
            return
        for first, batch in self._batches(samples):
            yield from self._both(batch, template, sampling, first)

    def chat(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),
        logprobs: int = 0,
        token_ids: Sequence[int] = (),
    ) -> list[Completion]:
        """Answers to B messages, each a text and the images that go before it, encoded as a sample's question is.

        Args:
            logprobs: how many of the likeliest tokens to tell at each place.
            token_ids: tokens whose log-probabilities to tell at each place, likely or not.

        Log-probabilities are those of the model's own distribution, whatever the temperature.

        Raises:
            ImageError: a picture cannot be read.
        """
        found: list[Completion] = []
        for first, batch in self._batches(prompts):
            features = self.backbone.encoder.encode(batch, padding_side="left")
            watch = _Watch(logprobs, token_ids, self.backbone.device) if logprobs or token_ids else None
            found += self._generate(self._moved(features), sampling, first, watch)
        return found

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, as they are in a message."""
        return self.backbone.encoder.tokens(text)

    def _both(
        self, batch: Sequence[Sample], template: Template, sampling: Sampling, first: int
    ) -> list[tuple[int, ClassScores, Answer]]:
        """One batch of `classify_and_reason`."""
        begin = time.perf_counter()
        reading = self._read_both(batch, template)
        read = time.perf_counter()
        found = self._generate(reading.prompt, sampling, first)
        seconds, more = (read - begin) / len(batch), (time.perf_counter() - read) / len(batch)
        costs = [Cost(1, length, 0, seconds) for length in reading.lengths.tolist()]
        scores = _scores([reading.probabilities], [reading.mass], costs)
        answers = [
            Answer(one.text, one.finished, added, one.completion_tokens, seconds=more)
            for one, added in zip(found, reading.added.tolist(), strict=True)
        ]
        return [(first + row, scores.row(row), answer) for row, answer in enumerate(answers)]

    @torch.inference_mode()
    def _read_both(self, samples: Sequence[Sample], template: Template) -> Reading:
        return read_both(self.backbone, samples, template)

    def _reads_both(self, samples: Sequence[Sample]) -> bool:
        """Whether this model can read two questions at once: tried out once, on the sample with the most pictures."""
        if self._exact is None:
            self._exact = self.backbone.settings.attention != "flash_attention_2" and _crops(self.backbone)
            sample = max(samples, key=lambda sample: len(sample.images))
            if self._exact:
                try:
                    found = self._read_both([sample], "reason").probabilities.double().cpu().numpy()
                except SettingsError:  # of where the chat template puts pictures
                    self._exact = False
                else:
                    tolerance = 1e-3 if self.backbone.settings.dtype == "float32" else 0.1
                    self._exact = bool(abs(found - self.classify([sample]).probabilities).max() < tolerance)
            if not self._exact:
                log.info("%s cannot read two questions at once: label and rationale are asked for apart", self.name)
        return self._exact

    @torch.inference_mode()
    def _generate(
        self, features: dict[str, Any], sampling: Sampling, first: int, watch: "_Watch | None" = None
    ) -> list[Completion]:
        """Answers to B left-padded prompts, of which the first is number `first` among all that were asked."""
        tokenizer, stops = self.backbone.processor.tokenizer, _end_tokens(self.backbone)
        options = _options(sampling) | {"eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id}
        if watch is not None:
            options["logits_processor"] = LogitsProcessorList([watch])
        # a caller may draw between two batches: neither changes what the other gets
        with torch.random.fork_rng(_devices(self.backbone.device)):
            torch.manual_seed(hash((sampling.seed, sampling.attempt, first)))
            output = self.backbone.model.generate(**features, **options)  # type: ignore[operator]
        found = []
        prompts = features["attention_mask"].sum(1).tolist()
        for index, row in enumerate(output[:, features["input_ids"].shape[1] :].cpu()):
            ends = torch.isin(row, torch.tensor(stops)).nonzero()
            length = int(ends[0]) if len(ends) else len(row)
            written = length + bool(len(ends))
            text = tokenizer.decode(row[:length], skip_special_tokens=True)
            tokens = watch.tokens(output, index, written, tokenizer) if watch is not None else ()
            found.append(Completion(text, bool(len(ends)), prompts[index], written, tokens))
        return found

    def _batches(self, items: Sequence[T]) -> Iterator[tuple[int, Sequence[T]]]:
        size = self.backbone.settings.batch_size
        return ((first, items[first : first + size]) for first in range(0, len(items), size))

    def _moved(self, features: Features) -> Features:
        return {name: value.to(self.backbone.device) for name, value in features.items()}


class _Watch(LogitsProcessor):
    """Notes at each step of a generation, before any temperature, the log-probabilities that were asked about.

    A step's own token is known only when the next one begins: until then its whole distribution is held.
    """

    def __init__(self, count: int, token_ids: Sequence[int], device: torch.device) -> None:
        self._count = count
        self._token_ids = torch.tensor(token_ids, dtype=torch.long, device=device)
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._open: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._settle(input_ids)
        self._open = scores.log_softmax(-1)
        return scores

    def tokens(self, output: torch.Tensor, row: int, length: int, tokenizer: Any) -> tuple[Token, ...]:
        """The first `length` generated tokens of one row of the output."""
        self._settle(output)
        found = []
        for ids, values in self._steps[:length]:
            texts = [tokenizer.decode([token]) for token in ids[row].tolist()]
            pairs = list(zip(texts, values[row].tolist(), strict=True))
            likely: dict[str, float] = {}
            for text, value in sorted(pairs[1:], key=lambda pair: -pair[1]):
                likely.setdefault(text, value)  # of tokens that read alike the likeliest stays
            found.append(Token(*pairs[0], likely))
        return tuple(found)

    def _settle(self, sequences: torch.Tensor) -> None:
        if self._open is not None:
            top = self._open.topk(self._count).indices
            ids = torch.cat([sequences[:, -1:], top, self._token_ids.expand(len(top), -1)], 1)
            self._steps.append((ids.cpu(), self._open.gather(1, ids).cpu()))
            self._open = None


def _scores(probabilities: Sequence[torch.Tensor], mass: Sequence[torch.Tensor], costs: Sequence[Cost]) -> ClassScores:
    """The scores of samples that were read in batches."""
    together, held = (torch.cat([part.cpu() for part in parts]).double().numpy() for parts in (probabilities, mass))
    return ClassScores(together, held, tuple(costs))


def _crops(backbone: Backbone) -> bool:
    """Whether keys and values of every token are all that a model remembers, so that the last ones can be cut off."""
    cache = DynamicCache(config=backbone.model.config)
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _options(sampling: Sampling) -> dict[str, Any]:
    """How `generate` is to draw; published models bring penalties and cuts of their own."""
    options: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "repetition_penalty": 1.0}
    if sampling.temperature > 0:
        return options | {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    return options | {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}  # transformers' neutral ones


def _end_tokens(backbone: Backbone) -> list[int]:
    """The ids that end an answer: the tokenizer's, and those the model was published with."""
    published = backbone.model.generation_config.eos_token_id  # type: ignore[union-attr]
    ids = published if isinstance(published, list) else [published]
    return sorted({backbone.processor.tokenizer.eos_token_id, *ids} - {None})


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []

"""A Reasoner over a backbone on this machine: label scoring in one forward pass, and generation."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from distill.models.backbone import Backbone, Features
from distill.models.reasoner import Answer, ClassScores, Sampling
from distill.task.prompts import Template
from distill.task.sample import Sample


class Local:
    """Teacher, assistant or student as a model in this process."""

    def __init__(self, backbone: Backbone, name: str, device: torch.device | str = "cpu") -> None:
        self.backbone = backbone
        self.name = name
        backbone.model.to(device).eval()

    @torch.inference_mode()
    def classify(self, samples: Sequence[Sample]) -> ClassScores:
        """Label probabilities of B samples by label scoring (DESIGN section 6)."""
        parts = []
        for batch in _batches(samples, self.backbone.settings.batch_size):
            features = _to(self.backbone.encode(batch, "classify"), self.backbone.device)
            parts.append(score_labels(self.backbone, features))
        if not parts:
            return ClassScores(np.zeros((0, len(self.backbone.labels))), np.zeros(0))
        probabilities, mass = (torch.cat(column).double().cpu().numpy() for column in zip(*parts, strict=True))
        return ClassScores(probabilities, mass)

    @torch.inference_mode()
    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        """Generated answers, a batch at a time, in the samples' order; the same seed draws the same answers."""
        model, tokenizer = self.backbone.model, self.backbone.processor.tokenizer
        stops = _end_tokens(self.backbone)
        options = {
            "max_new_tokens": sampling.max_new_tokens,
            "eos_token_id": stops,
            "pad_token_id": tokenizer.pad_token_id,
            "repetition_penalty": 1.0,  # published models bring penalties and cuts of their own
        }
        if sampling.temperature > 0:
            options |= {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        else:
            options |= {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}  # transformers' neutral ones
        first = 0
        for batch in _batches(samples, self.backbone.settings.batch_size):
            features = _to(self.backbone.encode(batch, template, padding_side="left"), self.backbone.device)
            # a caller may draw between two batches: neither changes what the other gets
            with torch.random.fork_rng(_devices(self.backbone.device)):
                torch.manual_seed(hash((sampling.seed, sampling.attempt, first)))
                output = model.generate(**features, **options)  # type: ignore[operator]
            prompts = features["attention_mask"].sum(1).tolist()
            for row, prompt in zip(output[:, features["input_ids"].shape[1] :].cpu(), prompts, strict=True):
                ends = torch.isin(row, torch.tensor(stops)).nonzero()
                length = int(ends[0]) if len(ends) else len(row)
                text = tokenizer.decode(row[:length], skip_special_tokens=True)
                yield first, Answer(text, bool(len(ends)), prompt, length + bool(len(ends)))
                first += 1


def _end_tokens(backbone: Backbone) -> list[int]:
    """The ids that end an answer: the tokenizer's, and those the model was published with."""
    published = backbone.model.generation_config.eos_token_id  # type: ignore[union-attr]
    ids = published if isinstance(published, list) else [published]
    return sorted({backbone.processor.tokenizer.eos_token_id, *ids} - {None})


def score_labels(backbone: Backbone, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [B, K] and label mass [B] of right-padded *classify* prompts closed with the forced prefix."""
    last = features["attention_mask"].sum(1) - 1
    kept = int(features["input_ids"].shape[1] - last.min())
    logits = backbone.model(**features, logits_to_keep=kept).logits
    offset = features["input_ids"].shape[1] - logits.shape[1]
    return normalise_labels(logits[torch.arange(len(last)), last - offset], backbone.label_ids.to(logits.device))


def normalise_labels(logits: torch.Tensor, label_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the K labels alone and the mass they held, from next-token logits [B, V] and token ids [K]."""
    log_probabilities = torch.log_softmax(logits.float(), -1)[:, label_ids]
    return log_probabilities.softmax(-1), log_probabilities.exp().sum(-1)


def _batches(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    return (samples[first : first + size] for first in range(0, len(samples), size))


def _devices(device: torch.device) -> list[torch.device]:
    return [] if device.type == "cpu" else [device]


def _to(features: Features, device: torch.device) -> Features:
    return {name: value.to(device) for name, value in features.items()}

"""The published student step (MulCoT-RD, arXiv 2508.05234): the baseline of `student_step.py`.

A sample gives two sequences, *reason* and *classify*, each with the image. A sequence is padded to the longest one of
its task in the data set and passes through the student and the frozen assistant. Cross-entropy is computed over the
answer tokens of the batch, KL over every position, prompt and padding included, on unshifted logits. Only prompt
rendering and tokenization are shared with the `distill` package.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from distill.models.backbone import IGNORE, Backbone, Features
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.training.batches import encode_tasks, prompts_and_answers


def padded_lengths(samples: Sequence[Sample], backbone: Backbone, tasks: Sequence[Template]) -> dict[Template, int]:
    """Tokens of the longest sequence of each task. Every sample needs an image and an answer to all tasks."""
    encoder = backbone.encoder
    image = encoder.encode([(" ", samples[0].media)])["input_ids"]
    image_tokens = image.numel() - len(encoder.processor.tokenizer(encoder.render(" ", samples[0].media))["input_ids"])
    lengths = dict.fromkeys(tasks, 0)
    for sample in samples:
        for task, (question, answer) in zip(tasks, prompts_and_answers(sample, backbone.labels, tasks), strict=True):
            prompt = encoder.processor.tokenizer(encoder.render(question, sample.media))["input_ids"]
            lengths[task] = max(lengths[task], len(prompt) + image_tokens + len(backbone.answer_tokens(answer)))
    return lengths


def encode(samples: Sequence[Sample], backbone: Backbone, lengths: Mapping[Template, int]) -> dict[Template, Features]:
    """Encodes B samples per task, padded to the length of the task: `input_ids`, `labels` [B, T] and the others."""
    padding = {"input_ids": backbone.processor.tokenizer.pad_token_id, "labels": IGNORE}
    batch = {}
    for task, features in encode_tasks(samples, backbone, dict.fromkeys(lengths, 1.0)).items():
        shape = features["input_ids"].shape
        missing = lengths[task] - shape[1]
        batch[task] = {
            name: F.pad(value, (0, missing), value=padding.get(name, 0)) if value.shape == shape else value
            for name, value in features.items()
        }
    return batch


def loss(
    student: torch.nn.Module, assistant: torch.nn.Module, batch: Mapping[Template, Features], weight: float = 0.3,
    temperature: float = 2.0,
) -> torch.Tensor:  # fmt: skip
    """Σ_k (1 - λ) CE_k + λ KL(softmax(z_a / T) || softmax(z_s / T))_k, over the token ids in both vocabularies."""
    parts = [_task_loss(student, assistant, features, weight, temperature) for features in batch.values()]
    return torch.stack(parts).sum()


def _task_loss(
    student: torch.nn.Module, assistant: torch.nn.Module, features: Features, weight: float, temperature: float
) -> torch.Tensor:
    inputs = {name: value for name, value in features.items() if name != "labels"}
    logits = student(**inputs).logits
    with torch.no_grad():
        targets = assistant(**inputs).logits
    ids = min(logits.shape[-1], targets.shape[-1])
    logits, targets = logits[..., :ids].flatten(0, 1).float(), targets[..., :ids].flatten(0, 1).float()
    next_tokens = F.pad(features["labels"], (0, 1), value=IGNORE)[:, 1:].flatten()
    hard = F.cross_entropy(logits, next_tokens, ignore_index=IGNORE)
    log_p, q = F.log_softmax(logits / temperature, -1), F.softmax(targets / temperature, -1)
    return (1 - weight) * hard + weight * F.kl_div(log_p, q, reduction="batchmean")

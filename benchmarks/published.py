"""The published student step (MulCoT-RD, arXiv 2508.05234), plainly: what `student_step.py` holds ours against.

A sample is two sequences, *reason* and *classify*, with its picture in both. Each is padded to the longest of its task
in the data set, and goes through the student and through the frozen assistant. Cross-entropy is taken over the answer
tokens of the batch, KL over every position, prompt and padding included, on unshifted logits. With the project's own
training this shares how a sample is asked and tokenised, and nothing else.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from distill.models.backbone import IGNORE, Backbone, Features
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.training.batches import encode_tasks, questions


def longest(samples: Sequence[Sample], backbone: Backbone, tasks: Sequence[Template]) -> dict[Template, int]:
    """Tokens of the longest sequence of each task; every sample has a picture and an answer to all tasks."""
    encoder = backbone.encoder
    picture = encoder.encode([(" ", samples[0].images)])["input_ids"]
    filled = picture.numel() - len(encoder.processor.tokenizer(encoder.render(" ", samples[0].images))["input_ids"])
    found = dict.fromkeys(tasks, 0)
    for sample in samples:
        for task, (question, answer) in zip(tasks, questions(sample, backbone.labels, tasks), strict=True):
            prompt = encoder.processor.tokenizer(encoder.render(question, sample.images))["input_ids"]
            found[task] = max(found[task], len(prompt) + filled + len(backbone.answer_tokens(answer)))
    return found


def encode(samples: Sequence[Sample], backbone: Backbone, widths: Mapping[Template, int]) -> dict[Template, Features]:
    """For each task the sequences of B samples, padded to its width: `input_ids`, `labels` [B, T] and the rest."""
    padding = {"input_ids": backbone.processor.tokenizer.pad_token_id, "labels": IGNORE}
    batch = {}
    for task, features in encode_tasks(samples, backbone, dict.fromkeys(widths, 1.0)).items():
        shape = features["input_ids"].shape
        more = widths[task] - shape[1]
        batch[task] = {
            name: F.pad(value, (0, more), value=padding.get(name, 0)) if value.shape == shape else value
            for name, value in features.items()
        }
    return batch


def loss(
    student: torch.nn.Module, assistant: torch.nn.Module, batch: Mapping[Template, Features], weight: float = 0.3,
    temperature: float = 2.0,
) -> torch.Tensor:  # fmt: skip
    """Σ_k (1 - λ) CE_k + λ KL(softmax(z_a / T) || softmax(z_s / T))_k, vocabularies cut to the ids they share."""
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
    following = F.pad(features["labels"], (0, 1), value=IGNORE)[:, 1:].flatten()
    hard = F.cross_entropy(logits, following, ignore_index=IGNORE)
    log_p, q = F.log_softmax(logits / temperature, -1), F.softmax(targets / temperature, -1)
    return (1 - weight) * hard + weight * F.kl_div(log_p, q, reduction="batchmean")

"""Self-written reasoning data: the assistant reasons without the label, and what it gets right is kept (MulCoT-RD)."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distill.annotation.ledger import Ledger, Memory
from distill.models.reasoner import Reasoner, Sampling
from distill.task.labels import LabelSpace
from distill.task.rationale import InvalidRationale, Rationale, check
from distill.task.sample import Sample


@dataclass
class AugmentSettings:
    """How the assistant writes rationales of its own."""

    temperature: float = 0.7
    """Temperature of the assistant's rationales."""
    max_new_tokens: int = 512
    """Token limit of a rationale; one that reaches it is dropped."""
    chunk: int = 64
    """How many samples the assistant is handed at a time."""


def augment(
    samples: Sequence[Sample],
    labels: LabelSpace,
    assistant: Reasoner,
    settings: AugmentSettings,
    ledger: Ledger,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[tuple[Sample, Rationale]], dict[str, Any]]:
    """One rationale a sample, kept where it is valid and its prediction is the sample's label; with the counts."""
    memory = Memory(assistant, labels, ledger, settings.chunk)
    kept: dict[int, Rationale] = {}
    dropped: Counter[str] = Counter()
    sampling = Sampling(settings.temperature, settings.max_new_tokens)
    for done, (index, answer) in enumerate(memory.reason(samples, "reason", sampling), start=1):
        try:
            kept[index] = check(answer.text, labels, samples[index].label, finished=answer.finished)
        except InvalidRationale as invalid:
            dropped[invalid.reason] += 1
        if progress is not None:
            progress(done, len(samples))
    summary = {"n": len(samples), "kept": len(kept), "dropped": dict(dropped)}
    return [(samples[index], kept[index]) for index in sorted(kept)], summary

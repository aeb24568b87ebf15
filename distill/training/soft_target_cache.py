"""The assistant's soft targets, written once before training: it need not be in memory while the student learns.

A shard is a safetensors file of what the assistant says at the answer tokens of some hundred samples. Its header names
each sample by a key: a hash of all that its targets depend on, the assistant and the sample's questions, answers and
pictures included. So what has changed is asked for again, and nothing else is.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import DataLoader

from distill import files
from distill.annotation.ledger import digest
from distill.errors import RunError
from distill.models.backbone import Backbone, Features
from distill.task.labels import LabelSpace
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.training.batches import Batch, questions
from distill.training.fused_loss import HiddenTargets, TopKTargets
from distill.training.soft_targets import SoftTargets

log = logging.getLogger(__name__)

Encode = Callable[[Sequence[Sample]], Batch]

FOLDER = Path("student", "soft_targets")
"""Where the soft targets of a run lie in its folder."""

SHARD, SHARD_BYTES = 256, 2**28
"""A shard is closed when it has so many samples, or takes so much; writing one takes memory for it three times."""

_FORMAT = 1  # part of every key
_HEAD = "assistant.safetensors"  # its output head, empty where the shards do not need it


@dataclass(frozen=True)
class Key:
    """What each sample is called: a hash of what all depend on (`keys`) and of its questions, answers and pictures."""

    common: str
    labels: LabelSpace
    tasks: tuple[Template, ...]

    def __call__(self, sample: Sample) -> str:
        asked = [sample.id, *questions(sample, self.labels, self.tasks), *map(_digest, sample.images)]
        return sha256(json.dumps([self.common, *asked]).encode()).hexdigest()


class CachedTargets:
    """The soft targets in a folder, memory-mapped; with hidden states goes the assistant's output head.

    Args:
        key: what a sample is called in the shards (`keys`).

    Attributes:
        vocabulary: how many ids student and assistant share.
    """

    def __init__(self, folder: Path, key: Key) -> None:
        self.folder = folder
        self.key = key
        self.places = {name: place for path in _shards(folder) for name, place in _places(path).items()}
        with safe_open(folder / _HEAD, "pt") as file:
            self.head, self.vocabulary = file.get_tensor("head"), int(file.metadata()["vocabulary"])
        self._open: dict[str, Any] = {}

    def read(self, samples: Sequence[Sample]) -> Features:
        """The targets of all answer tokens of B samples, by name.

        Raises:
            RunError: those of a sample are not there, or cannot be read.
        """
        parts: dict[str, list[torch.Tensor]] = {}
        for sample in samples:
            try:
                name, begin, end = self.places[self.key(sample)]
                if name not in self._open:
                    self._open[name] = safe_open(self.folder / name, "pt")
                for part in self._open[name].keys():  # noqa: SIM118 - no dict
                    parts.setdefault(part, []).append(self._open[name].get_slice(part)[begin:end])
            except (KeyError, OSError, SafetensorError):
                raise RunError(f"{self.folder} lacks those of {sample.id}; the same command writes them") from None
        return {name: torch.cat(rows) for name, rows in parts.items()}

    def __call__(self, batch: Batch) -> HiddenTargets | TopKTargets:
        """What the assistant says at the N positions that predict an answer token."""
        if "hidden" not in batch.soft:
            return TopKTargets(**batch.soft)
        self.head = self.head.to(batch.columns.device)
        return HiddenTargets(batch.soft["hidden"].to(self.head.dtype), self.head)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # another process opens the shards itself


def keys(student: Backbone, tasks: Sequence[Any], assistant: str, top_k: int, temperature: float) -> Key:
    """The key of samples whose targets depend on the assistant (a hash of its weights, say), on how the student reads
    pictures and texts, and on what is kept.
    """
    kept = f"top {top_k} at {temperature}" if top_k else "hidden states"
    return Key(json.dumps([_FORMAT, assistant, student.encoder.fingerprint(), kept]), student.labels, tuple(tasks))


def write(
    folder: Path,
    samples: Sequence[Sample],
    key: Key,
    encode: Encode,
    assistant: Callable[[], SoftTargets],
    *,
    device: torch.device | str = "cpu",
    top_k: int = 0,
    temperature: float = 1.0,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Ask for what the folder lacks, a shard at a time; shards that are torn or of no use any more are removed.

    Args:
        encode: the batch that the student makes of samples.
        assistant: loads the assistant; called only where there is anything to ask for.
        workers: processes that prepare batches.
        top_k: keep so many likeliest tokens at `temperature` and the mass of the others; 0: the last hidden states.
    """
    wanted = {key(sample): sample for sample in samples}
    for path in _shards(folder):
        try:
            known = _places(path)
        except (SafetensorError, OSError, KeyError, ValueError):
            log.warning("%s is torn; its soft targets are computed again", path)
            known = {}
        if not known.keys() & wanted.keys():
            path.unlink()
        for name in known:
            wanted.pop(name, None)
    if not wanted and _whole(folder / _HEAD):
        return
    asked = assistant()
    asked.assistant.model.to(device)
    head = asked.assistant.head.detach()[: 0 if top_k else asked.vocabulary]
    _save(folder / _HEAD, {"head": head}, {"vocabulary": str(asked.vocabulary)})
    names, done = list(wanted), 0
    for rows, sizes in _ask(list(wanted.values()), encode, asked, top_k, temperature, workers):
        part = names[done : done + len(sizes)]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        name = sha256("".join(part).encode()).hexdigest()[:16]
        _save(folder / f"{name}.safetensors", rows, {"ends": json.dumps(dict(zip(part, ends, strict=True)))})
        done += len(part)
        if progress is not None:
            progress(done, len(names))


def bytes_per_token(width: int, top_k: int) -> int:
    """What one answer token takes on the disk; `width` is that of the assistant's hidden states."""
    return 8 * top_k + 4 if top_k else 2 * width


def room(run: Path) -> tuple[float, float]:
    """Bytes for soft targets: what those of an earlier try take, and what is free where a run is, or will be."""
    there = sum(path.stat().st_size for path in (run / FOLDER).glob("*"))
    return there, shutil.disk_usage(next(path for path in [run, *run.absolute().parents] if path.exists())).free


@torch.no_grad()
def _ask(
    samples: Sequence[Sample], encode: Encode, targets: SoftTargets, top_k: int, temperature: float, workers: int
) -> Iterator[tuple[Features, list[int]]]:
    """A shard at a time: the targets of all answer tokens of the next samples, by name, and how many each has."""
    parts: list[Features] = []
    sizes: list[int] = []
    device = targets.assistant.device
    size = min(targets.assistant.settings.batch_size, SHARD)
    for batch in DataLoader(samples, size, collate_fn=encode, num_workers=workers):  # type: ignore[arg-type]
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        hidden, head = targets(batch._replace(inputs=inputs, columns=batch.columns.to(device)))
        sizes += batch.sizes.tolist()
        if not top_k:
            parts.append({"hidden": hidden.to(torch.bfloat16).cpu()})
        else:
            for chunk in hidden.split(max(1, 2**25 // len(head))):
                parts.append(top_targets(chunk @ head[: targets.vocabulary].T, top_k, temperature))
        full = sum(value.nbytes for part in parts for value in part.values()) >= SHARD_BYTES
        if full or len(sizes) + size > SHARD:
            yield _joined(parts), sizes
            parts, sizes = [], []
    if sizes:
        yield _joined(parts), sizes


def _joined(parts: Sequence[Features]) -> Features:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def top_targets(logits: torch.Tensor, top_k: int, temperature: float) -> Features:
    """The k likeliest tokens of softmax(logits / T) and the log of what all others hold, from logits [N, V].

    Returns:
        `log_q` [N, k], `ids` [N, k] and `log_rest` [N]. Without the rest, the divergence from them would be biased.
    """
    log_q = (logits.float() / temperature).log_softmax(-1)
    likeliest = log_q.topk(min(top_k, logits.shape[1]))
    rest = log_q.scatter(-1, likeliest.indices, -torch.inf).logsumexp(-1)
    found = {"log_q": likeliest.values, "ids": likeliest.indices.to(torch.int32), "log_rest": rest}
    return {name: value.cpu() for name, value in found.items()}


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if path.name != _HEAD)


def _places(path: Path) -> dict[str, tuple[str, int, int]]:
    """Where each sample of a shard lies: file, first row, last row. Raises what safetensors and json please."""
    with safe_open(path, "pt") as shard:
        ends: dict[str, int] = json.loads(shard.metadata()["ends"])
    return {name: (path.name, begin, end) for name, (begin, end) in zip(ends, _spans(ends.values()), strict=True)}


def _spans(ends: Any) -> Iterator[tuple[int, int]]:
    begin = 0
    for end in ends:
        yield begin, end
        begin = end


def _whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _save(path: Path, tensors: Features, metadata: dict[str, str]) -> None:
    content = save({name: value.contiguous() for name, value in tensors.items()}, metadata)
    with files.atomic_write(path, "wb") as file:
        file.write(content)


@cache
def _digest(path: Path) -> str:
    return digest(path)

"""Soft targets cached on disk before training, so that the assistant need not be in memory during training.

A shard is a safetensors file with the assistant's outputs at the answer tokens of up to SHARD_SAMPLES samples. Its
metadata lists the samples by key: a hash of everything that the soft targets depend on, such as the assistant's weights
and the sample's prompts, answers and media. Only samples whose key is missing are computed.
"""

import json
import logging
import re
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
from distill.errors import NonFiniteError, RunError
from distill.models.backbone import Backbone, Features, capped
from distill.models.memory import memory_errors
from distill.task.labels import LabelSpace
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.training.batches import Batch, prompts_and_answers
from distill.training.fused_loss import HiddenTargets, SoftTargets, TopKTargets
from distill.training.soft_targets import OnlineTargets

log = logging.getLogger(__name__)

Encode = Callable[[Sequence[Sample]], Batch]

FOLDER = Path("student", "soft_targets")
"""Folder of the soft targets, relative to the run's folder."""

SHARD_SAMPLES, SHARD_BYTES = 256, 2**28
"""A shard is closed at this number of samples or bytes; writing it takes three times its size in memory."""

_FORMAT = 1  # part of every key
_HEAD = "assistant.safetensors"  # the assistant's output head; empty for top-k targets
_SHARD = re.compile(r"[0-9a-f]{16}\.safetensors")


@dataclass(frozen=True)
class KeyFunction:
    """Returns the key of a sample: a hash of `common` and of the sample's id, prompts, answers and media.

    Attributes:
        clips: the preprocessing of videos and sounds.
    """

    common: str
    clips: str
    labels: LabelSpace
    tasks: tuple[Template, ...]

    def __call__(self, sample: Sample) -> str:
        pairs = prompts_and_answers(sample, self.labels, self.tasks)
        content = [sample.id, *pairs, *map(_file_digest, sample.images)]
        if sample.video or sample.audio:
            clips = [path and _file_digest(path) for path in (sample.video, sample.audio)]
            content.append(json.dumps([self.clips, *clips]))
        return sha256(json.dumps([self.common, *content]).encode()).hexdigest()


class CachedTargets:
    """The soft targets in a folder, memory-mapped, with the assistant's output head if they are hidden states.

    Args:
        key: the key function with which they were written (`key_function`).

    Attributes:
        vocabulary: number of token ids that student and assistant share.
    """

    def __init__(self, folder: Path, key: KeyFunction) -> None:
        self.folder = folder
        self.key = key
        self.locations = {name: location for path in _shards(folder) for name, location in _read_index(path).items()}
        with safe_open(folder / _HEAD, "pt") as file:
            self.head, written = file.get_tensor("head"), file.metadata()
        self.vocabulary, self._cap = int(written["vocabulary"]), json.loads(written.get("cap", "null"))
        self._open: dict[str, Any] = {}

    def read(self, samples: Sequence[Sample]) -> Features:
        """Return the soft targets of all answer tokens of B samples, by name.

        Raises:
            RunError: the soft targets of a sample are missing or cannot be read.
        """
        parts: dict[str, list[torch.Tensor]] = {}
        for sample in samples:
            try:
                shard, begin, end = self.locations[self.key(sample)]
                if shard not in self._open:
                    self._open[shard] = safe_open(self.folder / shard, "pt")
                for name in self._open[shard].keys():  # noqa: SIM118 - not a dict
                    parts.setdefault(name, []).append(self._open[shard].get_slice(name)[begin:end])
            except (KeyError, OSError, SafetensorError):
                raise RunError(
                    f"{self.folder} has no soft targets of sample {sample.id}; the same command computes them again"
                ) from None
        return {name: torch.cat(rows) for name, rows in parts.items()}

    def __call__(self, batch: Batch) -> SoftTargets:
        """Return the soft targets of the batch's N answer tokens."""
        if "hidden" not in batch.soft_targets:
            return TopKTargets(**batch.soft_targets)
        self.head = self.head.to(batch.positions.device)
        return HiddenTargets(batch.soft_targets["hidden"].to(self.head.dtype), self.head, self._cap)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # another process opens the shards itself


def key_function(
    student: Backbone, tasks: Sequence[Any], assistant: str, top_k: int, temperature: float
) -> KeyFunction:
    """Return the key function of samples.

    Args:
        student: determines how texts and media are encoded.
        assistant: identifies the assistant, for example a hash of its weights.
        top_k: kind of soft targets, as in `write`; the key depends on the temperature only if it is not 0.
    """
    kind = f"top {top_k} at {temperature}" if top_k else "hidden states"
    common = json.dumps([_FORMAT, assistant, student.encoder.fingerprint(), kind])
    return KeyFunction(common, student.encoder.media.fingerprint(), student.labels, tuple(tasks))


def write(
    folder: Path,
    samples: Sequence[Sample],
    key: KeyFunction,
    encode: Encode,
    assistant: Callable[[], OnlineTargets],
    *,
    device: torch.device | str = "cpu",
    top_k: int = 0,
    temperature: float = 1.0,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Compute the soft targets that are missing in the folder, shard by shard; delete unreadable and unused shards.

    Args:
        encode: returns the student's batch of samples.
        assistant: loads the assistant; called only if soft targets are missing.
        workers: DataLoader worker processes.
        top_k: number of most likely tokens to store at `temperature`, with the mass of all others; 0 stores the last
            hidden states.
        progress: called with the number of samples done and the number to do after each shard.
    """
    missing = {key(sample): sample for sample in samples}
    for path in _shards(folder):
        try:
            cached = _read_index(path)
        except (SafetensorError, OSError, KeyError, ValueError):
            log.warning("%s is damaged; its soft targets are computed again", path)
            cached = {}
        if not cached.keys() & missing.keys():
            path.unlink()
        for name in cached:
            missing.pop(name, None)
    if not missing and _is_readable(folder / _HEAD):
        return
    targets = assistant()
    targets.assistant.model.to(device)
    head = targets.assistant.head.detach()[: 0 if top_k else targets.vocabulary]
    written = {"vocabulary": str(targets.vocabulary), "cap": json.dumps(targets.assistant.cap)}
    _save(folder / _HEAD, {"head": head}, written)
    names, done = list(missing), 0
    for tensors, sizes in _compute_shards(list(missing.values()), encode, targets, top_k, temperature, workers):
        keys = names[done : done + len(sizes)]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        shard = sha256("".join(keys).encode()).hexdigest()[:16]
        _save(folder / f"{shard}.safetensors", tensors, {"ends": json.dumps(dict(zip(keys, ends, strict=True)))})
        done += len(keys)
        if progress is not None:
            progress(done, len(names))


def bytes_per_token(width: int, top_k: int) -> int:
    """Return the bytes on disk per answer token; `width` is the size D' of the assistant's hidden states."""
    return 8 * top_k + 4 if top_k else 2 * width


def disk_space(run: Path) -> tuple[float, float]:
    """Return the bytes of soft targets that a run's folder contains, and the free bytes of its file system."""
    cached = sum(path.stat().st_size for path in (run / FOLDER).glob("*"))
    return cached, shutil.disk_usage(next(path for path in [run, *run.absolute().parents] if path.exists())).free


@torch.no_grad()
def _compute_shards(
    samples: Sequence[Sample], encode: Encode, targets: OnlineTargets, top_k: int, temperature: float, workers: int
) -> Iterator[tuple[Features, list[int]]]:
    """Yield for each shard the soft targets of its answer tokens by name, and the number of tokens of each sample."""
    parts: list[Features] = []
    sizes: list[int] = []
    device = targets.assistant.device
    batch_size = min(targets.assistant.settings.batch_size, SHARD_SAMPLES)
    for batch in DataLoader(samples, batch_size, collate_fn=encode, num_workers=workers):  # type: ignore[arg-type]
        with memory_errors(batch.ids, "reduce assistant.model.batch_size, data.max_tokens or model.image_size"):
            inputs = {name: value.to(device) for name, value in batch.inputs.items()}
            hidden, head, cap = targets(batch._replace(inputs=inputs, positions=batch.positions.to(device)))
        if not hidden.isfinite().all():
            broken = [not part.isfinite().all() for part in hidden.split(batch.sizes.tolist())]
            raise NonFiniteError(
                "the assistant's soft targets are",
                [post for post, bad in zip(batch.ids, broken, strict=False) if bad],
                "train the assistant again",
            )
        sizes += batch.sizes.tolist()
        if not top_k:
            parts.append({"hidden": hidden.to(torch.bfloat16).cpu()})
        else:
            for chunk in hidden.split(max(1, 2**25 // len(head))):
                logits = capped(chunk @ head[: targets.vocabulary].T, cap)
                parts.append(top_k_targets(logits, top_k, temperature))
        full = sum(value.nbytes for part in parts for value in part.values()) >= SHARD_BYTES
        if full or len(sizes) + batch_size > SHARD_SAMPLES:
            yield _concatenate(parts), sizes
            parts, sizes = [], []
    if sizes:
        yield _concatenate(parts), sizes


def _concatenate(parts: Sequence[Features]) -> Features:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def top_k_targets(logits: torch.Tensor, top_k: int, temperature: float) -> Features:
    """Return the fields of `TopKTargets` from logits [N, V]: the k most likely tokens of softmax(logits / T).

    Returns:
        `log_q` [N, k], `ids` [N, k] in 32 bits and `log_rest` [N], on the CPU. Without the mass of the other tokens,
        the KL divergence would be biased.
    """
    log_q = (logits.float() / temperature).log_softmax(-1)
    top = log_q.topk(min(top_k, logits.shape[1]))
    rest = log_q.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    targets = {"log_q": top.values, "ids": top.indices.to(torch.int32), "log_rest": rest}
    return {name: value.cpu() for name, value in targets.items()}


def _shards(folder: Path) -> list[Path]:
    """The shards in a folder; other files in it are not ours."""
    return sorted(path for path in folder.glob("*.safetensors") if _SHARD.fullmatch(path.name))


def _read_index(path: Path) -> dict[str, tuple[str, int, int]]:
    """Return the location of each sample of a shard: file name, first row, end row.

    Raises:
        SafetensorError, OSError, KeyError, ValueError: the file is damaged.
    """
    with safe_open(path, "pt") as shard:
        ends: dict[str, int] = json.loads(shard.metadata()["ends"])
    return {name: (path.name, begin, end) for name, (begin, end) in zip(ends, _spans(ends.values()), strict=True)}


def _spans(ends: Any) -> Iterator[tuple[int, int]]:
    begin = 0
    for end in ends:
        yield begin, end
        begin = end


def _is_readable(path: Path) -> bool:
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
def _file_digest(path: Path) -> str:
    return digest(path)

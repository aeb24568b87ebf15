"""Lightning datamodule of all trainings: multitask training batches and labelled validation samples."""

import math
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from random import Random
from typing import Any

import lightning as L
import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from distill.data.stored import StoredPosts, selected
from distill.errors import SettingsError
from distill.models.backbone import Backbone, Features
from distill.task.prompts import Template
from distill.task.sample import MODALITIES, Sample
from distill.training.batches import target_answer
from distill.training.sharded_sampler import ShardedSampler


class LengthGroupedSampler(StatefulDistributedSampler):
    """Groups samples of similar length into batches to reduce padding.

    The shuffled samples are sorted by length within windows of WINDOW batches, then the batches of a window are
    shuffled. Lengths are rounded to steps of STEP times the mean length; samples of equal rounded length stay in random
    order, because samples of exactly the same length are often similar in other respects too.

    A batch here is what one optimizer step consumes over all processes and accumulated batches, so that several
    processes see the same samples per step as one process with the larger batch.
    """

    WINDOW = 16
    STEP = 1 / 8

    def __init__(self, samples: Sequence[Sample], world_size: int, rank: int, seed: int, batch_size: int) -> None:
        super().__init__(samples, world_size, rank, seed=seed)
        self.next_yielded: int | None
        self.samples = samples
        self.batch_size = batch_size * world_size
        lengths = [len(sample.text) + len(sample.rationale or "") for sample in samples]
        mean = max(1.0, sum(lengths) / len(lengths))
        self.lengths = [round((length / mean - 1) / self.STEP) for length in lengths]

    def __iter__(self) -> Iterator[int]:
        self.yielded, self.next_yielded = self.next_yielded or 0, None
        for index in self._epoch_order()[self.rank :: self.num_replicas][self.yielded :]:
            self.yielded += 1
            yield index

    def _epoch_order(self) -> list[int]:
        """Return the sample indices of one epoch over all processes."""
        random, size = Random(f"{self.seed} {self.epoch}"), self.batch_size
        order = random.sample(range(len(self.samples)), len(self.samples))
        order += [order[n % len(order)] for n in range(self.total_size - len(order))]
        mixed: list[int] = []
        for window in _chunks(order, self.WINDOW * size):
            batches = _chunks(sorted(window, key=self.lengths.__getitem__), size)
            short = [batches.pop()] if len(batches[-1]) < size else []  # only the last batch of an epoch may be smaller
            random.shuffle(batches)
            mixed += [n for batch in batches + short for n in batch]
        return mixed


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


class TrainingPosts(Sequence[Sample]):
    """The training samples as the epoch of a sampler sees them: without the modalities that are left out.

    Each modality of a sample is left out with its probability, drawn from seed, epoch and id, so that a resumed run
    draws the same. One that the model is given is always left. A sample without a modality has no rationale, which may
    be about it.

    Args:
        drop: probability of each modality.
        takes: whether the model is given a modality.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        drop: Mapping[str, float],
        sampler: "LengthGroupedSampler | ShardedSampler",
        takes: Callable[[str], bool],
    ) -> None:
        self.samples, self.drop, self.sampler, self.takes = samples, drop, sampler, takes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        sample = self.samples[index]
        if not self.drop or sample.label is None:
            return sample
        random = Random(f"{self.sampler.seed} {self.sampler.epoch} {sample.id}")
        drawn = {name: random.random() for name in MODALITIES}  # of all, so that they do not depend on each other
        present = [name for name in sample.modalities if self.takes(name)]
        left_out = [name for name in present if drawn[name] < self.drop.get(name, 0.0)]
        if left_out and len(left_out) == len(present):
            left_out.remove(random.choice(left_out))
        return replace(sample.without(*left_out), rationale=None) if left_out else sample


class ReasoningDataModule(L.LightningDataModule):
    """Training and validation loaders of one training.

    A training batch is `encode` applied to B samples. A validation batch holds the *classify* prompts of B samples, the
    gold label indices [B], the gold values [B] on the label scale (NaN without a scale), and the ids.

    Training samples without an answer to any of the tasks and without a label target are dropped. The others are
    shuffled by seed and epoch, batched by length and divided among the processes; if they cannot be divided equally, a
    few of them, others in each epoch, are trained twice. The training loader is stateful: a resumed run continues
    within the epoch at the next batch. Posts that are not in memory are shuffled by shard (`ShardedSampler`).
    Validation samples are padded with gold index -1 to the same number in every process.

    Args:
        label_targets: ids of the samples that need no answer, because their label distribution is learned.
        drop: probability with which a modality of a training sample is left out (`TrainingPosts`).

    Raises:
        SettingsError: no training sample has an answer.
    """

    def __init__(
        self,
        backbone: Backbone,
        train: Sequence[Sample],
        validation: Sequence[Sample],
        tasks: Iterable[Template],
        encode: Callable[[Sequence[Sample]], Any],
        *,
        batch_size: int,
        workers: int = 0,
        seed: int = 42,
        label_targets: Container[str] = (),
        drop: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        labels = backbone.labels
        tasks = list(tasks)

        def teaches(sample: Sample) -> bool:
            return sample.id in label_targets or any(target_answer(task, sample, labels) is not None for task in tasks)

        self.train = selected(train, teaches)
        if not self.train:
            raise SettingsError(f"none of the {len(train)} training posts has an answer to {' or '.join(tasks)}")
        self.validation = list(validation)
        self.encode = encode
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed
        self.drop = dict(drop or {})

    def train_dataloader(self) -> StatefulDataLoader:
        world_size, rank = self._processes()
        accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
        sampler: LengthGroupedSampler | ShardedSampler
        if isinstance(self.train, StoredPosts):
            sampler = ShardedSampler(self.train, world_size, rank, self.seed, self.batch_size * accumulated)
        else:
            sampler = LengthGroupedSampler(self.train, world_size, rank, self.seed, self.batch_size * accumulated)
        if self.trainer:  # a resumed run starts its workers before Lightning sets the epoch of the sampler
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        return StatefulDataLoader(
            TrainingPosts(self.train, self.drop, sampler, self.backbone.encoder.media.takes),
            self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            multiprocessing_context=self._workers_context,
            collate_fn=self.encode,
            generator=self._generator(),
        )

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        world_size, rank = self._processes()
        items: list[tuple[Sample, int]] = [(s, self.backbone.labels.index(s.label)) for s in self.validation]
        items += [(items[0][0], -1)] * (-len(items) % world_size)
        return torch.utils.data.DataLoader(
            items[rank::world_size],  # type: ignore[arg-type]
            self.backbone.settings.batch_size,
            num_workers=self.workers,
            multiprocessing_context=self._workers_context,
            collate_fn=self._validation_batch,
            generator=self._generator(),
        )

    def batch_ids(self, batches: Sequence[int], training: bool) -> list[str]:
        """Return the ids of the samples in batches of this process, of the current epoch if it is training."""
        world_size, rank = self._processes()
        if not training:
            samples, size = self.validation[rank::world_size], self.backbone.settings.batch_size
            return [sample.id for n in dict.fromkeys(batches) for sample in samples[n * size : (n + 1) * size]]
        loader: Any = self.trainer.train_dataloader  # type: ignore[union-attr]
        order, size, found = loader.sampler._epoch_order(), self.batch_size, dict[int, list[str]]()
        for place, index in enumerate(islice(order, rank, (max(batches) + 1) * size * world_size, world_size)):
            if place // size in batches:
                found.setdefault(place // size, []).append(self.train[index].id)
        return [name for n in dict.fromkeys(batches) for name in found.get(n, [])]

    def _processes(self) -> tuple[int, int]:
        """Return the number of processes and the rank of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    @property
    def _workers_context(self) -> str | None:
        """How workers start. In the processes of ddp_spawn they would be spawned too, and a loader has no copy."""
        return "fork" if self.workers and sys.platform == "linux" else None

    def _generator(self) -> torch.Generator:
        """Return the generator of a loader; the global generator is left to dropout."""
        return torch.Generator().manual_seed(self.seed)

    def _validation_batch(
        self, items: Sequence[tuple[Sample, int]]
    ) -> tuple[Features, torch.Tensor, torch.Tensor, list[str]]:
        samples, gold = zip(*items, strict=True)
        values = [sample.label if isinstance(sample.label, float) else math.nan for sample in samples]
        features = self.backbone.encode(samples, "classify")
        ids = [sample.id for sample in samples]
        return features, torch.tensor(gold), torch.tensor(values, dtype=torch.float32), ids


def restart_epoch(fit_loop: dict[str, Any]) -> bool:
    """Change the saved state of Lightning's fit loop so that the epoch in progress begins anew; steps stay counted.

    Returns:
        Whether an epoch was in progress; between epochs only the places of the loaders are dropped.
    """
    fit_loop["state_dict"]["combined_loader"] = []
    batches = fit_loop["epoch_loop.batch_progress"]
    if batches["is_last_batch"]:
        return False
    batches["current"] = dict.fromkeys(batches["current"], 0)
    return True

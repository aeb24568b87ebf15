"""One datamodule for every role: multitask batches to train on, labelled posts to judge by."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import Any

import lightning as L
import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from distill.errors import SettingsError
from distill.models.backbone import Backbone, Features
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.training.batches import answer


class ByLengthSampler(StatefulDistributedSampler):
    """Samples of about one length in a batch: sorted within windows of some batches, which are shuffled in turn.

    Lengths that differ by little are left in the order of chance, for samples of one length are often alike in more.
    A batch is what one step of the optimizer takes, over all processes and accumulated batches: so several of them see
    what one with the larger batch would.
    """

    WINDOW = 16  # batches
    STEP = 1 / 8  # of the mean length

    def __init__(self, samples: Sequence[Sample], world: int, rank: int, seed: int, batch_size: int) -> None:
        super().__init__(samples, world, rank, seed=seed)
        self.next_yielded: int | None
        self.samples = samples
        self.batch_size = batch_size * world
        lengths = [len(sample.text) + len(sample.rationale or "") for sample in samples]
        mean = max(1.0, sum(lengths) / len(lengths))
        self.lengths = [round((length / mean - 1) / self.STEP) for length in lengths]

    def __iter__(self) -> Iterator[int]:
        self.yielded, self.next_yielded = self.next_yielded or 0, None
        for index in self._order()[self.rank :: self.num_replicas][self.yielded :]:
            self.yielded += 1
            yield index

    def _order(self) -> list[int]:
        """An epoch of all processes."""
        draw, size = Random(f"{self.seed} {self.epoch}"), self.batch_size
        order = draw.sample(range(len(self.samples)), len(self.samples))
        order += [order[n % len(order)] for n in range(self.total_size - len(order))]
        mixed: list[int] = []
        for window in _parts(order, self.WINDOW * size):
            batches = _parts(sorted(window, key=self.lengths.__getitem__), size)
            short = [batches.pop()] if len(batches[-1]) < size else []  # only an epoch's last batch may be smaller
            draw.shuffle(batches)
            mixed += [n for batch in batches + short for n in batch]
        return mixed


def _parts(items: list[int], size: int) -> list[list[int]]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


class ReasoningDataModule(L.LightningDataModule):
    """Training batches are what `encode` makes of B samples; validation batches are closed *classify* prompts of B
    samples, their gold indices [B], and their values [B] on the labels' scale (NaN where there is none).

    The training loader keeps its place, so that a killed run goes on in the middle of an epoch with the batch it had
    reached. Training samples are shuffled by seed and epoch, batched by length and shared out between processes;
    validation samples are shared out with fillers (gold -1), so that every process has equally many. Training samples
    without an answer to any of the tasks are left out.

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
    ) -> None:
        super().__init__()
        self.backbone = backbone
        labels = backbone.labels
        self.train = [sample for sample in train if any(answer(task, sample, labels) is not None for task in tasks)]
        if not self.train:
            raise SettingsError(f"none of the {len(train)} training posts has an answer to {' or '.join(tasks)}")
        self.validation = list(validation)
        self.encode = encode
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed

    def train_dataloader(self) -> StatefulDataLoader:
        world, rank = self._processes()
        accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
        sampler = ByLengthSampler(self.train, world, rank, self.seed, self.batch_size * accumulated)
        if self.trainer:  # a resumed run starts its workers before Lightning tells the sampler which epoch it is
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        return StatefulDataLoader(
            self.train,
            self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=self.encode,
            generator=self._generator(),
        )

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        world, rank = self._processes()
        items: list[tuple[Sample, int]] = [(s, self.backbone.labels.index(s.label)) for s in self.validation]
        items += [(items[0][0], -1)] * (-len(items) % world)
        return torch.utils.data.DataLoader(
            items[rank::world],  # type: ignore[arg-type]
            self.backbone.settings.batch_size,
            num_workers=self.workers,
            collate_fn=self._validation_batch,
            generator=self._generator(),
        )

    def _processes(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _generator(self) -> torch.Generator:
        """What a loader draws from, so that it does not draw from what dropout draws from."""
        return torch.Generator().manual_seed(self.seed)

    def _validation_batch(self, items: Sequence[tuple[Sample, int]]) -> tuple[Features, torch.Tensor, torch.Tensor]:
        samples, gold = zip(*items, strict=True)
        values = [sample.label if isinstance(sample.label, float) else math.nan for sample in samples]
        features = self.backbone.encode(samples, "classify")
        return features, torch.tensor(gold), torch.tensor(values, dtype=torch.float32)

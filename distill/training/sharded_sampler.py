"""The order in which a training reads posts that are not in memory: by shard, with a seed, in flat memory."""

from collections.abc import Iterator
from itertools import chain, islice

import numpy as np
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from distill.data.stored import StoredPosts


class ShardedSampler(StatefulDistributedSampler):
    """Shuffles shards, then the posts of as many shards as fill a pool, and groups posts of similar length.

    The order follows from seed and epoch alone, so that the number of posts that were given is all that a resumed run
    needs. Within a pool, posts are batched by the size of their lines as `LengthGroupedSampler` does, in windows of
    WINDOW batches; a batch is what one optimizer step consumes over all processes and accumulated batches. The
    processes are given disjoint posts; if they cannot be divided equally, the first ones of an epoch are given twice.

    Memory is that of a pool: 8 bytes for each of POOL posts, or of the largest shard.
    """

    WINDOW = 16
    STEP = 1 / 8
    POOL = 100_000

    def __init__(self, samples: StoredPosts, world_size: int, rank: int, seed: int, batch_size: int) -> None:
        super().__init__(samples, world_size, rank, seed=seed)
        self.next_yielded: int | None
        self.samples = samples
        self.batch_size = batch_size * world_size
        self.mean = max(1.0, float(samples.sizes.sum(dtype=np.int64)) / len(samples))

    def __iter__(self) -> Iterator[int]:
        self.yielded, self.next_yielded = self.next_yielded or 0, None
        first = self.rank + self.yielded * self.num_replicas
        for index in islice(self._epoch_order(), first, None, self.num_replicas):
            self.yielded += 1
            yield index

    def _epoch_order(self) -> Iterator[int]:
        """Yield the numbers of the posts of one epoch over all processes."""
        random, window = np.random.default_rng([self.seed, self.epoch]), self.WINDOW * self.batch_size
        left, first = np.empty(0, np.int64), np.empty(0, np.int64)
        missing = self.total_size - len(self.samples)
        for pool in self._pools(random):
            random.shuffle(pool)
            first = np.concatenate([first, pool[: missing - len(first)]])
            left = np.concatenate([left, pool])
            whole = len(left) // window * window
            for begin in range(0, whole, window):
                yield from self._grouped(left[begin : begin + window], random)
            left = left[whole:]
        yield from self._grouped(np.concatenate([left, np.resize(first, missing)]) if missing else left, random)

    def _pools(self, random: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the numbers of the posts of shards in random order, about POOL at a time."""
        ends = [*self.samples.shards[1:], len(self.samples)]
        ranges = list(zip(self.samples.shards, ends, strict=True))
        pool: list[np.ndarray] = []
        for number in random.permutation(len(ranges)).tolist():
            pool.append(np.arange(*ranges[number], dtype=np.int64))
            if sum(map(len, pool)) >= self.POOL:
                yield np.concatenate(pool)
                pool = []
        if pool:
            yield np.concatenate(pool)

    def _grouped(self, window: np.ndarray, random: np.random.Generator) -> Iterator[int]:
        """Yield the numbers of a window in batches of posts of similar length."""
        lengths = np.round((self.samples.sizes[window] / self.mean - 1) / self.STEP)
        ordered = window[np.argsort(lengths, kind="stable")]
        batches = [ordered[begin : begin + self.batch_size] for begin in range(0, len(ordered), self.batch_size)]
        short = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        random.shuffle(batches)
        return chain.from_iterable(batch.tolist() for batch in batches + short)

"""The order of posts that are not in memory: by shard, by seed and epoch, the same after a stop."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.data.corpus import Corpus
from distill.data.stored import StoredPosts, scan
from distill.models.backbone import Backbone
from distill.training.datamodule import ReasoningDataModule
from distill.training.sharded_sampler import ShardedSampler
from tests.data import shard_files as files
from tests.training.test_datamodule import as_process, ids
from tests.training.training_runs import Killed, Runs, is_equal, state


@pytest.fixture
def posts(tmp_path: Path) -> StoredPosts:
    """101 posts in 10 shards of 10 and one of 1."""
    return stored(tmp_path, files.rows(0, 101))


def stored(folder: Path, rows: list[dict[str, Any]], shard: int = 10) -> StoredPosts:
    found = scan([files.jsonl(folder / "posts.jsonl", rows)], folder, lambda *_: None)
    found.shards = list(range(0, len(found), shard))
    return found


def order(posts: StoredPosts, world_size: int = 1, rank: int = 0, seed: int = 42, epoch: int = 0) -> list[int]:
    sampler = ShardedSampler(posts, world_size, rank, seed, 4)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_an_epoch_has_every_post_once_in_an_order_of_seed_and_epoch(posts: StoredPosts) -> None:
    first = order(posts)
    assert sorted(first) == list(range(101)) and first == order(posts)
    assert len({tuple(order(posts, seed=seed, epoch=epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_shards_are_read_one_after_the_other_if_the_pool_is_small(
    posts: StoredPosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardedSampler, "POOL", 20)
    monkeypatch.setattr(ShardedSampler, "WINDOW", 1)
    found = order(posts)
    assert sorted(found) == list(range(101))
    near = [{index // 10 for index in found[begin : begin + 20]} for begin in range(0, 80)]
    assert max(map(len, near)) <= 5 and min(map(len, near)) >= 2, "neighbours are from few of the 11 shards"
    shards = list(dict.fromkeys(index // 10 for index in found))
    assert shards != sorted(shards)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_read_disjoint_posts_that_are_all_together(tmp_path: Path, world_size: int) -> None:
    posts = stored(tmp_path, files.rows(0, 1009), 100)
    parts = [order(posts, world_size, rank) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    counts = Counter(index for part in parts for index in part)
    assert set(counts) == set(range(1009)) and counts.total() - 1009 == -1009 % world_size
    whole = list(ShardedSampler(posts, 1, 0, 42, 4 * world_size))
    together = [index for turn in zip(*parts, strict=True) for index in turn]
    assert together[:700] == whole[:700], "a step has the posts that it has in one process"


def test_batches_have_similar_lengths(tmp_path: Path) -> None:
    rows = [{"id": str(n), "text": "x" * (n * 37 % 2000 + 1), "label": "neutral"} for n in range(640)]
    posts = stored(tmp_path, rows)
    found = order(posts)
    spans = [posts.sizes[found[begin : begin + 4]] for begin in range(0, 640, 4)]
    assert sum(int(span.max() * len(span)) for span in spans) < 1.15 * posts.sizes.sum()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_continues_at_the_next_batch(
    backbone: Backbone, postcards: Corpus, posts: StoredPosts, workers: int
) -> None:
    def module() -> ReasoningDataModule:
        data = ReasoningDataModule(
            backbone, posts, postcards.validation, ["classify"], list, batch_size=8, workers=workers
        )
        return as_process(data, 0, 1, 3)

    assert isinstance(module().train, StoredPosts)
    loader = module().train_dataloader()
    stream = iter(loader)
    begun = [next(stream) for _ in range(5)]
    place, rest = loader.state_dict(), ids(stream)
    resumed = module().train_dataloader()
    resumed.load_state_dict(place)
    assert ids(resumed) == rest and len(begun) + len(rest) == 13
    assert sorted(name for batch in [*ids(begun), *rest] for name in batch) == sorted(post.id for post in posts)


def test_a_training_killed_within_an_epoch_ends_as_one_without_a_stop(
    model_folder: Path, postcards: Corpus, tmp_path: Path
) -> None:
    """24 posts in shards of 5, batches of 4: killed after 3 of the 6 steps of the second epoch."""
    from distill.data import jsonl

    rows = [jsonl.to_row(post, postcards.root) for post in postcards.train[:24]]
    posts = stored(tmp_path, json.loads(json.dumps(rows)), 5)
    posts.root = postcards.root
    corpus = Corpus(posts, postcards.validation, postcards.test, [], postcards.root)

    class Streamed(Runs):
        def run(self, folder: Path, *, kill: Any = None, **arguments: Any) -> Any:
            self.corpus.train = posts
            return super().run(folder, kill=kill, **arguments)

    runs = Streamed(model_folder, corpus)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = {"max_epochs": 2, "val_check_interval": 3}
    runs.run(whole, **arguments)

    def kill(step: int) -> None:
        if step == 9 + 1:
            raise Killed

    with pytest.raises(Killed):
        runs.run(stopped, kill=kill, **arguments)
    torch.manual_seed(5)
    runs.run(stopped, **arguments)
    assert is_equal(state(whole), state(stopped))

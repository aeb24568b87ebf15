"""The loaders: every sample once per epoch, division among processes, resumption within an epoch."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distill.data.corpus import Corpus
from distill.errors import SettingsError
from distill.models.backbone import Backbone
from distill.task.sample import Sample
from distill.training.datamodule import LengthGroupedSampler, ReasoningDataModule, TrainingPosts


def module(
    backbone: Backbone, corpus: Corpus, train: int = 10, validation: int = 7, **options: Any
) -> ReasoningDataModule:
    options = {"batch_size": 4, "tasks": {"classify": 1.0}} | options
    tasks = options.pop("tasks")
    encode = options.pop("encode", list)  # the samples themselves
    return ReasoningDataModule(backbone, corpus.train[:train], corpus.validation[:validation], tasks, encode, **options)


def as_process(data: ReasoningDataModule, rank: int, world_size: int, epoch: int = 0) -> ReasoningDataModule:
    loop = SimpleNamespace(epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=epoch)))
    data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, fit_loop=loop, accumulate_grad_batches=1)  # type: ignore[assignment]
    return data


def ids(batches: Any) -> list[list[str]]:
    return [[sample.id for sample in batch] for batch in batches]


def test_an_epoch_has_every_sample_once_in_an_order_that_depends_on_seed_and_epoch(
    backbone: Backbone, postcards: Corpus
) -> None:
    epochs = [ids(as_process(module(backbone, postcards), 0, 1, epoch).train_dataloader()) for epoch in (0, 1, 0)]
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    for epoch in epochs:
        found = [identity for batch in epoch for identity in batch]
        assert sorted(found) == sorted(sample.id for sample in postcards.train[:10])
    assert epochs[0] != epochs[1] and epochs[0] == epochs[2]
    other = ids(as_process(module(backbone, postcards, seed=1), 0, 1).train_dataloader())
    assert other != epochs[0]


def test_two_processes_divide_the_batches_of_one_process_with_twice_the_batch_size(
    backbone: Backbone, postcards: Corpus
) -> None:
    whole = ids(as_process(module(backbone, postcards, 16, batch_size=8), 0, 1).train_dataloader())
    parts = [ids(as_process(module(backbone, postcards, 16), rank, 2).train_dataloader()) for rank in (0, 1)]
    assert [sorted(one + two) for one, two in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]


def test_batches_have_similar_lengths_in_random_order(backbone: Backbone, postcards: Corpus) -> None:
    generator = random.Random(0)
    rows = [replace(postcards.train[0], id=str(n), text="x" * generator.randrange(1, 2000)) for n in range(500)]
    data = ReasoningDataModule(backbone, rows, postcards.validation, ["classify"], list, batch_size=8)
    batches = [[len(sample.text) for sample in batch] for batch in as_process(data, 0, 1).train_dataloader()]
    assert [len(batch) for batch in batches] == [8] * 62 + [4]
    padded = sum(max(batch) * len(batch) for batch in batches) / sum(map(sum, batches))
    shuffled = [max(generator.sample(rows, 8), key=lambda sample: len(sample.text)) for _ in range(500)]
    unsorted = sum(len(sample.text) for sample in shuffled) / sum(len(sample.text) for sample in rows)
    assert padded < 1.2 and unsorted > 1.6
    longest = [max(batch) for batch in batches]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.4, "lengths do not rise or fall over the epoch"


def test_small_differences_in_length_do_not_sort(backbone: Backbone, postcards: Corpus) -> None:
    """Posts of two nearly equal lengths must stay mixed."""
    rows = [replace(postcards.train[0], id=str(n), text="x" * (300 + n % 2 * 9)) for n in range(320)]
    data = ReasoningDataModule(backbone, rows, postcards.validation, ["classify"], list, batch_size=16)
    batches = [[len(sample.text) for sample in batch] for batch in as_process(data, 0, 1).train_dataloader()]
    assert all(3 <= batch.count(300) <= 13 for batch in batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_from_its_saved_state(backbone: Backbone, postcards: Corpus, workers: int) -> None:
    data = module(backbone, postcards, 20, workers=workers)
    loader = data.train_dataloader()
    stream = iter(loader)
    for _ in range(2):
        next(stream)
    state = loader.state_dict()
    rest = ids(stream)
    resumed = data.train_dataloader()
    resumed.load_state_dict(state)
    assert ids(resumed) == rest and len(rest) == 3


def test_loaders_do_not_use_the_global_generator(backbone: Backbone, postcards: Corpus) -> None:
    data = module(backbone, postcards)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_has_every_sample_once_and_the_same_number_in_every_process(
    backbone: Backbone, postcards: Corpus, world_size: int
) -> None:
    golds = []
    for rank in range(world_size):
        loader = as_process(module(backbone, postcards), rank, world_size).val_dataloader()
        golds.append(torch.cat([gold for _, gold, _, _ in loader]).tolist())
    assert {len(gold) for gold in golds} == {-(-7 // world_size)}
    found = [label for gold in golds for label in gold if label >= 0]
    expected = [backbone.labels.index(sample.label) for sample in postcards.validation[:7]]
    assert sorted(found) == sorted(expected)
    assert sum(gold.count(-1) for gold in golds) == -7 % world_size


def test_validation_batches_are_classify_prompts_without_answers(backbone: Backbone, postcards: Corpus) -> None:
    features, gold, values, _ = next(iter(module(backbone, postcards).val_dataloader()))
    assert "labels" not in features and len(gold) == 7
    assert values.isnan().all(), "named labels have no values"
    expected = backbone.encode(postcards.validation[:7], "classify")
    assert torch.equal(features["input_ids"], expected["input_ids"])


def test_samples_without_an_answer_are_dropped(backbone: Backbone, postcards: Corpus) -> None:
    a, b, c = postcards.train[:3]
    rows: list[Sample] = [a, replace(b, rationale=None), replace(c, rationale=None, label=None)]
    kept = ReasoningDataModule(
        backbone, rows, postcards.validation, {"reason": 1.0, "classify": 1.0}, list, batch_size=2
    ).train
    assert [sample.id for sample in kept] == [a.id, b.id]
    with pytest.raises(SettingsError, match="none of the 1 training posts has an answer to reason or classify"):
        ReasoningDataModule(backbone, rows[2:], postcards.validation, ["reason", "classify"], list, batch_size=2)


CLIP = Sample(
    "a", "words", (Path("i.png"),), label="neutral", rationale="why", video=Path("v.mp4"), audio=Path("v.mp4")
)


def dropped(samples: list[Sample], drop: dict[str, float], epoch: int = 0, ignored: str = "") -> list[Sample]:
    sampler = LengthGroupedSampler(samples, 1, 0, 7, 4)
    sampler.set_epoch(epoch)
    return list(TrainingPosts(samples, drop, sampler, lambda name: name != ignored))


def test_modalities_are_left_out_with_their_probabilities_independently_and_anew_in_each_epoch() -> None:
    posts = [replace(CLIP, id=str(n)) for n in range(2000)]
    first, second = (dropped(posts, {"audio": 0.3, "text": 0.1}, epoch) for epoch in (0, 1))
    assert first == dropped(posts, {"audio": 0.3, "text": 0.1}), "a resumed run draws the same"
    without = [[sample.audio is None for sample in epoch] for epoch in (first, second)]
    assert np.mean(without[0]) == pytest.approx(0.3, abs=0.03) and without[0] != without[1]
    assert np.mean([sample.text == "" for sample in first]) == pytest.approx(0.1, abs=0.02)
    both = np.mean([sample.text == "" and sample.audio is None for sample in first])
    assert both == pytest.approx(0.03, abs=0.015)
    assert all(sample.images and sample.video and sample.label == "neutral" for sample in first)
    assert all((sample.rationale is None) == (sample.modalities != CLIP.modalities) for sample in first)


def test_one_modality_is_always_left_and_posts_without_a_label_stay_whole() -> None:
    drop = dict.fromkeys(("text", "images", "video", "audio"), 0.99)
    posts = [replace(CLIP, id=str(n)) for n in range(200)]
    found = dropped(posts, drop)
    assert all(sample.modalities for sample in found)
    assert {sample.modalities for sample in found} >= {(name,) for name in drop}
    assert all(set(post.modalities) - {"audio"} for post in dropped(posts, drop, ignored="audio"))
    unheard = Sample("s", "", label="neutral", audio=Path("a.wav"))
    assert dropped([unheard], drop, ignored="audio") == [unheard]
    assert dropped([Sample("t", "words", label="neutral")], drop) == [Sample("t", "words", label="neutral")]
    assert dropped([replace(CLIP, label=None)], drop) == [replace(CLIP, label=None)]


def test_a_training_batch_has_the_posts_without_what_was_left_out(backbone: Backbone, postcards: Corpus) -> None:
    data = as_process(module(backbone, postcards, drop={"images": 0.5}), 0, 1)
    samples = [sample for batch in data.train_dataloader() for sample in batch]
    assert 0 < sum(not sample.images for sample in samples) < len(samples)

"""Splits drawn from the training rows: stratified, seeded, without leakage."""

import random
from collections import Counter
from pathlib import Path

import pytest

from distill.data.split import stratified_split
from distill.task.sample import Sample

PARTS = {"validation": 0.1, "test": 0.2}


def posts(count: int = 1000) -> list[Sample]:
    labels = ("neutral",) * 6 + ("positive",) * 3 + ("negative",)
    return [Sample(f"p{i}", f"text {i}", label=labels[i % 10]) for i in range(count)]


def ids(parts: dict[str, list[Sample]]) -> dict[str, set[str]]:
    return {part: {sample.id for sample in samples} for part, samples in parts.items()}


def test_splits_are_stratified_and_complete() -> None:
    parts = stratified_split(posts(), PARTS, seed=1)
    counts = {part: Counter(sample.label for sample in samples) for part, samples in parts.items()}
    assert counts["validation"] == {"neutral": 60, "positive": 30, "negative": 10}
    assert counts["test"] == {"neutral": 120, "positive": 60, "negative": 20}
    assert sorted(sample.id for samples in parts.values() for sample in samples) == sorted(s.id for s in posts())


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_rows() -> None:
    samples = posts()
    shuffled = random.Random(0).sample(samples, len(samples))
    assert ids(stratified_split(samples, PARTS, seed=1)) == ids(stratified_split(shuffled, PARTS, seed=1))
    first, second = (ids(stratified_split(samples, PARTS, seed=seed))["test"] for seed in (1, 2))
    assert len(first & second) < 80  # 40 expected by chance of 200


def test_posts_that_share_a_text_or_an_image_stay_together(tmp_path: Path) -> None:
    rng = random.Random(0)
    for i in range(60):
        (tmp_path / f"{i}.jpg").write_bytes(f"image {i // 2}".encode())  # each image exists under two names
    labels = ("negative", "neutral", "positive")
    samples = [
        Sample(f"p{i}", rng.choice(["One  Text", f"text {i // 3}"]) if i < 30 else f"TEXT {i}",
               (tmp_path / f"{rng.randrange(60)}.jpg",) if i % 4 else (), label=rng.choice(labels))
        for i in range(300)
    ]  # fmt: skip
    parts = stratified_split(samples, PARTS, seed=3)
    seen: dict[object, str] = {}
    for part, members in parts.items():
        for sample in members:
            keys = [image.read_bytes() for image in sample.images] + [" ".join(sample.text.casefold().split())]
            for key in keys:
                assert seen.setdefault(key, part) == part
    assert len(parts["validation"]) >= 15 and len(parts["test"]) >= 30


def test_a_placeholder_does_not_decide_the_split(tmp_path: Path) -> None:
    (tmp_path / "none.jpg").write_bytes(b"grey")
    (tmp_path / "real.jpg").write_bytes(b"photo")
    samples = [
        Sample(f"p{i}", f"text {i}" if i % 3 else "[deleted]", (tmp_path / ("real.jpg" if i < 4 else "none.jpg"),),
               label="ab"[i % 2])
        for i in range(200)
    ]  # fmt: skip
    parts = stratified_split(samples, PARTS, seed=0)
    assert (len(parts["validation"]), len(parts["test"])) == (20, 40)
    assert len({part for part, members in ids(parts).items() if members & {"p0", "p1", "p2", "p3"}}) == 1


def test_small_groups_reach_the_exact_split_sizes() -> None:
    samples = [Sample(f"p{i}", f"text {i // 3}" if i < 600 else f"single {i}", label="ab"[i % 2]) for i in range(1000)]
    parts = stratified_split(samples, PARTS, seed=0)
    assert (len(parts["validation"]), len(parts["test"])) == (100, 200)
    assert Counter(sample.label for sample in parts["test"]) == {"a": 100, "b": 100}


def test_groups_are_transitive(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "b.jpg").write_bytes(b"b")
    chain = [
        Sample("1", "x", (tmp_path / "a.jpg",), label="a"),
        Sample("2", "y", (tmp_path / "a.jpg", tmp_path / "b.jpg"), label="a"),
        Sample("3", "Y ", (), label="a"),
        Sample("4", "z", (tmp_path / "b.jpg",), label="a"),
    ]
    for seed in range(20):
        parts = stratified_split(chain, {"test": 0.5}, seed=seed)
        assert [len(parts["train"]), len(parts["test"])] == [4, 0]  # the group cannot be divided


def test_groups_with_unlabelled_posts_stay_in_train() -> None:
    labelled = posts(200)
    unlabelled_copies = [Sample(f"u{i}", f"text {i}") for i in range(20)]
    unlabelled_others = [Sample(f"v{i}", f"other {i}") for i in range(300)]
    parts = stratified_split([*labelled, *unlabelled_copies, *unlabelled_others], PARTS, seed=0)
    assert all(sample.label is not None for sample in parts["validation"] + parts["test"])
    assert {f"p{i}" for i in range(20)} | {s.id for s in unlabelled_copies + unlabelled_others} <= ids(parts)["train"]
    assert (len(parts["validation"]), len(parts["test"])) == (20, 40)


def test_continuous_labels_are_stratified_by_the_nearest_integer() -> None:
    values = [random.Random(i).uniform(-3, 3) for i in range(600)]
    parts = stratified_split(
        [Sample(f"p{i}", f"text {i}", label=v) for i, v in enumerate(values)], {"test": 0.2}, seed=0
    )
    total = Counter(round(value) for value in values)
    taken = Counter(round(float(sample.label or 0.0)) for sample in parts["test"])
    for stratum, count in total.items():
        assert taken[stratum] == pytest.approx(0.2 * count, abs=0.5)

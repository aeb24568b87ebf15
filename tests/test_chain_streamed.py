"""A whole chain on shards in an object store, with pictures that are fetched from there."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill.chain import run
from distill.data.postcards import PostcardSettings, corpus
from distill.errors import SettingsError
from tests import micro
from tests.s3_server import S3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The postcards, with the training split as two shards."""
    folder = tmp_path_factory.mktemp("postcards") / "data"
    corpus(PostcardSettings(**micro.RECORDED["data"]["postcards"])).generate(folder)
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    for number in (0, 1):
        (folder / f"train-{number}.jsonl").write_text("".join(lines[number::2]))
    return folder


def recipe(folder: Path, root: str, **changes: Any) -> Path:
    return micro.write(
        folder,
        {name: section for name, section in micro.RECORDED.items() if name not in ("evaluate", "export")},
        data={
            "source": "stream", "root": root, "train": ["train-*.jsonl"], "validation": ["validation.jsonl"],
            "test": ["test.jsonl"], "stream": {"cache": str(folder / "cache")},
        },
        **changes,
    )  # fmt: skip


def test_a_chain_runs_on_a_bucket_without_a_copy_of_it(data: Path, s3: S3, tmp_path: Path) -> None:
    bucket = s3.bucket("chain")
    s3.files().put(str(data), f"{bucket}/posts", recursive=True)
    path = recipe(tmp_path, f"{bucket}/posts")
    first = micro.read(path)
    ran = run(first)
    assert ran == ["annotate", "assistant", "augment", "student"]
    summary = json.loads((first.folder / "annotate" / "summary.json").read_text())
    assert summary["recorded"] == 27
    rows = [json.loads(line) for line in (first.folder / "annotate" / "rationales.jsonl").open()]
    images = {image for row in rows for image in row["images"]}
    assert len(images) == 27 and all(name.startswith("images/") for name in images)
    assert run(micro.read(path)) == [], "nothing has changed"
    shutil.rmtree(tmp_path / "cache")
    assert run(micro.read(path)) == [], "the index is only a cache"
    other = (data / "train-0.jsonl").read_bytes().replace(b'"train-', b'"new-')
    s3.put(f"{bucket}/posts/train-2.jsonl", other)
    assert run(micro.read(path), until="annotate") == ["annotate"], "another shard is other data"


def test_workers_fetch_pictures_and_train_as_on_files_of_this_machine(data: Path, s3: S3, tmp_path: Path) -> None:
    bucket = s3.bucket("same")
    s3.files().put(str(data), f"{bucket}/posts", recursive=True)
    losses = []
    for name, root, workers in (("local", str(data), 0), ("remote", f"{bucket}/posts", 2)):
        folder = tmp_path / name
        folder.mkdir()
        loaded = micro.read(recipe(folder, root), "--assistant.workers", str(workers))
        run(loaded, until="annotate")
        for media in (folder / "cache").rglob("fetched-media"):
            shutil.rmtree(media)
        run(loaded, until="assistant")
        with (loaded.folder / "assistant" / "metrics.csv").open() as file:
            losses.append([(row["step"], row["train/loss"], row["val/accuracy"]) for row in csv.DictReader(file)])
    assert losses[0] == losses[1] and len(losses[0]) > 6
    assert len(list((tmp_path / "remote" / "cache").rglob("images/train-*"))) == 27


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--data.teacher", '["more.jsonl"]'), "data.teacher"),
        (("--student.distillation.label_weight", "0.5"), "student.distillation.label_weight"),
        (("--student.distillation.soft_targets", "cached"), "student.distillation.soft_targets: cached"),
        (("--assistant.labelled_posts", "true"), "assistant.labelled_posts"),
        (("--refine.max_steps", "1"), "refine"),
    ],
)
def test_what_would_hold_all_posts_in_memory_is_refused(tmp_path: Path, flags: tuple[str, str], name: str) -> None:
    path = recipe(tmp_path, "s3://unused")
    with pytest.raises(SettingsError, match=rf"^{name} cannot be used with data.source stream; remove it$"):
        micro.read(path, *flags)

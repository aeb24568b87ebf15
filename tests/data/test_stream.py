"""Source `stream`: shards of all kinds, what is dropped, and pictures that are fetched again."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.data import media_cache, stream_corpus
from distill.data.corpus import Corpus, read_corpus
from distill.data.images import ImageError, decode
from distill.data.source import DataSettings, data_fingerprint
from distill.data.stored import StoredPosts
from distill.data.stream import QUARANTINED, StreamSettings
from distill.errors import RunError, SettingsError
from distill.task.labels import LabelSpace, Scale, TaskSettings
from tests.data import shard_files as files
from tests.s3_server import S3

Read = Callable[..., Corpus]


@pytest.fixture
def read(tmp_path: Path, labels: LabelSpace) -> Read:
    """Reads shards of the training split beside small files of the others."""
    for split in ("validation", "test"):
        files.jsonl(tmp_path / "data" / f"{split}.jsonl", [{"id": split, "text": split, "label": "neutral"}])

    def read(*train: str, root: str | None = None, **changes: Any) -> Corpus:
        return read_corpus(settings(tmp_path, *train, root=root, **changes), labels)

    return read


def settings(folder: Path, *train: str, root: str | None = None, stream: Any = None, **changes: Any) -> DataSettings:
    data = folder / "data"
    fields = {"validation": [str(data / "validation.jsonl")], "test": [str(data / "test.jsonl")]} | changes
    options = StreamSettings(**{"cache": str(folder / "cache")} | (stream or {}))
    return DataSettings(source="stream", root=root or str(data), train=list(train), stream=options, **fields)


def ids(corpus: Corpus) -> list[str]:
    return [sample.id for sample in corpus.train]


def test_jsonl_parquet_and_webdataset_give_the_same_posts(read: Read, tmp_path: Path) -> None:
    rows, data = files.rows(0, 10), tmp_path / "data"
    files.jsonl(data / "a.jsonl", rows)
    files.parquet(data / "a.parquet", rows)
    files.webdataset(data / "a.tar", [{"json": json.dumps(row).encode()} for row in rows])
    found = [[(s.id, s.text, s.label) for s in read(f"a.{suffix}").train] for suffix in ("jsonl", "parquet", "tar")]
    assert found[0] == found[1] == found[2] == [(row["id"], row["text"], row["label"]) for row in rows]


def test_posts_stay_in_the_order_of_the_shards_and_are_a_sequence(read: Read, tmp_path: Path) -> None:
    for shard in range(3):
        files.jsonl(tmp_path / "data" / f"train-{shard}.jsonl", files.rows(shard, 5))
    corpus = read("train-*.jsonl")
    posts = corpus.train
    assert isinstance(posts, StoredPosts) and posts.shards == [0, 5, 10]
    assert ids(corpus) == [f"{shard}-{n}" for shard in range(3) for n in range(5)]
    assert posts[-1].id == "2-4" and [post.id for post in posts[4:6]] == ["0-4", "1-0"]
    kept = posts.selected(lambda post: post.id[2] in "13" and post.id[0] != "1")
    assert [post.id for post in kept] == ["0-1", "0-3", "2-1", "2-3"] and kept.shards == [0, 2]


def test_a_row_that_cannot_be_used_is_dropped_with_its_file_and_number(read: Read, tmp_path: Path) -> None:
    data = tmp_path / "data"
    bad = [
        "{broken",
        {"id": "x", "text": "no such label", "label": "happy"},
        {"id": "y", "text": "a", "image": "gone.png"},
    ]
    files.jsonl(data / "train-0.jsonl", [*files.rows(0, 3), *bad])
    files.jsonl(
        data / "train-1.jsonl",
        [*files.rows(0, 1), {"id": "z", "text": "b", "image": "../../etc/passwd"}, *files.rows(1, 1)],
    )
    (data / "validation.jsonl").write_text(json.dumps(files.rows(0, 2)[1]) + "\n")
    corpus = read("train-*.jsonl")
    assert ids(corpus) == ["0-0", "0-2", "1-0"]
    found = {(row.file, row.row): row.reason for row in corpus.dropped}
    assert found[("train-0.jsonl", 4)].startswith("is not valid JSON")
    assert "happy" in found[("train-0.jsonl", 5)] and found[("train-0.jsonl", 6)] == "image gone.png is missing"
    assert found[("train-1.jsonl", 1)] == "id '0-0' is already used by train-0.jsonl row 1"
    assert "outside the data root" in found[("train-1.jsonl", 2)]
    assert found[("train-0.jsonl", 2)].endswith("with the same content"), "it repeats a validation post"


def test_all_dropped_rows_are_counted_and_the_first_are_listed(read: Read, tmp_path: Path) -> None:
    files.jsonl(tmp_path / "data" / "a.jsonl", [*files.rows(0, 1), *["{"] * (QUARANTINED + 7)])
    corpus = read("a.jsonl")
    assert len(corpus.dropped) == QUARANTINED and corpus.unlisted == 7 and len(corpus.train) == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_pictures_are_fetched_from_the_bucket_whenever_they_are_not_here(
    read: Read, tmp_path: Path, s3: S3, kind: str
) -> None:
    bucket, data = s3.bucket(f"pictures-{kind}"), tmp_path / "data"
    contents = [files.picture(10 * n) for n in range(10)]
    rows: list[dict[str, Any]] = files.rows(0, 10)
    if kind == "jsonl":
        path = files.jsonl(data / "a.jsonl", [row | {"image": f"images/{n}.png"} for n, row in enumerate(rows)])
        for n, content in enumerate(contents):
            s3.put(f"{bucket}/posts/images/{n}.png", content)
    elif kind == "parquet":
        cells = [{"bytes": content, "path": "x.png"} for content in contents]
        path = files.parquet(data / "a.parquet", [row | {"image": c} for row, c in zip(rows, cells, strict=True)])
    else:
        samples = [{"json": json.dumps(r).encode(), "png": c} for r, c in zip(rows, contents, strict=True)]
        path = files.webdataset(data / "a.tar", samples)
    s3.put(f"{bucket}/posts/{path.name}", path.read_bytes())
    corpus = read(path.name, root=f"{bucket}/posts")
    assert len(corpus.train) == 10 and media_cache.FOLDER in corpus.root.parts
    for _ in range(2):
        shades = [decode(post.images[0]).getpixel((0, 0)) for post in corpus.train]
        assert shades == [(10 * n, 0, 0) for n in range(10)]
        shutil.rmtree(corpus.root)
    s3.files().rm(f"{bucket}/posts", recursive=True)
    with pytest.raises((ImageError, SettingsError), match=r"is missing|does not exist"):
        decode(corpus.train[0].images[0])


def test_fetched_pictures_take_no_more_than_the_limit(tmp_path: Path, s3: S3) -> None:
    folder = tmp_path / "source" / media_cache.FOLDER
    folder.mkdir(parents=True)
    (folder.parent / media_cache.SOURCE).write_text(json.dumps({"root": "unused", "shards": {}, "cache_gb": 1e-5}))
    for n in range(50):
        media_cache.put(folder, f"a/{n}", bytes(1000))
        os.utime(folder / "a" / str(n), (n, n))
        if n == 5:
            media_cache.fetch(folder / "a" / "0")  # used again
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 11_000
    assert (folder / "a" / "49").exists() and (folder / "a" / "0").exists() and not (folder / "a" / "1").exists()


def test_columns_of_the_shards_may_have_other_names_and_rows_no_id(read: Read, tmp_path: Path) -> None:
    rows = [{"sentence": row["text"], "sentiment": row["label"]} for row in files.rows(0, 3)]
    files.parquet(tmp_path / "data" / "part-0.parquet", rows)
    corpus = read("part-0.parquet", stream={"columns": {"text": "sentence", "label": "sentiment"}})
    assert ids(corpus) == ["part-0:1", "part-0:2", "part-0:3"] and corpus.train[1].label == "neutral"


def test_labels_on_a_scale_are_numbers(tmp_path: Path, read: Read) -> None:
    scale = TaskSettings(scale=Scale()).label_space
    values = {"validation": 1, "test": -2}
    for split, value in values.items():
        files.jsonl(tmp_path / "data" / f"{split}.jsonl", [{"id": split, "text": split, "label": value}])
    rows = [{"id": str(n), "text": f"post {n}", "label": label} for n, label in enumerate([1.5, "-0.25", None, "high"])]
    files.jsonl(tmp_path / "data" / "a.jsonl", rows)
    corpus = read_corpus(settings(tmp_path, "a.jsonl"), scale)
    assert [post.label for post in corpus.train] == [1.5, -0.25, None] and corpus.test[0].label == -2.0
    assert corpus.dropped[0].reason == "label 'high' is not a number"


def test_what_cannot_be_read_is_one_sentence_that_names_it(read: Read, tmp_path: Path, s3: S3) -> None:
    data, bucket = tmp_path / "data", s3.bucket("wrong")
    files.jsonl(data / "a.jsonl", files.rows(0, 2))
    files.parquet(data / "b-0.parquet", files.rows(0, 2))
    files.parquet(data / "b-1.parquet", [{"id": "q", "text": "without a label"}])
    files.parquet(data / "c.parquet", [{"sentence": "other names"}])
    (data / "d.tar").write_bytes(b"no tar" * 200)
    (data / "e.csv").write_text("text\na\n")
    files.jsonl(data / "f.jsonl", ["{", "{"])
    cases = {
        "missing.jsonl": f"data.train: {data}/missing.jsonl does not exist",
        "*.zip": f"data.train: {data}/*.zip matches no file",
        f"{bucket}/a.jsonl": "data.train: s3://wrong/a.jsonl does not exist",
        "s3://no-such-bucket/a.jsonl": "data.train: s3://no-such-bucket/a.jsonl has no such bucket",
        "gs://bucket/a.jsonl": "pip install 'distill[gcs]'",
        "ftp2://host/a.jsonl": "Protocol not known",
        "c.parquet": "c.parquet has no column text, image, images, video or audio; its columns are sentence",
        "d.tar": "d.tar is not a complete tar file",
        "e.csv": "must end in .jsonl, .parquet or .tar",
        "f.jsonl": "data.train: none of the rows of f.jsonl can be used; row 1: is not valid JSON",
        "hub:": "data.train: hub: is no name of a data set",
    }
    for name, message in cases.items():
        with pytest.raises((SettingsError, RunError)) as error:
            read(name)
        assert message in str(error.value) and "\n" not in str(error.value), name
    with pytest.raises(SettingsError, match=r"b-1.parquet has the columns id, text; .*b-0.parquet has id, label, text"):
        read("b-*.parquet")
    with pytest.raises(SettingsError, match=r"^data.test is empty; with data.source stream it takes at least one"):
        read("a.jsonl", test=[])


def test_without_credentials_nothing_is_read(
    tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch, read: Read
) -> None:
    bucket = s3.bucket("closed")
    s3.put(f"{bucket}/a.jsonl", b"{}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3.files().clear_instance_cache()
    with pytest.raises(SettingsError, match=r"^data.train: s3://closed/a.jsonl: there are no credentials"):
        read(f"{bucket}/a.jsonl")
    s3.files().clear_instance_cache()


def test_a_kill_while_the_index_is_written_leaves_none(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.jsonl(tmp_path / "data" / "a.jsonl", files.rows(0, 600))
    check, calls = stream_corpus.check_entries, []

    def killed(*arguments: Any) -> None:
        calls.append(0)
        if len(calls) == 3:  # after the other splits and a chunk
            raise KeyboardInterrupt
        check(*arguments)

    monkeypatch.setattr(stream_corpus, "check_entries", killed)
    with pytest.raises(KeyboardInterrupt):
        read("a.jsonl")
    monkeypatch.setattr(stream_corpus, "check_entries", check)
    assert len(read("a.jsonl").train) == 600
    monkeypatch.setattr(stream_corpus, "_chunks", None)
    assert len(read("a.jsonl").train) == 600, "the index is read once"


def test_the_fingerprint_follows_the_shards_not_the_folder(tmp_path: Path, read: Read) -> None:
    path = files.jsonl(tmp_path / "data" / "a.jsonl", files.rows(0, 3))
    first = data_fingerprint(settings(tmp_path, "a.jsonl"))
    assert data_fingerprint(settings(tmp_path, "a.jsonl", stream={"cache": str(tmp_path / "other")})) == first
    files.jsonl(path, files.rows(0, 4))
    assert data_fingerprint(settings(tmp_path, "a.jsonl")) != first

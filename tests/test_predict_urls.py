"""`distill predict` from and to an object store: the same rows as on this machine, whole or not at all."""

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.commands import Command
from tests.data import shard_files as files
from tests.s3_server import S3
from tests.test_predict import ended_by, posts, root, without_time, write_jsonl

__all__ = ["posts", "root"]  # fixtures


def test_shards_in_a_bucket_are_labelled_as_files_here_are(
    folder: Path,
    posts: list[dict],
    root: Path,
    s3: S3,
    tmp_path: Path,
    distill: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = s3.bucket("predict")
    options = ("predict", "--run", folder)
    write_jsonl(tmp_path / "all.jsonl", posts)
    assert (
        distill(
            *options, "--input", tmp_path / "all.jsonl", "--images", root, "--output", tmp_path / "here.jsonl"
        ).status
        == 0
    )
    expected = [json.loads(line) for line in (tmp_path / "here.jsonl").open()]

    for name in {name for post in posts for name in post["images"]}:
        s3.put(f"{bucket}/new/{name}", (root / name).read_bytes())
    for shard, rows in enumerate((posts[:4], [*posts[4:], {"id": "bad"}])):
        s3.put(f"{bucket}/new/part-{shard}.jsonl", write_jsonl(tmp_path / "part.jsonl", rows).read_bytes())
    monkeypatch.chdir(tmp_path)
    output = f"{bucket}/labels/out.parquet"
    call = (*options, "--input", f"{bucket}/new/part-*.jsonl", "--output", output)
    with ended_by(OSError(28, "no space")):
        assert distill(*call).status == 1
    s3.files().invalidate_cache()
    assert not s3.files().exists(output)
    result = distill(*call)
    assert (result.status, result.stdout.splitlines()[0]) == (0, f"wrote 9 rows to {output}"), result.stderr
    found = pq.read_table(io.BytesIO(s3.files().cat_file(output))).to_pylist()
    assert without_time(found) == without_time(expected)
    quarantine = json.loads(s3.files().cat_file(f"{bucket}/labels/out.quarantine.jsonl"))
    assert quarantine["row"] == 10 and "there is no text" in quarantine["problem"]
    assert not (tmp_path / ".out.parquet.parts").exists()
    assert distill(*call).error == f"--output: {output} exists; delete it or name another file"
    missing = distill(*options, "--input", f"{bucket}/nothing.jsonl", "--output", "x.jsonl")
    assert missing.error == f"--input: {bucket}/nothing.jsonl does not exist"


def test_a_webdataset_is_labelled(
    folder: Path, posts: list[dict], root: Path, tmp_path: Path, distill: Command
) -> None:
    samples = [{"txt": post["text"].encode(), "png": (root / post["images"][0]).read_bytes()} for post in posts]
    path = files.webdataset(tmp_path / "new.tar", samples)
    result = distill("predict", "--run", folder, "--input", path, "--output", tmp_path / "out.jsonl")
    assert result.stdout == f"wrote 9 rows to {tmp_path / 'out.jsonl'}\n", result.stderr
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert [row["id"] for row in answers] == [f"{n:06d}" for n in range(9)]

"""Digests of files and models: by content, read once."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from distill.digests import Digests


def test_a_digest_is_the_sha256_of_the_content_now(tmp_path: Path) -> None:
    file, cache = tmp_path / "a", tmp_path / "cache.json"
    file.write_bytes(b"one")
    digests = Digests(cache)
    assert digests.file(file) == hashlib.sha256(b"one").hexdigest()
    times = file.stat()
    file.write_bytes(b"two")  # with the same size and modification time
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digests.file(file) == hashlib.sha256(b"two").hexdigest()
    assert digests.file(tmp_path / "none") is None and not cache.exists()


def test_a_pipe_a_device_and_a_folder_have_no_digest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        assert Digests(tmp_path / "cache.json").file(path) is None


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "a", tmp_path / "cache.json"
    file.write_bytes(b"one")
    first = Digests(cache)
    digest = first.file(file)
    first.save()
    again = Digests(cache)
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("the file is read"))
    assert again.file(file) == digest


@pytest.mark.parametrize("content", ["", "[1]", '{"a', json.dumps({"x": 1})])
def test_a_broken_cache_is_computed_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "cache.json").write_text(content)
    assert Digests(tmp_path / "cache.json").file(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()


def test_a_model_is_known_by_the_content_of_its_folder(tmp_path: Path) -> None:
    digests = Digests(tmp_path / "cache.json")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    before = digests.model(str(tmp_path / "a"))
    assert before is not None and digests.model(str(tmp_path / "b")) == before
    (tmp_path / "b" / "model.safetensors").write_bytes(b"others!")
    assert digests.model(str(tmp_path / "b")) != before
    assert digests.model("no/such-model") is None

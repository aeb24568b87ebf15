"""`distill copy`: what a store holds is whole or is not read, whenever a copy ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill import copying
from distill.chain import locked
from distill.copying import MANIFEST, copy
from distill.errors import RunError, SettingsError
from tests.commands import Command
from tests.s3_server import S3


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with files as a run has them."""
    folder = tmp_path / "run"
    contents = {
        "chain.json": b'{"stages": {}}', "recipe.yaml": b"name: run\n",
        "student/adapter/weights.safetensors": b"w" * 1000,
        "student/metrics.csv": b"", ".lock": b"", ".digests.json": b"{}", "student/.x.part": b"torn",
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


COPIED = {"chain.json", "recipe.yaml", "student/adapter/weights.safetensors", "student/metrics.csv"}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_comes_back_from_a_bucket_as_it_was(run: Path, s3: S3, tmp_path: Path, distill: Command) -> None:
    url = f"{s3.bucket('copies')}/runs/one"
    result = distill("copy", run, url)
    assert (result.status, result.stdout) == (0, f"copied 4 files to {url}\n"), result.stderr
    assert distill("copy", run, url).stdout == f"{url}: nothing to do, it is this copy already\n"
    assert distill("copy", url, tmp_path / "back").stdout == f"copied 4 files to {tmp_path / 'back'}\n"
    assert content(tmp_path / "back") == {name: content(run)[name] for name in COPIED}


def test_a_folder_of_this_machine_can_stand_for_a_store(run: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store/run"
    assert copy(str(run), url) == 4 and copy(url, str(tmp_path / "back")) == 4
    assert content(tmp_path / "back").keys() == COPIED


def test_a_copy_that_was_killed_is_not_read_and_is_completed_by_the_next(
    run: Path, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, put = f"{s3.bucket('killed')}/run", copying.put

    def kill_at(number: int) -> None:
        puts: list[str] = []

        def killed(path: Path, url: str) -> None:
            puts.append(url)
            if len(puts) == number:
                raise KeyboardInterrupt
            put(path, url)

        monkeypatch.setattr(copying, "put", killed)

    for number in (1, 2, 4):
        kill_at(number)
        with pytest.raises(KeyboardInterrupt):
            copy(str(run), url)
        with pytest.raises(SettingsError, match=rf"^{url} is no whole copy: it has no {MANIFEST}"):
            copy(url, str(tmp_path / "back"))
        assert not (tmp_path / "back").exists()
    kill_at(0)
    assert copy(str(run), url) == 4 and copy(url, str(tmp_path / "back")) == 4


def test_sigkill_in_the_middle_of_an_upload_leaves_nothing_that_reads_as_whole(
    run: Path, s3: S3, tmp_path: Path
) -> None:
    for n in range(300):
        (run / f"file-{n:03}").write_bytes(bytes(2000))
    url = f"{s3.bucket('sigkill')}/run"
    command = [sys.executable, "-m", "distill", "copy", str(run), url]
    process = subprocess.Popen(command, env=os.environ | s3.environment, stderr=subprocess.DEVNULL)
    while True:  # until some objects are there
        s3.files().invalidate_cache()
        if len(s3.files().find(url)) > 10:
            break
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    s3.files().invalidate_cache()
    assert 10 < len(s3.files().find(url)) < 304
    with pytest.raises(SettingsError, match="is no whole copy"):
        copy(url, str(tmp_path / "back"))
    assert copy(str(run), url) == 304 and copy(url, str(tmp_path / "back")) == 304


def test_a_file_that_was_changed_in_the_store_is_noticed(run: Path, s3: S3, tmp_path: Path) -> None:
    url = f"{s3.bucket('changed')}/run"
    copy(str(run), url)
    s3.put(f"{url}/student/adapter/weights.safetensors", b"v" * 1000)
    with pytest.raises(RunError, match=r"weights.safetensors is not what was copied: its SHA-256 is another one$"):
        copy(url, str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()


def test_nothing_of_others_is_overwritten(run: Path, s3: S3, tmp_path: Path) -> None:
    bucket = s3.bucket("others")
    copy(str(run), f"{bucket}/run")
    (run / "recipe.yaml").write_text("name: changed\n")
    with pytest.raises(SettingsError, match=rf"^{bucket}/run holds another copy; delete it or name another URL$"):
        copy(str(run), f"{bucket}/run")
    s3.put(f"{bucket}/else/notes.txt", b"mine")
    with pytest.raises(SettingsError, match=r"else holds notes.txt, which is not of"):
        copy(str(run), f"{bucket}/else")
    (tmp_path / "here").mkdir()
    with pytest.raises(SettingsError, match=r"here exists; name a new folder$"):
        copy(f"{bucket}/run", str(tmp_path / "here"))


def test_what_cannot_be_copied_is_refused(run: Path, s3: S3, tmp_path: Path) -> None:
    bucket = s3.bucket("refused")
    with pytest.raises(SettingsError, match=r"^copy takes a folder of this machine and a URL"):
        copy(str(run), str(tmp_path / "x"))
    with pytest.raises(SettingsError, match=r"nothing is no folder$"):
        copy(str(tmp_path / "nothing"), f"{bucket}/x")
    with pytest.raises(SettingsError, match=r"no-such-bucket.* has no such bucket$"):
        copy(str(run), "s3://no-such-bucket/run")
    with locked(run), pytest.raises(RunError, match=r"run is in use by another process$"):
        copy(str(run / "student"), f"{bucket}/x")
    s3.put(f"{bucket}/evil/{MANIFEST}", b'{"files": {"../outside": {"size": 1, "sha256": "x"}}}')
    with pytest.raises(SettingsError, match=r"names ../outside, which lies outside the copy$"):
        copy(f"{bucket}/evil", str(tmp_path / "x"))

"""Atomic writing of files and folders, and JSON: errors and kills keep the old content and leave nothing behind."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.errors import SettingsError
from distill.files import atomic_folder, atomic_write, read_json, write_json, write_text


def run_script(script: str, path: Path) -> int:
    """Run a Python script with `path` as its argument, in another process; returns its exit status."""
    command = [sys.executable, "-c", script, str(path)]
    return subprocess.run(command, cwd=Path(__file__).parents[1], check=False).returncode


def fail_with_full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- files ----


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    write_json(tmp_path / "m.json", {"a": math.nan, "b": [1.5, -math.inf, (math.inf,)], "c": {"d": None, "e": 2}})
    assert json.loads((tmp_path / "m.json").read_text()) == {
        "a": None,
        "b": [1.5, None, [None]],
        "c": {"d": None, "e": 2},
    }


def test_a_file_and_its_folders_appear_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "a.txt"
    with atomic_write(path) as file:
        file.write("ü\r\nline\n")
        assert not path.exists()
    assert path.read_bytes() == "ü\r\nline\n".encode()
    assert os.listdir(path.parent) == ["a.txt"]


def test_bytes_are_written_unchanged(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.bin", "wb") as file:
        file.write(b"\x00\xff\r\n")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff\r\n"


@pytest.mark.parametrize("error", [ValueError("in the block"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_error_in_the_block_keeps_the_old_file_and_leaves_no_temporary_file(
    error: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_write(path) as file:
        file.write("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_error_at_the_end_keeps_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr(os, step, fail_with_full_disk)
    with pytest.raises(OSError, match="No space left"), atomic_write(path) as file:
        file.write("new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_raises_oserror(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError), atomic_write(tmp_path / "file" / "a.txt"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "folder") as file:
        file.write("new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_kill_keeps_the_old_file_and_the_next_write_removes_the_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    script = (
        "import os, pathlib, signal, sys\n"
        "from distill.files import atomic_write\n"
        "with atomic_write(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write('half' * 100_000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert run_script(script, path) == -signal.SIGKILL
    assert path.read_text() == "old"
    with atomic_write(path) as file:
        file.write("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


# ---- folders ----


def replace_folder(folder: Path, content: str) -> None:
    with atomic_folder(folder) as new:
        (new / "a.txt").write_text(content)


def content_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_and_its_parents_appear_when_the_block_ends(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "deep" / "data"
    with atomic_folder(folder) as new:
        (new / "a.txt").write_text("one")
        assert new.parent == folder.parent and not folder.exists()
    assert content_of(folder) == {"a.txt": "one"}
    assert os.listdir(folder.parent) == ["data"]


def test_a_folder_is_replaced_completely(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    (folder / "old.txt").write_text("old")
    with atomic_folder(folder) as new:
        (new / "a.txt").write_text("new")
        assert (folder / "old.txt").read_text() == "old"
    assert content_of(folder) == {"a.txt": "new"}
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize("error", [ValueError("in the block"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_error_in_the_block_keeps_the_old_folder(error: BaseException, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    replace_folder(folder, "old")
    with pytest.raises(type(error)), atomic_folder(folder) as new:
        (new / "a.txt").write_text("half")
        raise error
    assert content_of(folder) == {"a.txt": "old"}
    assert os.listdir(tmp_path) == ["data"]


def test_a_disk_error_at_the_end_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    replace_folder(folder, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_with_full_disk)
        with pytest.raises(OSError, match="No space left"):
            replace_folder(folder, "new")
    assert content_of(folder) == {"a.txt": "old"}
    assert os.listdir(tmp_path) == ["data"]


def test_an_error_between_the_renames_is_repaired_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder is moved away, and the new one cannot take its place."""
    folder = tmp_path / "data"
    replace_folder(folder, "old")
    replace = os.replace

    def fail_for_new(source: Path, target: Path) -> None:
        if target == folder:
            fail_with_full_disk()
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_for_new)
        with pytest.raises(OSError, match="No space left"):
            replace_folder(folder, "new")
    assert not folder.exists()
    with pytest.raises(ValueError, match="stop"), atomic_folder(folder):
        assert content_of(folder) == {"a.txt": "old"}
        raise ValueError("stop")
    assert content_of(folder) == {"a.txt": "old"}
    assert os.listdir(tmp_path) == ["data"]


KILL_IN_BLOCK = (
    "import os, pathlib, signal, sys\n"
    "from distill.files import atomic_folder\n"
    "with atomic_folder(pathlib.Path(sys.argv[1])) as new:\n"
    "    (new / 'a.txt').write_text('half')\n"
    "    os.kill(os.getpid(), signal.SIGKILL)\n"
)
KILL_BETWEEN_RENAMES = (
    "import os, pathlib, signal, sys\n"
    "from distill.files import atomic_folder\n"
    "replace = os.replace\n"
    "def replace_and_kill(source, target):\n"
    "    replace(source, target)\n"
    "    os.kill(os.getpid(), signal.SIGKILL)\n"
    "os.replace = replace_and_kill\n"
    "with atomic_folder(pathlib.Path(sys.argv[1])) as new:\n"
    "    (new / 'a.txt').write_text('half')\n"
)


def test_the_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    replace_folder(folder, "old")
    assert run_script(KILL_IN_BLOCK, folder) == -signal.SIGKILL
    assert content_of(folder) == {"a.txt": "old"}
    assert len(os.listdir(tmp_path)) == 2
    replace_folder(folder, "new")
    assert content_of(folder) == {"a.txt": "new"}
    assert os.listdir(tmp_path) == ["data"]


def test_a_folder_whose_process_was_killed_between_the_renames_is_restored(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    replace_folder(folder, "old")
    assert run_script(KILL_BETWEEN_RENAMES, folder) == -signal.SIGKILL
    assert not folder.exists()
    with pytest.raises(ValueError, match="stop"), atomic_folder(folder):
        assert content_of(folder) == {"a.txt": "old"}
        raise ValueError("stop")
    assert content_of(folder) == {"a.txt": "old"}
    assert os.listdir(tmp_path) == ["data"]


def test_the_folder_of_another_running_process_is_not_changed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        others = [tmp_path / f".data.{process.pid}.{state}" for state in ("new", "old")]
        for other in others:
            other.mkdir()
            (other / "a.txt").write_text("of the other process")
        replace_folder(folder, "mine")
        assert content_of(folder) == {"a.txt": "mine"}
        assert [content_of(other) for other in others] == [{"a.txt": "of the other process"}] * 2
    replace_folder(folder, "mine again")  # the other process has ended
    assert content_of(folder) == {"a.txt": "mine again"}
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize(
    "name",
    [".data.new", ".data.x.new", ".data.1x.old", ".data.9999999.new.txt", "data.9999999.new", ".data2.9999999.old",
     ".xdata.9999999.new", ".data.9999999.part", f".data.{10**20}.new"],
)  # fmt: skip
def test_files_and_folders_with_similar_names_are_not_changed(name: str, tmp_path: Path) -> None:
    foreign = tmp_path / name
    foreign.mkdir()
    (foreign / "a.txt").write_text("foreign")
    replace_folder(tmp_path / "data", "mine")
    foreign_file = tmp_path / ".data.9999999.new"  # a file, not a folder
    foreign_file.write_text("foreign")
    replace_folder(tmp_path / "data", "mine")
    assert content_of(foreign) == {"a.txt": "foreign"} and foreign_file.read_text() == "foreign"


def test_a_name_with_characters_of_regular_expressions(tmp_path: Path) -> None:
    folder, similar = tmp_path / "a.b+[c]", tmp_path / ".axb+[c].9999999.new"
    similar.mkdir()
    replace_folder(folder, "old")
    assert run_script(KILL_IN_BLOCK, folder) == -signal.SIGKILL
    replace_folder(folder, "new")
    assert sorted(os.listdir(tmp_path)) == sorted([folder.name, similar.name])


# ---- text and JSON ----


def test_json_is_written_atomically_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.json"
    content: dict[str, Any] = {"name": "ü", "values": [1, 2.5, None, True]}
    write_json(path, content)
    assert read_json(path) == json.loads(path.read_text(encoding="utf-8")) == content
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n") and '  "name": "ü"' in text
    monkeypatch.setattr(os, "fsync", fail_with_full_disk)
    for write in (lambda: write_text(path, "half"), lambda: write_json(path, {})):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert read_json(path) == content
    assert os.listdir(path.parent) == ["a.json"]


def test_content_that_json_does_not_support_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", ["old"])
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"path": tmp_path})
    assert read_json(tmp_path / "a.json") == ["old"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1} x', b"\x00\x01", b"\xff\xfe"], ids=repr)
def test_an_invalid_json_file_is_named_with_a_remedy(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(
        SettingsError, match=r"a\.json is not valid JSON \(.+\); if a stage wrote it, delete it and run it again$"
    ):
        read_json(path)
    assert path.read_bytes() == content


def test_a_missing_json_file_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "a.json")

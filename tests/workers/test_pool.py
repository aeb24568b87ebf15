"""What a pool calls in its worker processes, without Ray around it: errors become sentences of the driver."""

import logging
import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distill.errors import RunError, SettingsError
from distill.models.backbone import ModelSettings
from distill.models.source import ModelSource
from distill.workers import pool
from tests.workers.annotating import LABELS


def double(number: int) -> int:
    return 2 * number


def fail(error: Exception, item: Any) -> None:
    raise error


def doubling() -> pool.Work:
    return double


def failing(error: Exception) -> pool.Work:
    return partial(fail, error)


def loading(folder: Path) -> pool.Work:
    ModelSource("tiny", ModelSettings(), LABELS, folder, "assistant", True).load("cpu")
    return double


@pytest.fixture(autouse=True)
def actor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(".")
    monkeypatch.setattr(pool, "actor_id", lambda: "actor")


def results(make: Any, folder: Path, *items: Any, directory: Path | None = None) -> list[Any]:
    actor = pool._Actor(pickle.dumps(make), directory or folder, folder)
    return [pool._unpacked(result) for result in actor({"item": [pickle.dumps(item) for item in items]})["result"]]  # type: ignore[dict-item]


def test_the_work_is_made_once_in_the_directory_of_the_driver(tmp_path: Path) -> None:
    folder = pool.new_folder(tmp_path / "workers")
    assert results(doubling, folder, 1, 2, 3, directory=tmp_path) == [2, 4, 6]
    assert Path.cwd() == tmp_path and (folder / "actor.starts").read_bytes() == b"."


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (SettingsError("task.labels has one"), SettingsError, "task.labels has one"),
        (RunError("the endpoint no longer answers"), RunError, "the endpoint no longer answers"),
        (ZeroDivisionError("by zero\nat once"), RunError, "a Ray worker failed: by zero"),
    ],
)
def test_an_error_is_that_of_the_driver(
    error: Exception, kind: type[Exception], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(kind) as raised:
        results(partial(failing, error), tmp_path, 1)
    assert str(raised.value) == message
    assert ("Traceback" in caplog.text) == isinstance(error, ZeroDivisionError)


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^assistant\.model\.path.*nothing"):
        results(partial(loading, tmp_path / "nothing"), tmp_path, 1)


def test_a_folder_that_a_worker_does_not_see_is_named(tmp_path: Path) -> None:
    message = rf"^the Ray worker on .+ does not see {tmp_path / 'gone'}: the run's folder must be on a file system"
    with pytest.raises(SettingsError, match=message):
        results(doubling, tmp_path / "gone", 1, directory=tmp_path)


def test_a_worker_that_is_killed_again_and_again_ends_the_run(tmp_path: Path) -> None:
    for _ in range(6):
        assert results(doubling, tmp_path, 1) == [2]
    with pytest.raises(RunError, match=r"^a Ray worker was killed 6 times; is its memory"):
        results(doubling, tmp_path, 1)
    assert os.path.getsize(tmp_path / "actor.starts") == 7

"""`distill sync`: real offline runs, sent by the real client to a stand-in for the server."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill import chain
from distill.errors import RunError, SettingsError
from distill.tracking.lineage import Lineage
from distill.tracking.sync import Sent, sync
from tests import micro
from tests.commands import Command
from tests.fake_stages import Fakes
from tests.tracking.test_lineage import run_stage
from tests.wandb_server import WandbServer

wandb = pytest.importorskip("wandb")


@pytest.fixture
def offline(tmp_path: Path) -> Path:
    """The folder of an offline chain of two stages."""
    run_stage(tmp_path, "annotate", "data", mode="offline")
    run_stage(tmp_path, "assistant", "weights", "annotate", mode="offline")
    return tmp_path


LINEAGE = [
    ("annotate", "logs", "micro-rationales"), ("assistant", "logs", "micro-assistant"),
    ("assistant", "uses", "micro-rationales"),
]  # fmt: skip


@pytest.mark.usefixtures("login")
def test_the_lineage_of_a_whole_offline_chain_is_complete(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, distill: Command
) -> None:
    """Stages that only write their outputs, with the runs, artifacts and edges of wandb."""
    Fakes(monkeypatch)
    recipe = micro.read(micro.write(tmp_path, micro.WITH_TEACHER, tracking__mode="offline"))
    assert chain.run(recipe, until="student") and chain.run(recipe)  # stages that are up to date are linked too
    assert not server.operations
    result = distill("sync", recipe.folder)
    assert (result.status, result.stdout) == (0, f"{recipe.folder}: 9 runs sent, 20 uses of artifacts linked\n")
    uses = {
        "annotate": ["teacher"],
        "assistant": ["rationales"],
        "augment": ["assistant", "rationales"],
        "student": ["assistant", "augmented-rationales", "rationales"],
        "evaluate": ["assistant", "rationales", "student", "teacher"],
        "calibrate": ["rationales", "student", "teacher"],
        "cascade": ["calibration", "rationales", "student", "teacher"],
        "export": ["evaluation", "student"],
    }
    logs = {
        "teacher": "teacher", "annotate": "rationales", "assistant": "assistant", "augment": "augmented-rationales",
        "student": "student", "evaluate": "evaluation", "calibrate": "calibration", "cascade": "decisions",
        "export": "export",
    }  # fmt: skip
    expected = [(stage, "uses", f"micro-{name}") for stage, names in uses.items() for name in names]
    expected += [(stage, "logs", f"micro-{name}") for stage, name in logs.items()]
    assert server.lineage() == sorted(expected)
    assert not server.unknown
    received = len(server.operations), len(server.edges)
    assert distill("sync", recipe.folder).stdout == f"{recipe.folder}: nothing to do, all offline runs are sent\n"
    assert (len(server.operations), len(server.edges)) == received


@pytest.mark.usefixtures("login")
def test_what_a_stage_logged_is_sent_although_it_ran_again(offline: Path, server: WandbServer) -> None:
    run_stage(offline, "annotate", "new data", mode="offline")
    run_stage(offline, "assistant", "new weights", "annotate", mode="offline")
    assert sync(offline) == Sent(4, 2)
    contents = {server.files[path] for path in server.files if path.endswith(("rationales.jsonl", ".safetensors"))}
    assert contents == {b"data", b"new data", b"weights", b"new weights"}
    assert server.lineage() == LINEAGE
    assert len({(run, version) for kind, run, version in server.edges if kind == "uses"}) == 2
    assert not list((offline / "wandb" / "uploads").iterdir())
    versions = sorted(server.artifacts.values(), key=lambda version: version["index"])
    versions = [version for version in versions if version["name"] == "micro-rationales"]
    logged = [edge.run for edge in Lineage(offline) if edge.kind == "logs" and edge.artifact == "micro-rationales"]
    assert [version["run"] for version in versions] == logged and len(logged) == 2, "in the order of time"
    assert ["latest" in version["aliases"] for version in versions] == [False, True]


@pytest.mark.usefixtures("login")
@pytest.mark.parametrize("operation", ["UpsertBucket", "UseArtifact", "Viewer"])
def test_a_sync_that_the_server_refuses_is_repeated(operation: str, offline: Path, server: WandbServer) -> None:
    server.refuse = {operation}
    with pytest.raises(RunError, match=f"^sync: .*{operation} is refused: permission denied") as raised:
        sync(offline)
    assert "\n" not in str(raised.value)
    server.refuse = set()
    sent = sync(offline)
    assert sent == Sent(0 if operation == "UseArtifact" else 2, 1)
    assert server.lineage() == LINEAGE
    assert sync(offline) == Sent(0, 0)


@pytest.mark.usefixtures("login")
def test_an_interrupted_sync_goes_on(offline: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("distill.tracking.sync._link", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sync(offline)
    assert sync(offline) == Sent(0, 1)
    assert server.lineage() == LINEAGE


def test_without_a_login_nothing_is_sent(offline: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    with pytest.raises(SettingsError, match=r"^sync needs a login to wandb: wandb login, or WANDB_API_KEY$"):
        sync(offline)
    assert not server.operations


@pytest.mark.usefixtures("login")
def test_a_key_that_the_server_does_not_know_is_refused(offline: Path, server: WandbServer) -> None:
    server.key = "another"
    with pytest.raises(RunError, match=r"^sync: .*user is not logged in"):
        sync(offline)
    assert not server.runs


@pytest.mark.usefixtures("login")
def test_a_folder_without_offline_runs_is_refused(tmp_path: Path, distill: Command) -> None:
    with pytest.raises(SettingsError, match=r"wandb holds no offline runs$"):
        sync(tmp_path)
    result = distill("sync", tmp_path / "none")
    assert result.status == 2 and "is no run: it has no recipe.yaml" in result.error


@pytest.mark.usefixtures("login")
def test_runs_that_wandb_has_sent_are_linked(offline: Path, server: WandbServer) -> None:
    """After `wandb sync`, and with the environment still asking for offline runs."""
    os.environ["WANDB_MODE"] = "offline"
    try:
        assert sync(offline) == Sent(2, 1)
        assert os.environ["WANDB_MODE"] == "offline"
    finally:
        del os.environ["WANDB_MODE"]
    assert server.lineage() == LINEAGE


@pytest.mark.parametrize("reached", [False, True])
@pytest.mark.usefixtures("login")
def test_a_server_that_is_gone_is_one_sentence_and_nothing_is_lost(
    reached: bool, offline: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the login, or after it."""
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        patch.setenv("WANDB_X_GRAPHQL_RETRY_MAX", "1")
        if reached:
            patch.setattr(wandb, "login", lambda **_: True)
            patch.setattr(wandb, "Api", lambda: None)
        wandb.teardown()
        with pytest.raises(RunError, match=r"^sync: .*127\.0\.0\.1:9") as raised:
            sync(offline)
    assert "\n" not in str(raised.value)
    wandb.teardown()
    assert sync(offline) == Sent(2, 1)
    assert server.lineage() == LINEAGE


KILLED = """
import os, signal, sys, time
from pathlib import Path
import psutil
from distill.tracking import Tracker, TrackingSettings

folder, values = Path(sys.argv[1]), int(sys.argv[2])
with Tracker(TrackingSettings(mode="offline"), folder, "micro").stage("assistant", {"seed": 1}, ["annotate"]) as run:
    for value in range(values):
        run.log({"train/loss": 1 / (1 + value)})
    (record,) = folder.glob(f"wandb/offline-run-*/run-{run._run.id}.wandb")
    size = -1
    while values and size < max(32768, record.stat().st_size):  # it is written in blocks, by another process
        size = record.stat().st_size
        time.sleep(1)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.usefixtures("login")
@pytest.mark.parametrize("values", [0, 300])
def test_a_stage_that_was_killed_does_not_hold_up_the_others(values: int, tmp_path: Path, server: WandbServer) -> None:
    """Its record holds nothing, or ends in the middle of an entry."""
    run_stage(tmp_path, "annotate", "data", mode="offline")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(values)], check=False)
    assert killed.returncode == -9
    run_stage(tmp_path, "assistant", "weights", "annotate", mode="offline")
    assert sync(tmp_path) == (Sent(3, 2) if values else Sent(2, 1))
    assert server.lineage() == LINEAGE
    exits = sorted(run["exitcode"] for run in server.runs.values() if run["jobType"] == "assistant")
    assert exits == ([0, 1] if values else [0])
    received = len(server.edges)
    assert sync(tmp_path) == Sent(0, 0) and len(server.edges) == received


@pytest.mark.usefixtures("login")
def test_nothing_is_lost_if_the_folder_was_moved(offline: Path, server: WandbServer, tmp_path: Path) -> None:
    """wandb then does not find the files, and counts the run as sent."""
    moved = offline.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    with pytest.raises(RunError, match=r"has not received the artifact micro-.*was moved after it ran, first move it"):
        sync(moved)
    moved.rename(offline)
    assert sync(offline).links == 1
    assert server.lineage() == LINEAGE
    assert {version["state"] for version in server.artifacts.values()} == {"COMMITTED"}
    assert not list((offline / "wandb" / "uploads").iterdir())


@pytest.mark.usefixtures("login")
def test_a_run_is_sent_from_any_folder(tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a run is relative to that of the command, by default."""
    monkeypatch.chdir(tmp_path)
    run = Path("runs", "micro")
    run.mkdir(parents=True)
    run_stage(run, "annotate", "data", mode="offline")
    wandb.teardown()  # its process has this working directory, too
    monkeypatch.chdir(tmp_path / "runs")
    assert sync(Path("micro")) == Sent(1, 0)
    assert {version["state"] for version in server.artifacts.values()} == {"COMMITTED"}


@pytest.mark.usefixtures("login")
def test_an_artifact_that_the_server_refuses_is_sent_again(offline: Path, server: WandbServer) -> None:
    server.refuse = {"CreateArtifact"}
    with pytest.raises(RunError, match=r"^sync: the server has not received the artifact micro-"):
        sync(offline)
    assert len(list((offline / "wandb" / "uploads").iterdir())) == 2
    server.refuse = set()
    assert sync(offline).links == 1
    assert server.lineage() == LINEAGE

"""`distill sync`: real offline runs, sent by the real client to a stand-in for the server."""

import os
from pathlib import Path
from typing import Any

import pytest

from distill import chain
from distill.errors import RunError, SettingsError
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

"""Tracking with real wandb offline, switched off, and failing at every place where it can."""

import builtins
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image

from distill.tracking import StageRun, Tracker, TrackingSettings

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def logged_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


def tracker(folder: Path, **settings: Any) -> Tracker:
    return Tracker(TrackingSettings(**settings), folder / "run", "my recipe")


def record(folder: Path, *words: str) -> bytes:
    """What wandb wrote about the only run, as it will be synced later; its process flushes shortly after the end."""
    (file,) = (folder / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 10
    while missing := [word for word in words if word.encode() not in file.read_bytes()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.05)
    return file.read_bytes()


def use_everything(run: StageRun, folder: Path) -> None:
    (folder / "rationales.jsonl").write_text("{}\n")
    Image.new("RGB", (600, 300), "red").save(folder / "post.png")
    run.use_artifact("gold")
    run.log({"train/loss": 1.5}, step=3)
    run.table("samples", [{"id": "1", "picture": folder / "post.png", "rationale": "<b>joy</b>"}])
    run.log_artifact("rationales", "dataset", folder / "rationales.jsonl")
    run.log_artifact("adapter", "model", folder)


def test_offline_is_the_default_and_leaves_a_run_to_sync(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path).stage("annotate", {"seed": 42}) as run:
        assert run.active and run._run.offline
        assert (run._run.group, run._run.job_type, run._run.project) == ("my recipe", "annotate", "distill")
        use_everything(run, tmp_path)
        assert run.active
    artifacts = ("my-recipe-rationales", "my-recipe-adapter", "my-recipe-gold")
    written = record(tmp_path, "train/loss", "annotate", "inputs", "rationales.jsonl", *artifacts)
    staged = [file.read_bytes() for file in (tmp_path / "run" / "wandb" / "artifacts" / "staging").iterdir()]
    tables = [json.loads(content) for content in staged if content.startswith(b"{")]
    table = next(table for table in tables if table["_type"] == "table")
    assert table["columns"] == ["id", "picture", "rationale"]
    ((_, picture, rationale),) = table["data"]
    assert rationale == "<b>joy</b>"
    assert (picture["_type"], picture["width"], picture["height"]) == ("image-file", 256, 128)
    assert picture["path"].encode() in written
    assert any(content.startswith(b"\x89PNG") for content in staged)
    assert "wandb" not in "".join(capfd.readouterr())
    assert not [name for name in os.environ if name in ("WANDB_SILENT", "WANDB_DATA_DIR", "WANDB_CACHE_DIR")]


def test_lightning_logs_into_the_stage_run(tmp_path: Path) -> None:
    with tracker(tmp_path).stage("student", {}) as run:
        logger = run.lightning_logger()
        assert logger is not None and logger.version == run._run.id
        fit(logger)
        assert run.active
    assert record(tmp_path, "boring_loss")


class Model(BoringModel):
    def training_step(self, batch: Any, batch_index: int) -> Any:
        output = super().training_step(batch, batch_index)
        self.log("boring_loss", output["loss"])
        return output


def fit(logger: Any) -> Trainer:
    trainer = Trainer(
        max_steps=3,
        logger=logger,
        accelerator="cpu",
        log_every_n_steps=1,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Model())
    return trainer


@pytest.mark.parametrize("how", ["setting", "environment"])
def test_disabled_never_touches_wandb(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("wandb.init was called"))
    if how == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    with tracker(tmp_path, mode="disabled" if how == "setting" else "auto").stage("annotate", {}) as run:
        use_everything(run, tmp_path)
        assert not run.active and run.lightning_logger() is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mode", "environment", "logged_in", "expected"),
    [
        ("auto", "", False, "offline"),
        ("auto", "", True, "online"),
        ("auto", "offline", True, "offline"),
        ("auto", "dryrun", True, "offline"),
        ("offline", "", True, "offline"),
        ("online", "", True, "online"),
        ("online", "", False, "offline"),
    ],
)
def test_modes(
    mode: str, environment: str, logged_in: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    monkeypatch.setattr(wandb, "login", lambda **_: logged_in)
    monkeypatch.setattr(wandb, "init", lambda **settings: chosen.append(settings["mode"]))
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    with tracker(tmp_path, mode=mode).stage("student", {}):
        pass
    assert chosen == [expected]


def test_a_key_in_the_environment_is_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.sdk.lib import wbauth

    chosen = []
    monkeypatch.setattr(wandb, "init", lambda **settings: chosen.append(settings["mode"]))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    try:
        with tracker(tmp_path).stage("student", {}):
            pass
    finally:
        wbauth.unauthenticate_session()
    assert chosen == ["online"]


def test_wandb_that_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("no route to host\nand a page more")

    monkeypatch.setattr(wandb, "init", refuse)
    with tracker(tmp_path).stage("annotate", {}) as run:
        use_everything(run, tmp_path)
        assert run.lightning_logger() is None
    assert warnings(caplog) == ["wandb is off for the rest of stage annotate: no route to host"]


def test_wandb_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def without_wandb(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'", name="wandb")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with tracker(tmp_path).stage("annotate", {}) as run:
        run.log({"x": 1})
    assert warnings(caplog) == ["wandb is off for the rest of stage annotate: No module named 'wandb'"]


def test_wandb_that_fails_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def full_disk(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise OSError(28, "No space left on device")

    chain = tracker(tmp_path)
    with chain.stage("student", {}) as run:
        logger = run.lightning_logger()
        monkeypatch.setattr(run._run, "log", full_disk)
        assert fit(logger).global_step == 3  # the training goes on
        use_everything(run, tmp_path)
        assert not run.active
    assert calls == [1]
    assert warnings(caplog) == ["wandb is off for the rest of stage student: [Errno 28] No space left on device"]
    with chain.stage("export", {}) as run:  # the next stage tries again
        assert run.active


def test_a_bad_picture_costs_its_cell_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with tracker(tmp_path).stage("evaluate", {}) as run:
        run.table("samples", [{"picture": tmp_path / "bad.png", "id": "a"}])
        assert run.active
    assert not warnings(caplog)
    assert record(tmp_path, "samples.table.json")


def test_a_stage_that_fails_ends_its_run_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = []
    with pytest.raises(RuntimeError, match="out of memory"), tracker(tmp_path).stage("student", {}) as run:
        finish = run._run.finish
        monkeypatch.setattr(run._run, "finish", lambda exit_code: (codes.append(exit_code), finish(exit_code)))
        raise RuntimeError("out of memory")
    assert codes == [1]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.name == "distill.tracking" and r.levelno == logging.WARNING]


def test_online_artifacts_are_linked_and_a_missing_one_costs_only_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used = []

    def use_artifact(name: str) -> None:
        used.append(name)
        if "gold" in name:
            raise wandb.errors.CommError("artifact not found")

    with tracker(tmp_path).stage("student", {}) as run:
        inputs = run._run.config
        monkeypatch.setattr(type(run._run), "offline", False)
        monkeypatch.setattr(run._run, "use_artifact", use_artifact)
        run.use_artifact("gold")
        run.use_artifact("rationales")
        assert run.active
        monkeypatch.undo()
    assert used == ["my-recipe-gold:latest", "my-recipe-rationales:latest"]
    assert inputs["inputs"] == ["my-recipe-gold", "my-recipe-rationales"]
    assert not warnings(caplog)


def test_only_the_first_process_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with tracker(tmp_path).stage("student", {}) as run:
        assert not run.active and run.lightning_logger() is None

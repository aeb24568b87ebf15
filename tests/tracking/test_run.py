"""Tracking with the real wandb library: offline, disabled, and with errors in every call."""

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
from distill.tracking.settings import not_logged_in, wandb_name

wandb = pytest.importorskip("wandb")


def tracker(folder: Path, **settings: Any) -> Tracker:
    return Tracker(TrackingSettings(**settings), folder / "run", "my recipe")


def record(folder: Path, *words: str) -> bytes:
    """The offline record of the only run. The wandb process flushes it shortly after the run ends, hence the wait."""
    (file,) = (folder / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 10
    while missing := [word for word in words if word.encode() not in file.read_bytes()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.05)
    return file.read_bytes()


def use_all_methods(run: StageRun, folder: Path) -> None:
    (folder / "rationales.jsonl").write_text("{}\n")
    Image.new("RGB", (600, 300), "red").save(folder / "post.png")
    run.use_artifact("gold")
    run.log({"train/loss": 1.5}, step=3)
    run.table("samples", [{"id": "1", "image": folder / "post.png", "rationale": "<b>joy</b>"}])
    run.log_artifact("rationales", "dataset", [folder / "rationales.jsonl", folder / "missing.jsonl"])
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "model.safetensors").write_bytes(b"weights")
    run.log_artifact("adapter", "model", [folder / "adapter"])


def test_offline_is_the_default_and_writes_a_run_that_can_be_synced(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with tracker(tmp_path).stage("annotate", {"seed": 42}) as run:
        assert run.active and run._run.offline
        assert (run._run.group, run._run.job_type, run._run.project) == ("my recipe", "annotate", "distill")
        use_all_methods(run, tmp_path)
        assert run.active
        run_id = run._run.id
    artifacts = ("my-recipe-rationales", "my-recipe-adapter", "my-recipe-gold")
    written = record(tmp_path, "train/loss", "annotate", "inputs", "rationales.jsonl", *artifacts)
    staged = [file.read_bytes() for file in (tmp_path / "run" / "wandb" / "artifacts" / "staging").iterdir()]
    tables = [json.loads(content) for content in staged if content.startswith(b"{")]
    table = next(table for table in tables if table["_type"] == "table")
    assert table["columns"] == ["id", "image", "rationale"]
    ((_, image, rationale),) = table["data"]
    assert rationale == "<b>joy</b>"
    assert (image["_type"], image["width"], image["height"]) == ("image-file", 256, 128)
    assert image["path"].encode() in written
    assert any(content.startswith(b"\x89PNG") for content in staged)
    assert "wandb" not in "".join(capfd.readouterr())
    kept = tmp_path / "run" / "wandb" / "uploads" / run_id / "adapter" / "model.safetensors"
    assert kept.samefile(tmp_path / "adapter" / "model.safetensors")  # no second copy of the weights
    assert not [name for name in os.environ if name in ("WANDB_SILENT", "WANDB_DATA_DIR", "WANDB_CACHE_DIR")]


@pytest.mark.parametrize("name", ["推文情感", "naïve-très", "läufe-" + "ü" * 120, "long-" * 50])
def test_names_that_wandb_refuses_are_replaced(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The folder keeps its name."""
    tracked = Tracker(TrackingSettings(), tmp_path / name, name)
    with tracked.stage("annotate", {"seed": 42}) as run:
        assert len(run._run.group) <= 128 and len(run._run.name) <= 128
        use_all_methods(run, tmp_path)
        inputs = run._run.config["inputs"]
        assert run.active
    assert not warnings(caplog)
    assert inputs == [wandb_name(f"{tracked.group}-gold")] and inputs[0].isascii() and len(inputs[0]) <= 128
    assert list((tmp_path / name / "wandb").glob("offline-run-*/run-*.wandb"))


def test_different_names_stay_different() -> None:
    names = ["推文-a", "推特-a", "x" * 200, "x" * 201, "my recipe-gold"]
    replaced = [wandb_name(name) for name in names]
    assert len(set(replaced)) == len(names) and replaced[-1] == "my-recipe-gold"
    groups = {Tracker(TrackingSettings(), Path("x"), name).group for name in names}
    assert len(groups) == len(names) and "推文-a" in groups


def test_lightning_logs_into_the_stage_run(tmp_path: Path) -> None:
    with tracker(tmp_path).stage("student", {}) as run:
        (logger,) = run.lightning_loggers()
        assert logger.version == run._run.id
        fit(logger)
        (baseline,) = run.lightning_loggers("hard_labels")
        fit(baseline)
        assert run.active
    assert record(tmp_path, "boring_loss", "hard_labels/boring_loss")


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


@pytest.mark.parametrize("source", ["setting", "environment"])
def test_disabled_never_calls_wandb(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("wandb.init was called"))
    if source == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    with tracker(tmp_path, mode="disabled" if source == "setting" else "auto").stage("annotate", {}) as run:
        use_all_methods(run, tmp_path)
        assert not run.active and not run.lightning_loggers()
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
    assert not_logged_in(TrackingSettings(mode=mode)) == (mode == "online" and not logged_in)  # type: ignore[arg-type]


def test_a_key_in_the_environment_is_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(wandb, "init", lambda **settings: chosen.append(settings["mode"]))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with tracker(tmp_path).stage("student", {}):
        pass
    assert chosen == ["online"]


def test_an_error_at_the_start_disables_tracking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_: Any) -> None:
        raise wandb.errors.CommError("no route to host\nand more lines")

    monkeypatch.setattr(wandb, "init", fail)
    with tracker(tmp_path).stage("annotate", {}) as run:
        use_all_methods(run, tmp_path)
        assert not run.lightning_loggers()
    assert warnings(caplog) == ["wandb is disabled for the rest of stage annotate: no route to host"]


def test_without_wandb_installed_tracking_is_disabled(
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
    assert warnings(caplog) == ["wandb is disabled for the rest of stage annotate: No module named 'wandb'"]


def test_an_error_while_logging_disables_tracking_for_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def full_disk(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise OSError(28, "No space left on device")

    chain = tracker(tmp_path)
    with chain.stage("student", {}) as run:
        (logger,) = run.lightning_loggers()
        monkeypatch.setattr(run._run, "log", full_disk)
        assert fit(logger).global_step == 3  # the training goes on
        use_all_methods(run, tmp_path)
        assert not run.active
    assert calls == [1]
    assert warnings(caplog) == ["wandb is disabled for the rest of stage student: [Errno 28] No space left on device"]
    with chain.stage("export", {}) as run:  # the next stage tries again
        assert run.active


def test_a_broken_image_gives_an_empty_cell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with tracker(tmp_path).stage("evaluate", {}) as run:
        run.table("samples", [{"image": tmp_path / "bad.png", "id": "a"}])
        assert run.active
    assert not warnings(caplog)
    assert record(tmp_path, "samples.table.json")


def test_numbers_alone_are_logged_and_what_is_unknown_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = []
    with tracker(tmp_path).stage("cascade", {}) as run:
        monkeypatch.setattr(run._run, "log", lambda metrics, step: logged.append(metrics))
        run.log(
            {"cascade": {"n": 0, "cost": None, "ece": float("nan"), "stages": {"student": {"share": 0.5}}, "id": "a"}}
        )
        run.log({"cost": None})
    assert logged == [{"cascade/n": 0, "cascade/stages/student/share": 0.5}]


def test_curves_are_charts_with_a_table(tmp_path: Path) -> None:
    with tracker(tmp_path).stage("cascade", {}) as run:
        run.curves("deferral", "Quality", "deferred", {"entropy": ([0.0, 1.0], [0.5, 0.9]), "random": ([0.0], [0.5])})
        assert run.active
    assert record(tmp_path, "deferral_table", "wandb/lineseries/v0")


def test_the_run_of_a_failed_stage_is_marked_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = []
    with pytest.raises(RuntimeError, match="out of memory"), tracker(tmp_path).stage("student", {}) as run:
        finish = run._run.finish
        monkeypatch.setattr(run._run, "finish", lambda exit_code: (codes.append(exit_code), finish(exit_code)))
        raise RuntimeError("out of memory")
    assert codes == [1]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.name.startswith("distill.tracking") and r.levelno == logging.WARNING]


def test_only_the_first_process_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with tracker(tmp_path).stage("student", {}) as run:
        assert not run.active and not run.lightning_loggers()

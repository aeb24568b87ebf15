"""TensorBoard and MLflow by class path, in real trainings; skipped where they are not installed."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from distill import chain
from distill.errors import SettingsError
from tests import micro


def train(folder: Path, logger: str, **arguments: Any) -> None:
    """Train an assistant with a further logger."""
    loggers = [{"class_path": f"lightning.pytorch.loggers.{logger}", "init_args": arguments}]
    path = micro.write(folder, micro.RECORDED, trainer__loggers=loggers)
    assert chain.run(micro.read(path), until="assistant") == ["annotate", "assistant"]


def test_tensorboard_gets_the_curves_of_a_training(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "TensorBoardLogger", save_dir=str(tmp_path / "logs"))
    events = EventAccumulator(str(tmp_path / "logs" / "lightning_logs" / "version_0"))
    events.Reload()
    assert {"train/loss", "train/learning_rate", "val/accuracy", "val/loss"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("val/accuracy")) == 2


def test_mlflow_gets_the_curves_of_a_training(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    train(tmp_path, "MLFlowLogger", experiment_name="micro", tracking_uri=address)
    client = mlflow.MlflowClient(address)
    (run,) = client.search_runs([client.get_experiment_by_name("micro").experiment_id])
    assert run.info.status == "FINISHED"
    assert {"train/loss", "train/learning_rate", "val/accuracy", "val/loss"} <= set(run.data.metrics)
    assert len(client.get_metric_history(run.info.run_id, "val/accuracy")) == 2


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="mlflow is installed")
def test_a_missing_library_is_named_before_the_first_stage(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="mlflow"):
        train(tmp_path, "MLFlowLogger", experiment_name="micro")
    assert not (tmp_path / "runs" / "micro" / "annotate").exists()

"""Errors of the command line: one line on stderr, exit status 2 for settings and data, 1 for failures while running."""

import json
import logging
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import micro
from tests.commands import ROWS, Command, rows_recipe
from tests.models.openai_server import Server

FIELDS = ("Text_analysis", "Image_analysis", "Conflict_resolution", "Final_conclusion")


def classifier(path: Path, model: Path, **changes: Any) -> Path:
    """Change a recipe so that it only trains a student, from the model in a folder and on labels only."""
    content = yaml.safe_load(path.read_text()) | changes
    for stage in ("annotate", "assistant", "augment", "evaluate", "export"):
        content.pop(stage, None)
    content["student"] |= {"tasks": {"classify": 1.0}, "distillation": {"weight": 0.0}, "hard_labels_baseline": False}
    content["student"]["model"] = {"path": str(model), "image_size": 28}
    path.write_text(yaml.safe_dump(content))
    return path


# ---- invalid recipes and data: status 2 ----


def test_a_typo_in_a_recipe(distill: Command, tmp_path: Path) -> None:
    path = micro.write(tmp_path, micro.RECORDED, student__distillation__wieght=0.5)
    result = distill("run", "--config", path)
    assert result.status == 2
    assert result.error == (
        "student.distillation.wieght is not a field (did you mean weight?); "
        "the fields of student.distillation are weight, temperature, positions, soft_targets, top_k, divergence, "
        "beta, skew, label_weight, label_teacher"
    )
    assert not (tmp_path / "runs").exists()


def test_a_missing_data_file(distill: Command, tmp_path: Path) -> None:
    path = rows_recipe(tmp_path, train=ROWS)
    (tmp_path / "data" / "train.jsonl").unlink()
    result = distill("run", "--config", path)
    assert result.status == 2
    assert result.error == f"data.train: cannot read {tmp_path / 'data' / 'train.jsonl'}: No such file or directory"


def test_a_file_without_rows(distill: Command, tmp_path: Path) -> None:
    result = distill("run", "--config", rows_recipe(tmp_path, train=ROWS, test=[]))
    assert (result.status, result.error) == (2, "data.test: test.jsonl has no rows")


def test_a_split_that_cannot_be_drawn(distill: Command, tmp_path: Path) -> None:
    result = distill("run", "--config", rows_recipe(tmp_path, train=ROWS[:1], test=ROWS[1:]))
    assert result.status == 2
    assert result.error.startswith("data.") and "has too few labelled posts to draw this split from" in result.error


def test_a_file_with_only_unknown_labels(distill: Command, tmp_path: Path) -> None:
    rows = [row | {"label": "happy"} for row in ROWS]
    result = distill("run", "--config", rows_recipe(tmp_path, train=rows))
    assert result.status == 2
    assert result.error == (
        "data.train: none of the 36 rows of train.jsonl can be used; row 1: "
        "unknown label 'happy'; the labels are negative, neutral, positive"
    )


def test_invalid_rows_are_dropped_with_a_warning(
    distill: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rationale = "\n".join(f'"{name}": "words"' for name in FIELDS) + '\n"Prediction": '
    rows = [row | {"rationale": rationale + str(row["label"])} for row in ROWS]
    invalid = [rows[0] | {"id": "p36", "label": "happy"}, rows[0] | {"text": "another text with the same id"}]
    with caplog.at_level(logging.WARNING, logger="distill"):
        result = distill("run", "--config", rows_recipe(tmp_path, train=rows + invalid), "--until", "annotate")
    assert result.status == 0
    report = tmp_path / "runs" / "micro" / "quarantine.jsonl"
    assert f"2 rows are dropped and listed in {report}; the first: train.jsonl row 37: unknown label" in caplog.text
    dropped = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(row["file"], row["row"], row["id"]) for row in dropped] == [
        ("train.jsonl", 37, "p36"),
        ("train.jsonl", 38, "p0"),
    ]
    assert dropped[1]["reason"] == "id 'p0' is already used by train.jsonl row 1"


def test_a_recording_without_rationales(distill: Command, tmp_path: Path) -> None:
    result = distill("run", "--config", rows_recipe(tmp_path, train=ROWS))
    assert result.status == 2
    assert result.error == "annotate: none of the 30 posts has a valid rationale (30 without a recording)"


# ---- invalid models: status 2 ----


def test_a_missing_model(distill: Command, tmp_path: Path) -> None:
    path = classifier(rows_recipe(tmp_path, train=ROWS), tmp_path / "nowhere")
    result = distill("run", "--config", path)
    assert result.status == 2
    assert result.error == f"student.model.path: {tmp_path / 'nowhere'} cannot be loaded: there is no such folder"


def test_a_model_without_a_chat_template(distill: Command, tmp_path: Path, model_folder: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    (model / "chat_template.jinja").unlink()
    result = distill("run", "--config", classifier(rows_recipe(tmp_path, train=ROWS), model))
    assert result.status == 2 and result.error.startswith(f"student.model.path: {model} has no chat template; use its ")


def test_labels_with_a_common_first_token_can_be_trained(distill: Command, tmp_path: Path, model_folder: Path) -> None:
    rows = [row | {"label": ("positive", "positively")[n % 2]} for n, row in enumerate(ROWS)]
    path = classifier(rows_recipe(tmp_path, train=rows), model_folder, task={"labels": ["positive", "positively"]})
    result = distill("run", "--config", path)
    assert (result.status, result.stdout) == (0, "ran student\n")


# ---- failures while running: status 1 ----


def endpoint_recipe(folder: Path, url: str, **settings: Any) -> Path:
    endpoint = {"base_url": url, "model": "big-vl", "max_attempts": 2, "backoff_s": 0.01} | settings
    path = rows_recipe(folder, train=ROWS)
    content = yaml.safe_load(path.read_text()) | {"annotate": {"endpoint": endpoint}}
    path.write_text(yaml.safe_dump(content))
    return path


def test_an_unreachable_endpoint(distill: Command, tmp_path: Path) -> None:
    result = distill("run", "--config", endpoint_recipe(tmp_path, "http://127.0.0.1:9/v1"))
    assert result.status == 1
    assert result.error.startswith("no server answers at base_url http://127.0.0.1:9/v1: ")
    status = json.loads((tmp_path / "runs/micro/chain.json").read_text())["stages"]["annotate"]["status"]
    assert status == "failed"


def test_an_expired_or_missing_key(distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(refuse=lambda body: (401, "expired")) as server:
        path = endpoint_recipe(tmp_path, server.url, api_key_env="TEACHER_KEY")
        result = distill("run", "--config", path)
        assert result.status == 2
        assert result.error.startswith("annotate.endpoint.api_key_env: the environment variable TEACHER_KEY is not set")
        monkeypatch.setenv("TEACHER_KEY", "secret")
        result = distill("run", "--config", path)
    assert result.status == 1
    assert result.error == f"the endpoint {server.url} refuses the key in TEACHER_KEY (status 401): expired"
    assert "secret" not in "".join(file.read_text() for file in (tmp_path / "runs").rglob("*.json*"))


def test_a_full_disk_during_training_and_a_second_run_with_free_space(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are limited to 200 kB, which only a checkpoint exceeds; the error comes from the kernel through torch."""
    path = micro.write(tmp_path, micro.RECORDED)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        result = distill("run", "--config", path, "--until", "assistant")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.status == 1
    folder = tmp_path / "runs" / "micro"
    assert result.error == f"{folder}: File too large"
    assert json.loads((folder / "chain.json").read_text())["stages"]["assistant"]["status"] == "failed"
    assert not (folder / "assistant" / "checkpoints" / "last.ckpt").exists()
    assert distill("run", "--config", path, "--until", "assistant").stdout == "ran assistant\n"


def test_a_run_folder_that_cannot_be_created(distill: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = distill("run", "--config", micro.write(tmp_path, micro.RECORDED), "--runs", tmp_path / "file")
    assert result.status == 1
    assert result.error == f"{tmp_path / 'file' / 'micro'}: Not a directory"

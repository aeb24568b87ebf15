"""Ownership of files in a run's folder, contents behind settings, and settings outside of fingerprints."""

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill import chain
from distill.chain import STAGES, run
from distill.errors import RunError, SettingsError
from distill.recipe import Recipe
from tests import micro
from tests.fake_stages import ROWS, Fakes, jsonl_recipe

ALL = [name for name in STAGES if name != "refine"]

NOTES = ("student/thesis.txt", "student/adapter/thesis.txt", "student/hard_labels/thesis/one.txt", "export/thesis.txt")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return micro.write(tmp_path, micro.WITH_TEACHER)


@pytest.fixture
def recipe(path: Path) -> Recipe:
    return micro.read(path)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


# ---- whose a file is ----


@pytest.mark.parametrize("state", ["done", "failed", "killed", "earlier version", "without manifest"])
def test_files_of_others_survive_a_stage_that_runs_again(
    state: str,
    recipe: Recipe,
    path: Path,
    fakes: Fakes,
) -> None:
    fakes.extra["student"] = ["checkpoints/last.ckpt", "hard_labels/metrics.csv"]
    if state == "failed":
        fakes.failing["student"] = RunError("stop here")
        with pytest.raises(RunError):
            run(recipe)
    else:
        run(recipe)
    folder, manifest = recipe.folder, recipe.folder / "chain.json"
    content = json.loads(manifest.read_text())
    if state in ("killed", "earlier version"):
        content["stages"]["student"].pop("files")
        content["stages"]["student"]["status"] = "running" if state == "killed" else "done"
        manifest.write_text(json.dumps(content))
    elif state == "without manifest":
        manifest.unlink()
    notes = [name for name in NOTES if "adapter" not in name]  # here the adapter is a file
    put(folder, *notes)
    fakes.failing["student"] = RunError("stop here")
    fakes.extra.clear()
    with pytest.raises(RunError, match="stop here"):
        run(micro.read(path, "--student.learning_rate", "0.1"))
    assert all((folder / name).read_text() == "mine" for name in notes)
    assert not (folder / "student" / "checkpoints").exists()
    assert not (folder / "student" / "hard_labels" / "metrics.csv").exists()
    assert (folder / "student" / "hard_labels" / "thesis").exists()


@pytest.mark.parametrize(
    "name", ["student/metrics.csv", "student/checkpoints/last.ckpt", "export/config.json", "recipe.yaml", "report.html"]
)
def test_a_file_of_others_with_the_name_of_an_output_is_named(name: str, recipe: Recipe, fakes: Fakes) -> None:
    put(recipe.folder, name)
    with pytest.raises(SettingsError, match=rf"{name} is in the way: [^\n]+; move it away$"):
        run(recipe)
    assert (recipe.folder / name).read_text() == "mine"
    (recipe.folder / name).unlink()
    run(recipe)


def test_a_link_in_place_of_an_output_is_not_followed(recipe: Recipe, tmp_path: Path, fakes: Fakes) -> None:
    put(tmp_path / "weights", "model.safetensors")
    (recipe.folder / "student").mkdir(parents=True)
    (recipe.folder / "student" / "adapter").symlink_to(tmp_path / "weights")
    with pytest.raises(SettingsError, match="student/adapter is in the way"):
        run(recipe)
    assert (tmp_path / "weights" / "model.safetensors").read_text() == "mine"


def test_an_edited_file_is_kept_when_its_stage_runs_again(recipe: Recipe, path: Path, fakes: Fakes) -> None:
    run(recipe)
    rationales = recipe.folder / "annotate" / "rationales.jsonl"
    rationales.write_text('{"id": "1"}\n')
    run(micro.read(path, "--annotate.retries", "2"))
    assert rationales.with_name("rationales.jsonl.edited").read_text() == '{"id": "1"}\n'
    assert rationales.read_text() != '{"id": "1"}\n'
    rationales.write_text('{"id": "2"}\n')
    run(micro.read(path, "--annotate.retries", "3"))
    assert rationales.with_name("rationales.jsonl.edited").read_text() == '{"id": "1"}\n'
    assert rationales.with_name("rationales.jsonl.edited.2").read_text() == '{"id": "2"}\n'


# ---- what is behind a setting ----


def test_an_image_with_the_same_size_and_time_runs_all_stages(tmp_path: Path, fakes: Fakes) -> None:
    rows = [row | {"image": "a.png"} for row in ROWS]
    recipe = jsonl_recipe(tmp_path, rows)
    image = tmp_path / "data" / "a.png"
    image.write_bytes(b"one")
    status = image.stat()
    stages = run(recipe)
    assert run(recipe) == []
    image.write_bytes(b"two")
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run(recipe) == stages
    assert run(recipe) == []
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    assert run(replace(recipe, data=replace(recipe.data, root=str(tmp_path / "moved")))) == []


def test_edited_postcards_run_all_stages_and_deleted_ones_none(recipe: Recipe, fakes: Fakes) -> None:
    from distill.data.corpus import read_corpus

    read_corpus(recipe.data, recipe.labels)
    assert run(recipe) == ALL
    rows = Path(recipe.data.root, "train.jsonl")
    rows.write_text(rows.read_text().replace("card", "cart", 1) + " ")
    content = rows.read_text().splitlines()
    rows.write_text("\n".join([json.dumps(json.loads(content[0]) | {"text": "edited"}), *content[1:]]) + "\n")
    assert run(recipe) == ALL
    assert run(recipe) == []
    shutil.rmtree(recipe.data.root)
    assert run(recipe) == []


def test_other_weights_behind_the_same_path_run_their_stage(tmp_path: Path, fakes: Fakes) -> None:
    put(tmp_path / "model", "config.json", "model.safetensors")
    path = micro.write(tmp_path, micro.RECORDED, student__model={"path": str(tmp_path / "model")})
    run(micro.read(path))
    assert run(micro.read(path)) == []
    (tmp_path / "model" / "model.safetensors").write_text("else")
    assert run(micro.read(path)) == ["student", "evaluate", "export"]
    assert run(micro.read(path)) == []


def test_the_answers_of_other_weights_behind_the_same_path_are_not_taken(
    tmp_path: Path,
    fakes: Fakes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variants: list[dict[str, str]] = []
    fake = STAGES["annotate"].run

    def annotate(context: Any, tracked: object) -> None:
        variants.append(dict(context.variants))
        fake(context, tracked)

    monkeypatch.setitem(chain.STAGES, "annotate", STAGES["annotate"]._replace(run=annotate))
    put(tmp_path / "model", "config.json")
    model = {"path": str(tmp_path / "model")}
    recipe = micro.read(micro.write(tmp_path, micro.RECORDED, annotate={"model": model}))
    run(recipe)
    (tmp_path / "model" / "config.json").write_text("else")
    run(recipe)
    put(tmp_path / "model", "config.json")
    run(recipe)
    assert [list(names) for names in variants] == [[], [str(tmp_path / "model")], []]


# ---- settings ----


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.enable_progress_bar", "true"],
        ["--trainer.log_every_n_steps", "7"],
        ["--trainer.enable_model_summary", "true"],
        ["--student.workers", "1"],
        ["--student.trainer.log_every_n_steps", "9"],
        ["--serve.port", "9000"],
        ["--tracking.mode", "offline"],
    ],
    ids=lambda flags: flags[0],
)
def test_settings_that_do_not_change_results_run_nothing(flags: list[str], path: Path, fakes: Fakes) -> None:
    run(micro.read(path))
    assert run(micro.read(path, *flags)) == []


def test_concurrency_timeouts_and_prices_of_an_endpoint_run_nothing(tmp_path: Path, fakes: Fakes) -> None:
    endpoint = {"base_url": "http://localhost:1/v1", "model": "m"}
    recipe = micro.read(micro.write(tmp_path, micro.RECORDED, annotate={"endpoint": endpoint}))
    run(recipe)
    assert recipe.annotate is not None and recipe.annotate.endpoint is not None
    other = replace(recipe.annotate.endpoint, concurrency=2, timeout_s=3.0, deadline_s=9.0, prompt_price=1.0)
    assert run(replace(recipe, annotate=replace(recipe.annotate, endpoint=other))) == []
    other = replace(recipe.annotate.endpoint, model="n")
    assert run(replace(recipe, annotate=replace(recipe.annotate, endpoint=other)))


def test_a_longer_training_keeps_its_checkpoints_and_a_shorter_one_does_not(
    recipe: Recipe, path: Path, fakes: Fakes
) -> None:
    fakes.extra["student"] = ["checkpoints/last.ckpt"]
    run(recipe)
    fakes.extra.clear()
    last = recipe.folder / "student" / "checkpoints" / "last.ckpt"
    for epochs, kept in (("5", True), ("9", True), ("8", False)):
        assert run(micro.read(path, "--student.trainer.max_epochs", epochs))[0] == "student"
        assert last.exists() == kept


def test_an_edit_is_logged(recipe: Recipe, fakes: Fakes, caplog: pytest.LogCaptureFixture) -> None:
    run(recipe)
    calibration = recipe.folder / "calibrate" / "calibration.json"
    calibration.write_text("{}")
    caplog.set_level(logging.WARNING)
    assert run(recipe) == ["cascade"]
    assert f"{calibration} was edited by hand and is used as it is" in caplog.text

"""The chain: which stages run again, failures, the manifest, and worker processes of distributed training."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import chain
from distill.chain import STAGES, identities, run, stages_of
from distill.errors import RunError, SettingsError
from distill.recipe import Recipe
from tests import micro
from tests.fake_stages import ROWS, Fakes, jsonl_recipe

AFTER_STUDENT = ["evaluate", "calibrate", "cascade", "export"]
ALL = ["teacher", "annotate", "assistant", "augment", "student", *AFTER_STUDENT]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return micro.write(tmp_path, micro.WITH_TEACHER)


@pytest.fixture
def recipe(path: Path) -> Recipe:
    return micro.read(path)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {str(path): (status.st_size, status.st_mtime_ns) for path, status in found.items()}


# ---- which stages run ----


def test_a_chain_has_the_stages_whose_sections_its_recipe_has(recipe: Recipe, path: Path) -> None:
    assert stages_of(recipe) == ALL == [name for name in STAGES if name != "refine"]
    flags = ["--teacher", "null", "--annotate.recorded", "true"]
    flags += [word for stage in ("augment", "calibrate", "cascade") for word in (f"--{stage}", "null")]
    fewer = micro.read(path, *flags)
    assert stages_of(fewer) == ["annotate", "assistant", "student", "evaluate", "export"]


def test_all_stages_run_in_order_and_a_second_run_changes_no_file(recipe: Recipe, fakes: Fakes) -> None:
    assert run(recipe) == ALL
    assert [folder.name for folder in fakes.folders] == ALL
    before = state(recipe.folder)
    assert run(recipe) == []
    assert state(recipe.folder) == before
    for name, entry in micro.manifest(recipe).items():
        assert entry["status"] == "done" and entry["identity"] == identities(recipe)[name]
        assert entry["outputs"] == [f"{name}/{output}" for output in STAGES[name].outputs]
        read = [earlier for earlier in STAGES[name].reads if earlier in ALL]
        assert entry["inputs"] == {earlier: micro.manifest(recipe)[earlier]["identity"] for earlier in read}
        assert set(entry["files"]) == set(STAGES[name].outputs)
        assert entry["seconds"] >= 0 and entry["peak_memory_mb"]["host"] > 100
        assert {"distill", "torch", "lightning", "transformers", "peft"} <= set(entry["versions"])
    assert micro.read(recipe.folder / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("flags", "again"),
    [
        (["--student.distillation.weight", "0.5"], ["student", *AFTER_STUDENT]),
        (["--evaluate.max_new_tokens", "50"], ["evaluate", "export"]),
        (["--augment.temperature", "0.9"], ["augment", "student", *AFTER_STUDENT]),
        (["--assistant.batch_size", "2"], ["assistant", "augment", "student", *AFTER_STUDENT]),
        (["--annotate.retries", "2"], ALL[1:]),
        (["--trainer.precision", "bf16-mixed"], ALL),
        (["--seed", "2"], ALL),
        (["--task.labels", "[bad, fair, good]"], ALL),
        (["--data.postcards.labelled", "36"], ALL),
        (["--augment", "null"], ["student", *AFTER_STUDENT]),
        (["--calibrate.budget", "0.2"], ["calibrate", "cascade"]),
        (["--cascade.on_agreement", "average"], ["cascade"]),
        (["--cascade.teacher.endpoint.base_url", "http://a/v1", "--cascade.teacher.endpoint.model", "a"],
         ["calibrate", "cascade"]),
        (["--tracking.project", "other"], []),
        (["--export", "null"], []),
    ],
    ids=lambda value: value[0] if value and value[0].startswith("-") else "",
)  # fmt: skip
def test_a_change_runs_the_dependent_stages(flags: list[str], again: list[str], path: Path, fakes: Fakes) -> None:
    run(micro.read(path))
    assert run(micro.read(path, *flags)) == again
    assert run(micro.read(path, *flags)) == []


def test_a_stage_with_a_deleted_output_runs_again(recipe: Recipe, fakes: Fakes) -> None:
    run(recipe)
    (recipe.folder / "augment" / "summary.json").unlink()
    shutil.rmtree(recipe.folder / "export")
    assert run(recipe) == ["augment", "export"]


def test_until_and_only(recipe: Recipe, path: Path, fakes: Fakes) -> None:
    assert run(recipe, until="assistant") == ["teacher", "annotate", "assistant"]
    assert run(recipe, until="annotate") == []
    with pytest.raises(
        SettingsError, match=r"^student reads augment, which has not run with this recipe; run it first$"
    ):
        run(recipe, only="student")
    assert run(recipe, only="augment") == ["augment"]
    assert run(recipe, only="student") == ["student"]
    with pytest.raises(SettingsError, match=r"^augment reads annotate, which has not run with this recipe"):
        run(micro.read(path, "--annotate.retries", "0"), only="augment")
    for arguments in ({"until": "serve"}, {"only": "serve"}):
        with pytest.raises(SettingsError, match=r"^the recipe has no section serve; its stages are teacher, annotate"):
            run(recipe, **arguments)
    assert run(recipe) == AFTER_STUDENT


# ---- inputs of a chain ----


def test_changed_data_runs_all_stages_and_moved_data_none(tmp_path: Path, fakes: Fakes) -> None:
    assert len(run(jsonl_recipe(tmp_path, ROWS))) == 6
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere" / "data")
    assert run(jsonl_recipe(tmp_path, ROWS, data__root=str(tmp_path / "elsewhere" / "data"))) == []
    changed = [ROWS[0] | {"text": "another text"}, *ROWS[1:]]
    assert len(run(jsonl_recipe(tmp_path, changed))) == 6


@pytest.mark.parametrize(
    "changes", [{"data__seed": 1}, {"data__validation_fraction": 0.3}, {"data__max_pixels": 9}], ids=str
)
def test_another_split_of_the_same_rows_runs_all_stages(changes: dict[str, Any], tmp_path: Path, fakes: Fakes) -> None:
    run(jsonl_recipe(tmp_path, ROWS))
    assert len(run(jsonl_recipe(tmp_path, ROWS, **changes))) == 6


def test_another_version_of_the_prompts_runs_all_stages(
    recipe: Recipe, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe)
    monkeypatch.setattr("distill.task.prompts.VERSION", "next")
    assert run(recipe) == ALL


def test_outputs_of_other_settings_are_deleted_but_the_ledger_is_kept(recipe: Recipe, path: Path, fakes: Fakes) -> None:
    run(recipe)
    annotate, student = recipe.folder / "annotate", recipe.folder / "student"
    (annotate / "ledger.jsonl").write_text("paid\n")
    fakes.extra["student"] = ["checkpoints/last.ckpt"]
    run(micro.read(path, "--student.patience", "3"))
    assert (student / "checkpoints" / "last.ckpt").exists()
    fakes.failing["student"] = RunError("stop here")
    del fakes.extra["student"]
    with pytest.raises(RunError, match="stop here"):
        run(micro.read(path, "--annotate.retries", "2"))
    assert (annotate / "ledger.jsonl").read_text() == "paid\n"
    assert not (student / "checkpoints").exists() and not (student / "metrics.csv").exists()


def test_an_export_is_kept_until_the_next_one_replaces_it(recipe: Recipe, path: Path, fakes: Fakes) -> None:
    fakes.extra["export"] = ["model.safetensors"]
    run(recipe)
    weights = (recipe.folder / "export" / "model.safetensors").read_text()
    fakes.failing["evaluate"] = RunError("stop here")
    other = micro.read(path, "--seed", "2")
    with pytest.raises(RunError, match="stop here"):
        run(other)
    assert (recipe.folder / "export" / "model.safetensors").read_text() == weights
    assert run(other) == AFTER_STUDENT


# ---- failures ----


def test_a_failed_stage_is_marked_and_resumes_with_its_files(recipe: Recipe, fakes: Fakes) -> None:
    fakes.failing["assistant"] = RunError("the endpoint is gone")
    with pytest.raises(RunError, match="the endpoint is gone"):
        run(recipe)
    stages = micro.manifest(recipe)
    assert [stages[name]["status"] for name in ("teacher", "annotate", "assistant")] == ["done", "done", "failed"]
    assert (recipe.folder / "assistant" / "adapter").exists()  # kept for the next run, which has the same fingerprint
    fakes.folders.clear()
    assert run(recipe) == ALL[2:]
    assert [folder.name for folder in fakes.folders] == ALL[2:]


def test_an_interrupted_stage_counts_as_failed(recipe: Recipe, fakes: Fakes) -> None:
    fakes.failing["annotate"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    assert micro.manifest(recipe)["annotate"]["status"] == "failed"
    assert run(recipe) == ALL[1:]


def test_a_second_process_is_rejected(recipe: Recipe, fakes: Fakes) -> None:
    with chain.locked(recipe.folder), pytest.raises(RunError, match=r"micro is in use by another process$"):
        run(recipe)
    assert run(recipe) == ALL


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"stages": 3', '{"stages": []}', '{"stages": {"annotate": 3}}', '{"other": {}}', "\x00\x01"],
    ids=repr,
)
def test_a_damaged_manifest_is_named_and_not_changed(content: str, recipe: Recipe, fakes: Fakes) -> None:
    run(recipe)
    damaged = recipe.folder / "chain.json"
    damaged.write_text(content)
    with pytest.raises(SettingsError, match=r"chain\.json is not a valid manifest; move it"):
        run(recipe)
    assert damaged.read_text() == content
    damaged.unlink()
    assert run(recipe) == ALL


def torch_on_a_full_disk() -> RuntimeError:
    """The error of torch.save, which has the error of the file system only as its context."""
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 6400 vs 6294")
    error.__context__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        torch_on_a_full_disk(),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors, in Rust
    ],
    ids=["python", "torch", "safetensors"],
)
def test_a_full_disk_is_reported_for_every_writer(error: Exception, recipe: Recipe, fakes: Fakes) -> None:
    fakes.failing["student"] = error
    with pytest.raises(RunError, match=r"No space left on device$") as raised:
        run(recipe)
    assert "\n" not in str(raised.value)
    assert micro.manifest(recipe)["student"]["status"] == "failed"
    assert run(recipe) == ["student", *AFTER_STUDENT]


def test_other_errors_are_not_reported_as_disk_errors(recipe: Recipe, fakes: Fakes) -> None:
    error = TypeError("a bug")
    error.__context__ = FileNotFoundError(errno.ENOENT, "an optional file")
    fakes.failing["teacher"] = error
    with pytest.raises(TypeError, match="a bug"):
        run(recipe)


# ---- worker processes of distributed training ----


def test_a_worker_process_runs_only_the_stage_of_its_training(
    recipe: Recipe, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe, until="assistant")
    before = state(recipe.folder)
    fakes.folders.clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("DISTILL_ACTIVE_FIT", str(recipe.folder / "student" / "hard_labels"))
    (recipe.folder / "student").mkdir()
    with chain.locked(recipe.folder):  # held by the main process
        assert run(recipe) == []
    assert [folder.name for folder in fakes.folders] == ["student"]
    assert {name: entry for name, entry in state(recipe.folder).items() if "chain.json" in name} == {
        name: entry for name, entry in before.items() if "chain.json" in name
    }


@pytest.mark.slow
def test_ddp_with_two_processes_trains_every_model_of_a_chain(tmp_path: Path) -> None:
    """ddp starts the command again for each training: assistant, student and the student's baseline."""
    changes = {"trainer__devices": 2, "trainer__strategy": "ddp", "evaluate": None, "export": None}
    path = micro.write(tmp_path, micro.RECORDED, **changes)
    command = [str(Path(sys.executable).with_name("distill")), "run", "--config", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "ran annotate, assistant, augment, student"
    stages = micro.manifest(micro.read(path))
    assert all(entry["status"] == "done" for entry in stages.values())
    for folder in ("assistant", "student", "student/hard_labels"):
        checkpoint = torch.load(tmp_path / "runs/micro" / folder / "checkpoints/last.ckpt", weights_only=True)
        # 27 labelled posts on two processes, 8 posts per step and process, two epochs
        assert checkpoint["global_step"] == 4, folder

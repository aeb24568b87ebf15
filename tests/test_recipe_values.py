"""Values of a recipe that are refused before any stage, blank fields, and printed recipes that are read back."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distill import chain
from distill.cli import COMMANDS
from distill.recipe import Recipe
from tests import micro
from tests.commands import Command
from tests.recipe_files import loaded, rejected


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return micro.write(tmp_path, micro.WITH_TEACHER)


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("student.learning_rate", "-1.0", "more than 0"),
        ("student.learning_rate", "nan", "more than 0"),
        ("student.learning_rate", "inf", "at most 2147483647"),
        ("student.factor", "1.5", "above 0, below 1"),
        ("student.distillation.temperature", "1e-30", "0.01 or more"),
        ("student.model.image_size", "-28", "0 to 8192"),
        ("student.model.batch_size", "0", "1 or more"),
        ("student.workers", "-1", "0 to 1024"),
        ("student.batch_size", "4294967296", "at most 2147483647"),
        ("student.warmup_steps", "-5", "0 or more"),
        ("student.patience", "-1", "0 or more"),
        ("student.model.tiny.hidden", "33", "a multiple of 32, 32 to 8192"),
        ("seed", "-1", "0 to 4294967295"),
        ("seed", "5000000000", "0 to 4294967295"),
        ("task.scale.bins", "400", "2 to 100"),
        ("evaluate.max_new_tokens", "0", "1 or more"),
        ("data.validation_fraction", "1.0", "at least 0, below 1"),
        ("student.trainer.accumulate_grad_batches", "0", "1 or more"),
        ("student.trainer.val_check_interval", "0", "more than 0"),
        ("student.trainer.limit_val_batches", "0.0", "more than 0"),
        ("student.trainer.max_epochs", "0", "1 or more, or -1"),
        ("trainer.max_steps", "0", "1 or more, or -1"),
        ("trainer.devices", "2000000", "1 to 1024, or -1"),
    ],
)
def test_a_number_out_of_range_is_named_with_the_range(name: str, value: str, takes: str, path: Path) -> None:
    given = f".{value}" if value in ("nan", "inf") else value
    assert rejected("--config", str(path), f"--{name}={given}") == f"{name} is {value}; it takes {takes}"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("student.trainer.max_time", "soon", "student.trainer.max_time: `Timer(duration='soon')` is not a valid"),
        ("trainer.profiler", "x", "trainer.profiler: When passing string value"),
        ("trainer.profiler", "0", "trainer.profiler: 0 is not"),
        ("trainer.gradient_clip_algorithm", "x", "trainer.gradient_clip_algorithm: `gradient_clip_algorithm` x is"),
        ("trainer.overfit_batches", "2", "trainer.overfit_batches is not a setting of lightning.Trainer; it takes"),
        ("student.trainer.barebones", "true", "student.trainer.barebones: `Trainer(barebones=True"),
        ("student.tasks", "{classify: .nan}", "student.tasks.classify is nan; it takes more than 0"),
        ("seed", "1" * 5000, "seed is a number with too many digits"),
        ("name", "a\0b", "name contains a NUL character"),
        ("annotate.endpoint", "{}", "annotate.endpoint.base_url is required"),
    ],
)
def test_what_a_library_refuses_is_refused_before_any_stage(name: str, value: str, message: str, path: Path) -> None:
    assert rejected("--config", str(path), f"--{name}={value}").startswith(message)


def test_missing_devices_end_a_run_before_any_stage_but_no_plan(path: Path, distill: Command) -> None:
    arguments = ("--config", path, "--student.trainer.devices", "[0, 0]")
    result = distill("run", *arguments)
    assert result.status == 2 and result.error.startswith("student.trainer.devices: `devices` selected with")
    assert not (path.parent / "runs/micro/teacher").exists()
    assert loaded(*map(str, arguments))  # as `distill plan` reads it on another machine


def test_values_near_the_ends_of_their_ranges_run(tmp_path: Path, distill: Command) -> None:
    extremes = {
        "augment__temperature": 1e-300, "augment__chunk": 10**9, "evaluate__max_new_tokens": 1,
        "student__distillation__temperature": 0.01, "student__learning_rate": 1e-300, "student__factor": 1e-300,
        "student__min_learning_rate": 1000.0, "student__warmup_steps": 2 * 10**9, "student__batch_size": 10**9,
        "student__model__batch_size": 10**9, "student__tasks": {"reason": 1e-300, "classify": 1.0},
        "data__max_tokens": 1, "data__postcards__unlabelled": 0, "seed": 2**32 - 1, "export": None,
    }  # fmt: skip
    result = distill("run", "--config", micro.write(tmp_path, micro.RECORDED, **extremes))
    assert result.status == 0 and "ran annotate, assistant, augment, student, evaluate" in result.stdout, result.stderr


def test_a_validation_interval_above_the_number_of_batches(path: Path, distill: Command) -> None:
    result = distill("run", "--config", path, "--until", "assistant", "--teacher", "null", "--annotate.recorded",
                     "true", "--calibrate", "null", "--cascade", "null", "--assistant.trainer",
                     "{max_epochs: 1, val_check_interval: 5000}")  # fmt: skip
    assert result.status == 2 and result.error.startswith("trainer: `val_check_interval` (5000) must be less than")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainer:\n", {}),
        ("task:\ntracking:\nseed:\nname:\n", {}),
        ("student: {trainer: }\n", {}),
        ("student: {distillation: }\n", {}),
        ("student: {tasks: , workers: , model: {tiny: {hidden: }}}\n", {}),
        ("trainer: null\n", {"trainer": {}}),
        ("cascade:\n", {"cascade": True}),
        ("cascade: null\n", {"cascade": False}),
        ("cascade: ~\nexport:\n", {"cascade": False, "export": True}),
        ("calibrate: {student_threshold: }\n", {}),
    ],
)
def test_a_blank_field_is_not_given_and_a_blank_section_has_its_defaults(
    text: str, expected: dict[str, Any], path: Path, tmp_path: Path
) -> None:
    override = tmp_path / "override.yaml"
    override.write_text(text)
    recipe, before = loaded("--config", str(path), "--config", str(override)), loaded("--config", str(path))
    for name in set(vars(Recipe("x"))) - set(expected):
        assert getattr(recipe, name) == getattr(before, name), name
    for name, value in expected.items():
        found = getattr(recipe, name)
        assert found == value if isinstance(value, dict) else (found is not None) == value


def test_numbers_and_text_of_a_file_keep_their_types(path: Path) -> None:
    content = yaml.safe_load(path.read_text()) | {"name": "1e3"}
    text = (
        yaml.safe_dump(content)
        .replace("name: 1e3", "name: '1e3'")
        .replace("learning_rate: 0.005", "learning_rate: 5e-3")
        .replace("mode: disabled", "group: 2026-11-26")
    )
    path.write_text(text)
    recipe = loaded("--config", str(path))
    assert (recipe.name, recipe.tracking.group) == ("1e3", "2026-11-26")
    assert recipe.assistant is not None and recipe.assistant.learning_rate == 5e-3


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_printed_recipe_of_every_command_is_read_back(
    command: str, path: Path, distill: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = distill(command, "--config", path, "--seed", "9", "--print_config")
    assert (result.status, result.stderr) == (0, "")
    again = path.with_name("c.yaml")
    again.write_text(result.stdout)
    seen: list[Recipe] = []
    monkeypatch.setattr("distill.planning.tables.plan_text", lambda recipe, **_: str(seen.append(recipe)))
    monkeypatch.setattr(chain, "run", lambda recipe, **_: seen.append(recipe))
    assert distill("plan", "--config", again).status == distill("run", "--config", again).status == 0
    assert seen == [loaded("--config", str(path), "--seed", "9")] * 2

"""Reading of recipes: overrides, round trips, and the documentation of every field."""

import ast
import contextlib
import dataclasses
import inspect
import io
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill import chain
from distill.cli import COMMANDS
from distill.errors import SettingsError
from distill.models.backbone import LoraSettings
from distill.models.endpoint import EndpointSettings
from distill.recipe import Recipe, load, masked, to_yaml
from tests import micro
from tests.recipe_files import ENDPOINT, loaded, options

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def printed(command: str, *arguments: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
        load(options(command), arguments)
    assert end.value.code == 0
    return output.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return micro.write(tmp_path, micro.WITH_TEACHER)


# ---- reading ----


def test_any_field_is_overridden_by_its_dotted_name(path: Path) -> None:
    recipe = loaded(
        *("--config", str(path), "--student.distillation.weight", "0.5", "--student.model.tiny.hidden=128"),
        *("--trainer.max_epochs", "7", "--student.trainer.precision", "bf16-mixed", "--task.labels", "[bad, good]"),
        *("--augment.temperature", "1", "--tracking.mode", "offline", "--teacher.tasks.classify", "2.5"),
    )
    assert recipe.student is not None and recipe.teacher is not None and recipe.augment is not None
    assert (recipe.student.distillation.weight, recipe.student.model.tiny.hidden) == (0.5, 128)
    assert recipe.student.model.tiny.layers == 1  # other fields keep the value of the file
    assert recipe.trainer == micro.RECORDED["trainer"] | {"max_epochs": 7}
    assert recipe.student.trainer == {"max_epochs": 2, "precision": "bf16-mixed"}
    assert recipe.labels.polarity == (-1, 1)
    assert recipe.augment.temperature == 1.0
    assert recipe.tracking.mode == "offline"
    assert recipe.teacher.tasks == {"predict": 1.0, "explain": 1.0, "classify": 2.5}


def test_flags_add_and_remove_sections(path: Path) -> None:
    recipe = loaded(
        *("--config", str(path), "--teacher", "null", "--annotate.endpoint", json.dumps(ENDPOINT)),
        *("--annotate.endpoint.concurrency", "3", "--export", "null"),
        *("--student.model.path", "some/model", "--student.model.lora", "{}", "--student.model.lora.r", "4"),
    )
    assert recipe.teacher is None and recipe.export is None
    assert recipe.annotate is not None and recipe.annotate.endpoint is not None and recipe.student is not None
    assert (recipe.annotate.endpoint.model, recipe.annotate.endpoint.concurrency) == ("big-vl", 3)
    assert recipe.annotate.max_new_tokens == 100
    assert recipe.student.model.lora == LoraSettings(r=4)


def test_later_files_and_flags_take_precedence(path: Path, tmp_path: Path) -> None:
    override = tmp_path / "override.yaml"
    override.write_text("seed: 5\nstudent: {batch_size: 3}\n")
    recipe = loaded("--config", str(path), "--config", str(override), "--seed", "6")
    assert recipe.student is not None
    assert (recipe.seed, recipe.student.batch_size, recipe.student.trainer) == (6, 3, {"max_epochs": 2})


def test_an_overlay_sets_single_arguments_of_the_trainer(path: Path, tmp_path: Path) -> None:
    before = loaded("--config", str(path)).trainer
    overlay, another, whole = (tmp_path / f"{name}.yaml" for name in ("overlay", "another", "whole"))
    overlay.write_text("trainer.strategy: fsdp2\ntrainer.devices: 4\n")
    another.write_text("trainer.devices: 8\n")
    whole.write_text("trainer: {accelerator: cpu}\n")
    assert loaded("--config", str(path), "--config", str(overlay)).trainer == before | {
        "strategy": "fsdp2", "devices": 4,
    }  # fmt: skip
    files = [text for file in (path, overlay, another) for text in ("--config", str(file))]
    assert loaded(*files).trainer == before | {"strategy": "fsdp2", "devices": 8}
    assert loaded(*files, "--trainer.devices", "2").trainer == before | {"strategy": "fsdp2", "devices": 2}
    assert loaded(*files, "--config", str(whole)).trainer == {"accelerator": "cpu"}
    another.write_text("trainer.device: 8\n")
    with pytest.raises(SettingsError, match=r"^trainer\.device is not a setting of lightning\.Trainer"):
        loaded(*files)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_the_overlays_change_where_a_recipe_trains_alone(name: str) -> None:
    recipe = next(path for path in RECIPES if path.stem == "twitter15")
    overlay = recipe.parent / "overlays" / f"{name}.yaml"
    before, after = loaded("--config", str(recipe)), loaded("--config", str(recipe), "--config", str(overlay))
    assert {key: after.trainer.pop(key) for key in ("strategy", "devices")} == {
        "strategy": {"fsdp": "fsdp2", "deepspeed": "zero3"}[name], "devices": 4,
    }  # fmt: skip
    del before.trainer["devices"]
    assert after == before


@pytest.mark.parametrize("source", [None, *RECIPES], ids=lambda p: p.stem if p else "micro")
def test_the_printed_and_the_saved_recipe_can_be_loaded(source: Path | None, path: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(source or path), "--seed", "9", "--student.distillation.temperature", "3"]
    recipe = loaded(*arguments)
    again = tmp_path / "again.yaml"
    again.write_text(printed("run", *arguments, "--print_config"))
    assert loaded("--config", str(again)) == recipe
    again.write_text(to_yaml(recipe))
    assert loaded("--config", str(again)) == recipe


# ---- documentation ----


def docstrings(section: Any) -> dict[str, str]:
    """The string below each field of a settings dataclass, including inherited fields; empty if there is none."""
    found: dict[str, str] = {}
    for base in reversed([base for base in section.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(inspect.getsource(base)).body[0].body  # type: ignore[attr-defined]
        for statement, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                text = (
                    after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
                )
                found[ast.unparse(statement.target)] = str(text)
    return found


def documented(section: Any, prefix: str = "") -> Iterator[tuple[str, str, bool]]:
    """The dotted name and docstring of every field, and whether it is a section."""
    texts = docstrings(section)
    for item in dataclasses.fields(section):
        inner = [kind for kind in typing.get_args(item.type) or (item.type,) if dataclasses.is_dataclass(kind)]
        yield prefix + item.name, texts[item.name], bool(inner)
        for kind in inner:
            yield from documented(kind, f"{prefix}{item.name}.")


def test_every_field_is_documented_in_the_help() -> None:
    pages = {"": printed("run", "--help")}
    while missing := set(re.findall(r"--([\w.]+)\.help\b", "".join(pages.values()))) - set(pages):
        pages |= {name: printed("run", f"--{name}.help") for name in missing}
    assert "student.model.lora" in pages and "annotate.endpoint" in pages
    plain = ["".join(page.split()) for page in pages.values()]
    fields = list(documented(Recipe))
    assert len(fields) > 120
    for name, text, is_section in fields:
        assert text.strip(), f"{name} has no docstring"
        if not is_section:
            text = "".join(text.split()).removesuffix(".")
            assert any(f"--{name}" in page and text in page.partition(f"--{name}")[2] for page in plain), name


def test_the_help_of_every_command_lists_the_fields() -> None:
    for command in COMMANDS:
        page = printed(command, "--help")
        assert f"distill {command}" in page and "--data.postcards.labelled" in page
        assert ("--until" in page) is False  # the command line adds it to `run` only


SERVER = {"base_url": "http://user:secret@127.0.0.1:9/v1/?key=secret", "model": "big"}


def test_the_earlier_place_of_the_cascades_teacher_is_read_with_a_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new = micro.read(micro.write(tmp_path, micro.RECORDED, calibrate={}, cascade={"teacher": {"endpoint": SERVER}}))
    assert not caplog.records and new.annotating_teacher is None
    old = micro.read(micro.write(tmp_path, micro.RECORDED, calibrate={"endpoint": SERVER}, cascade={}))
    assert caplog.messages == ["calibrate.endpoint is read as cascade.teacher.endpoint, its new place"]
    assert old.cascade_teacher == new.cascade_teacher and isinstance(old.cascade_teacher, EndpointSettings)
    assert old.cascade_teacher.address == "http://127.0.0.1:9/v1"
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(new))
    assert masked(micro.read(path)) == masked(new)


def test_two_servers_with_one_model_name_are_known_to_be_different(tmp_path: Path) -> None:
    def recipe(**cascade: Any) -> Recipe:
        content = {"annotate": {"endpoint": SERVER}, "calibrate": {}, "cascade": cascade}
        return micro.read(micro.write(tmp_path, micro.RECORDED, **content))

    two = recipe(teacher={"endpoint": SERVER | {"base_url": "http://127.0.0.1:10/v1"}})
    assert two.other_servers() == ["http://127.0.0.1:10/v1"]
    assert two.other_servers(for_cascade=True) == ["http://127.0.0.1:9/v1"]
    assert recipe().other_servers() == recipe(teacher={"endpoint": SERVER}).other_servers() == []
    assert recipe(teacher={"endpoint": SERVER | {"model": "b", "base_url": "http://b/v1"}}).other_servers() == []


def test_the_third_stage_needs_a_teacher_that_can_review(tmp_path: Path) -> None:
    def reviews(**changes: Any) -> bool:
        return micro.read(micro.write(tmp_path, micro.WITH_TEACHER, **changes)).teacher_learned("review")

    tasks = {"predict": 1.0, "classify": 1.0}
    assert not reviews() and not reviews(teacher__tasks=tasks)
    assert reviews(teacher__tasks=tasks | {"review": 0.5})
    assert reviews(cascade__teacher={"endpoint": SERVER}) and reviews(calibrate__model={"path": "qwen"})
    assert reviews(teacher=None, annotate={"model": {"path": "qwen"}}) and not reviews(cascade__teacher={})


@pytest.mark.parametrize("place", ["trainer", "student.trainer"])
def test_callbacks_by_class_path_are_plain_values(place: str, tmp_path: Path) -> None:
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.DeviceStatsMonitor"},
        {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 2}},
        "ModelSummary",
    ]
    (tmp_path / "flag").mkdir()
    (tmp_path / "file").mkdir()
    flag = f"--{place}={json.dumps({'max_epochs': 1, 'callbacks': callbacks})}"
    given = micro.read(micro.write(tmp_path / "flag", micro.RECORDED), flag)
    content = {f"{place.replace('.', '__')}": {"max_epochs": 1, "callbacks": callbacks}}
    for recipe in (given, micro.read(micro.write(tmp_path / "file", micro.RECORDED, **content))):
        trainer = recipe.trainer if place == "trainer" else recipe.student.trainer  # type: ignore[union-attr]
        stats, *others = json.loads(json.dumps(trainer))["callbacks"]
        assert stats["class_path"] == callbacks[0]["class_path"] and others == callbacks[1:]  # type: ignore[index]
        assert set(chain.up_to_date(recipe).values()) == {False}  # fingerprints can be made of it
    for wrong in (None, {}, {"init_args": {}}):
        with pytest.raises(SettingsError, match=rf"^{place}\.callbacks: .* names no class; each has class_path"):
            micro.read(tmp_path / "flag" / "recipe.yaml", f"--{place}={json.dumps({'callbacks': [wrong]})}")

"""Recipes: overrides, round trips, every refusal in one sentence, and the documentation of every field."""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.cli import COMMANDS
from distill.errors import SettingsError
from distill.models.backbone import LoraSettings
from distill.recipe import Recipe, check, load, parser, to_yaml
from tests import micro

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))

ENDPOINT = {"base_url": "http://localhost:8000/v1", "model": "big-vl"}


OPTIONS = functools.cache(parser)


def loaded(*arguments: str) -> Recipe:
    return load(OPTIONS("run"), arguments)[0]


def refused(*arguments: str) -> str:
    with pytest.raises(SettingsError) as error:
        loaded(*arguments)
    message = str(error.value)
    assert message and "\n" not in message
    assert not re.search(r"<class|Traceback|jsonargparse|Namespace|Union", message)
    return message


def printed(command: str, *arguments: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
        load(OPTIONS(command), arguments)
    assert end.value.code == 0
    return output.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return micro.write(tmp_path, micro.TAUGHT)


def change(path: Path, name: str, value: Any) -> None:
    """Set one field of a recipe file by its dotted name."""
    content = yaml.safe_load(path.read_text())
    *sections, field = name.split(".")
    place = content
    for section in sections:
        if not isinstance(place.get(section), dict):
            place[section] = {}
        place = place[section]
    place[field] = value
    path.write_text(yaml.safe_dump(content))


# ---- what is read ----


def test_any_field_is_overridden_by_its_dotted_name(path: Path) -> None:
    recipe = loaded(
        *("--config", str(path), "--student.distillation.weight", "0.5", "--student.model.tiny.hidden=128"),
        *("--trainer.max_epochs", "7", "--student.trainer.precision", "bf16-mixed", "--task.labels", "[bad, good]"),
        *("--augment.temperature", "1", "--tracking.mode", "offline", "--teacher.tasks.classify", "2.5"),
    )
    assert recipe.student is not None and recipe.teacher is not None and recipe.augment is not None
    assert (recipe.student.distillation.weight, recipe.student.model.tiny.hidden) == (0.5, 128)
    assert recipe.student.model.tiny.layers == 1  # what stands beside it stays as the file has it
    assert recipe.trainer == micro.RECORDED["trainer"] | {"max_epochs": 7}
    assert recipe.student.trainer == {"max_epochs": 2, "precision": "bf16-mixed"}
    assert recipe.labels.polarity == (-1, 1)
    assert recipe.augment.temperature == 1.0
    assert recipe.tracking.mode == "offline"
    assert recipe.teacher.tasks == {"predict": 1.0, "explain": 1.0, "classify": 2.5}


def test_sections_come_and_go_by_flags(path: Path) -> None:
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


def test_later_files_and_flags_win(path: Path, tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("seed: 5\nstudent: {batch_size: 3}\n")
    recipe = loaded("--config", str(path), "--config", str(over), "--seed", "6")
    assert recipe.student is not None
    assert (recipe.seed, recipe.student.batch_size, recipe.student.trainer) == (6, 3, {"max_epochs": 2})


@pytest.mark.parametrize("source", [None, *RECIPES], ids=lambda p: p.stem if p else "micro")
def test_what_is_printed_and_what_a_run_keeps_load_back(source: Path | None, path: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(source or path), "--seed", "9", "--student.distillation.temperature", "3"]
    recipe = loaded(*arguments)
    again = tmp_path / "again.yaml"
    again.write_text(printed("run", *arguments, "--print_config"))
    assert loaded("--config", str(again)) == recipe
    again.write_text(to_yaml(recipe))
    assert loaded("--config", str(again)) == recipe


# ---- what is refused: names ----

UNKNOWN = {
    "studnet": ("student", "the recipe takes name, runs, seed"),
    "student.modle": ("model", "student takes model, tasks"),
    "student.model.pth": ("path", "student.model takes path"),
    "student.model.tiny.hiden": ("hidden", "student.model.tiny takes hidden"),
    "student.model.lora.rr": ("r", "student.model.lora takes r, alpha"),
    "student.distillation.wieght": ("weight", "student.distillation takes weight, temperature, positions"),
    "annotate.endpoint.base": ("base_url", "annotate.endpoint takes base_url, model"),
    "annotate.model.pth": ("path", "annotate.model takes path"),
    "annotate.chunks": ("chunk", "annotate takes retries"),
    "data.rot": ("root", "data takes source, root"),
    "data.postcards.sed": ("seed", "data.postcards takes seed"),
    "task.label": ("labels", "task takes labels, polarity"),
    "tracking.mod": ("mode", "tracking takes project, mode"),
    "export.samples": (None, "export takes check_samples"),
}


@pytest.mark.parametrize("value", [3, {}, "text", None], ids=repr)
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_field_in_a_file_is_named_with_those_there_are(name: str, value: Any, path: Path) -> None:
    change(path, name, value)
    meant, takes = UNKNOWN[name]
    message = refused("--config", str(path))
    assert message.startswith(f"{name} is not a field")
    assert meant is None or f"did you mean {meant}?" in message
    assert takes in message


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_flag_is_named_with_those_there_are(name: str, path: Path) -> None:
    message = refused("--config", str(path), f"--{name}", "3")
    assert message.startswith(f"{name} is not a field") and UNKNOWN[name][1] in message
    assert refused("--config", str(path), f"--{name}=3") == message
    section, _, field = name.rpartition(".")
    if section:
        assert refused("--config", str(path), f"--{section}", json.dumps({field: 3})).startswith(name)


def test_an_argument_of_the_trainer_is_checked_too(path: Path) -> None:
    assert refused("--config", str(path), "--trainer.max_epoch", "3").startswith(
        "trainer.max_epoch is not a setting of"
    )
    assert "callbacks" in refused("--config", str(path), "--student.trainer.callbacks", "[]")
    assert refused("--config", str(path), "extra") == "unrecognized arguments: extra"


# ---- what is refused: values ----


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("seed", "x", "a whole number"),
        ("seed", 1.5, "a whole number"),
        ("student.batch_size", "many", "a whole number"),
        ("student.learning_rate", "fast", "a number"),
        ("student.model.tiny.hidden", "wide", "a whole number"),
        ("student.model.lora.r", "x", "a whole number"),
        ("student.tasks", [1], "a mapping"),
        ("student.hard_labels_baseline", "perhaps", "true or false"),
        ("annotate.recorded", "maybe", "true or false"),
        ("annotate.unlabelled", "keep", "one of skip, keep_confident"),
        ("data.source", "csv", "one of jsonl, twitter, mvsa, mosi, postcards"),
        ("data.train", "x.jsonl", "a list"),
        ("student.distillation.positions", "some", "one of response, all"),
        ("student.model.dtype", "int8", "one of float32, bfloat16, float16"),
        ("tracking.mode", "on-line", "one of auto, online, offline, disabled"),
        ("task.labels", "positive", "a list"),
        ("task.polarity", "x", "a list"),
        ("trainer", 3, "a mapping"),
        ("trainer.max_epochs", "many", "a whole number"),
        ("student.trainer.precision", "bf8", "a whole number or one of transformer-engine"),
        ("student.trainer.enable_progress_bar", "perhaps", "true or false"),
        ("student", 3, "a section; it takes model, tasks"),
        ("student.model", 3, "a section; it takes path"),
        ("student.model.lora", 3, "a section; it takes r, alpha"),
        ("data", 3, "a section; it takes source"),
    ],
)
def test_a_wrong_type_is_named_with_its_value_and_what_is_taken(
    name: str, value: Any, takes: str, path: Path, tmp_path: Path
) -> None:
    expected = f"{name}: {value} is not {takes}"
    assert refused("--config", str(path), f"--{name}", str(value)).startswith(expected)
    change(path, name, value)
    assert refused("--config", str(path)).startswith(expected)


def test_text_that_yaml_reads_as_a_number_wants_quotes(path: Path) -> None:
    change(path, "name", 3)
    assert refused("--config", str(path)) == "name: 3 is not text; quote it in YAML"


def test_what_is_required_is_named_where_it_is_missing(path: Path) -> None:
    change(path, "annotate.endpoint", {"base_url": "http://h"})
    assert refused("--config", str(path)) == "annotate.endpoint.model is required"
    change(path, "annotate", None)
    change(path, "name", None)
    assert refused("--config", str(path)) == "name is required"
    assert refused("--seed", "3") == "name is required"
    assert "expected one argument" in refused("--config")


def test_a_file_that_is_no_recipe_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nope.yaml"
    assert refused("--config", str(missing)) == f"--config: cannot read {missing}: No such file or directory"
    assert "Is a directory" in refused("--config", str(tmp_path))
    path = tmp_path / "r.yaml"
    for content, complaint in (
        ("name: [x\n  foo: }", "is not valid YAML"),
        ("name: q\n\tseed: 1\n", "line 2"),
        ("", "holds no fields"),
        ("- a\n- b\n", "holds no fields"),
    ):
        path.write_text(content)
        message = refused("--config", str(path))
        assert str(path) in message and complaint in message
    path.write_bytes(b"name: \xff\xfe")
    assert "is not valid YAML" in refused("--config", str(path))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("annotate.retries", -1, "annotate.retries is -1; it takes 0 or more"),
        ("annotate.confidence", 2.0, "annotate.confidence is 2.0; it takes above 0, at most 1"),
        ("annotate.endpoint", ENDPOINT | {"base_url": "x"}, "annotate.endpoint.base_url is 'x'; it takes an address"),
        ("annotate.endpoint", ENDPOINT | {"concurrency": 0}, "annotate.endpoint.concurrency is 0"),
    ],
)
def test_what_a_section_refuses_itself_is_named_by_its_place(name: str, value: Any, sentence: str, path: Path) -> None:
    change(path, name, value)
    assert refused("--config", str(path)).startswith(sentence)


# ---- what is refused: combinations ----


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "a/b"}, "name: 'a/b' takes letters"),
        ({"name": "../up"}, "name: '../up' takes letters"),
        ({"name": ".hidden"}, "name: '.hidden' takes letters"),
        ({"task.labels": ["one"]}, "task.labels needs at least two names"),
        ({"task.labels": ["a", "A"]}, "task.labels names one label twice"),
        ({"task.polarity": [1]}, "task.polarity needs one of -1, 0, 1 for each label"),
        ({"student.tasks": {"sing": 1.0}}, "student.tasks.sing: 1.0 is not a task"),
        ({"student.tasks": {"reason": 0.0}}, "student.tasks.reason: 0.0 is not a task with a positive weight"),
        ({"student.tasks": {}}, "student.tasks: at least one task"),
        ({"assistant.batch_size": 0}, "assistant.batch_size is 0; it takes 1 or more"),
        ({"teacher.model.lora": {}}, "teacher.model.lora needs teacher.model.path"),
        ({"annotate.endpoint": ENDPOINT}, "annotate takes one teacher"),
        ({"annotate.model": {"path": "p"}}, "annotate takes one teacher"),
        ({"teacher": None}, "annotate needs a teacher"),
        ({"annotate": None}, "assistant.tasks: reasoning needs an annotate section"),
        ({"annotate": None, "assistant": None, "augment": None, "student.distillation.weight": 0.0},
         "student.tasks: reasoning needs an annotate section"),
        ({"assistant": None}, "augment needs an assistant section"),
        ({"assistant.tasks": {"classify": 1.0}}, "augment needs an assistant section that trains the reason task"),
        ({"student.distillation.weight": 1.5}, "student.distillation.weight is 1.5; it takes 0 to 1"),
        ({"student.distillation.temperature": 0.0}, "student.distillation.temperature is 0.0; it takes more than 0"),
        ({"assistant": None, "augment": None}, "student.distillation.weight needs an assistant section"),
        ({"assistant.model.attention": "flash_attention_2", "assistant.packing": False},
         "student.packing takes false where assistant.model.attention is flash_attention_2"),
        ({"data.source": "mosi"}, "data.source mosi has continuous labels; task.scale must say"),
        ({"task.scale": {}}, "task.scale needs continuous labels: data.source mosi, not postcards"),
        ({"task.scale": {}, "data.source": "mosi"}, "annotate takes label names; with task.scale"),
        ({"task.scale": {}, "data.source": "mosi", "teacher": None, "annotate": None, "augment": None,
          "assistant.tasks": {"classify": 1.0}, "student.tasks": {"classify": 1.0}},
         "student.distillation.weight takes 0 where task.scale.spread makes the targets soft"),
        ({"annotate": None, "assistant": None, "augment": None, "student": None, "evaluate": None, "export": None},
         "teacher.tasks: reasoning needs an annotate section; without one the task is classify and review"),
        ({"student": None}, "evaluate needs a student section"),
        ({"student": None, "evaluate": None}, "calibrate needs a student section"),
        ({"student": None, "evaluate": None, "calibrate": None, "cascade": None}, "export needs a student section"),
        ({"calibrate": None}, "cascade needs a calibrate section, for its thresholds"),
        ({"teacher": None, "annotate.recorded": True},
         "calibrate needs a teacher to ask: teacher, or an endpoint or model of annotate or of calibrate"),
        ({"calibrate": {"endpoint": {"base_url": "http://a/v1", "model": "a"}, "model": {"path": "b"}}},
         "calibrate takes one teacher: calibrate.endpoint or calibrate.model"),
        ({"calibrate": {"model": {}}}, "calibrate.model.path is required: an untrained tiny model is no teacher"),
        ({"calibrate.risk": 2.0}, "calibrate.risk is 2.0; it takes above 0, below 1"),
        ({"serve": {"port": 70000}}, "serve.port is 70000; it takes 0 to 65535"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_an_impossible_combination_is_refused(changes: dict[str, Any], sentence: str, path: Path) -> None:
    for name, value in changes.items():
        change(path, name, value)
    assert refused("--config", str(path)).startswith(sentence)


def test_the_ablations_of_the_paper_are_sections_left_out(path: Path) -> None:
    for changes in (
        {"augment": None},
        {"assistant": None, "augment": None, "student.distillation.weight": 0.0},
        {"student.tasks": {"classify": 1.0}},
        {"student.distillation.weight": 0.0},
        {"calibrate": None, "cascade": None},
        {"teacher": None, "annotate.recorded": True, "calibrate": None, "cascade": None},
        {"teacher": None, "annotate": None, "assistant": None, "augment": None, "student.distillation.weight": 0.0,
         "student.tasks": {"classify": 1.0}, "calibrate": None, "cascade": None},
    ):  # fmt: skip
        content = yaml.safe_load(path.read_text())
        for name, value in changes.items():
            change(path, name, value)
        recipe = loaded("--config", str(path))
        check(recipe)
        assert all(getattr(recipe, name) is None for name, value in changes.items() if value is None)
        path.write_text(yaml.safe_dump(content))


# ---- documentation ----


def docstrings(section: Any) -> dict[str, str]:
    """The sentence under each field of a settings dataclass, those it inherits included; empty where there is none."""
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
    """Every field's dotted name and docstring, and whether it is a section of fields."""
    texts = docstrings(section)
    for item in dataclasses.fields(section):
        inner = [kind for kind in typing.get_args(item.type) or (item.type,) if dataclasses.is_dataclass(kind)]
        yield prefix + item.name, texts[item.name], bool(inner)
        for kind in inner:
            yield from documented(kind, f"{prefix}{item.name}.")


def test_every_field_is_documented_on_a_page_that_help_leads_to() -> None:
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


def test_the_help_of_every_command_has_the_fields() -> None:
    for command in COMMANDS:
        page = printed(command, "--help")
        assert f"distill {command}" in page and "--data.postcards.labelled" in page
        assert ("--until" in page) is False  # the command line adds it to `run` alone

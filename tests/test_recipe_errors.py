"""Errors in recipes: unknown names, wrong values, and invalid combinations of settings."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.recipe import check
from tests import micro
from tests.recipe_files import ENDPOINT, change, loaded, rejected


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return micro.write(tmp_path, micro.WITH_TEACHER)


# ---- names ----

UNKNOWN = {
    "studnet": ("student", "the fields of the recipe are name, runs, seed"),
    "student.modle": ("model", "the fields of student are model, tasks"),
    "student.model.pth": ("path", "the fields of student.model are path"),
    "student.model.tiny.hiden": ("hidden", "the fields of student.model.tiny are hidden"),
    "student.model.lora.rr": ("r", "the fields of student.model.lora are r, alpha"),
    "student.distillation.wieght": ("weight", "the fields of student.distillation are weight, temperature, positions"),
    "annotate.endpoint.base": ("base_url", "the fields of annotate.endpoint are base_url, model"),
    "annotate.model.pth": ("path", "the fields of annotate.model are path"),
    "annotate.chunks": ("chunk", "the fields of annotate are retries"),
    "data.rot": ("root", "the fields of data are source, root"),
    "data.postcards.sed": ("seed", "the fields of data.postcards are seed"),
    "task.label": ("labels", "the fields of task are labels, polarity"),
    "tracking.mod": ("mode", "the fields of tracking are project, mode"),
    "export.samples": (None, "the fields of export are check_samples"),
}


@pytest.mark.parametrize("value", [3, {}, "text", None], ids=repr)
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_field_in_a_file_is_named_with_the_known_ones(name: str, value: Any, path: Path) -> None:
    change(path, name, value)
    suggestion, known = UNKNOWN[name]
    message = rejected("--config", str(path))
    assert message.startswith(f"{name} is not a field")
    assert suggestion is None or f"did you mean {suggestion}?" in message
    assert known in message


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_flag_is_named_with_the_known_ones(name: str, path: Path) -> None:
    message = rejected("--config", str(path), f"--{name}", "3")
    assert message.startswith(f"{name} is not a field") and UNKNOWN[name][1] in message
    assert rejected("--config", str(path), f"--{name}=3") == message
    section, _, field = name.rpartition(".")
    if section:
        assert rejected("--config", str(path), f"--{section}", json.dumps({field: 3})).startswith(name)


def test_arguments_of_the_trainer_are_checked(path: Path) -> None:
    assert rejected("--config", str(path), "--trainer.max_epoch", "3").startswith(
        "trainer.max_epoch is not a setting of"
    )
    assert "logger" in rejected("--config", str(path), "--student.trainer.logger", "true")
    assert rejected("--config", str(path), "--student.trainer.callbacks", '["Nothing"]').startswith(
        "student.trainer.callbacks: Nothing: "
    )
    assert rejected("--config", str(path), "extra") == "unrecognized arguments: extra"


# ---- values ----


@pytest.mark.parametrize(
    ("name", "value", "expected"),
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
        ("data.source", "csv", "one of jsonl, twitter, mvsa, mosi, mmsa, meld, postcards, clips"),
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
        ("student", 3, "a section; its fields are model, tasks"),
        ("student.model", 3, "a section; its fields are path"),
        ("student.model.lora", 3, "a section; its fields are r, alpha"),
        ("data", 3, "a section; its fields are source"),
    ],
)
def test_a_wrong_type_is_named_with_the_value_and_the_expected_type(
    name: str, value: Any, expected: str, path: Path, tmp_path: Path
) -> None:
    message = f"{name}: {value} is not {expected}"
    assert rejected("--config", str(path), f"--{name}", str(value)).startswith(message)
    change(path, name, value)
    assert rejected("--config", str(path)).startswith(message)


def test_text_that_yaml_reads_as_a_number_needs_quotes(path: Path) -> None:
    change(path, "name", 3)
    assert rejected("--config", str(path)) == "name: 3 is not text; quote it in YAML"


def test_a_missing_required_field_is_named(path: Path) -> None:
    change(path, "annotate.endpoint", {"base_url": "http://h"})
    assert rejected("--config", str(path)) == "annotate.endpoint.model is required"
    change(path, "annotate", None)
    change(path, "name", None)
    assert rejected("--config", str(path)) == "name is required"
    assert rejected("--seed", "3") == "name is required"
    assert "expected one argument" in rejected("--config")


def test_an_invalid_file_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nope.yaml"
    assert rejected("--config", str(missing)) == f"--config: cannot read {missing}: No such file or directory"
    assert "Is a directory" in rejected("--config", str(tmp_path))
    path = tmp_path / "r.yaml"
    for content, problem in (
        ("name: [x\n  foo: }", "is not valid YAML"),
        ("name: q\n\tseed: 1\n", "line 2"),
        ("seed: 1\nname: q\nseed: 2\n", "seed is given twice"),
        ("student: {batch_size: 1, 'batch_size': 2}\n", "batch_size is given twice"),
        ("student: {}\nname: q\nstudent:\n", "student is given twice"),
        ("", "has no fields"),
        ("- a\n- b\n", "has no fields"),
    ):
        path.write_text(content)
        message = rejected("--config", str(path))
        assert str(path) in message and problem in message
    path.write_bytes(b"name: \xff\xfe")
    assert "is not valid YAML" in rejected("--config", str(path))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("annotate.retries", -1, "annotate.retries is -1; it takes 0 or more"),
        ("annotate.confidence", 2.0, "annotate.confidence is 2.0; it takes above 0, at most 1"),
        ("annotate.endpoint", ENDPOINT | {"base_url": "x"}, "annotate.endpoint.base_url is 'x'; it takes an address"),
        ("annotate.endpoint", ENDPOINT | {"concurrency": 0}, "annotate.endpoint.concurrency is 0"),
    ],
)
def test_an_error_of_a_section_has_its_dotted_name(name: str, value: Any, message: str, path: Path) -> None:
    change(path, name, value)
    assert rejected("--config", str(path)).startswith(message)


# ---- combinations ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "name is 'a/b'; it takes letters"),
        ({"name": "../up"}, "name is '../up'; it takes letters"),
        ({"name": ".hidden"}, "name is '.hidden'; it takes letters"),
        ({"task.labels": []}, "task.labels needs at least two names"),
        ({"task.labels": ["one"]}, "task.labels needs at least two names"),
        ({"task.labels": ["a", "A"]}, "task.labels has a label twice"),
        ({"task.polarity": [1]}, "task.polarity needs one of -1, 0 and 1 for each label"),
        ({"student.tasks": {"reason": 1e30}}, "student.tasks.reason is 1e+30; it takes at most 2147483647"),
        ({"student.tasks": {"sing": 1.0}}, "student.tasks.sing is not a task; the tasks are predict"),
        ({"student.tasks": {"reason": 0.0}}, "student.tasks.reason is 0.0; it takes more than 0"),
        ({"student.tasks": {}}, "student.tasks: at least one task"),
        ({"assistant.batch_size": 0}, "assistant.batch_size is 0; it takes 1 or more"),
        ({"teacher.model.lora": {}}, "teacher.model.lora needs teacher.model.path"),
        ({"annotate.endpoint": ENDPOINT}, "annotate takes one teacher"),
        ({"annotate.model": {"path": "p"}}, "annotate takes one teacher"),
        ({"teacher": None}, "annotate needs a teacher section"),
        ({"annotate": None}, "assistant.tasks takes only classify without an annotate section"),
        ({"annotate": None, "assistant": None, "augment": None, "student.distillation.weight": 0.0},
         "student.tasks takes only classify without an annotate section"),
        ({"assistant": None}, "augment needs an assistant section"),
        ({"assistant.tasks": {"classify": 1.0}}, "augment needs an assistant section that trains the reason task"),
        ({"data.drop_modality": {"smell": 0.1}},
         "data.drop_modality.smell is no modality; they are text, images, video, audio"),
        ({"data.drop_modality": {"audio": 1.0}}, "data.drop_modality.audio is 1.0; it takes"),
        ({"data.drop_modality": {"audio": 0.1}, "student.tasks": {"reason": 1.0}},
         "data.drop_modality needs classify in student.tasks: it trains labels only"),
        ({"data.drop_modality": {"audio": 0.1}, "student.distillation.soft_targets": "cached"},
         "student.distillation.soft_targets must be online with data.drop_modality"),
        ({"student.distillation.weight": 1.5}, "student.distillation.weight is 1.5; it takes 0 to 1"),
        ({"student.distillation.temperature": 0.0}, "student.distillation.temperature is 0.0; it takes 0.01 or more"),
        ({"assistant": None, "augment": None}, "student.distillation.weight must be 0 without an assistant section"),
        ({"student.distillation.label_weight": 1.0, "assistant": None, "augment": None,
          "student.distillation.weight": 0.0},
         "student.distillation.label_teacher: assistant needs an assistant section; or set label_weight to 0"),
        ({"student.distillation.label_weight": 1.0, "student.distillation.label_teacher": "teacher", "teacher": None,
          "annotate.recorded": True, "calibrate": None, "cascade": None},
         "student.distillation.label_teacher: teacher needs a teacher section, or an annotate section with a teacher"),
        ({"student.distillation.label_weight": 1.0, "assistant.tasks": {"reason": 1.0}},
         "assistant.tasks needs classify, because the student learns its label distribution"),
        ({"student.distillation.label_weight": 1.0, "student.distillation.label_teacher": "teacher",
          "teacher.tasks": {"predict": 1.0, "explain": 1.0}}, "teacher.tasks needs classify"),
        ({"student.distillation.label_weight": 1.0, "student.distillation.positions": "all"},
         "student.distillation.positions all requires label_weight 0 and divergence forward_kl"),
        ({"student.distillation.divergence": "tv", "student.distillation.positions": "all"},
         "student.distillation.positions all requires label_weight 0 and divergence forward_kl"),
        ({"student.distillation.positions": "all", "student.distillation.top_k": 4},
         "student.distillation.positions all requires soft_targets online and top_k 0"),
        ({"student.distillation.soft_targets": "online", "student.distillation.top_k": 4},
         "student.distillation.soft_targets online requires top_k 0"),
        ({"student.distillation.label_weight": -1.0}, "student.distillation.label_weight is -1.0; it takes 0 or more"),
        ({"student.distillation.beta": 1.0}, "student.distillation.beta is 1.0; it takes above 0, below 1"),
        ({"student.distillation.skew": 0.0}, "student.distillation.skew is 0.0; it takes above 0, below 1"),
        ({"student.distillation.divergence": "kl"}, "student.distillation.divergence"),
        ({"assistant.model.attention": "flash_attention_2", "assistant.packing": False},
         "student.packing must be false if assistant.model.attention is flash_attention_2"),
        ({"data.source": "mosi"}, "data.source mosi has continuous labels: add task.scale"),
        ({"task.scale": {}}, "task.scale needs continuous labels: data.source mosi or mmsa or clips, not postcards"),
        ({"task.scale": {}, "data.source": "mosi"}, "annotate does not support task.scale"),
        ({"task.scale": {}, "data.source": "mosi", "teacher": None, "annotate": None, "augment": None,
          "assistant.tasks": {"classify": 1.0}, "student.tasks": {"classify": 1.0}},
         "student.distillation.weight must be 0 if task.scale.spread is above 0"),
        ({"annotate": None, "assistant": None, "augment": None, "student": None, "evaluate": None, "export": None},
         "teacher.tasks takes only classify and review without an annotate section"),
        ({"student": None}, "evaluate needs a student section"),
        ({"student": None, "evaluate": None}, "calibrate needs a student section"),
        ({"student": None, "evaluate": None, "calibrate": None, "cascade": None}, "export needs a student section"),
        ({"calibrate": None}, "cascade needs a calibrate section, which fits its thresholds"),
        ({"teacher": None, "annotate.recorded": True},
         "calibrate needs a teacher: a teacher section, or the endpoint or model of annotate or cascade.teacher"),
        ({"calibrate": {"endpoint": {"base_url": "http://a/v1", "model": "a"}, "model": {"path": "b"}}},
         "calibrate takes one teacher: calibrate.endpoint or calibrate.model"),
        ({"calibrate": {"model": {}}}, "calibrate.model.path is required: an untrained tiny model"),
        ({"cascade": {"teacher": {"endpoint": {"base_url": "http://a/v1", "model": "a"}, "model": {"path": "b"}}}},
         "cascade.teacher takes one teacher: cascade.teacher.endpoint or cascade.teacher.model"),
        ({"cascade": {"teacher": {"model": {}}}}, "cascade.teacher.model.path is required: an untrained tiny model"),
        ({"calibrate": {"endpoint": {"base_url": "http://a/v1", "model": "a"}},
          "cascade": {"teacher": {"model": {"path": "b"}}}},
         "the cascade takes one teacher: cascade.teacher.model or calibrate.endpoint"),
        ({"cascade": {"teacher": {"endpoint": {"model": "a"}}}}, "cascade.teacher.endpoint.base_url is required"),
        ({"cascade": {"teacher": {"server": "a"}}}, "cascade.teacher.server is not a field"),
        ({"name": "ü" * 128}, "name has 256 bytes; it takes at most 255, because it names a folder"),
        ({"calibrate.risk": 2.0}, "calibrate.risk is 2.0; it takes above 0, below 1"),
        ({"serve": {"port": 70000}}, "serve.port is 70000; it takes 0 to 65535"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_an_invalid_combination_raises(changes: dict[str, Any], message: str, path: Path) -> None:
    for name, value in changes.items():
        change(path, name, value)
    assert rejected("--config", str(path)).startswith(message)


def test_recipes_of_the_papers_ablations_are_valid(path: Path) -> None:
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

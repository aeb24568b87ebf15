"""The arguments of lightning.Trainer: names, types, ranges, and the trial."""

import copy
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelSummary
from lightning.pytorch.loggers import CSVLogger

from distill.errors import SettingsError
from distill.models.backbone import LoraSettings, ModelSettings
from distill.training.assistant import TrainSettings
from distill.training.trainer_arguments import (
    check_schedule,
    check_strategy,
    check_trainer,
    extensions,
    try_trainer,
    with_defaults,
)


def test_unknown_and_reserved_trainer_arguments_are_rejected() -> None:
    check_trainer({"max_epochs": 3, "precision": "bf16-mixed", "strategy": "ddp", "val_check_interval": 0.1}, "trainer")
    with pytest.raises(SettingsError, match=r"student\.trainer\.epochs is not a setting of lightning\.Trainer"):
        check_trainer({"epochs": 3}, "student.trainer")
    for reserved in ("logger", "plugins", "enable_checkpointing", "self"):
        with pytest.raises(SettingsError, match=rf"trainer\.{reserved} "):
            check_trainer({reserved: True}, "trainer")


def test_the_type_and_the_range_of_an_argument_are_checked() -> None:
    with pytest.raises(SettingsError, match=r"^student\.trainer\.max_epochs: many is not a whole number$"):
        check_trainer({"max_epochs": "many"}, "student.trainer")
    with pytest.raises(SettingsError, match=r"^trainer\.max_epochs is 0; it takes 1 or more, or -1$"):
        check_trainer({"max_epochs": 0}, "trainer")


def test_the_trial_names_the_argument_and_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    try_trainer({"max_epochs": 3}, {"precision": "32-true"}, "student")
    with pytest.raises(SettingsError, match=r"^student\.trainer\.strategy: [^\n]+$"):
        try_trainer({"max_epochs": 3}, {"strategy": "none_such"}, "student")
    assert not caplog.records


def test_a_limit_of_steps_removes_that_of_epochs() -> None:
    assert with_defaults({"max_epochs": 3}, {"max_epochs": None})["max_epochs"] == 20
    assert with_defaults({"max_steps": 7})["max_epochs"] == -1
    assert with_defaults({"max_epochs": 3}, {"max_steps": 7})["max_epochs"] == 3


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "a", "patence": 1}}]},
         "callbacks: EarlyStopping: Option 'patence' is not accepted"),
        ({"callbacks": [{"class_path": "nowhere.Callback"}]}, "callbacks: nowhere.Callback: No module named 'nowhere'"),
        ({"callbacks": {"class_path": "EarlyStopping"}},
         "callbacks takes a list of classes, each with class_path and, if needed, init_args"),
        ({"callbacks": [3]}, "callbacks: 3: Not a valid subclass of Callback. Got value: 3"),
        ({"loggers": ["CSVLogger"]}, "loggers: CSVLogger: the following arguments are required: save_dir"),
        ({"loggers": [{"class_path": "ModelSummary"}]}, "loggers: ModelSummary: "),
    ],
)  # fmt: skip
def test_classes_are_checked_before_any_stage(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_trainer(arguments, "student.trainer")
    assert str(caught.value).startswith(f"student.trainer.{problem}") and "\n" not in str(caught.value)


def test_classes_are_created_and_leave_the_settings_as_they_are(tmp_path: Path) -> None:
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 7}}
    log = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    arguments = {"max_epochs": 3, "callbacks": [stop, "ModelSummary"], "loggers": [log]}
    before = copy.deepcopy(arguments)
    check_trainer(arguments, "trainer")
    rest, callbacks, loggers = extensions(arguments)
    assert rest == {"max_epochs": 3} and arguments == before
    assert [type(item) for item in callbacks] == [EarlyStopping, ModelSummary] and callbacks[0].patience == 7
    assert [type(item) for item in loggers] == [CSVLogger]
    assert extensions({"callbacks": None, "loggers": []}) == ({}, [], [])


def test_a_class_that_cannot_be_created_is_named_before_any_stage() -> None:
    broken = {"callbacks": [{"class_path": f"{__name__}.Broken"}]}
    try_trainer({}, broken, "student", on_cpu=True)
    with pytest.raises(SettingsError, match=rf"^student\.trainer\.callbacks: {__name__}\.Broken: needs a licence$"):
        try_trainer({}, broken, "student")


class Broken(Callback):
    def __init__(self) -> None:
        raise RuntimeError("needs a licence")


def test_a_falling_learning_rate_needs_a_last_step() -> None:
    cosine = TrainSettings(schedule="cosine")
    check_schedule(cosine, {}, "student")
    check_schedule(cosine, {"max_steps": 100}, "student")
    check_schedule(TrainSettings(trainer={"max_epochs": -1}), {}, "student")
    with pytest.raises(SettingsError, match=r"^student\.schedule cosine needs trainer\.max_epochs or "):
        check_schedule(cosine, {"max_epochs": -1}, "student")


# ---- several devices and nodes ----


@pytest.mark.parametrize(
    ("arguments", "quantize", "problem"),
    [
        ({"strategy": "fsdp"}, False, "trainer.strategy: fsdp is not supported; use fsdp2"),
        ({"strategy": "deepspeed_stage_3"}, False, "trainer.strategy: deepspeed_stage_3 is not supported; use zero3"),
        ({"strategy": "fsdp2", "precision": "16-mixed"}, False,
         "trainer.strategy: fsdp2 does not support float16; set precision to bf16-mixed"),
        ({"strategy": "zero3"}, True,
         "student.model.lora.quantize: weights in 4 bits cannot be sharded; "
         "set it to false, or trainer.strategy to ddp"),
    ],
)  # fmt: skip
def test_what_cannot_be_sharded_is_one_sentence(arguments: dict[str, Any], quantize: bool, problem: str) -> None:
    lora = LoraSettings(quantize=quantize)
    settings = TrainSettings(ModelSettings("a/model", lora=lora))
    check_strategy(settings, {"strategy": "ddp", "precision": "16-mixed"}, "student")
    with pytest.raises(SettingsError) as error:
        check_strategy(settings, arguments, "student")
    assert str(error.value) == problem
    with pytest.raises(SettingsError, match=re.escape(problem.replace("trainer.", "student.trainer."))):
        check_strategy(replace(settings, trainer=arguments), {"strategy": "auto"}, "student")


def test_a_strategy_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.training.zero3.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"^trainer\.strategy: zero3 needs .* pip install 'distill\[deepspeed\]'$"):
        try_trainer({"strategy": "zero3", "accelerator": "cpu", "devices": 2}, {}, "student")


def test_several_nodes_need_torchrun_and_its_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    two = {"accelerator": "cpu", "devices": 2, "num_nodes": 2, "strategy": "fsdp2"}
    with pytest.raises(SettingsError, match=r"^trainer\.num_nodes is 2: start distill by torchrun on each node$"):
        try_trainer(two, {}, "student")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(SettingsError) as error:
        try_trainer({"accelerator": "cpu"}, {"devices": 2, "num_nodes": 2}, "student")
    named = "student.trainer.devices times student.trainer.num_nodes is 4, but torchrun has started 8 processes"
    assert str(error.value) == named

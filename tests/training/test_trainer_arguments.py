"""The arguments of lightning.Trainer: names, types, ranges, and the trial."""

import logging

import pytest

from distill.errors import SettingsError
from distill.training.trainer_arguments import check_trainer, try_trainer, with_defaults


def test_unknown_and_reserved_trainer_arguments_are_rejected() -> None:
    check_trainer({"max_epochs": 3, "precision": "bf16-mixed", "strategy": "ddp", "val_check_interval": 0.1}, "trainer")
    with pytest.raises(SettingsError, match=r"student\.trainer\.epochs is not a setting of lightning\.Trainer"):
        check_trainer({"epochs": 3}, "student.trainer")
    for reserved in ("logger", "callbacks", "plugins", "enable_checkpointing", "self"):
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

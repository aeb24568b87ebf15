"""Random overrides of every field, on the command line and in a file: exit status 0, or 2 with one sentence.

A recipe that is accepted is printed by --print_config and read back.
"""

import contextlib
import dataclasses
import functools
import io
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from distill import chain, recipe
from distill.cli import main
from distill.recipe import Recipe
from distill.settings import LARGEST, Range, fields, limit_of, section_of

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
TRAINER = ("max_epochs", "max_steps", "devices", "accelerator", "precision", "strategy", "val_check_interval",
           "check_val_every_n_epoch", "accumulate_grad_batches", "limit_train_batches", "limit_val_batches",
           "gradient_clip_val", "max_time", "profiler", "num_sanity_val_steps", "log_every_n_steps",
           "min_epochs", "min_steps", "fast_dev_run", "overfit_batches", "limit_test_batches", "num_nodes",
           "gradient_clip_algorithm", "deterministic", "benchmark", "inference_mode", "detect_anomaly", "barebones",
           "sync_batchnorm", "reload_dataloaders_every_n_epochs", "enable_progress_bar", "typo")  # fmt: skip


def leaves(section: type = Recipe, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and types of all fields, sections included; arguments of the Trainer, too."""
    for name, annotation in fields(section).items():
        yield path + name, annotation
        if inner := section_of(annotation):
            yield from leaves(inner, f"{path}{name}.")
        if name == "trainer":
            yield from ((f"{path}trainer.{argument}", Any) for argument in TRAINER)


FIELDS = dict(leaves())

NUMBERS = st.one_of(
    st.integers(-3, 5), st.integers(), st.just(10**30), st.floats(), st.floats(0, 1), st.sampled_from([1e400, 1e-320])
)
ANYTHING = st.one_of(
    NUMBERS, st.booleans(), st.none(), st.text(max_size=8), st.sampled_from(["", " ", "null", "é☃", "a\0b", "-1"]),
    st.lists(st.one_of(NUMBERS, st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2), st.just({}),
)  # fmt: skip


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of the field's type, in its range and at its ends, and values of any other type."""
    fitting = [ANYTHING]
    for kind in (annotation, *typing.get_args(annotation)):
        kind = getattr(kind, "__origin__", kind) if hasattr(kind, "__metadata__") else kind
        if typing.get_origin(kind) is typing.Literal:
            fitting.append(st.sampled_from(typing.get_args(kind)))
        plain: dict[Any, st.SearchStrategy[Any]] = {
            int: st.integers(0, 40), float: st.floats(0, 1), bool: st.booleans(), str: st.text(max_size=12),
        }  # fmt: skip
        fitting += [strategy for type_, strategy in plain.items() if kind is type_]
    if isinstance(limit := limit_of(annotation), Range):
        fitting.append(st.sampled_from([limit.low, limit.high, limit.low - 1, limit.high + 1]))
    return st.one_of(fitting)


OVERRIDES = st.lists(
    st.sampled_from(sorted(FIELDS)).flatmap(lambda name: st.tuples(st.just(name), values(FIELDS[name]))),
    min_size=1, max_size=3, unique_by=lambda pair: pair[0],
)  # fmt: skip


@functools.cache
def options(command: str) -> recipe.RecipeParser:
    """A parser that is built once; building it takes longer than parsing."""
    made = build_parser(command)
    made.add_argument("--until", default=None)
    made.add_argument = lambda *_, **__: None  # type: ignore[assignment,method-assign]
    return made


build_parser = recipe.parser


def nested(overrides: list[tuple[str, Any]]) -> dict[str, Any]:
    """Overrides as the content of a recipe; a field inside one that is overridden as a whole is left out."""
    content: dict[str, Any] = {}
    for name, value in sorted(overrides):
        *sections, field = name.split(".")
        target: Any = content
        for section in sections:
            target = target.setdefault(section, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):
            target[field] = value
    return content


@pytest.mark.parametrize("part", range(5))
def test_random_overrides_end_with_0_or_one_sentence(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "parser", options)
    monkeypatch.setattr(chain, "locked", contextlib.nullcontext)  # writes nothing, also for a random `runs`
    monkeypatch.setattr(chain, "_run_stage", lambda *_: None)
    statuses: list[int] = []

    @seed(part)
    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(overrides=OVERRIDES, in_file=st.booleans())
    def attempt(overrides: list[tuple[str, Any]], in_file: bool) -> None:
        arguments = ["run", "--config", str(QUICKSTART)]
        if in_file:
            file = tmp_path / "override.yaml"
            text = yaml.safe_dump(nested(overrides), allow_unicode=True)
            file.write_text(text.replace(": null\n", ":\n"), encoding="utf-8")  # blank
            arguments += ["--config", str(file)]
        else:
            shown = [(name, v if isinstance(v, str) else json.dumps(v)) for name, v in overrides]
            arguments += [f"--{name}={value}" for name, value in shown]
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = main(arguments)
        assert status in (0, 2), errors.getvalue()
        if status == 2:
            (line,) = errors.getvalue().splitlines()
            assert line.startswith("distill: ") and "Traceback" not in line and len(line) < 1500
            assert not any(word in line for word in ("<class", "jsonargparse", "Namespace(", "object at 0x")), line
        else:
            printed = tmp_path / "printed.yaml"
            with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit):
                main([*arguments, "--print_config"])
            printed.write_text(output.getvalue(), encoding="utf-8")
            again = recipe.load(options("run"), ["--config", str(printed)])[0]
            assert again == recipe.load(options("run"), arguments[1:])[0]
        statuses.append(status)

    attempt()
    assert len(statuses) >= 60 and {0, 2} <= set(statuses)


def test_every_number_has_a_range() -> None:
    numbers = {
        name: kind for name, kind in FIELDS.items() if {int, float} & {kind, *typing.get_args(kind)} and kind is not Any
    }
    assert [name for name, kind in numbers.items() if limit_of(kind) is None and "[" not in str(kind)] == []
    ranged = {name: limit_of(kind) for name, kind in FIELDS.items() if isinstance(limit_of(kind), Range)}
    assert len(ranged) > 100 and all(limit.high >= limit.low > -LARGEST for limit in ranged.values())
    for section in {section_of(kind) for kind in FIELDS.values()} - {None}:
        assert hasattr(section, "__post_init__"), section  # which checks the ranges
        assert dataclasses.is_dataclass(section)

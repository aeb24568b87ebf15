"""A recipe and its variants: run with the stages that differ, and compared."""

import errno
import json
from pathlib import Path
from unittest.mock import patch

import pytest

import distill as api
from distill import chain
from distill.errors import SettingsError
from distill.variants import run_variants
from tests import micro
from tests.commands import Command


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.write(tmp_path_factory.mktemp("variants"), micro.RECORDED)


def overlay(folder: Path, name: str, text: str) -> Path:
    (path := folder / f"{name}.yaml").write_text(text)
    return path


def test_a_recipe_and_its_variants_are_run_and_compared(recipe: Path, tmp_path: Path, distill: Command) -> None:
    classify = overlay(tmp_path, "no-reasoning", "student: {tasks: {classify: 1.0}}\n")
    plain = overlay(tmp_path, "no-augment", "augment: null\n")
    arguments = ("compare", "--config", recipe, "--variants", classify, plain, "--seeds", 1, 2)
    result = distill(*arguments, "--student.trainer.max_epochs", "1", "--output", tmp_path / "t.csv")
    assert result.status == 0, result.stderr
    names = [f"micro{variant}-{seed}" for seed in (1, 2) for variant in ("", "-no-reasoning", "-no-augment")]
    runs = {name: recipe.parent / "runs" / name for name in names}
    read = {name: api.Run(path).recipe for name, path in runs.items()}
    assert read["micro-no-reasoning-2"].student.tasks == {"classify": 1.0}  # type: ignore[union-attr]
    assert [item.student.trainer["max_epochs"] for item in read.values()] == [1] * 6  # type: ignore[union-attr]
    assert read["micro-no-augment-1"].augment is None and not (runs["micro-no-augment-1"] / "augment").exists()
    for name in names[1:3]:  # the stages before the first difference are those of the recipe's own run
        for stage in ("annotate", "assistant"):
            of_variant, own = (json.loads((runs[run] / "chain.json").read_text()) for run in (name, names[0]))
            assert of_variant["stages"][stage] == own["stages"][stage]
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert {line.split(",")[1] for line in lines[1:]} == {"micro", "micro-no-reasoning", "micro-no-augment"}

    before = {path: path.stat().st_mtime_ns for path in recipe.parent.glob("runs/*/*/metrics.*")}
    again = distill(*arguments, "--student.trainer.max_epochs", "1")
    assert again.stdout == result.stdout
    assert {path: path.stat().st_mtime_ns for path in recipe.parent.glob("runs/*/*/metrics.*")} == before


@pytest.mark.parametrize(
    ("name", "text", "seeds", "message"),
    [
        ("bad", "student: {epochs: 3}", [5], "epochs is not a field"),
        ("good", "augment: null", [5, 5], "a seed is given twice"),
        ("7", "augment: null", [5], "has a number as its name"),
        ("same", "{}", [5], r"same\.yaml does not differ from"),
        ("seed", "{seed: 3, augment: null}", [5], "sets seed, which is the same for all variants"),
        ("named", "{name: other, augment: null}", [], "sets name, which"),
    ],
)
def test_nothing_runs_if_a_variant_is_invalid(
    name: str, text: str, seeds: list[int], message: str, recipe: Path, tmp_path: Path
) -> None:
    good = overlay(tmp_path, "one", "student: {batch_size: 4}\n")
    before = sorted(recipe.parent.rglob("*"))
    with pytest.raises(SettingsError, match=message):
        run_variants(recipe, [good, overlay(tmp_path, name, text)], seeds)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(SettingsError, match="two variants have the same file name"):
        run_variants(recipe, [good, overlay(tmp_path / "elsewhere", "one", "augment: null")], [])
    with pytest.raises(SettingsError, match="has no evaluate section"):
        run_variants(recipe, [good], [], ["--evaluate", "null", "--export", "null"])
    assert sorted(recipe.parent.rglob("*")) == before


def test_a_variant_that_was_killed_is_not_compared_and_goes_on(
    recipe: Path, tmp_path: Path, distill: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the copy, the results of the recipe's own run are not those of the variant."""
    other = overlay(tmp_path, "rate", "student: {learning_rate: 0.003}\n")
    arguments = ("compare", "--config", recipe, "--variants", other, "--student.trainer.max_epochs", "1")

    def killed(settings: object) -> list[str]:
        raise KeyboardInterrupt

    real = chain.run
    monkeypatch.setattr(chain, "run", lambda settings: (real if settings.name == "micro" else killed)(settings))
    assert distill(*arguments).status == 130
    runs = [recipe.parent / "runs" / name for name in ("micro", "micro-rate")]
    assert "the stage evaluate has not finished" in distill("compare", *runs).error
    assert not (runs[1] / "evaluate" / "metrics.json").exists()
    monkeypatch.setattr(chain, "run", real)
    assert distill(*arguments).status == 0
    assert api.Run(runs[1]).recipe.student.learning_rate == 0.003  # type: ignore[union-attr]


def test_a_full_disk_ends_with_one_sentence(recipe: Path, tmp_path: Path, distill: Command) -> None:
    other = overlay(tmp_path, "full", "student: {learning_rate: 0.004}\n")
    arguments = ("--variants", other, "--student.trainer.max_epochs", "1")
    with patch("shutil.copytree", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        result = distill("compare", "--config", recipe, *arguments)
    assert result.status == 1 and result.error.endswith(": No space left on device")
    assert not (recipe.parent / "runs" / "micro-full").exists()

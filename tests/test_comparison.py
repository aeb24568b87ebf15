"""`distill compare`: runs on the same posts, and a recipe with its variants."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

import distill as api
from distill.comparison import compare, run_variants, variants
from distill.errors import SettingsError
from distill.evaluation.comparison_page import page, text_table
from tests import micro
from tests.commands import Command


def copy(folder: Path, target: Path, seed: int = 1, **changes: object) -> Path:
    """A copy of a run with another seed or other fields in its recipe."""
    shutil.copytree(folder, target)
    recipe = yaml.safe_load((target / "recipe.yaml").read_text()) | {"seed": seed} | changes
    (target / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return target


def answer(run: Path, role: str, labels: dict[int, str]) -> None:
    """Change the labels that a role gave to some test posts."""
    path = run / "evaluate" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for index, label in labels.items():
        rows[index]["roles"][role]["label"] = rows[index]["gold"] if label == "gold" else label
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def wrong(run: Path, index: int) -> str:
    rows = [json.loads(line) for line in (run / "evaluate" / "predictions.jsonl").read_text().splitlines()]
    return next(label for label in ("negative", "neutral", "positive") if label != rows[index]["gold"])


def test_a_difference_is_that_of_the_posts_themselves(folder: Path, tmp_path: Path, distill: Command) -> None:
    first, other = copy(folder, tmp_path / "first"), copy(folder, tmp_path / "other", evaluate=None)
    answer(first, "student", {0: "gold", 1: "gold", 2: wrong(first, 2)})
    answer(other, "student", {0: wrong(first, 0), 1: wrong(first, 1), 2: "gold"})
    frame = compare([first, other])
    row = frame[(frame["role"] == "student") & (frame["variant"] == "other")].iloc[0]
    assert row["difference"] == pytest.approx(-1 / 9) and row["p"] == pytest.approx(1.0)  # 2 against 1 of 9 posts
    assert row["low"] <= row["difference"] <= row["high"]
    base = frame[(frame["role"] == "student") & (frame["variant"] == "first")].iloc[0]
    assert row["value"] - base["value"] == pytest.approx(row["difference"])
    assert np.isnan(base["difference"]) and (base["runs"], base["posts"]) == (1, 9)

    result = distill("compare", first, other, "--output", tmp_path / "table.csv", "--output", tmp_path / "table.html")
    assert result.status == 0 and result.stdout.strip() == text_table(frame)
    with (tmp_path / "table.csv").open(newline="") as file:
        written = [line for line in csv.DictReader(file) if (line["role"], line["variant"]) == ("student", "other")]
    assert float(written[0]["difference"]) == pytest.approx(row["difference"])
    html = (tmp_path / "table.html").read_text()
    assert html == page(frame) and "default-src 'none'" in html and html.count("<h2>") == frame["role"].nunique()


def test_runs_that_differ_in_their_seed_are_one_variant(folder: Path, tmp_path: Path) -> None:
    runs = [copy(folder, tmp_path / f"full-{seed}", seed) for seed in (2, 1, 3)]
    runs += [copy(folder, tmp_path / f"without-{seed}", seed, augment=None) for seed in (1, 2, 3)]
    answer(runs[3], "student", {0: wrong(folder, 0)})
    found = variants(runs)
    assert [(variant.name, variant.seeds) for variant in found] == [("full", [1, 2, 3]), ("without", [1, 2, 3])]
    frame = compare(runs)
    assert set(frame["runs"]) == {3} and frame["value"].notna().all()
    assert "without" in text_table(frame)


def test_runs_that_cannot_be_compared_are_named(folder: Path, tmp_path: Path, distill: Command) -> None:
    other = copy(folder, tmp_path / "other", augment=None)
    path = other / "evaluate" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["id"] = "elsewhere"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SettingsError, match="have other test posts or labels, such as elsewhere"):
        compare([folder, other])
    path.unlink()
    (other / "evaluate" / "metrics.json").unlink()
    assert "the stage evaluate has not run" in distill("compare", folder, other).error
    same = copy(folder, tmp_path / "same")
    for arguments, message in [
        ([folder], "runs of two recipes or more"),
        ([folder, folder], "is given twice"),
        ([folder, same], "has the recipe and the seed of"),
        ([folder, tmp_path / "none"], "is no run: it has no recipe.yaml"),
        ([folder, other, "--output", "x.pdf"], "must end in .csv or .html"),
        ([folder, "--student.batch_size", "3"], "--student.batch_size is no option without --config"),
        (["--config", folder / "recipe.yaml"], "--config needs --variants"),
    ]:
        result = distill("compare", *arguments)
        assert message in result.error and result.status == 2
    assert not Path("x.pdf").exists()


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


def test_nothing_runs_if_a_variant_is_invalid(recipe: Path, tmp_path: Path) -> None:
    good, bad = overlay(tmp_path, "good", "augment: null\n"), overlay(tmp_path, "bad", "student: {epochs: 3}\n")
    before = sorted(recipe.parent.rglob("*"))
    with pytest.raises(SettingsError, match="epochs is not a field"):
        run_variants(recipe, [good, bad], [5])
    (tmp_path / "other").mkdir()
    with pytest.raises(SettingsError, match="two variants have the same file name"):
        run_variants(recipe, [good, overlay(tmp_path / "other", "good", "")], [])
    assert sorted(recipe.parent.rglob("*")) == before

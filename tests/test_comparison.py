"""`distill compare`: runs on the same posts, and a recipe with its variants."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from distill.comparison import compare, variants
from distill.errors import SettingsError
from distill.evaluation.comparison_page import page, text_table
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
    first, other = copy(folder, tmp_path / "first"), copy(folder, tmp_path / "other", augment=None)
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


def edit(path: Path, change: Callable[[list[dict]], object]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_other_test_posts_are_named(folder: Path, tmp_path: Path) -> None:
    other = copy(folder, tmp_path / "other", augment=None, cascade=None)
    edit(other / "evaluate" / "predictions.jsonl", lambda rows: rows[4].update(id="elsewhere"))
    with pytest.raises(SettingsError, match="have other test posts or labels, such as elsewhere"):
        compare([folder, other])


def test_posts_without_an_answer_are_left_out_of_all_runs(folder: Path, tmp_path: Path) -> None:
    other = copy(folder, tmp_path / "other", augment=None)
    edit(other / "evaluate" / "predictions.jsonl", lambda rows: rows[2]["roles"]["student"].update(label=None))
    frame = compare([folder, other]).set_index(["role", "variant"])
    assert set(frame.loc["student"]["posts"]) == {8} and set(frame.loc["teacher"]["posts"]) == {9}
    assert frame.loc[("student", "other"), "difference"] == 0
    rows = [json.loads(line) for line in (folder / "evaluate" / "predictions.jsonl").read_text().splitlines()]
    right = [row["roles"]["student"]["label"] == row["gold"] for row in rows]
    assert frame.loc[("student", "other"), "value"] == pytest.approx(np.mean(right[:2] + right[3:]))


PREDICTIONS, METRICS, DECISIONS = "evaluate/predictions.jsonl", "evaluate/metrics.json", "cascade/decisions.jsonl"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (PREDICTIONS, lambda path: path.unlink(), "predictions.jsonl is missing"),
        (DECISIONS, lambda path: path.unlink(), "decisions.jsonl is missing"),
        (PREDICTIONS, lambda path: path.write_text(path.read_text()[:-20]), "is damaged .row 9"),
        (PREDICTIONS, lambda path: path.write_text(""), "there are no rows"),
        (PREDICTIONS, lambda path: edit(path, lambda rows: rows[3].pop("gold")), "'gold' is missing"),
        (PREDICTIONS, lambda path: edit(path, lambda rows: rows[3].update(id=7)), "row 4 has no id"),
        (PREDICTIONS, lambda path: edit(path, lambda rows: rows.append(rows[0])), "row 10 has no id"),
        (PREDICTIONS, lambda path: edit(path, lambda rows: rows[0].update(roles=None)), "is damaged"),
        (PREDICTIONS, lambda path: edit(path, lambda rows: rows[5]["roles"].pop("student")), "'student' is missing"),
        (DECISIONS, lambda path: edit(path, lambda rows: rows.pop()), "decisions.jsonl: 'test-"),
        (METRICS, lambda path: path.write_text("{}"), "metrics.json: 'assistant' is missing"),
        (METRICS, lambda path: path.write_text("[]"), "metrics.json is damaged"),
        (METRICS, lambda path: path.write_text(path.read_text()[:50]), "metrics.json is damaged"),
        ("chain.json", lambda path: path.write_text("{}"), "chain.json is not a valid manifest"),
    ],
)
def test_damaged_results_are_refused_by_file(
    file: str, damage: Callable[[Path], None], message: str, folder: Path, tmp_path: Path, distill: Command
) -> None:
    other = copy(folder, tmp_path / "other", augment=None)
    damage(other / file)
    result = distill("compare", folder, other)
    assert result.status == 2 and re.search(message, result.error), result.error


def test_results_that_are_older_than_what_they_are_made_from_are_refused(
    folder: Path, tmp_path: Path, distill: Command
) -> None:
    other = copy(folder, tmp_path / "other", augment=None)
    manifest = json.loads((other / "chain.json").read_text())

    def refusal(**entries: dict) -> str:
        stages = manifest["stages"] | {name: manifest["stages"][name] | entry for name, entry in entries.items()}
        (other / "chain.json").write_text(json.dumps(manifest | {"stages": stages}))
        return distill("compare", folder, other).error

    assert "the stage evaluate has not finished" in refusal(evaluate={"status": "running"})
    assert "evaluate is older than student" in refusal(student={"status": "running"})
    assert "evaluate is older than student" in refusal(student={"identity": "another"})
    assert "cascade is older than calibrate" in refusal(calibrate={"identity": "another"})


def test_what_cannot_be_compared_is_refused(folder: Path, tmp_path: Path, distill: Command) -> None:
    other, same = copy(folder, tmp_path / "other", augment=None), copy(folder, tmp_path / "same", name="another")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    for arguments, message in [
        ([folder], "runs of two recipes or more"),
        ([folder, folder], "is given twice"),
        ([folder, same], "has the recipe and the seed of"),
        ([folder, copy(folder, tmp_path / "none", evaluate=None)], "has no evaluate section"),
        ([folder, tmp_path / "nothing"], "is no run: it has no recipe.yaml"),
        ([folder, other, "--output", tmp_path / "x.pdf"], "must end in .csv or .html"),
        ([folder, other, "--output", tmp_path / "folder.html"], "folder.html is a folder"),
        ([folder, other, "--output", tmp_path / "file" / "x.csv"], "is no writable folder"),
        ([folder, "--student.batch_size", "3"], "--student.batch_size is no option without --config"),
        ([folder, other, "--seeds", "1"], "--seeds needs --config"),
        ([folder, other, "--variants", "x.yaml"], "--variants needs --config"),
        (["--config", folder / "recipe.yaml"], "--config needs --variants"),
    ]:
        result = distill("compare", *arguments)
        assert message in result.error and result.status == 2
    assert not (tmp_path / "x.pdf").exists()


def test_how_a_run_is_served_and_tracked_does_not_matter(folder: Path, tmp_path: Path) -> None:
    runs = [folder, copy(folder, tmp_path / "two", 2, serve={"explain": "none"}, tracking={"mode": "offline"})]
    (variant,) = variants(runs)
    assert variant.seeds == [1, 2]


def test_a_refined_student_is_compared_with_the_student_of_a_run_without_refine(folder: Path, tmp_path: Path) -> None:
    first, other = copy(folder, tmp_path / "first"), copy(folder, tmp_path / "other", refine={})
    for name, change in (("predictions.jsonl", lambda row: row["roles"]), ("metrics.json", lambda content: content)):
        path = other / "evaluate" / name
        parts = path.read_text().splitlines() if name.endswith("l") else [path.read_text()]
        contents = [json.loads(part) for part in parts]
        for content in contents:
            change(content)["student_refined"] = dict(change(content)["student"])
        path.write_text("\n".join(map(json.dumps, contents)))
    answer(other, "student_refined", {0: "gold"})
    answer(first, "student", {0: wrong(first, 0)})
    frame = compare([first, other])
    rows = frame[frame["role"] == "student_refined"].set_index("variant")
    assert rows.loc["other", "difference"] == pytest.approx(rows.loc["other", "value"] - rows.loc["first", "value"])
    base = frame[(frame["role"] == "student") & (frame["variant"] == "first")].iloc[0]
    assert rows.loc["first", "value"] == base["value"]
    assert "student_refined" not in set(compare([first, copy(folder, tmp_path / "third", augment=None)])["role"])

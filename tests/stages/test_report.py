"""The report and the table at the end of a chain."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from distill.errors import SettingsError
from distill.recipe import Recipe
from distill.stages import report
from distill.task.labels import TaskSettings
from tests import micro


@pytest.fixture(scope="module")
def page(finished: Recipe) -> str:
    report.run(finished)
    return (finished.folder / "report.html").read_text(encoding="utf-8")


def test_the_page_loads_no_other_files(page: str) -> None:
    assert page.startswith("<!doctype html>")
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']+)", page) + re.findall(r"url\(([^)]+)\)", page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "<script src" not in page and "@import" not in page


def test_the_page_shows_all_roles_posts_and_curves(page: str, finished: Recipe) -> None:
    for text in ("teacher", "assistant", "student", "student, hard labels", "majority class", "micro", "Cascade"):
        assert text in page
    assert page.count("data:image/") == 9 and all(f"test-000{n}" in page for n in range(9))
    assert page.count("<svg") >= 3 + 5  # the curves of teacher, assistant and student, and of the cascade
    assert "weight: 0.3" in page  # from the recipe


def test_the_table_lists_roles_and_the_paths_of_report_and_student(finished: Recipe) -> None:
    table = report.summary(finished).splitlines()
    assert table[-2] == f"report   {finished.folder / 'report.html'}"
    assert table[-1] == f"student  {finished.folder / 'export'}"
    assert re.fullmatch(r"cascade  accuracy \d\.\d{3} with \d\.\d{3} teacher calls per post", table[-3])
    assert [line.split("  ")[0] for line in table[2:-3]] == [
        "majority class (negative)", "teacher", "assistant", "student", "student, hard labels",
    ]  # fmt: skip


@pytest.mark.parametrize("labels", [["no", "not"], ["no", "not", "both"], ["positive", "neutral", "negative"]])
def test_an_evaluation_with_other_labels_is_not_shown(labels: list[str], finished: Recipe) -> None:
    other = replace(finished, task=TaskSettings(labels=labels))
    assert report.is_available(finished) and not report.is_available(other)
    with pytest.raises(SettingsError, match=r"evaluate was written with other task.labels; run: distill run"):
        report.run(other)


def test_a_chain_without_evaluation_has_no_report(tmp_path: Path) -> None:
    recipe = micro.read(micro.write(tmp_path, micro.RECORDED))
    with pytest.raises(SettingsError, match=r"metrics.json is missing; run: distill run --until evaluate"):
        report.run(recipe)


def test_stages_of_removed_sections_are_not_shown(finished: Recipe, tmp_path: Path) -> None:
    recipe = replace(finished, runs=str(tmp_path))
    shutil.copytree(finished.folder, recipe.folder)
    removed = replace(recipe, annotate=None, assistant=None, augment=None)
    report.run(removed)
    page = (removed.folder / "report.html").read_text(encoding="utf-8")
    assert "<h2>Annotation</h2>" not in page and "<h3>assistant</h3>\n<div" not in page
    assert '<tr class=""><th>augment</th>' not in page and '<tr class=""><th>student</th>' in page


def test_a_run_without_its_manifest_has_no_report(finished: Recipe, tmp_path: Path) -> None:
    recipe = replace(finished, runs=str(tmp_path))
    shutil.copytree(finished.folder, recipe.folder)
    (recipe.folder / "chain.json").unlink()
    with pytest.raises(SettingsError, match=r"chain\.json is missing; run: distill run$"):
        report.run(recipe)

"""The report and the table at the end of a chain."""

import re
from pathlib import Path

import pytest

from distill.errors import SettingsError
from distill.recipe import Recipe
from distill.stages import report
from tests import micro


@pytest.fixture(scope="module")
def page(finished: Recipe) -> str:
    report.run(finished)
    return (finished.folder / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_beside_it(page: str) -> None:
    assert page.startswith("<!doctype html>")
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']+)", page) + re.findall(r"url\(([^)]+)\)", page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "<script src" not in page and "@import" not in page


def test_the_page_shows_every_role_post_and_curve(page: str, finished: Recipe) -> None:
    for text in ("teacher", "assistant", "student", "student, hard labels", "majority class", "micro", "Cascade"):
        assert text in page
    assert page.count("data:image/") == 9 and all(f"test-000{n}" in page for n in range(9))
    assert page.count("<svg") >= 3 + 5  # the curves of teacher, assistant and student, and of the cascade
    assert "weight: 0.3" in page  # the recipe it was made from


def test_the_table_names_the_roles_the_page_and_the_student(finished: Recipe) -> None:
    table = report.summary(finished).splitlines()
    assert table[-2] == f"report   {finished.folder / 'report.html'}"
    assert table[-1] == f"student  {finished.folder / 'export'}"
    assert re.fullmatch(r"cascade  accuracy \d\.\d{3} with \d\.\d{3} teacher calls a post", table[-3])
    assert [line.split("  ")[0] for line in table[2:-3]] == [
        "majority class (negative)", "teacher", "assistant", "student", "student, hard labels",
    ]  # fmt: skip


def test_a_chain_that_was_not_judged_has_no_report(tmp_path: Path) -> None:
    recipe = micro.read(micro.write(tmp_path, micro.RECORDED))
    with pytest.raises(SettingsError, match=r"metrics.json is missing; run: distill run --until evaluate"):
        report.run(recipe)

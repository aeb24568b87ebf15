"""The posts and decisions of the report, from files that are written here: no model runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.data import jsonl
from distill.data.corpus import read_corpus
from distill.files import write_json
from distill.recipe import Recipe
from distill.stages import report
from distill.stages.report_posts import posts_and_decisions
from distill.task.labels import Scale, TaskSettings
from distill.task.sample import Sample
from distill.training.refine_settings import RefineSettings
from tests import micro
from tests.report_pages import CHAIN, HOSTILE, metrics


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe whose postcards are generated, and of whose run there are predictions and decisions of 40 posts."""
    content = micro.WITH_TEACHER | {"data": {"source": "postcards", "postcards": micro.RECORDED["data"]["postcards"]}}
    content["data"]["postcards"] = content["data"]["postcards"] | {"test": 45}
    recipe = micro.read(micro.write(tmp_path, content))
    posts = read_corpus(recipe.data, recipe.labels).test[:40]
    evaluate = recipe.folder / "evaluate"
    jsonl.write_rows(
        evaluate / "predictions.jsonl", [prediction(post, ["student", "student_refined"]) for post in posts]
    )
    roles = {"student": metrics(0.8), "student_refined": metrics(0.9, grounded=0.75)}
    write_json(evaluate / "metrics.json", roles | {"majority_class": {"label": "negative", "accuracy": 0.5}})
    started = {"started": "2026-01-02", "versions": {"torch": "2"}, "seconds": 61.0}
    write_json(recipe.folder / "chain.json", {"stages": {"evaluate": started, "refine": started}})
    return recipe


def prediction(post: Sample, roles: list[str]) -> dict[str, Any]:
    """A row of `predictions.jsonl`: the first role is wrong about negative posts."""
    answers = {
        role: {"label": "neutral" if role == "student" and post.label == "negative" else post.label,
               "probabilities": [0.7, 0.2, 0.1], "rationale": post.rationale}
        for role in roles
    }  # fmt: skip
    fields = {"id": post.id, "text": post.text, "aspect": None, "images": [f"images/{post.id}.png"]}
    return fields | {"gold": post.label, "reference": CHAIN, "roles": answers}


def decide(recipe: Recipe, *answers: tuple[str, Any, Any, Any, Any], ids: list[str] | None = None) -> None:
    """Write decisions: gold, and the answers of cascade, student, teacher and review; None where it was not asked."""

    def model(label: Any) -> dict[str, Any] | None:
        polarity = {"negative": -1, "neutral": 0, "positive": 1}.get(label, 0)
        answer = {"label": label or None, "polarity": polarity, "uncertainty": 0.3 if label else None}
        return None if label is None else answer

    rows = [
        {"id": ids[n] if ids else f"test-{n:04}", "gold": gold, "label": label, "stage": "student", "reason": "r"}
        | {"student": model(student), "teacher": model(teacher), "review": model(review)}
        for n, (gold, label, student, teacher, review) in enumerate(answers)
    ]
    jsonl.write_rows(recipe.folder / "cascade" / "decisions.jsonl", rows)


def test_decisions_are_grouped_and_their_posts_are_in_the_gallery(recipe: Recipe) -> None:
    wrong = ("negative", "positive", "positive", None, None)
    reviewed = ("negative", "negative", "negative", "positive", "negative")
    spoiled = ("negative", "positive", "negative", "negative", "positive")
    corrected = ("negative", "negative", "neutral", "negative", None)
    unanswered = ("negative", "negative", "negative", "negative", "")  # the review did not answer
    right = ("negative", "negative", "negative", None, None)
    decide(recipe, *[right] * 20, wrong, reviewed, spoiled, unanswered, *[corrected] * 16)
    gallery, groups = posts_and_decisions(recipe)
    assert [(group["title"], group["total"], [row["index"] for row in group["rows"]]) for group in groups] == [
        ("Wrong answers of the cascade", 2, [20, 22]),
        ("Corrected by the review", 1, [21]),
        ("Errors of the student that the teacher corrected", 16, list(range(24, 36))),
    ]
    shown = [post["index"] for post in gallery]
    assert len(shown) == len(set(shown)) and {20, 21, 22, *range(24, 36)} <= set(shown)
    assert all(post["id"] == f"test-{post['index']:04}" for post in gallery)
    by_index = {post["index"]: post for post in gallery}
    assert by_index[20]["decision"]["right"] is False and by_index[21]["decision"]["teacher"]["right"] is False


def test_half_of_the_gallery_is_misclassified(recipe: Recipe) -> None:
    gallery, groups = posts_and_decisions(recipe)
    wrong = [post for post in gallery if post["answers"]["student"]["label"] != post["gold"]]
    assert (len(gallery), len(wrong), groups) == (24, 12, []) and gallery[:12] == wrong
    assert gallery[0]["decision"] is None
    assert set(gallery[0]["attributes"]) == {"tone", "face", "sky"}


def test_decisions_about_other_posts_have_no_link(recipe: Recipe) -> None:
    decide(recipe, ("negative", "positive", "positive", None, None), ids=["of another run"])
    gallery, (group,) = posts_and_decisions(recipe)
    assert group["rows"][0]["index"] is None and len(gallery) == 24
    report.run(recipe)
    assert "of another run" in (recipe.folder / "report.html").read_text(encoding="utf-8")


def test_values_on_a_scale_are_judged_by_polarity(recipe: Recipe) -> None:
    other = replace(recipe, task=TaskSettings(scale=Scale(low=-2, high=2, bins=5)))
    decide(other, *[(gold, label, "neutral", None, None) for gold, label in ((1.5, 0.9), (1.5, -0.2), (0.0, 0.0))])
    _, groups = posts_and_decisions(other)
    rows = {group["title"]: [row["index"] for row in group["rows"]] for group in groups}
    assert rows == {"Wrong answers of the cascade": [1], "Errors of the student that the teacher corrected": [0]}


@pytest.mark.parametrize("change", ["gone", "other texts", "damaged"])
def test_attributes_come_from_the_same_posts_alone(change: str, recipe: Recipe) -> None:
    path = Path(recipe.data.root, "test.jsonl")
    if change == "gone":
        path.unlink()
    elif change == "other texts":
        rows = [json.loads(line) | {"text": "other"} for line in path.read_text(encoding="utf-8").splitlines()]
        jsonl.write_rows(path, rows)
    else:
        rows = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(['{"id": "test-0000", "attributes": 3, "text": "x"}', *rows[1:]]), encoding="utf-8")
    gallery, _ = posts_and_decisions(recipe)
    unknown = [post["id"] for post in gallery if not post["attributes"]]
    assert unknown == ["test-0000"] if change == "damaged" else len(unknown) == 24


def test_the_page_of_a_refined_student_with_hostile_ids(recipe: Recipe) -> None:
    path = recipe.folder / "evaluate" / "predictions.jsonl"
    rows = [dict(row.fields) for row in jsonl.read(path)]
    rows[30] |= {"id": HOSTILE}
    jsonl.write_rows(path, rows)
    answer = ("negative", "positive", "positive", None, None)
    decide(recipe, answer, ids=[HOSTILE])
    (recipe.folder / "refine").mkdir()
    (recipe.folder / "refine" / "metrics.csv").write_text("step,train/loss\n1,2\n2,1\n")
    report.run(replace(recipe, refine=RefineSettings()))
    page = (recipe.folder / "report.html").read_text(encoding="utf-8")
    assert 'href="#post-30"' in page and 'id="post-30"' in page and 'href="#decision-30"' in page
    assert page.count("<script") == 1 and "onerror=alert(1)>" not in page
    assert page.count("<h3>student, refined</h3>") == 2  # its training and its confusion matrix
    assert 'rationale: student, refined <span class="tag right">grounded' in page
    assert "1 min 01 s" in page and "2 min 02 s" in page

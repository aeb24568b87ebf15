"""The names of `import distill`: they give what the stages wrote."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import distill
from distill.data import jsonl
from tests import micro


@pytest.fixture(scope="module")
def posts(folder: Path) -> list[dict]:
    """The test posts, with paths of their images."""
    recipe = distill.Run(folder).recipe
    rows = [row.fields for row in jsonl.read(folder / "evaluate" / "predictions.jsonl")]
    return [
        {"id": row["id"], "text": row["text"], "images": [f"{recipe.data.root}/{name}" for name in row["images"]]}
        for row in rows
    ]


def test_the_import_is_quick_and_every_name_is_there() -> None:
    script = "import distill, sys; assert 'torch' not in sys.modules and 'Student' in dir(distill); print(distill.Run)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "distill.runs.Run" in result.stdout
    for name in distill.__all__:
        assert getattr(distill, name).__doc__ or name == "__version__", name
    with pytest.raises(AttributeError, match="no attribute 'Stduent'"):
        distill.Stduent  # noqa: B018


def test_a_recipe_is_read_as_on_the_command_line(tmp_path: Path) -> None:
    path = micro.write(tmp_path, micro.RECORDED)
    overrides = {"student.distillation.weight": 0.5, "trainer": {"max_epochs": 3}, "name": "other", "augment": None}
    flags = ("--student.distillation.weight", "0.5", "--trainer", "{max_epochs: 3}", "--name", "other")
    recipe = distill.load_recipe(path, overrides)
    assert recipe == micro.read(path, *flags, "--augment", "null") and isinstance(recipe, distill.Recipe)
    assert recipe.augment is None and recipe.student is not None and recipe.student.distillation.weight == 0.5
    assert distill.plan(recipe).startswith("Plan of other")
    with pytest.raises(distill.SettingsError, match="distilation is not a field"):
        distill.load_recipe(path, {"student.distilation.weight": 0.5})


def test_a_run_gives_what_the_stages_wrote(folder: Path, finished: distill.Recipe) -> None:
    run = distill.run(finished)  # nothing is left to do
    assert run.folder == folder and run.recipe == finished
    assert list(run.stages.index) == list(json.loads((folder / "chain.json").read_text())["stages"])
    assert set(run.stages["status"]) == {"done"}
    written = json.loads((folder / "evaluate" / "metrics.json").read_text())
    assert run.metrics.loc["student", "accuracy"] == written["student"]["accuracy"]
    decided = json.loads((folder / "cascade" / "metrics.json").read_text())
    assert run.metrics.loc["cascade", "teacher_calls_per_sample"] == decided["teacher_calls_per_sample"]
    assert run.decisions["teacher_calls"].mean() == pytest.approx(decided["teacher_calls_per_sample"])
    rows = [row.fields for row in jsonl.read(folder / "cascade" / "decisions.jsonl")]
    assert run.decisions["uncertainty"].to_dict() == {row["id"]: row["student"]["uncertainty"] for row in rows}
    predictions = run.predictions
    assert (predictions["gold"] == predictions["student"]).mean() == pytest.approx(written["student"]["accuracy"])
    assert predictions["student_rationale"].str.len().min() > 0
    assert all(path.exists() for paths in predictions["images"] for path in paths)
    assert predictions["images"].str.len().max() >= 1


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(distill.SettingsError, match=r"is no run: it has no recipe\.yaml"):
        distill.Run(tmp_path)
    with pytest.raises(distill.SettingsError, match=r"is no exported student: .*scoring\.json is missing"):
        distill.Student.from_pretrained(tmp_path)


def test_a_student_classifies_as_it_was_evaluated(folder: Path, posts: list[dict]) -> None:
    rows = [row.fields["roles"]["student"] for row in jsonl.read(folder / "evaluate" / "predictions.jsonl")]
    trained = distill.Student.from_run(folder)
    exported = distill.Student.from_pretrained(folder / "export")
    assert trained.labels == exported.labels == ["negative", "neutral", "positive"]
    for student, tolerance in ((trained, 1e-6), (exported, 1e-4)):
        found = student.classify(posts)
        assert [answer["id"] for answer in found] == [post["id"] for post in posts]
        assert [answer["label"] for answer in found] == [row["label"] for row in rows]
        for answer, row in zip(found, rows, strict=True):
            assert list(answer["probabilities"].values()) == pytest.approx(row["probabilities"], abs=tolerance)
            p = np.array(row["probabilities"])
            assert answer["uncertainty"] == pytest.approx(-(p * np.log(p)).sum() / np.log(3), abs=10 * tolerance)
    reasoned = trained.reason(posts[:3], max_new_tokens=100)
    for answer, row in zip(reasoned, rows, strict=False):
        assert answer["text"] == row["rationale"]
        assert (answer["problem"] is None) == (answer["label"] in trained.labels) == (answer["rationale"] is not None)


def test_images_may_be_paths_pictures_bytes_or_rows_of_datasets(folder: Path, posts: list[dict]) -> None:
    student = distill.Student.from_run(folder, device="cpu")
    post = next(post for post in posts if post["images"])
    (path,) = post["images"]
    expected = student.classify([post])[0]["probabilities"]
    cells = [Path(path), Image.open(path).convert("RGB"), Path(path).read_bytes(), {"bytes": None, "path": path}]
    table = datasets.Dataset.from_dict({"text": [post["text"]], "image": [path]})
    rows = [{"text": post["text"], "image": cell} for cell in cells]
    rows += list(table.cast_column("image", datasets.Image()))
    answers = student.classify(rows)
    assert [answer["id"] for answer in answers] == ["0", "1", "2", "3", "4"]
    for answer in answers:
        assert answer["probabilities"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("post", "message"),
    [
        ({}, "post 1: there is no text, image, video or audio"),
        ({"text": 3}, "post 1: text must be text"),
        ({"text": "x", "image": "missing.png"}, "post 1: image missing.png is missing"),
        ({"text": "x", "image": b"GIF89a"}, r"post 1: image 1-0\.png is "),
        ({"text": "x", "image": 3}, "post 1: an image must be a path, a PIL image or bytes, not int"),
        ({"text": "x", "image": "a.png", "images": ["a.png"]}, "post 1: image and images are both given"),
        ("text", "post 1: must be a mapping with text, image, video or audio, not str"),
    ],
)
def test_a_bad_post_is_named(post: object, message: str, folder: Path) -> None:
    student = distill.Student.from_run(folder)
    with pytest.raises(ValueError, match=f"^{message}"):
        student.classify([{"text": "good"}, post])  # type: ignore[list-item]
    assert student.classify([]) == []


def test_a_cascade_decides_as_its_stage(folder: Path, posts: list[dict]) -> None:
    decided = [row.fields for row in jsonl.read(folder / "cascade" / "decisions.jsonl")]
    cascade = distill.Cascade.from_run(folder)
    found = cascade.classify(posts)
    for answer, row in zip(found, decided, strict=True):
        for name in ("id", "label", "stage", "reason", "degraded", "teacher_calls"):
            assert answer[name] == row[name]
        assert list(answer["probabilities"].values()) == pytest.approx(row["probabilities"], abs=1e-5)
        assert answer["seconds"] > 0 and answer["price"] is None
    assert any(answer["teacher_calls"] for answer in found)

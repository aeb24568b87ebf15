"""The evaluation of an export with transformers alone gives the predictions of the run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import exported_accuracy
from distill.data import jsonl
from distill.data.corpus import Corpus
from distill.export.card import scoring
from distill.files import write_json
from distill.models.backbone import Backbone, ModelSettings, create
from distill.models.local import Local
from distill.task.labels import LabelSpace, Scale
from distill.task.sample import Sample
from tests.models import text_folders


def write_run(run: Path, student: Backbone, posts: list[Sample], root: Path) -> None:
    """What the benchmark reads of a run."""
    for name in ("evaluate", "export"):
        (run / name).mkdir(parents=True)
    student.model.save_pretrained(run / "export")  # type: ignore[operator]
    student.processor.save_pretrained(run / "export")
    write_json(run / "export" / "scoring.json", scoring(student))
    write_json(run / "evaluate" / "metrics.json", {"student": {"accuracy": 0.5}})
    (run / "recipe.yaml").write_text(yaml.safe_dump({"data": {"root": str(root)}}))
    answers = Local(student, "").classify(posts).probabilities.tolist()
    rows: list[dict[str, Any]] = []
    for post, answer in zip(posts, answers, strict=True):
        rows.append(jsonl.to_row(post, root) | {"gold": student.labels.name(post.label), "value": post.label})
        rows[-1] |= {"roles": {"student": {"probabilities": answer}}}
    jsonl.write_rows(run / "evaluate" / "predictions.jsonl", rows)


@pytest.mark.parametrize("kind", ["images", "scale"])
def test_an_export_gives_the_predictions_of_the_run(
    kind: str, model_folder: Path, tokenizer_folder: Path, postcards: Corpus, tmp_path: Path
) -> None:
    labels, posts, base = LabelSpace(), postcards.test[:4], model_folder
    if kind == "scale":
        labels, base = LabelSpace.from_scale(Scale()), text_folders.write(tmp_path / "b", "llama", tokenizer_folder)
        posts = [replace(post, images=(), label=float(index)) for index, post in enumerate(posts)]
    posts = [replace(posts[0], aspect="the  theatre"), replace(posts[1], text="a <|im_end|>\n b"), *posts[2:]]
    write_run(tmp_path / "run", create(ModelSettings(str(base), image_size=56), labels, tmp_path, train=False), posts,
              postcards.root)  # fmt: skip
    result = exported_accuracy.evaluate(tmp_path / "run", posts=4)
    assert result["n"] == result["labels_equal"] == 4 and result["difference"] < 1e-5
    assert result["transformers"] == pytest.approx(result["distill"], abs=1e-4)  # a correlation of four values
    of_scale = {"mae", "correlation", "acc2_without_zero"} if kind == "scale" else set()
    assert set(result["distill"]) == {"accuracy", "macro_f1"} | of_scale

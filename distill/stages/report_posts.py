"""The test posts of the report: which are in its gallery, and which decisions of the cascade it lists."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from distill.data import jsonl
from distill.data.source import DataSettings, media_root, split_files
from distill.recipe import Recipe
from distill.task.labels import LabelSpace

_GALLERY = 24
"""Number of posts in the gallery that are chosen by the answers of the roles."""
_DECISIONS = 12
"""Number of decisions in each group; their posts are in the gallery, too."""

Row = Mapping[str, Any]


def posts_and_decisions(recipe: Recipe) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The `gallery` and the `decisions` of `Report`, from `predictions.jsonl` and `decisions.jsonl`.

    The first half of the gallery's 24 posts are posts that not all roles classify correctly. Posts of listed decisions
    follow.
    """
    rows = [dict(row.fields) for row in jsonl.read(recipe.folder / "evaluate" / "predictions.jsonl")]
    places = {row["id"]: index for index, row in enumerate(rows)}
    decided = _decisions(recipe, places)
    groups = _groups(list(decided.values()))
    listed = [row["index"] for group in groups for row in group["rows"]]
    chosen = dict.fromkeys([*_chosen(rows), *(index for index in listed if index is not None)])
    attributes = _attributes(recipe.data)
    root = media_root(recipe.data)
    gallery = [
        _entry(root, index, rows[index])
        | {"attributes": attributes.get((rows[index]["id"], rows[index]["text"]), {})}
        | {"decision": decided.get(rows[index]["id"])}
        for index in chosen
    ]
    return gallery, groups


def _chosen(rows: list[dict[str, Any]]) -> list[int]:
    """Positions of up to `_GALLERY` posts: at most half of them such that not all roles classify correctly."""

    def all_correct(row: Row) -> bool:
        return {answer["label"] for answer in row["roles"].values()} == {row["gold"]}

    wrong = [index for index, row in enumerate(rows) if not all_correct(row)][: _GALLERY // 2]
    correct = [index for index, row in enumerate(rows) if all_correct(row)]
    return wrong + correct[: _GALLERY - len(wrong)]


def _entry(root: Path, index: int, row: Row) -> dict[str, Any]:
    """A gallery entry of `Report`."""
    return {
        "index": index,
        "id": row["id"],
        "text": row["text"],
        "aspect": row["aspect"],
        "image": root / row["images"][0] if row["images"] else None,
        "video": root / row["video"] if row.get("video") else None,
        "gold": row["gold"],
        "answers": {
            role: {"label": answer["label"], "probability": max(answer["probabilities"] or [None])}
            for role, answer in row["roles"].items()
        },
        "rationales": {role: answer["rationale"] for role, answer in row["roles"].items()},
        "reference": row["reference"],
    }


def _attributes(data: DataSettings) -> dict[tuple[str, str], Mapping[str, str]]:
    """The gold attributes of the test posts by id and text; empty if the data have none, or are no longer there."""
    found: dict[tuple[str, str], Mapping[str, str]] = {}
    if data.source not in ("jsonl", "postcards", "clips"):  # the other layouts have no attributes
        return found
    root, files = Path(data.root), split_files(data)
    for file in files["test"] or files["train"]:
        with suppress(OSError):
            for row in jsonl.read(root / file):
                with suppress(ValueError):  # a row that cannot be used was dropped
                    sample = jsonl.to_sample(row.fields, root)
                    found[sample.id, sample.text] = sample.attributes
    return found


def _decisions(recipe: Recipe, places: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """The cascade's decisions by id of the post, as rows of `Report.decisions`; empty if it did not run.

    Args:
        places: positions in the test split by id; a post that it lacks has no link.
    """
    path = recipe.folder / "cascade" / "decisions.jsonl"
    if recipe.cascade is None or not path.exists():
        return {}
    labels = recipe.labels

    def row(fields: Row) -> dict[str, Any]:
        right = _judge(labels, fields["gold"])
        models = {role: fields.get(role) for role in ("student", "teacher", "review")}
        return {
            "index": places.get(fields["id"]),
            **{name: fields[name] for name in ("id", "stage", "reason", "gold", "label")},
            "right": right({"label": fields["label"], "polarity": _polarity(labels, fields["label"])}),
            **{role: model and _prediction(model, right) for role, model in models.items()},
        }

    return {decision.fields["id"]: row(decision.fields) for decision in jsonl.read(path)}


def _judge(labels: LabelSpace, gold: str | float) -> Callable[[Row], bool]:
    """Whether a prediction is right: its label, or on a scale its polarity, as in the cascade's metrics."""
    if labels.scale is None:
        return lambda prediction: prediction["label"] == gold
    polarity = _polarity(labels, gold)
    return lambda prediction: prediction["polarity"] == polarity


def _polarity(labels: LabelSpace, value: str | float) -> int | None:
    return None if labels.scale is None else int(labels.scale.polarity(np.array([value], dtype=np.float64))[0])


def _prediction(model: Row, right: Callable[[Row], bool]) -> dict[str, Any]:
    """A model's prediction; one without an answer has no label."""
    label = model["label"]
    return {"label": label, "uncertainty": model["uncertainty"], "right": label is not None and right(model)}


def _groups(decisions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The decisions that are worth reading, each in the first group that it belongs to."""

    def group(decision: Row) -> str | None:
        first, review = decision["teacher"], decision["review"]
        if not decision["right"]:
            return "Wrong answers of the cascade"
        if review is not None and review["label"] is not None and first["right"] != review["right"]:
            return "Corrected by the review"
        if not decision["student"]["right"]:
            return "Errors of the student that the teacher corrected"
        return None

    found: dict[str | None, list[dict[str, Any]]] = {}
    for decision in decisions:
        found.setdefault(group(decision), []).append(decision)
    titles = (
        "Wrong answers of the cascade",
        "Corrected by the review",
        "Errors of the student that the teacher corrected",
    )
    return [
        {"title": title, "total": len(found[title]), "rows": found[title][:_DECISIONS]}
        for title in titles
        if title in found
    ]

"""Reading of `rationales.jsonl`, the reasoning data that a stage wrote."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.data import jsonl
from distill.data.stored import StoredPosts, changed, scan, selected
from distill.errors import SettingsError
from distill.task.labels import LabelSpace
from distill.task.sample import Sample

RATIONALES = "rationales.jsonl"


def read_rationales(path: Path, root: Path, labels: LabelSpace) -> Iterator[tuple[Sample, Mapping[str, Any]]]:
    """Yield each row as a sample, with all its fields.

    Args:
        root: folder of the images.

    Raises:
        SettingsError: a row, edited by hand perhaps, cannot be used.
    """
    for row in jsonl.read(path):
        yield _sample(path, row, root, labels), row.fields


def stored_rationales(paths: Iterable[Path], root: Path, labels: LabelSpace) -> StoredPosts:
    """The rows of files as `read_rationales` gives them, read when they are needed. Raises SettingsError as it does."""

    def check(path: Path, number: int, line: bytes) -> None:
        _sample(path, jsonl.parse_line(number, line.decode("utf-8", "replace")), root, labels)

    return scan(paths, root, check)


def _sample(path: Path, row: jsonl.Row, root: Path, labels: LabelSpace) -> Sample:
    try:
        if row.problem is not None:
            raise ValueError(row.problem)
        sample = jsonl.to_sample(row.fields, root)
        labels.index(sample.label if sample.label is not None else "")
        if sample.rationale is None:
            raise ValueError("has no rationale")
    except ValueError as error:
        raise SettingsError(
            f"{path}, row {row.number}: {error}; correct the row, or delete the file and run: distill run"
        ) from None
    return sample


def labels_only(posts: Sequence[Sample], rows: Sequence[Sample] = ()) -> Sequence[Sample]:
    """Return the labelled posts that are not among the rows, without a rationale."""
    known = {row.id for row in rows}
    return changed(selected(posts, lambda post: post.label is not None and post.id not in known), _without_rationale)


def _without_rationale(post: Sample) -> Sample:
    return replace(post, rationale=None)

"""`distill predict`: label the posts of a file with the student of a run, or with the student and its teacher.

Results are collected beside the output, one line for each row of the input in order, and synced after each batch. A
run that was killed continues after the last line. The output is written from them at the end, whole or not at all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from distill.annotation.ledger import Ledger
from distill.api import Cascade, Run, Student
from distill.chain import locked
from distill.data import streams
from distill.data.jsonl import Row
from distill.data.posts import sample
from distill.errors import RunError, SettingsError
from distill.files import read_json, write_json
from distill.models.reasoner import Sampling
from distill.stages.cascade import CALIBRATION
from distill.stages.context import Context
from distill.task.sample import Sample

_CHUNK = 256
"""Posts between two writes of results. Models divide them into batches of their own size."""


@dataclass(frozen=True)
class Prediction:
    """What `predict` wrote: the output, its number of rows, and the number of rows that could not be used."""

    output: Path
    rows: int
    dropped: int

    @property
    def quarantine(self) -> Path:
        """The file of the rows that could not be used, with the reasons; it exists if there are any."""
        return self.output.with_name(f"{self.output.stem}.quarantine.jsonl")


def predict(
    run: Path,
    source: Path,
    output: Path,
    *,
    cascade: bool = False,
    rationales: bool = False,
    images: Path | None = None,
    max_new_tokens: int = 512,
    device: str | None = None,
) -> Prediction:
    """Label the posts of `source` and write `output`.

    Args:
        run: folder of a run.
        source: posts as JSONL, CSV or Parquet (`id`, `text`, `aspect`, `image` or `images`), or a folder of pictures.
        output: a file with the suffix .jsonl, .csv or .parquet. It has a row for each post that can be used.
        cascade: ask the teacher about the posts of which the student is not certain.
        rationales: generate the student's rationale for each post.
        images: folder of the images that are given by name; None: the folder of the file.
        device: for the student alone; None: the first GPU, or the CPU without one.

    Raises:
        SettingsError: an argument cannot be used, or the output exists or was begun with other arguments.
        RunError: a model failed, or the disk is full; the same call continues.
    """
    output = output.absolute()
    if output.suffix.casefold() not in (".jsonl", ".csv", ".parquet"):
        raise SettingsError(f"--output: {output.name} must end in .jsonl, .csv or .parquet")
    if output.exists():
        raise SettingsError(f"--output: {output} exists; delete it or name another file")
    if not source.exists():
        raise SettingsError(f"--input: {source} does not exist")
    root = images or (source if source.is_dir() else source.parent)
    total = streams.count(source)
    opened = Run(run)
    if rationales and (opened.recipe.student is None or "reason" not in opened.recipe.student.tasks):
        raise SettingsError(f"--rationales: the student of {run} was not trained to reason")
    parts = output.with_name(f".{output.name}.parts")
    try:
        with locked(parts), ExitStack() as stack:
            _check_begun(parts, _identity(opened, source, cascade, rationales and max_new_tokens))
            model: Student | Cascade
            if cascade:
                model = Cascade.from_run(run, ledger=stack.enter_context(Ledger(parts / "ledger.jsonl")))
            else:
                model = Student.from_run(run, device=device)
            _answer(parts, source, total, lambda rows: _results(rows, root, model, max_new_tokens * rationales))
            written = _write_output(parts, output, _columns(model, rationales))
        shutil.rmtree(parts)
    except OSError as error:
        raise RunError(f"{error.filename or output}: {error.strerror or error}") from error
    return written


def _answer(parts: Path, source: Path, total: int, results_of: Callable[[Sequence[Row]], list[dict[str, Any]]]) -> None:
    """Write the results of the rows that have none yet."""
    with (parts / "results.jsonl").open("ab+") as results:
        done = _complete_lines(results)
        with tqdm(desc="predict", unit="post", total=total, initial=done) as bar:
            remaining = islice(streams.rows(source), done, None)
            while rows := list(islice(remaining, _CHUNK)):
                lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in results_of(rows)]
                results.write("".join(lines).encode())
                results.flush()
                os.fsync(results.fileno())
                bar.update(len(rows))


def _results(chunk: Sequence[Row], root: Path, model: Student | Cascade, new_tokens: int) -> list[dict[str, Any]]:
    """A result for each row: the columns of the output, or the row and the `problem` with it."""
    results: list[dict[str, Any]] = []
    usable: list[tuple[int, Sample]] = []
    with TemporaryDirectory(prefix="distill-posts-") as scratch:
        for position, row in enumerate(chunk):
            problem = row.problem
            if problem is None:
                try:
                    usable.append((position, sample(row.fields, str(row.number), Path(scratch), root)))
                except ValueError as error:
                    problem = str(error)
            results.append({"row": row.number} | ({} if problem is None else {"problem": problem}))
        posts = [post for _, post in usable]
        answers = model.label(posts) if posts else []
        student = model.student if isinstance(model, Cascade) else model
        reasons = student.explain(posts, Sampling(max_new_tokens=new_tokens)) if posts and new_tokens else []
    for index, (position, _) in enumerate(usable):
        answer = answers[index]
        probabilities = {f"probability_{name}": value for name, value in answer.pop("probabilities").items()}
        results[position] |= answer | probabilities | (_rationale(answer["label"], reasons[index]) if reasons else {})
    return results


def _rationale(label: str, reason: dict[str, Any]) -> dict[str, Any]:
    """The rationale as JSON if it is valid and argues for the label; otherwise why there is none."""
    problem = reason["problem"]
    if problem is None and reason["label"] != label:
        problem = f"it argues for {reason['label']}"
    shown = None if problem else json.dumps(reason["rationale"], ensure_ascii=False)
    return {"rationale": shown, "rationale_problem": problem}


def _columns(model: Student | Cascade, rationales: bool) -> dict[str, str]:
    student = model.student if isinstance(model, Cascade) else model
    columns = {"row": "int64", "id": "string", "label": "string"}
    columns |= {"value": "double"} if student.model.backbone.labels.scale is not None else {}
    columns |= {f"probability_{name}": "double" for name in student.labels} | {"uncertainty": "double"}
    if isinstance(model, Cascade):
        columns |= {"stage": "string", "reason": "string", "degraded": "bool", "teacher_calls": "int64"}
    columns |= {"seconds": "double"} | ({"price": "double"} if isinstance(model, Cascade) else {})
    return columns | ({"rationale": "string", "rationale_problem": "string"} if rationales else {})


def _identity(run: Run, source: Path, cascade: bool, new_tokens: int | bool) -> dict[str, Any]:
    """What the results depend on, as JSON: input, weights, calibration and options."""
    digest = hashlib.sha256()
    if source.is_dir():
        for path in sorted(source.iterdir()):
            digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    else:
        with source.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    found = {"input": digest.hexdigest(), "student": Context(run.recipe, {}).weights("student"), "tokens": new_tokens}
    if cascade and (calibration := run.folder / CALIBRATION).exists():
        found["calibration"] = hashlib.sha256(calibration.read_bytes()).hexdigest()
    return found | {"cascade": cascade}


def _check_begun(parts: Path, identity: dict[str, Any]) -> None:
    """Raise SettingsError if the results were begun with another identity."""
    path = parts / "begun.json"
    if not path.exists():
        write_json(path, identity)
    elif (begun := read_json(path)) != identity:
        names = {"input": "another input", "student": "another student", "calibration": "another calibration"}
        different = next(name for name in {*begun, *identity} if begun.get(name) != identity.get(name))
        what = names.get(different, "other options")
        raise SettingsError(f"{parts} was begun with {what}; delete it, or name another --output")


def _complete_lines(file: Any) -> int:
    """The number of complete lines of a file that is open for appending; a line that a kill has cut is removed."""
    file.seek(0)
    complete = count = 0
    for line in file:
        if line.endswith(b"\n"):
            complete, count = complete + len(line), count + 1
    file.truncate(complete)
    file.seek(0, os.SEEK_END)
    return count


def _write_output(parts: Path, output: Path, columns: dict[str, str]) -> Prediction:
    """Write the output, and the rows that could not be used."""
    rows = dropped = 0
    new, quarantine = parts / output.name, parts / "quarantine.jsonl"

    def usable() -> Iterator[dict[str, Any]]:
        nonlocal rows, dropped
        with quarantine.open("w", encoding="utf-8") as file:
            for line in _lines(parts):
                if "problem" in line:
                    dropped += 1
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                else:
                    rows += 1
                    yield line

    streams.write(new, usable(), columns)
    written = Prediction(output, rows, dropped)
    if dropped:
        os.replace(quarantine, written.quarantine)
    os.replace(new, output)
    return written


def _lines(parts: Path) -> Iterator[dict[str, Any]]:
    return (dict(row.fields) for row in streams.rows(parts / "results.jsonl"))

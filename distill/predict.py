"""`distill predict`: label the posts of a file with the student of a run, or with the student and its teacher.

Results are collected beside the output, one line for each row of the input in order, and synced after each batch. A
run that was killed continues after the last line. The output is written from them at the end, whole or not at all.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Literal

from tqdm import tqdm

from distill import storage
from distill.annotation.ledger import Ledger
from distill.api import Cascade, Run, Student
from distill.chain import locked
from distill.data import inputs, streams
from distill.data.jsonl import Row
from distill.data.posts import sample
from distill.errors import RunError, SettingsError
from distill.files import read_json, write_json
from distill.models.reasoner import Sampling
from distill.settings import build
from distill.stages.cascade import CALIBRATION
from distill.stages.context import Context
from distill.task.labels import LabelSpace
from distill.task.sample import Sample
from distill.workers import pool
from distill.workers.settings import RaySettings
from distill.workers.settings import check as check_ray

log = logging.getLogger(__name__)

_CHUNK = 256
"""Posts between two writes of results. Models divide them into batches of their own size."""


Explain = Literal["student", "teacher", "none"]


@dataclass(frozen=True)
class _Reasoning:
    """How rationales are written."""

    max_new_tokens: int
    explain: Explain


@dataclass(frozen=True)
class Prediction:
    """What `predict` wrote: the output, its number of rows, and the number of rows that could not be used."""

    output: Path | str
    rows: int
    dropped: int

    @property
    def quarantine(self) -> Path | str:
        """The file of the rows that could not be used, with the reasons; it exists if there are any."""
        if isinstance(self.output, str):
            return f"{self.output.rpartition('.')[0]}.quarantine.jsonl"
        return self.output.with_name(f"{self.output.stem}.quarantine.jsonl")


def predict(
    run: Path,
    source: Path | str,
    output: Path | str,
    *,
    cascade: bool = False,
    rationales: bool = False,
    explain: Explain | None = None,
    images: Path | str | None = None,
    max_new_tokens: int = 512,
    device: str | None = None,
    engine: Literal["local", "ray"] | None = None,
    ray: Mapping[str, Any] = MappingProxyType({}),
) -> Prediction:
    """Label the posts of `source` and write `output`.

    Args:
        run: folder of a run.
        source: posts as JSONL, CSV or Parquet (`id`, `text`, `aspect`, `image` or `images`, `video`, `audio`), or a
            folder of pictures; or a URL or pattern of shards (JSONL, Parquet, WebDataset).
        output: a file or a URL with the suffix .jsonl, .csv or .parquet. It has a row for each post that can be used.
            Results for a URL are collected in the working directory.
        cascade: ask the teacher about the posts of which the student is not certain.
        rationales: generate the student's rationale for each post.
        explain: who explains the label if that rationale is invalid or argues for another one: the student, the
            teacher with one more call, or nobody. None: with `cascade`, `serve.explain` of the recipe, otherwise the
            student.
        images: folder of the images that are given by name; None: the folder of the file.
        device: for the student alone in this process; None: the first GPU, or the CPU without one.
        engine: whether Ray workers label the posts; None: as the recipe of the run has it. With `cascade`, this process
            does.
        ray: settings of the workers that differ from the recipe's.

    Raises:
        SettingsError: an argument cannot be used, or the output exists or was begun with other arguments.
        RunError: a model failed, or the disk is full; the same call continues.
    """
    url = str(output) if storage.is_url(str(output)) else None
    output = Path(PurePosixPath(url).name if url else output).absolute()
    if output.suffix.casefold() not in (".jsonl", ".csv", ".parquet"):
        raise SettingsError(f"--output: {output.name} must end in .jsonl, .csv or .parquet")
    if storage.exists(url or str(output)):
        raise SettingsError(f"--output: {url or output} exists; delete it or name another file")
    parts = output.with_name(f".{output.name}.parts")
    posts = inputs.posts(str(source), None if images is None else str(images), parts)
    opened = Run(run)
    if rationales and (opened.recipe.student is None or "reason" not in opened.recipe.student.tasks):
        raise SettingsError(f"--rationales: the student of {run} was not trained to reason")
    if explain is None:
        explain = opened.recipe.serve.explain if cascade else "student"
    on_ray = (engine or opened.recipe.engine) == "ray" and not cascade
    if cascade and (engine or opened.recipe.engine) == "ray":
        log.warning("predict --cascade labels the posts in this process, not on Ray workers")
    total = posts.count()
    if on_ray and total is None:
        raise SettingsError("--engine ray reads a file or folder of this machine; use --engine local for shards")
    if on_ray and device is not None:
        raise SettingsError("--device needs --engine local: ray.gpus has the GPUs of Ray workers")
    if explain == "teacher" and rationales and not cascade:
        raise SettingsError("--explain teacher needs --cascade")
    try:
        with locked(parts), ExitStack() as stack:
            reasoning = _Reasoning(max_new_tokens, explain) if rationales else None
            _check_begun(parts, _identity(opened, posts.digest(), cascade, reasoning))
            model: Student | Cascade
            if on_ray:
                settings = build(RaySettings, asdict(opened.recipe.ray) | dict(ray), "ray.")
                check_ray(settings)
                assert total is not None
                root, on_gpu = posts.root().absolute(), bool(settings.gpus)
                job = _Job(run.absolute(), Path(source).absolute(), root, reasoning, on_gpu)
                _answer(parts, total, partial(_on_ray, job, settings, total, pool.new_folder(parts / "workers")))
            elif cascade:
                model = Cascade.from_run(run, ledger=stack.enter_context(Ledger(parts / "ledger.jsonl")))
            else:
                model = Student.from_run(run, device=device)
            if not on_ray:
                _answer(parts, total, lambda done: _here(posts, done, model, reasoning))
            written = _write_output(parts, output, _columns(opened.recipe.labels, cascade, rationales), url)
        shutil.rmtree(parts)
    except OSError as error:
        raise RunError(f"{error.filename or output}: {error.strerror or error}") from error
    return written


def _answer(parts: Path, total: int | None, results_from: Callable[[int], Iterator[list[dict[str, Any]]]]) -> None:
    """Write the results of the rows that have none yet: `results_from` the number of those that have one."""
    with (parts / "results.jsonl").open("ab+") as results:
        done = _complete_lines(results)
        with tqdm(desc="predict", unit="post", total=total, initial=done) as bar:
            for chunk in results_from(done):
                lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in chunk]
                results.write("".join(lines).encode())
                results.flush()
                os.fsync(results.fileno())
                bar.update(len(chunk))


def _here(
    posts: inputs.Posts, done: int, model: Student | Cascade, reasoning: _Reasoning | None
) -> Iterator[list[dict[str, Any]]]:
    """Results of this process."""
    remaining = islice(posts.rows(), done, None)
    while rows := list(islice(remaining, _CHUNK)):
        yield _results(rows, posts.root(), model, reasoning)


@dataclass(frozen=True)
class _Job:
    """What a Ray worker needs to know."""

    run: Path
    source: Path
    root: Path
    reasoning: _Reasoning | None
    on_gpu: bool


def _on_ray(job: _Job, settings: RaySettings, total: int, folder: Path, done: int) -> Iterator[list[dict[str, Any]]]:
    """Results of Ray workers, in the order of the rows."""
    size = settings.batch_size
    spans = [(begin, min(begin + size, total)) for begin in range(done, total, size)]
    with closing(pool.run(settings, partial(_Worker, job), spans, folder, ordered=True)) as results:
        yield from results


class _Worker:
    """Reads spans of rows and labels their posts, in a worker process."""

    def __init__(self, job: _Job) -> None:
        self.job, self.student = job, Student.from_run(job.run, device="cuda" if job.on_gpu else "cpu")
        self._rows, self._at = streams.rows(job.source), 0

    def __call__(self, span: tuple[int, int]) -> list[dict[str, Any]]:
        begin, end = span
        if begin < self._at:
            self._rows, self._at = streams.rows(self.job.source), 0
        rows, self._at = list(islice(self._rows, begin - self._at, end - self._at)), end
        return _results(rows, self.job.root, self.student, self.job.reasoning)


def _results(
    chunk: Sequence[Row], root: Path, model: Student | Cascade, reasoning: _Reasoning | None
) -> list[dict[str, Any]]:
    """A result for each row: the columns of the output, or the row and the `problem` with it."""
    results: list[dict[str, Any]] = []
    usable: list[tuple[int, Sample]] = []
    with TemporaryDirectory(prefix="distill-posts-") as scratch:
        for position, row in enumerate(chunk):
            problem = row.problem
            if problem is None:
                try:
                    usable.append((position, sample(row.fields, str(row.number), Path(scratch), root, model.clips)))
                except ValueError as error:
                    problem = str(error)
            results.append({"row": row.number} | ({} if problem is None else {"problem": problem}))
        posts = [post for _, post in usable]
        answers = model.label(posts) if posts else []
        if reasoning is not None and posts:
            _add_rationales(posts, answers, model, reasoning)
    for (position, _), answer in zip(usable, answers, strict=True):
        probabilities = {f"probability_{name}": value for name, value in answer.pop("probabilities").items()}
        results[position] |= answer | probabilities
    return results


def _add_rationales(
    posts: Sequence[Sample], answers: Sequence[dict[str, Any]], model: Student | Cascade, reasoning: _Reasoning
) -> None:
    """Add the rationale that argues for the label as JSON, who wrote it, or why there is none, and what it cost."""
    sampling, student = Sampling(max_new_tokens=reasoning.max_new_tokens), _student(model)
    for answer, row in zip(answers, student.rationales(posts, sampling), strict=True):
        if row["problem"] is None and row["label"] != answer["label"]:
            row |= {"rationale": None, "problem": f"it argues for {row['label']}"}
        _add_rationale(answer, row, "student")
    if reasoning.explain == "none":
        return
    missing = [index for index, answer in enumerate(answers) if answer["rationale"] is None]
    labelled = [replace(posts[index], label=answers[index]["label"]) for index in missing]
    explaining = model if reasoning.explain == "teacher" else student
    for index, row in zip(missing, explaining.rationales(labelled, sampling) if missing else [], strict=True):
        _add_rationale(answers[index], row, reasoning.explain)


def _add_rationale(answer: dict[str, Any], row: dict[str, Any], by: Explain) -> None:
    found, problem = row["rationale"], row["problem"]
    answer |= {"rationale": None if found is None else json.dumps(found, ensure_ascii=False)}
    answer |= {"rationale_by": None if found is None else by, "rationale_problem": problem}
    answer["seconds"] += row["seconds"]
    if "price" in row:
        answer["teacher_calls"] += row["teacher_calls"]
        answer["price"] = None if answer["price"] is None or row["price"] is None else answer["price"] + row["price"]


def _student(model: Student | Cascade) -> Student:
    return model.student if isinstance(model, Cascade) else model


def _columns(labels: LabelSpace, cascade: bool, rationales: bool) -> dict[str, str]:
    columns = {"row": "int64", "id": "string", "label": "string"}
    columns |= {"value": "double"} if labels.scale is not None else {}
    columns |= {f"probability_{name}": "double" for name in labels.names} | {"uncertainty": "double"}
    if cascade:
        columns |= {"stage": "string", "reason": "string", "degraded": "bool", "teacher_calls": "int64"}
    columns |= {"seconds": "double"} | ({"price": "double"} if cascade else {})
    reasoned = dict.fromkeys(("rationale", "rationale_by", "rationale_problem"), "string")
    return columns | (reasoned if rationales else {})


def _identity(run: Run, source: str, cascade: bool, reasoning: _Reasoning | None) -> dict[str, Any]:
    """What the results depend on, as JSON: the digest of the input, weights, calibration and options."""
    student = Context(run.recipe, {}).weights(run.recipe.student_stage)
    reasons = None if reasoning is None else asdict(reasoning)
    found = {"input": source, "student": student, "cascade": cascade, "rationales": reasons}
    if cascade and (calibration := run.folder / CALIBRATION).exists():
        found["calibration"] = hashlib.sha256(calibration.read_bytes()).hexdigest()
    return found


def _check_begun(parts: Path, identity: dict[str, Any]) -> None:
    """Raise SettingsError if the results were begun with another identity."""
    path = parts / "begun.json"
    if not path.exists():
        write_json(path, identity)
    elif (begun := read_json(path)) != identity:
        names = {"input": "another input", "student": "another student", "calibration": "another calibration"}
        different = next(name for name in {*begun, *identity} if begun.get(name) != identity.get(name))
        different = names.get(different, "other options")
        raise SettingsError(f"{parts} was begun with {different}; delete it, or name another --output")


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


def _write_output(parts: Path, output: Path, columns: dict[str, str], url: str | None) -> Prediction:
    """Write the output, to a URL if there is one, and the rows that could not be used."""
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
    written = Prediction(url or output, rows, dropped)
    if dropped:
        _move(quarantine, written.quarantine)
    _move(new, written.output)
    return written


def _move(path: Path, target: Path | str) -> None:
    """Move a file to its place as a whole."""
    storage.put(path, target) if isinstance(target, str) else os.replace(path, target)


def _lines(parts: Path) -> Iterator[dict[str, Any]]:
    return (dict(row.fields) for row in streams.rows(parts / "results.jsonl"))

"""Rounds of batch files in a stage's folder: what was asked, where it is, and the answers, which go to the ledger.

A round is a folder `batches/round-N`. Its files of requests have a file of queries each, which says what the ledger
has to know about an answer, so that answers are read in any order, and also after the settings have changed.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from distill.annotation.cached_teacher import CachedTeacher
from distill.annotation.ledger import Entry, digest
from distill.annotation.scores import scores_text
from distill.errors import RunError
from distill.files import read_json, write_json
from distill.models.endpoint import BatchSettings, Endpoint
from distill.models.endpoint.batch_api import ROUTE
from distill.models.endpoint.client import unanswered
from distill.models.endpoint.replies import OnlyThought, RequestFailed, RequestFiltered, RequestRefused, encodable
from distill.models.reasoner import Answer
from distill.task import prompts
from distill.task.labels import LabelSpace

log = logging.getLogger(__name__)

STATE = "state.json"

_FLUSH = 1000  # answers that are written to the ledger together


@dataclass
class RequestFile:
    """A file of requests: its number in the round, what the service knows of it, and what came of it.

    Attributes:
        digest: SHA-256 of the file.
        input_file, batch, status: of the service: the ids of the uploaded file and of the batch, and its state. A batch
            may exist if there is an uploaded file.
        folded: digest of the results that were read; empty if none were.
        problems: numbers of requests without an answer, by reason.
    """

    number: str
    requests: int
    digest: str
    input_file: str = ""
    batch: str = ""
    status: str = ""
    folded: str = ""
    answers: int = 0
    problems: dict[str, int] = field(default_factory=dict)


@dataclass
class Round:
    """The files of requests that were written together.

    Attributes:
        submit: who answers them: the service (`api`) or the user (`files`).
        address: of the endpoint.
        labels: see `label_names`.
        filtered: refusals of content filters, by ledger key.
        closed: the stage that asked has ended.
    """

    folder: Path
    submit: Literal["api", "files"]
    address: str
    labels: list[str]
    files: list[RequestFile] = field(default_factory=list)
    filtered: dict[str, str] = field(default_factory=dict)
    closed: bool = False

    @property
    def answers(self) -> int:
        return sum(file.answers for file in self.files)

    def save(self) -> None:
        """Write the state of the round. Raises OSError."""
        content = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_json(self.folder / STATE, content)

    def is_open(self, file: RequestFile) -> bool:
        """Whether answers of a file may still come."""
        return bool(file.batch) and not file.folded if self.submit == "api" else not file.folded

    def requests(self, file: RequestFile) -> Path:
        return self.folder / f"requests-{file.number}.jsonl"

    def results(self, file: RequestFile) -> Path:
        return self.folder / f"results-{file.number}.jsonl"

    def errors(self, file: RequestFile) -> Path:
        return self.folder / f"errors-{file.number}.jsonl"

    def queries(self, file: RequestFile) -> dict[str, dict[str, Any]]:
        """What a file asks: the fields of the ledger by key."""
        with (self.folder / f"queries-{file.number}.jsonl").open(encoding="utf-8") as lines:
            return {item.pop("key"): item for item in map(json.loads, lines)}

    def discard(self, file: RequestFile) -> None:
        """Delete the requests of a file that nobody has been asked to answer."""
        self.files.remove(file)
        self.save()
        for kind in ("requests", "queries"):
            (self.folder / f"{kind}-{file.number}.jsonl").unlink(missing_ok=True)


def read_rounds(folder: Path) -> list[Round]:
    """The rounds in a folder, in order, without one that is being written.

    Raises:
        RunError: the state of a round is damaged.
    """
    found = []
    for number in _numbers(folder):
        path = folder / f"round-{number}"
        if not (path / STATE).exists():
            continue
        try:
            content = read_json(path / STATE)
            files = [RequestFile(**item) for item in content.pop("files")]
            found.append(Round(folder=path, files=files, **content))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise RunError(
                f"{path / STATE} is damaged; its batches are listed at the service. Without any, delete {path}"
            ) from None
    return found


def remove_unfinished(folder: Path) -> None:
    """Remove the files of rounds that a kill has left unfinished: nobody was asked to answer them."""
    for path in (folder / f"round-{number}" for number in _numbers(folder)):
        if not (path / STATE).exists():
            for part in [*path.glob("requests-*.jsonl"), *path.glob("queries-*.jsonl")]:
                part.unlink()
            with contextlib.suppress(OSError):
                path.rmdir()  # if it is empty


def label_names(labels: LabelSpace) -> list[str]:
    """What a classification is read with: the labels, and the words before one."""
    return [*labels.names, labels.wording.prefix]


def next_folder(folder: Path) -> Path:
    """The folder of a new round."""
    return folder / f"round-{max(_numbers(folder), default=0) + 1}"


def _numbers(folder: Path) -> list[int]:
    found = (re.fullmatch(r"round-(\d{1,6})", path.name) for path in folder.glob("round-*"))
    return sorted(int(match[1]) for match in found if match)


class RequestWriter:
    """Writes requests to files within the limits of a service. `round` has the files that are complete.

    A key is written once. Raises OSError if a file cannot be written.
    """

    def __init__(self, round: Round, settings: BatchSettings) -> None:
        self.round = round
        self._settings = settings
        self._seen: set[bytes] = set()
        self._size = 0

    def add(self, key: str, meta: Mapping[str, Any], body: bytes) -> bool:
        """Add a request. Returns whether it is small enough for a file."""
        line = b'{"custom_id": "%b", "method": "POST", "url": "%b", "body": %b}\n' % (
            key.encode(),
            ROUTE.encode(),
            body,
        )
        limit = self._settings.max_mb * 1e6
        if len(line) > limit:
            return False
        if (short := bytes.fromhex(key)) in self._seen:
            return True
        self._seen.add(short)
        files = self.round.files
        if not files or self._size + len(line) > limit or files[-1].requests >= self._settings.max_requests:
            self.close()
            self._begin()
        self._requests.write(line)
        self._queries.write(json.dumps({"key": key, **meta}, ensure_ascii=True).encode() + b"\n")
        self._digest.update(line)
        self._size += len(line)
        files[-1].requests += 1
        return True

    def _begin(self) -> None:
        self.round.folder.mkdir(parents=True, exist_ok=True)
        self.round.files.append(RequestFile(f"{len(self.round.files) + 1:04}", 0, ""))
        file = self.round.files[-1]
        self._requests = self.round.requests(file).open("wb")
        self._queries = (self.round.folder / f"queries-{file.number}.jsonl").open("wb")
        self._digest, self._size = hashlib.sha256(), 0

    def close(self) -> None:
        """End the last file and wait until it is on disk."""
        if self.round.files and not self.round.files[-1].digest:
            for part in (self._requests, self._queries):
                part.flush()
                os.fsync(part.fileno())
                part.close()
            self.round.files[-1].digest = self._digest.hexdigest()


# ---- results ----


def results_digest(round: Round, file: RequestFile) -> str:
    """SHA-256 of the results of a file; empty if there are none."""
    found = [path for path in (round.results(file), round.errors(file)) if path.exists() and path.stat().st_size]
    digests = [digest(path) for path in found]
    return hashlib.sha256(repr(digests).encode()).hexdigest() if digests else ""


def fold(round: Round, file: RequestFile, teacher: CachedTeacher) -> None:
    """Write the answers in the results of a file to the ledger, and count the requests without one. Repeatable.

    Raises:
        RunError: the ledger cannot be written, or the results are of other requests or cannot be read.
    """
    queries, known, unknown = round.queries(file), set[str](), list[str]()
    problems, words, new = dict[str, str](), dict[str, str](), list[Entry]()
    for path in (round.results(file), round.errors(file)):
        for key, item in _lines(path):
            if key not in queries:
                unknown.append(key)
                continue
            if key in known:
                continue
            answer, problem = _read(teacher, round, queries[key], item)
            if problem is not None:
                problems[key] = problem
                words.setdefault(problem, (answer.error or "")[:200])
                if answer.kind == "filtered":
                    round.filtered[key] = answer.error or problem
                continue
            known.add(key)
            round.filtered.pop(key, None)
            if teacher.paid_answer(key) is None:
                new.append((key, queries[key] | {"batch": f"{round.folder.name}/{round.requests(file).name}"}, answer))
            if len(new) >= _FLUSH:
                teacher.ledger.put_all(new)
                new.clear()
    teacher.ledger.put_all(new)
    if not known and not problems and (results := round.results(file)).exists() and results.stat().st_size:
        remedy = "correct it, or delete it" if round.submit == "files" else f"to ask again, delete {round.folder}"
        raise RunError(
            f"{results} has no result of {round.requests(file)}; it takes one JSON object a line with the custom_id of "
            f"a request: {remedy}"
        )
    if unknown:
        log.warning("%s has %d results of no request, such as %s", round.results(file), len(unknown), unknown[0][:80])
    file.answers = len(known)
    file.problems = dict(Counter(problems.get(key, "missing") for key in queries if key not in known))
    for problem, count in file.problems.items():
        detail = f" ({words[problem]})" if words.get(problem) else ""
        values = (round.requests(file), count, len(queries), problem, detail)
        log.warning("%s: %d of %d requests have no answer: %s%s", *values)
    file.folded = results_digest(round, file) or "none"
    round.save()
    if round.submit == "api":  # a copy of the pictures that is of no use any more
        round.requests(file).unlink(missing_ok=True)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The results in a file with their ids; a line may have a list of them.

    A line that cannot be read is skipped, with one warning for the file.
    """
    if not path.exists():
        return
    damaged = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                found = [(entry["custom_id"].strip(), entry) for entry in (item if isinstance(item, list) else [item])]
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                damaged.append(number)
            else:
                yield from found
    if damaged:
        log.warning("%s: line %d cannot be read (%d in all); the other lines are used", path, damaged[0], len(damaged))


def _read(
    teacher: CachedTeacher, round: Round, query: Mapping[str, Any], item: Mapping[str, Any]
) -> tuple[Answer, str | None]:
    """The answer of a result, and why it is none; the reason is short, to be counted."""
    endpoint = teacher.teacher
    assert isinstance(endpoint, Endpoint)
    response, error = item.get("response"), item.get("error")
    if isinstance(response, dict) and response.get("body") is not None:
        status, body = response.get("status_code") or 200, response["body"]
    elif error:
        if isinstance(error, dict) and isinstance(error.get("error"), dict):
            error = error["error"]  # vLLM
        status = response.get("status_code") if isinstance(response, dict) else None
        status, body = status or 400, {"error": error}
    else:
        return unanswered("the result has neither a response nor an error"), "no response"
    code = error.get("code") if isinstance(error, dict) else None
    text = body if isinstance(body, str) else json.dumps(body)
    scored = query["template"] in prompts.SCORED
    if scored and round.labels != label_names(teacher.labels):
        return unanswered("task.labels were others"), "asked with other labels"
    try:
        if not scored:
            return replace(endpoint.read(int(status), text), seconds=math.nan), None
        score = endpoint.read_score(int(status), text)
        if score is None:
            return unanswered("the answer has no log-probabilities"), "no log-probabilities"
        text = scores_text(score.probabilities, score.label_mass, score.answer.text)
        return replace(score.answer, text=text, seconds=math.nan), None
    except RequestFiltered as refusal:
        return unanswered(str(refusal), "filtered"), "filtered"
    except OnlyThought as thought:
        return unanswered(str(thought)), "a thought and no answer"
    except RequestFailed as failure:
        return unanswered(str(failure)), f"status {status}" if status != 200 else "no valid reply"
    except (RequestRefused, RunError) as failure:
        return unanswered(str(failure)), encodable(code)[:60] if code and isinstance(code, str) else f"status {status}"
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as failure:
        return unanswered(str(failure)), "no valid reply"

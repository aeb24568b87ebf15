"""Requests of a stage in batch files: the ledger is filled in rounds, then the stage runs as it does without batches.

A round plays the conversation about every sample with the answers in the ledger, and writes the first question that it
cannot answer to a file. The files are answered by a service, or by the user with a tool such as vllm run-batch; the
answers go to the ledger under the keys that they were asked by. What is left after the last round, the stage asks.
"""

import logging
import shlex
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.annotation.batch_files import (
    RequestWriter,
    Round,
    fold,
    label_names,
    next_folder,
    read_rounds,
    remove_unfinished,
    results_digest,
)
from distill.annotation.batch_jobs import Job, Jobs
from distill.annotation.cached_teacher import CachedTeacher, Start, TeacherQuery
from distill.annotation.scheduler import Progress
from distill.errors import RunError
from distill.models.endpoint import BatchSettings, Endpoint
from distill.models.endpoint.client import unanswered
from distill.models.endpoint.message import MediaError
from distill.models.endpoint.pool import as_completed
from distill.task import prompts
from distill.task.sample import Sample

log = logging.getLogger(__name__)

FOLDER = "batches"

_MAX_UNANSWERED = 8  # requests of a round that may all be without an answer; at least `concurrency`

_NO_LOGPROBS = "labels without log-probabilities take several answers each"


@dataclass(frozen=True)
class _Asked:
    """What a conversation asks next. With neither of the others, it is on its way already or does not go to a file.

    Attributes:
        body: the request.
        is_new: the dialect of the server for such a request is not known yet.
        direct: why it cannot be in a file.
    """

    query: TeacherQuery
    key: str
    body: bytes | None = None
    is_new: bool = False
    direct: str = ""


class Batches:
    """The batches of one stage.

    Args:
        folder: the stage's folder.
        settings: None: no further batches, but what earlier ones have answered is used.
        run, stage: for messages, and to know a batch by at the service.
        show: called with the numbers of finished and of all requests at the service.
    """

    def __init__(
        self,
        teacher: CachedTeacher,
        folder: Path,
        settings: BatchSettings | None,
        run: str,
        stage: str,
        show: Progress = lambda done, total: None,
    ) -> None:
        assert isinstance(teacher.teacher, Endpoint)
        self.endpoint: Endpoint = teacher.teacher
        self.teacher, self.settings, self.stage = teacher, settings, stage
        self.folder = folder / FOLDER
        self.rounds: list[Round] = []
        self._jobs = Jobs(self.endpoint.settings, settings, run, stage, show)
        self._dialects: set[tuple[bool, ...]] = set()  # kinds of requests that the server has answered
        self._written = 0  # rounds
        self._asks_server = settings is not None and settings.submit == "api"

    def fill(self, samples: Sequence[Sample], starts: Sequence[Start]) -> None:
        """Fill the ledger with the answers of batches, round by round.

        Args:
            starts: conversations about each sample that do not depend on each other.

        Raises:
            RunError: files wait for the user, the service refuses a batch or answers nothing of one, its first answers
                are all invalid, or a file cannot be written. The same call continues.
        """
        try:
            self._take_up()
            for start in starts:
                self.teacher.recall(samples, start)
            while jobs := self._ask(samples, starts):
                self._jobs.answer([job for job in jobs if job[0].submit == "api"], self.teacher)
                self._check_answered(jobs)
        except OSError as error:  # a full disk, for example
            raise RunError(
                f"{self.stage}: {error.filename or self.folder} cannot be read or written: {error.strerror or error}; "
                "mend this, and the same command goes on"
            ) from error
        finally:
            self._jobs.close()

    def close(self) -> None:
        """Note that the stage has all answers; later batches count their rounds anew."""
        for round in self._current:
            round.closed = True
            round.save()

    @property
    def summary(self) -> dict[str, Any]:
        """Counts of the batches since the stage ended last."""
        files = [file for round in self._current for file in round.files]
        return {
            "rounds": sum(bool(round.files) for round in self._current),
            "requests": sum(file.requests for file in files),
            "answers": sum(file.answers for file in files),
            "without_answer": dict(sum((Counter(file.problems) for file in files), Counter[str]())),
        }

    @property
    def _current(self) -> list[Round]:
        return [round for round in self.rounds if not round.closed]

    def _take_up(self) -> None:
        """Bring the state up to date after a run that ended anywhere: find batches, read results, drop unsent files."""
        address = self.endpoint.settings.address
        remove_unfinished(self.folder)
        for round in read_rounds(self.folder):
            if round.submit == "api" and round.address != address:
                if any(round.is_open(file) for file in round.files):
                    log.warning("%s: the batches of %s are at %s and not used", self.stage, round.folder, round.address)
                continue
            self.rounds.append(round)
            for file in list(round.files):
                if round.submit == "files":
                    if (digest := results_digest(round, file)) and digest != file.folded:
                        fold(round, file, self.teacher)
                    continue
                if file.input_file and not file.batch:
                    self._jobs.find(round, file)
                if not file.batch:
                    round.discard(file)

    # ---- what to ask ----

    def _ask(self, samples: Sequence[Sample], starts: Sequence[Start], *, waits: bool = True) -> list[Job]:
        """Write the questions that the ledger does not answer to files, unless all rounds are over.

        Args:
            waits: write nothing while files with such questions wait for the user.

        Returns:
            The new files, and those on their way that have one of these questions.
        """
        for round in self._current:
            self.teacher.known |= {key: unanswered(words, "filtered") for key, words in round.filtered.items()}
        waits = waits and self.settings is not None and not self._asks_server
        rounds = [round for round in self.rounds if waits or round.submit == "api"]
        open_jobs = [(round, file) for round in rounds for file in round.files if round.is_open(file)]
        on_way = {key: index for index, (round, file) in enumerate(open_jobs) for key in round.queries(file)}
        used = sum(round.answers > 0 or any(map(round.is_open, round.files)) for round in self._current)
        settings = self.settings
        if settings is not None and max(used, self._written) >= settings.rounds:
            settings = None
        if settings is None and not on_way:
            return []
        writes = settings is not None and not (waits and on_way)
        submit = "api" if settings is None else settings.submit
        address, names = self.endpoint.settings.address, label_names(self.teacher.labels)
        round = Round(next_folder(self.folder), submit, address, names)
        writer = RequestWriter(round, settings or BatchSettings())
        wanted, direct, large = set[int](), Counter[str](), list[str]()

        def play(sample: Sample, stop: threading.Event) -> list[_Asked]:
            return self._next(sample, starts, on_way, encode=writes)

        for sample, asked in as_completed(play, samples, self.teacher.max_parallel):
            if any(item.is_new for item in asked):
                self._learn_dialects(sample, starts, on_way)
                asked = self._next(sample, starts, on_way, encode=True)
            for item in asked:
                direct.update([item.direct] if item.direct else [])
                if item.key in on_way:
                    wanted.add(on_way[item.key])
                elif item.body is not None:
                    meta = self.teacher.meta(sample, item.query)
                    large += [] if writer.add(item.key, meta, item.body) else [sample.id]
        writer.close()
        unused = [job for index, job in enumerate(open_jobs) if index not in wanted and not job[0].closed]
        self._log_left(direct, large, unused)
        jobs = [open_jobs[index] for index in sorted(wanted)]
        if not jobs and settings is not None and not writes:
            return self._ask(samples, starts, waits=False)
        if not round.files:
            return jobs
        round.save()
        self.rounds.append(round)
        self._written += 1
        return [*jobs, *((round, file) for file in round.files)]

    def _next(self, sample: Sample, starts: Sequence[Start], on_way: Collection[str], *, encode: bool) -> list[_Asked]:
        """What the conversations about a sample ask next; nothing about a post whose files cannot be read."""
        found, message = [], self.endpoint.message(sample)
        for start in starts:
            try:
                replayed = self.teacher.replay(sample, start(sample))
                query = next((query for query, answer in replayed if answer is None), None)
                if query is None:
                    continue
                key, body, is_new, direct = self.teacher.ledger_key(sample, query), None, False, ""
                if encode and key not in on_way:
                    if query.template in prompts.SCORED and not self.endpoint.returns_logprobs:
                        direct = _NO_LOGPROBS
                    elif self._asks_server and _dialect(sample, query) not in self._dialects:
                        is_new = True
                    else:
                        asked = (query.template, query.sampling, query.earlier)
                        body = self.endpoint.body(message, *asked, tokenize=self._asks_server)
                found.append(_Asked(query, key, body, is_new, direct))
            except (MediaError, OSError):  # the stage reports it
                continue
        return found

    def _learn_dialects(self, sample: Sample, starts: Sequence[Start], on_way: Collection[str]) -> None:
        """Ask questions of a kind directly until one has a valid answer, so that files have what the server takes.

        Nothing is paid in vain: the answers are in the ledger. If they are all invalid, the stage ends.
        """
        if not self._dialects:
            self._jobs.check()
        message = self.endpoint.message(sample)
        for start in starts:
            while (asked := next(iter(self._next(sample, [start], on_way, encode=True)), None)) and asked.is_new:
                answer = self.teacher.ask(message, asked.query, threading.Event())
                if answer.error is not None:
                    self.teacher.known |= {asked.key: answer} if answer.kind == "filtered" else {}
                    break
                if self.teacher.first_answers.has_valid(asked.query.template):
                    self._dialects.add(_dialect(sample, asked.query))

    def _log_left(self, direct: Counter[str], large: Sequence[str], unused: Sequence[Job]) -> None:
        for reason, count in direct.items():
            log.warning("%s: %d requests are asked one by one: %s", self.stage, count, reason)
        if large:
            log.warning(
                "%s: %d requests are larger than batch.max_mb and asked one by one, such as that of post %s",
                self.stage, len(large), large[0],
            )  # fmt: skip
        for round, file in unused:
            where = f"{file.batch} at {round.address}" if file.batch else f"{round.requests(file)}"
            log.warning("%s: these settings do not need the batch %s, which has not ended", self.stage, where)

    # ---- what came of it ----

    def _check_answered(self, jobs: Sequence[Job]) -> None:
        """Raise RunError if files wait for the user, or nothing was answered: then no single request is at fault."""
        if waiting := [job for job in jobs if job[0].is_open(job[1])]:
            round, file = waiting[0]
            count = sum(file.requests for _, file in waiting)
            files = ["-i", str(round.requests(file)), "-o", str(round.results(file))]
            command = shlex.join(["vllm", "run-batch", *files, "--model", self.endpoint.settings.model])
            raise RunError(
                f"{self.stage}: {count} requests in {len(waiting)} files of {round.folder} wait for answers; run for "
                f"each: {command}; then the same command again, which reads the results"
            )
        count = sum(file.requests for _, file in jobs)
        if any(file.answers for _, file in jobs) or count < max(_MAX_UNANSWERED, self.endpoint.settings.concurrency):
            return
        problems = sum((Counter(file.problems) for _, file in jobs), Counter[str]())
        if set(problems) == {"filtered"}:
            return
        reasons = ", ".join(f"{count} {problem}" for problem, count in problems.most_common())
        raise RunError(
            f"{self.stage}: the batches have no answer to any of {count} requests ({reasons}); the same command asks "
            f"again, and without {self.stage}.batch one by one"
        )


def _dialect(sample: Sample, query: TeacherQuery) -> tuple[bool, ...]:
    """The kind of a request: other kinds have other optional fields and parts."""
    media = (bool(sample.images), sample.video is not None, sample.audio is not None)
    return (query.template in prompts.SCORED, *media)

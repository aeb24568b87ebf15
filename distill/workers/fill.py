"""Questions of a stage on Ray workers: they fill the stage's ledger, then the stage runs as it does in one process.

Each worker has the whole conversation about a post and writes every answer to a ledger of its own, a shard, before it
uses it. The shards are merged into the stage's ledger when the workers end, and those of a run that was killed when the
next one begins: by key, so that an answer is there once however often they are merged.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from distill.annotation.cached_teacher import CachedTeacher, Start, TeacherQuery
from distill.annotation.ledger import Ledger, LedgerInUse
from distill.annotation.scheduler import Progress, run_conversations
from distill.errors import RunError
from distill.models.endpoint import Endpoint
from distill.models.reasoner import Answer
from distill.models.source import ModelSource
from distill.task.labels import LabelSpace
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.workers import pool
from distill.workers.files import fetched
from distill.workers.settings import RaySettings

T = TypeVar("T")

FOLDER = "shards"

_LOCK_S = 60.0  # seconds until a worker whose driver was killed has noticed that and ended
_WAIT_S = 5.0  # if the stage has failed
_IDENTITY = TeacherQuery("classify")  # has everything of a post in its key, and nothing else

NewAnswer = tuple[str, Sample, Template, Answer]
"""An answer that was requested or failed, with its key."""


def merge(ledger: Ledger, folder: Path, wait_s: float | None = None) -> None:
    """Merge the shards in a stage's folder into its ledger, and delete them.

    Args:
        wait_s: seconds to wait for a worker that still writes; None: until it must have ended.

    Raises:
        RunError: a worker of an earlier run does not end, or a file cannot be read or written.
    """
    for shard in sorted((folder / FOLDER).glob("*/*.jsonl")):
        _when_free(partial(ledger.merge, shard), wait_s)
        shard.unlink()
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def fill(
    teacher: CachedTeacher,
    folder: Path,
    settings: RaySettings,
    root: Path,
    samples: Sequence[Sample],
    starts: Sequence[Start],
    progress: Progress = lambda done, total: None,
) -> None:
    """Fill the ledger with the answers of workers.

    Args:
        teacher: what its `teacher` is, an `Endpoint` or a `ModelSource`, the workers ask.
        folder: the stage's folder.
        root: the folder of the posts' files.
        starts: conversations about each sample that can be pickled and do not depend on each other.

    Raises:
        SettingsError: Ray is not installed, or a model cannot be loaded on a worker.
        RunError: the first answers are all invalid, the endpoint no longer answers, or a worker failed. All answers
            that were paid for are in the ledger, or in shards that the next call merges.
    """
    merge(teacher.ledger, folder)
    for start in starts:
        teacher.recall(samples, start)
    posts = list(_unanswered(teacher, samples, starts))
    if not posts:
        return
    shards = pool.new_folder(folder / FOLDER)
    model, total, done = teacher.teacher, sum(len(post.samples) for post in posts), 0
    assert isinstance(model, Endpoint | ModelSource)
    job = _Job(model, teacher.labels, teacher.chunk, tuple(teacher.other_servers), starts, shards, settings, root)
    size = settings.batch_size
    batches = [posts[begin : begin + size] for begin in range(0, len(posts), size)]
    try:
        with contextlib.closing(pool.run(settings, partial(_Worker, job), batches, shards)) as results:
            for count, new in results:
                for key, sample, template, answer in new:
                    if answer.error is not None:
                        teacher.known[key] = answer
                    teacher.first_answers.add((sample, template, answer))
                progress(done := done + count, total)
    except BaseException:
        with contextlib.suppress(RunError):  # the next run merges them
            merge(teacher.ledger, folder, _WAIT_S)
        raise
    teacher.first_answers.begin_anew()
    merge(teacher.ledger, folder)


@dataclass(frozen=True)
class _Post:
    """Samples with the same content, whose questions are partly the same, and the answers that are known.

    Attributes:
        identity: hash of the content.
    """

    identity: str
    samples: list[Sample] = field(default_factory=list)
    known: dict[str, Answer] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """What a worker needs to know."""

    model: Endpoint | ModelSource
    labels: LabelSpace
    chunk: int
    other_servers: Sequence[str]
    starts: Sequence[Start]
    shards: Path
    settings: RaySettings
    root: Path


def _unanswered(teacher: CachedTeacher, samples: Sequence[Sample], starts: Sequence[Start]) -> Iterator[_Post]:
    """The posts about which a question is open; not those whose files cannot be read, which the stage reports."""
    posts: dict[str, _Post] = {}
    for sample in samples:
        with contextlib.suppress(OSError):
            known, is_open = dict[str, Answer](), False
            for start in starts:
                for query, answer in teacher.replay(sample, start(sample)):
                    if answer is None:
                        is_open = True
                    else:
                        known[teacher.ledger_key(sample, query)] = answer
            if is_open:
                identity = teacher.ledger_key(sample, _IDENTITY)
                post = posts.setdefault(identity, _Post(identity))
                post.samples.append(sample)
                post.known.update(known)
    yield from posts.values()


class _ShardTeacher(CachedTeacher):
    """Collects in `new` what it has requested."""

    new: list[NewAnswer]

    def _store(self, ledger_key: str, sample: Sample, query: TeacherQuery, answer: Answer) -> Answer:
        self.new.append((ledger_key, sample, query.template, answer))
        return super()._store(ledger_key, sample, query, answer)


class _Worker:
    """Asks about batches of posts, in a worker process."""

    def __init__(self, job: _Job) -> None:
        self.job, model = job, job.model
        asked = model.load("cuda" if job.settings.gpus else "cpu") if isinstance(model, ModelSource) else model
        shard = _when_free(partial(Ledger, job.shards / f"{pool.actor_id()}.jsonl"))
        self.teacher = _ShardTeacher(asked, job.labels, shard, job.chunk, job.other_servers)

    def __call__(self, posts: Sequence[_Post]) -> tuple[int, list[NewAnswer]]:
        """The number of samples, and the new answers to them."""
        teacher, job = self.teacher, self.job
        teacher.new, teacher.known = [], {}
        for post in posts:
            teacher.known |= post.known
        samples = [sample for post in posts for sample in post.samples]
        with fetched(samples, job.root, job.settings.files) as there:
            self._check(posts, there)
            for start in job.starts:
                for _ in run_conversations(there, start, teacher):
                    pass
        return len(samples), teacher.new

    def _check(self, posts: Sequence[_Post], samples: Sequence[Sample]) -> None:
        """Raise RunError if the posts are others here: the stage would not find the answers to them."""
        remaining = iter(samples)
        for post in posts:
            sample, *_ = islice(remaining, len(post.samples))
            try:
                same = self.teacher.ledger_key(sample, _IDENTITY) == post.identity
            except OSError as error:
                raise RunError(
                    f"a Ray worker cannot read a file of post {sample.id}: {error}; set ray.files to an address that "
                    "the workers can read"
                ) from error
            if not same:
                raise RunError(
                    f"post {sample.id} is another one on a Ray worker: its files in ray.files or the version of "
                    "distill differ from those here"
                )


def _when_free(action: Callable[[], T], wait_s: float | None = None) -> T:
    """Retry an action on a ledger that another process has open, until that has ended."""
    deadline = time.monotonic() + (_LOCK_S if wait_s is None else wait_s)
    while True:
        try:
            return action()
        except LedgerInUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)

"""The batches of a stage at the service: send files, take up what an earlier run has sent, wait, fetch and fold.

The state of a file is written before and after each step, so that a run that ends anywhere pays for no file twice.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from distill.annotation.batch_files import RequestFile, Round, fold
from distill.annotation.cached_teacher import CachedTeacher
from distill.annotation.scheduler import Progress
from distill.errors import RunError
from distill.models.endpoint import BatchSettings, EndpointSettings
from distill.models.endpoint.batch_api import KNOWN, BatchService, NotThere

log = logging.getLogger(__name__)

Job = tuple[Round, RequestFile]

_MAX_LATE = 10  # questions about a batch that has ended until its file of results has to be there


@dataclass
class Jobs:
    """The batches of one stage at the service of its endpoint.

    Args:
        settings: None: no batches are made, and none is waited for, but those that have ended are fetched.
        run, stage: for messages, and to know a batch by at the service.
        show: called with the numbers of finished and of all requests.
    """

    endpoint: EndpointSettings
    settings: BatchSettings | None
    run: str
    stage: str
    show: Progress

    def __post_init__(self) -> None:
        self._open: BatchService | None = None
        self._unknown: set[str] = set()  # states of batches that were logged
        self._late = Counter[str]()  # questions about batches that have ended without a file of results

    @property
    def _service(self) -> BatchService:
        self._open = self._open or BatchService(self.endpoint)
        return self._open

    @property
    def _pause_s(self) -> float:
        return BatchSettings.poll_s if self.settings is None else self.settings.poll_s

    def close(self) -> None:
        """Close the connections."""
        if self._open is not None:
            self._open.close()

    def check(self) -> None:
        """Raise RunError if the service has no batch API or refuses the key, before a question is paid for."""
        self._service.check()

    def find(self, round: Round, file: RequestFile) -> None:
        """Look for the batch that a run was about to create when it ended.

        Raises:
            RunError: the service does not list its batches.
        """
        try:
            found = self._service.find(file.input_file, self._marker(round, file), self._pause_s)
        except RunError as error:
            raise RunError(
                f"{error}; a run ended while it created a batch of {round.requests(file)}: look for it at the "
                f"service, and delete {round.folder} if there is none"
            ) from error
        if found is not None:
            file.batch = found.id
            round.save()
            log.info("%s: batch %s of an earlier run is taken up", self.stage, found.id)

    def answer(self, jobs: Sequence[Job], teacher: CachedTeacher) -> None:
        """Send the files that have no batch yet, wait for all batches, and fold their results.

        Raises:
            RunError: the service does not accept a file or does not answer, or the ledger cannot be written.
        """
        try:
            for round, file in jobs:
                if not file.batch:
                    self._send(round, file)
            self._wait(jobs, teacher)
        except KeyboardInterrupt:
            if any(file.batch and not file.folded for _, file in jobs):
                log.warning(
                    "%s: the batches go on at %s and the next run fetches their answers; to cancel them: "
                    "distill batches --cancel, with the same recipe", self.stage, self.endpoint.shown_url,
                )  # fmt: skip
            raise
        for round, file in jobs:
            if file.status == "failed" and not file.answers:
                raise RunError(
                    f"{self.stage}: the service has not accepted batch {file.batch} ({round.folder.name}, file "
                    f"{file.number}): {next(iter(file.problems))}"
                )

    def _send(self, round: Round, file: RequestFile) -> None:
        assert self.settings is not None
        file.input_file = self._service.upload(round.requests(file))
        round.save()
        marker = self._marker(round, file)
        batch = self._service.create(file.input_file, self.settings.window, marker, self._pause_s)
        file.batch, file.status = batch.id, batch.status
        round.save()
        log.info("%s: batch %s has the %d requests of %s", self.stage, batch.id, file.requests, round.requests(file))

    def _marker(self, round: Round, file: RequestFile) -> str:
        identity = [self.run, self.stage, round.folder.name, file.number, file.digest]
        return hashlib.sha256(repr(identity).encode()).hexdigest()

    def _wait(self, jobs: Sequence[Job], teacher: CachedTeacher) -> None:
        """Ask for the state of the batches until all have ended; the results of each are folded when it has."""
        finished, total, tenth = dict[str, int](), sum(file.requests for _, file in jobs), 0
        while True:
            for round, file in jobs:
                if not file.folded:
                    with _naming(round):
                        finished[file.batch] = self._poll(round, file, teacher)
                self.show(done := sum(finished.values()), total)
                if 10 * done // total > tenth:
                    tenth = 10 * done // total
                    log.info("%s: %d of %d requests in batches are finished", self.stage, done, total)
            if all(file.folded for _, file in jobs):
                return
            time.sleep(self._pause_s)

    def _poll(self, round: Round, file: RequestFile, teacher: CachedTeacher) -> int:
        """Ask for the state of a batch, and fetch and fold its results if it has ended. Returns its finished requests.

        Raises:
            RunError: it has not ended, and there are no settings; or its results do not come.
        """
        batch = self._service.get(file.batch)
        if batch.status != file.status:
            log.info("%s: batch %s is %s", self.stage, batch.id, batch.status)
        if batch.status not in KNOWN | self._unknown:
            self._unknown.add(batch.status)
            log.warning("%s: %r is no known state of a batch; it is waited for", self.stage, batch.status)
        file.status = batch.status
        if not batch.ended:
            if self.settings is None and batch.status != "cancelling":
                raise RunError(
                    f"{self.stage}.batch is gone, but batch {batch.id} with {file.requests} requests goes on at "
                    f"{self.endpoint.shown_url}; put the section back, or cancel the batch: distill batches --cancel, "
                    "with the same recipe"
                )
            return batch.finished
        if batch.lacks_results:
            self._late[batch.id] += 1
            if self._late[batch.id] >= _MAX_LATE:
                raise RunError(
                    f"{self.stage}: the service has no file of results of batch {batch.id}, which is {batch.status}; "
                    f"the same command asks again; if its answers are lost, delete {round.folder}"
                )
            log.info("%s: batch %s has no file of results yet", self.stage, batch.id)
            return batch.finished
        if batch.status == "failed" and not batch.output_file:
            file.folded, file.problems = "none", {batch.problem or "it gives no reason": file.requests}
            round.save()
            round.requests(file).unlink(missing_ok=True)  # written anew for another batch
            return 0
        for id, path in ((batch.output_file, round.results(file)), (batch.error_file, round.errors(file))):
            if id:
                self._service.download(id, path)
        fold(round, file, teacher)
        return file.requests


@contextmanager
def _naming(round: Round) -> Iterator[None]:
    """Add what to do about a batch that is not there."""
    try:
        yield
    except NotThere as error:
        raise RunError(
            f"{error}; if its answers are lost, delete {round.folder}: its requests are asked again"
        ) from error

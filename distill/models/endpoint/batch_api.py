"""The batch API of OpenAI and of services like it: upload a file, create a batch, ask for its state, fetch and cancel.

Services differ in which fields they return, so a missing field and an unknown state are no errors.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from urllib3.filepost import choose_boundary, encode_multipart_formdata

from distill.errors import RunError
from distill.files import atomic_write
from distill.models.endpoint.http import HttpClient, backoff_s
from distill.models.endpoint.replies import RequestFailed, RequestFiltered, RequestRefused, encodable
from distill.models.endpoint.settings import EndpointSettings

ROUTE = "/v1/chat/completions"
"""The route of the requests in a file."""

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
"""The states of a batch that no longer change."""

KNOWN = ENDED | {"validating", "in_progress", "finalizing", "cancelling"}

_SPELLINGS = {"canceled": "cancelled", "canceling": "cancelling"}

_MARKER = "distill"  # name of the metadata field that says which file a batch was made from
_PAGE, _MAX_PAGES = 100, 100
_PART = 1 << 20  # bytes of an upload that are read at once

T = TypeVar("T")


class NotThere(RunError):
    """The service does not know a batch or a file."""


@dataclass(frozen=True)
class Batch:
    """A batch at the service.

    Attributes:
        finished, answered, total: numbers of requests; 0 if the service does not say. Failed ones are finished.
        output_file, error_file: ids of the files with the results; empty if there is none.
        problem: why the batch failed, in the words of the service.
    """

    id: str
    status: str
    finished: int = 0
    total: int = 0
    output_file: str = ""
    error_file: str = ""
    problem: str = ""
    answered: int = 0

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def lacks_results(self) -> bool:
        """Whether it has ended with answers, as far as is known, and the service does not name their file yet."""
        completed_silently = self.status == "completed" and not self.total and not self.error_file
        return self.ended and not self.output_file and (self.answered > 0 or completed_silently)


class BatchService:
    """The batch API behind an endpoint. Every call is repeated as a chat request is, within `deadline_s`.

    All methods raise RunError if the service has no batch API, refuses a call or the key, or does not answer.

    Raises:
        SettingsError: the environment variable named by `api_key_env` is not set.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self._http = HttpClient(settings)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def check(self) -> None:
        """Ask whether there is a batch API, which costs nothing. A service that does not list batches may have one."""
        with contextlib.suppress(RequestFailed, RequestFiltered):
            try:
                self._http.call("GET", "/batches?limit=1")
            except RequestRefused as refusal:
                if refusal.status == 404:
                    raise self._explained(refusal, "") from refusal

    def upload(self, path: Path) -> str:
        """Upload a file of requests, which is read in parts. Returns its id."""
        boundary, gap = choose_boundary(), b"\0file\0"
        form: dict[str, Any] = {"purpose": "batch", "file": (path.name, gap, "application/jsonl")}
        body, kind = encode_multipart_formdata(form, boundary)
        head, _, tail = body.partition(gap)
        headers = {"Content-Type": kind, "Content-Length": str(len(head) + path.stat().st_size + len(tail))}

        def parts() -> Iterator[bytes]:
            yield head
            with path.open("rb") as file:
                yield from iter(lambda: file.read(_PART), b"")
            yield tail

        return self._retried(lambda: _id(self._http.call("POST", "/files", parts(), headers)))

    def create(self, input_file: str, window: str, marker: str, pause_s: float) -> Batch:
        """Create a batch, once: a lost reply does not tell whether it was created, so it is looked for first (`find`).

        Args:
            marker: what to know the batch by, in its metadata.
            pause_s: see `find`.
        """
        request = {"input_file_id": input_file, "endpoint": ROUTE, "completion_window": window}
        body = json.dumps(request | {"metadata": {_MARKER: marker}}).encode()
        may_exist = False

        def attempt() -> Batch:
            nonlocal may_exist
            if may_exist and (found := self._find(input_file, marker, pause_s)) is not None:
                return found
            try:
                return _batch(self._http.call("POST", "/batches", body))
            except RequestFailed as failure:
                may_exist = may_exist or not (failure.busy or failure.unreachable)
                raise

        return self._retried(attempt)

    def get(self, id: str) -> Batch:
        """The state of a batch."""
        return self._retried(lambda: _batch(self._http.call("GET", f"/batches/{_path(id)}")), of=f"the batch {id}")

    def cancel(self, id: str) -> Batch:
        """Cancel a batch; what it has answered can still be fetched."""
        route = f"/batches/{_path(id)}/cancel"
        return self._retried(lambda: _batch(self._http.call("POST", route)), of=f"the batch {id}")

    def download(self, id: str, path: Path) -> None:
        """Write a file of results to `path`, whole or not at all."""

        def attempt() -> None:
            with atomic_write(path, "wb") as file:
                self._http.call("GET", f"/files/{_path(id)}/content", save=file)

        self._retried(attempt, of=f"the file {id}")

    def find(self, input_file: str, marker: str, pause_s: float) -> Batch | None:
        """The batch that was made from an uploaded file; None if there is none.

        Args:
            marker: see `create`.
            pause_s: a batch may not be listed at once, so it is looked for again after so many seconds.
        """
        return self._retried(lambda: self._find(input_file, marker, pause_s))

    def _find(self, input_file: str, marker: str, pause_s: float) -> Batch | None:
        for pause in (0.0, pause_s):
            time.sleep(pause)
            for item in self._all():
                metadata = item.get("metadata")
                marked = isinstance(metadata, dict) and metadata.get(_MARKER) == marker
                if item.get("input_file_id") == input_file or (marked and not item.get("input_file_id")):
                    return _batch(item)
        return None

    def _all(self) -> Iterator[dict[str, Any]]:
        """The batches of the service, at most `_MAX_PAGES` pages of them."""
        after = ""
        for _ in range(_MAX_PAGES):
            page = self._http.call("GET", f"/batches?limit={_PAGE}{after}")
            data = page.get("data") if isinstance(page, dict) else page
            listed = data if isinstance(data, list) else ()
            items = [item for item in listed if isinstance(item, dict) and item.get("id")]
            yield from items
            if not items or not (isinstance(page, dict) and page.get("has_more")):
                return
            after = f"&after={_path(items[-1]['id'])}"

    def _retried(self, attempt: Callable[[], T], of: str = "") -> T:
        """The result of a call that is repeated while it fails. `of` is what a status 404 says is not there."""
        settings, deadline = self.settings, time.monotonic() + self.settings.deadline_s
        failures = counted = 0
        while True:
            try:
                return attempt()
            except (RequestRefused, RequestFiltered) as refusal:
                raise self._explained(refusal, of) from refusal
            except RequestFailed as failure:
                failures, counted = failures + 1, counted + (not failure.busy)
                pause = backoff_s(settings, failures, failure)
                if counted >= settings.max_attempts or time.monotonic() + pause >= deadline:
                    raise RunError(
                        f"the batch API at {settings.shown_url} does not answer, after {failures} attempts: {failure}"
                    ) from failure
                time.sleep(pause)

    def _explained(self, refusal: Exception, of: str) -> RunError:
        url = self.settings.shown_url
        if not isinstance(refusal, RequestRefused) or refusal.status not in (404, 405, 501):
            return RunError(f"the batch API at {url}: {refusal}")
        status, words = refusal.status, refusal.error.words
        if of and status == 404:
            return NotThere(f"the batch API at {url} does not know {of} (status 404): {words}")
        return RunError(
            f"the endpoint {url} does not have the batch API (status {status}): {words}; "
            "set submit: files, or remove the batch section"
        )


def _path(id: str) -> str:
    """An id as a part of a URL."""
    return quote(str(id), safe="")


def _id(reply: Any) -> str:
    if not isinstance(reply, dict) or not isinstance(reply.get("id"), str):
        raise RequestFailed(f"a reply without an id: {str(reply)[:200]!r}")
    return str(reply["id"])


def _batch(reply: Any) -> Batch:
    """Read a batch. Raises RequestFailed if the reply is none."""
    id = _id(reply)
    counts, errors = reply.get("request_counts"), reply.get("errors")
    counts = counts if isinstance(counts, dict) else {}
    data = errors.get("data") if isinstance(errors, dict) else errors
    words = [item.get("message") for item in data if isinstance(item, dict)] if isinstance(data, list) else [data]
    numbers = {name: value for name, value in counts.items() if isinstance(value, int)}
    status = str(reply.get("status") or "").strip().lower()
    return Batch(
        id,
        _SPELLINGS.get(status, status),
        numbers.get("completed", 0) + numbers.get("failed", 0),
        numbers.get("total", 0),
        str(reply.get("output_file_id") or ""),
        str(reply.get("error_file_id") or ""),
        " ".join(encodable(" ".join(str(word) for word in words if word)).split())[:300],
        numbers.get("completed", 0),
    )

"""Replicas: several servers with the same model. A request goes to the least busy one that is healthy."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from distill.models.endpoint.http import HttpClient
from distill.models.endpoint.replies import RequestFailed, Tokens
from distill.models.endpoint.settings import EndpointSettings
from distill.models.reasoner import Answer

log = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECT_S = 3.0  # the longest wait for a connection, if there is another server to ask
_PROBE_S = 1.0  # between two health checks of a server that has failed
_PROBE_TIMEOUT_S = 5.0


class ReplicaState(NamedTuple):
    """The state of one server: its URL without secrets, and the requests that it has and had."""

    url: str
    healthy: bool
    in_flight: int
    answered: int
    failed: int


@dataclass(eq=False)
class _Replica:
    http: HttpClient
    healthy: bool = True
    in_flight: int = 0
    answered: int = 0
    failed: int = 0
    last: int = 0  # number of its last request
    probing: bool = False  # whether a thread checks its health


class Replicas:
    """The servers of an endpoint, `base_url` and `replicas`; thread-safe.

    A request that fails is sent to another server at once. A server that does not answer gets no more requests until
    its health check succeeds (`/health`, or `/v1/models`). If none is healthy, all are tried.

    Raises:
        SettingsError: the environment variable that `api_key_env` names is not set.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self._settings = settings
        connect_s = _CONNECT_S if settings.replicas else None
        servers = [replace(settings, base_url=url, replicas=[]) for url in (settings.base_url, *settings.replicas)]
        self._replicas = [_Replica(HttpClient(server, connect_s)) for server in servers]
        self._requests = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()

    @property
    def states(self) -> list[ReplicaState]:
        """The state of each server, in the order of the settings."""
        with self._lock:
            return [
                ReplicaState(one.http.settings.shown_url, one.healthy, one.in_flight, one.answered, one.failed)
                for one in self._replicas
            ]

    def close(self) -> None:
        """Close the idle connections and end the health checks."""
        self._closed.set()
        for replica in self._replicas:
            replica.http.close()

    def send(self, request: bytes, deadline: float) -> tuple[Answer, Tokens]:
        """Send a chat request and return the parsed answer. Each server has `timeout_s` for it.

        Args:
            request: from `request_body`.
            deadline: on the clock of `time.monotonic`.

        Raises:
            RequestFailed: no server answered.
            RequestRefused, RequestFiltered, OnlyThought, RunError: see `HttpClient.send`.
        """

        def send(http: HttpClient) -> tuple[Answer, Tokens]:
            remaining_s = max(deadline - time.monotonic(), 0.001)
            return http.send(request, min(self._settings.timeout_s, remaining_s))

        return self._ask(send, deadline)

    def read(self, status: int, text: str) -> tuple[Answer, Tokens]:
        """The answer in a reply that was sent elsewhere. Raises what `HttpClient.send` raises."""
        return self._replicas[0].http.read(status, text)

    def tokenize(self, text: str) -> list[int] | None:
        """See `HttpClient.tokenize`; the servers have the same model, so any of them is asked."""
        return self._ask(lambda http: http.tokenize(text), time.monotonic() + self._settings.timeout_s)

    def _ask(self, work: Callable[[HttpClient], T], deadline: float) -> T:
        """The result of `work` on the first server that does not fail. Raises RequestFailed if all do."""
        failures: dict[_Replica, RequestFailed] = {}
        while (replica := self._take(failures)) is not None:
            error: RequestFailed | None = None
            try:
                return work(replica.http)
            except RequestFailed as failure:
                error = failures[replica] = failure
                if failure.generated or time.monotonic() >= deadline:  # a reply that may be paid is not asked for again
                    raise
            finally:
                self._release(replica, error)
        raise min(failures.values(), key=lambda failure: (not failure.busy, failure.retry_after_s))

    def _take(self, failures: Mapping[_Replica, RequestFailed]) -> _Replica | None:
        """The least busy server that has not failed, counted as busy; None if no other is worth a try."""
        with self._lock:
            left = [replica for replica in self._replicas if replica not in failures]
            healthy = [replica for replica in left if replica.healthy]
            if not left or (not healthy and any(failure.busy for failure in failures.values())):
                return None
            chosen = min(healthy or left, key=lambda replica: (replica.in_flight, replica.last))
            self._requests += 1
            chosen.in_flight, chosen.last = chosen.in_flight + 1, self._requests
            return chosen

    def _release(self, replica: _Replica, failure: RequestFailed | None) -> None:
        """Record the end of a request; after a failure of the server, check its health."""
        down = failure is not None and not (failure.busy or failure.generated)
        with self._lock:
            replica.in_flight -= 1
            replica.answered += failure is None
            replica.failed += failure is not None
            was_healthy, replica.healthy = replica.healthy, not down
            if not down or replica.probing or len(self._replicas) == 1:
                return
            replica.probing = True
        if was_healthy:
            url = replica.http.settings.shown_url
            log.warning("%s does not answer and gets no requests until its health check succeeds: %s", url, failure)
        threading.Thread(target=self._probe, args=(replica,), name="health", daemon=True).start()

    def _probe(self, replica: _Replica) -> None:
        """Check the health of a server until it answers."""
        while not (replica.healthy or replica.http.is_healthy(_PROBE_TIMEOUT_S)):
            if self._closed.wait(_PROBE_S):
                return
        with self._lock:
            replica.healthy, replica.probing = True, False
        log.warning("%s answers again", replica.http.settings.shown_url)

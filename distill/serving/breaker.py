"""The circuit breaker of the teacher: a teacher that does not answer is suspended instead of waited for."""

import logging
import time
from collections.abc import Callable
from typing import Literal

log = logging.getLogger(__name__)

BreakerState = Literal["closed", "half-open", "open"]


class CircuitBreaker:
    """Suspends the teacher after `failures` requests in a row that waited for it in vain.

    closed: every request may be sent. open: none may. half-open, `retry_s` later: one request at a time may be sent,
    and its result closes or opens the breaker. Must be used from one thread only.

    Args:
        clock: returns the time in seconds.
        warn: logs that the teacher is suspended or answers again.
    """

    def __init__(
        self,
        failures: int,
        retry_s: float,
        clock: Callable[[], float] = time.monotonic,
        warn: Callable[..., None] = log.warning,
    ) -> None:
        self._limit, self._retry_s, self._clock, self._warn = failures, retry_s, clock, warn
        self._failures = 0
        self._opened: float | None = None  # None: closed
        self._trial = False  # the one request of the half-open state is in flight

    @property
    def state(self) -> BreakerState:
        """The state at this moment."""
        if self._opened is None:
            return "closed"
        return "half-open" if self._trial or self._clock() >= self._opened + self._retry_s else "open"

    def admit(self) -> BreakerState | None:
        """The state in which a request may be sent now, or None. `report` must follow for each admitted request."""
        state = self.state
        if state == "open" or self._trial:
            return None
        self._trial = state == "half-open"
        return state

    def report(self, admitted: BreakerState, answered: bool, waited: bool) -> None:
        """Record the end of a request.

        Args:
            admitted: what `admit` returned for the request.
            answered: whether there is an answer, which closes the breaker.
            waited: whether the request waited long. A closed breaker ignores a quick failure, which delays nobody and
                may be due to the post.
        """
        if answered:
            if self._opened is not None:
                self._warn("the teacher answers again")
            self._failures, self._opened, self._trial = 0, None, False
        elif self._opened is None:
            self._failures += waited
            if self._failures >= self._limit:
                values = self._failures, self._retry_s
                self._warn("the teacher left %d requests in a row unanswered; it is suspended for %g s", *values)
                self._opened = self._clock()
        elif admitted == "half-open":
            self._opened, self._trial = self._clock(), False

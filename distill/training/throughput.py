"""Tokens per second of a training."""

import time


class Throughput:
    """Counts tokens and the seconds in which they were trained; pauses, such as validations, do not count."""

    def __init__(self) -> None:
        self._tokens = 0
        self._seconds = 0.0
        self._begin: float | None = None

    def start(self) -> None:
        """Begin or continue to measure."""
        self._begin = time.monotonic()

    def add(self, tokens: int) -> None:
        """Count the tokens of a batch that has just been trained."""
        if self._begin is not None:
            now = time.monotonic()
            self._seconds += now - self._begin
            self._tokens += tokens
            self._begin = now

    def take(self) -> float | None:
        """Return the tokens per second since the last call; None if nothing was measured."""
        tokens, seconds = self._tokens, self._seconds
        self._tokens, self._seconds = 0, 0.0
        return tokens / seconds if seconds > 0 else None

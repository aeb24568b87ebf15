"""Where a chain is: one log line at the start and at the end of each stage."""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from distill import logs

log = logging.getLogger(__name__)


class Progress:
    """Logs the number of a stage, the time since the chain began, and the time that is left where it is known."""

    def __init__(
        self, stages: Sequence[str], pending: Collection[str], earlier: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Begin.

        Args:
            stages: all stages of the chain, in order.
            pending: those that would run.
            earlier: entries of the manifest: a stage that has run before is expected to take as long again.
        """
        self._stages = stages
        self._expected = {
            name: entry.get("seconds") if (entry := earlier.get(name, {})).get("status") == "done" else None
            for name in pending
        }
        self._began = time.monotonic()

    def begin(self, stage: str) -> None:
        """Log that a stage begins."""
        logs.set_stage(stage)
        self._log(stage, "", self._stages.index(stage))

    def end(self, stage: str) -> None:
        """Log that a stage has ended."""
        self._log(stage, " done", self._stages.index(stage) + 1)
        logs.set_stage(None)

    def _log(self, stage: str, done: str, first: int) -> None:
        """Log a line.

        Args:
            first: position of the first stage whose time is left.
        """
        elapsed = time.monotonic() - self._began
        left = [self._expected[name] for name in self._stages[first:] if name in self._expected]
        remaining = sum(left) if left and None not in left else None  # type: ignore[arg-type]
        number, count = self._stages.index(stage) + 1, len(self._stages)
        parts = [f"stage {number} of {count}: {stage}{done}", duration(elapsed)]
        parts += [] if remaining is None else [f"about {duration(remaining, exact=False)} left"]
        fields = {"stage": stage, "number": number, "of": count, "elapsed_s": round(elapsed, 1)}
        log.info(", ".join(parts), extra={"fields": fields | {"remaining_s": remaining}})


def duration(seconds: float, *, exact: bool = True) -> str:
    """A duration as text: `40 s`, `2 min 10 s`, `3 h 5 min`; not `exact`, in whole minutes from one minute on."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds < 59.5 else "1 min"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if exact else f"{round(seconds / 60)} min"

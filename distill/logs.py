"""What a command logs: its own info messages; the routine messages and warnings of the libraries are hidden.

With `--log-format json`, each line on stderr is one JSON object, also those that libraries print.
"""

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TextIO

from distill.errors import SettingsError
from distill.masking import mask

FORMATS = ("text", "json")

_FORMAT = "DISTILL_LOG_FORMAT"
"""Environment variable that passes the format to the other processes of a training."""

_log = logging.getLogger(__name__)
_state: dict[str, Any] = {"stage": None, "quiet": False}


def split_format(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --log-format, which all commands take, and the other arguments.

    Raises:
        SettingsError: the value is not one of FORMATS.
    """
    rest, form = [], None
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name != "--log-format":
            rest.append(argument)
            continue
        form = value if equals else next(remaining, "")
        if form not in FORMATS:
            raise SettingsError(f"--log-format is {form!r}; it takes {' or '.join(FORMATS)}")
    return form, rest


def configure(form: str | None = None, *, main: bool = True) -> None:
    """Show info messages of distill; hide the routine messages and warnings of the libraries.

    Progress bars are off if the messages are JSON, stderr is no terminal, or the environment variable CI is set.

    Args:
        form: text or json; None: as in the process that started this one.
        main: False in the other processes of a training, whose messages are those of the main process again.
    """
    form = form or os.environ.get(_FORMAT, "text")
    root = logging.getLogger()
    if form == "json" and not isinstance(sys.stderr, _JsonStream):
        os.environ[_FORMAT] = form
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_JsonFormatter())
        logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
        logging.captureWarnings(True)
        sys.stderr = _JsonStream(sys.stderr)
    _state["quiet"] = form == "json" or "CI" in os.environ or not sys.stderr.isatty()
    if _state["quiet"]:
        os.environ["TQDM_DISABLE"] = "1"  # the bars of libraries
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for handler in root.handlers:  # type: ignore[assignment]
        if not isinstance(handler.formatter, _MaskingFormatter):
            handler.setFormatter(_MaskingFormatter(handler.formatter))
    logging.getLogger("distill").setLevel(logging.INFO if main else logging.ERROR)
    for name in ("utilities.rank_zero", "accelerators.cuda", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.ERROR)
    for name in ("rank_zero", "distributed"):
        logging.getLogger(f"lightning.fabric.utilities.{name}").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|torchdata|transformers|peft)\..*")


def quiet() -> bool:
    """Whether a command shows no progress bars."""
    return bool(_state["quiet"])


def set_stage(stage: str | None) -> None:
    """Name the stage that runs, for messages in JSON."""
    _state["stage"] = stage


def fail(message: str, details: str = "") -> None:
    """Print why a command failed, after its details."""
    if isinstance(sys.stderr, _JsonStream):
        _log.error(message, extra={"fields": {"details": details} if details else {}})
    else:
        print(f"{details}distill: {message}", file=sys.stderr)


def _json_line(level: str, message: str, fields: Mapping[str, Any]) -> str:
    """A message as a line of JSON."""
    stage = {} if _state["stage"] is None else {"stage": _state["stage"]}
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps(mask({"time": time, "level": level, "message": message} | stage | dict(fields)))


class _MaskingFormatter(logging.Formatter):
    """Masks passwords in the lines of another formatter."""

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return str(mask(self._inner.format(record)))


class _JsonFormatter(_MaskingFormatter):
    """Formats a message as one line of JSON, with the `fields` of the record, and masks passwords."""

    def __init__(self) -> None:
        super().__init__(logging.Formatter("%(message)s"))

    def format(self, record: logging.LogRecord) -> str:
        return _json_line(record.levelname.lower(), super().format(record), getattr(record, "fields", {}))


class _JsonStream(io.TextIOBase):
    """Writes each line that is printed to it as a warning in JSON; parts of a line are kept until it ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        for line in filter(str.strip, lines):
            self._stream.write(_json_line("warning", line, {}) + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

"""The expected failures of a command; `cli.py` prints their message and sets the exit status."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_FIELDS_OF_SECTIONS = re.compile(r"(?:model|packing|max_length|api_key_env)\b")


class SettingsError(ValueError):
    """Invalid settings or data: exit status 2. The message names the field, the file or the row."""


class RunError(RuntimeError):
    """A failure while running, such as an unreachable endpoint or a full disk: exit status 1."""


class NonFiniteError(RunError):
    """A loss, gradient or probability is NaN or infinite; the chain adds the stage to the message."""

    def __init__(self, what: str, posts: Sequence[str] = (), remedy: str = "") -> None:
        """Args: what is not finite, the ids of the posts, and what to change."""
        shown = ", ".join(posts[:5]) + (f" and {len(posts) - 5} more" if len(posts) > 5 else "")
        details = [*([f"posts {shown}"] if posts else []), *([remedy] if remedy else [])]
        super().__init__("; ".join([f"{what} not finite (NaN or infinite)", *details]))


@contextmanager
def in_section(section: str) -> Iterator[None]:
    """Add the section to a SettingsError about a field that several sections of a recipe have, such as `model.path`.

    Args:
        section: dotted name; empty to leave messages as they are.
    """
    try:
        yield
    except SettingsError as error:
        if not section or not _FIELDS_OF_SECTIONS.match(str(error)):
            raise
        raise SettingsError(f"{section}.{error}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next one if it announces a list."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])

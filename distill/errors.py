"""The expected failures of a command; `cli.py` prints their message and sets the exit status."""

from collections.abc import Sequence


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

"""The two expected failures of a command; `cli.py` prints their message and sets the exit status."""


class SettingsError(ValueError):
    """Invalid settings or data: exit status 2. The message names the field, the file or the row."""


class RunError(RuntimeError):
    """A failure while running, such as an unreachable endpoint or a full disk: exit status 1."""

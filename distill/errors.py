"""The two ways in which a command ends badly; `cli.py` turns each into one sentence and an exit status."""


class SettingsError(ValueError):
    """Settings or data that cannot work: exit status 2. The message names the field, the file and the row."""


class RunError(RuntimeError):
    """A failure while running, such as a dead endpoint or a full disk: exit status 1."""

"""Masking of passwords and keys in everything that leaves the process: files, pages, messages, logs and uploads."""

import os
import re
from collections.abc import Mapping
from typing import Any

from distill.errors import RunError, SettingsError

MASK = "***"

_LOGIN = re.compile(r"(?<=://)[^\s/?#]*@")
_QUERY = re.compile(
    r"(?i)([?&][\w.-]*(?:key|token|secret|passw(?:or)?d|pwd|auth|sig|signature|credential|code)=)[^&#\s'\"]+"
)
_VARIABLE = re.compile(r"(api_key_env['\"]?(?:[ \t]*[:=][ \t]*|[ \t]+)['\"]?)([^\s'\",}\]]+)")
_SECRET = re.compile(r"(?i)(?:^|_|api)(?:api_?key|access_?key|secret_?key|token|secret|passw(?:or)?d|pwd)$")
"""Names of fields that hold a secret, such as an argument of a logger that a recipe names by its class path."""
_KEY = re.compile(
    r"^(sk|pk|hf|gsk|ghp|xai|nvapi)[_-]?\w{16,}$"
    r"|AKIA[A-Z\d]{16}"
    r"|(?=[A-Z\d]*[a-z])(?=[A-Za-z]*\d)[A-Za-z\d]{20}"  # a long run of letters and digits
)


def mask(value: Any) -> Any:
    """Replace logins in URLs, keys in their queries, and keys in place of a variable's name by `***`.

    Of a mapping, the texts of fields such as `api_key` and `password` are replaced as a whole.

    Args:
        value: text, or a tree of mappings and lists whose texts are masked.
    """
    if isinstance(value, str):
        text = _QUERY.sub(rf"\1{MASK}", _LOGIN.sub(f"{MASK}@", value))
        return _VARIABLE.sub(lambda found: found[1] + (found[2] if is_variable_name(found[2]) else MASK), text)
    if isinstance(value, Mapping):
        return {name: MASK if _is_secret(name, item) else mask(item) for name, item in value.items()}
    return [mask(item) for item in value] if isinstance(value, list) else value


def _is_secret(name: Any, value: Any) -> bool:
    return isinstance(value, str) and value != "" and bool(_SECRET.search(str(name)))


def is_variable_name(text: str) -> bool:
    """Whether a text can be the name of an environment variable, and does not look like a key."""
    return bool(re.fullmatch(r"[A-Za-z_]\w*", text, re.ASCII)) and (text in os.environ or not _KEY.search(text))


def describe(error: BaseException) -> str:
    """One masked line about an error; one that is not expected, a bug, is named as such."""
    line = " ".join(str(mask(str(error))).splitlines())
    return line if isinstance(error, SettingsError | RunError) else f"unexpected {type(error).__name__}: {line}"

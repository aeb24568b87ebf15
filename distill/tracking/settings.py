"""Settings of the tracking with wandb, and what they and the environment ask for."""

import os
import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from distill.settings import Settings

_NAME_LENGTH = 128  # wandb's limit


@dataclass
class TrackingSettings(Settings):
    """Experiment tracking with Weights & Biases (wandb)."""

    project: str = "distill"
    """wandb project."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: the value of WANDB_MODE if it is set, otherwise online if the user is logged in, otherwise offline."""
    group: str = ""
    """Group of the runs of this chain; empty: the recipe's name."""
    entity: str = ""
    """wandb user or team; empty: the default of the login."""
    artifacts: Literal["upload", "reference"] = "upload"
    """What an artifact holds: upload: the files; reference: their paths on this machine and their digests."""


def wanted_mode(settings: TrackingSettings) -> str:
    """The mode of the settings, or that of the environment: auto, online, offline, dryrun or disabled."""
    return os.environ.get("WANDB_MODE", "auto") if settings.mode == "auto" else settings.mode


def not_logged_in(settings: TrackingSettings) -> bool:
    """Whether the settings ask for online runs although nobody is logged in to wandb."""
    if wanted_mode(settings) != "online":
        return False
    try:
        import wandb

        return not wandb.login(prompt=False, verify=False)
    except Exception:  # noqa: BLE001 (no error of wandb may stop the chain)
        return True


def wandb_name(text: str) -> str:
    """A name that wandb accepts for an artifact: ASCII letters, digits, '-', '_' and '.', at most 128 of them.

    Two texts with different letters outside ASCII have different names.
    """
    ascii_text = re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
    return shorten(ascii_text if text.isascii() else f"{ascii_text}-{_digest(text)}", _NAME_LENGTH)


def shorten(text: str, length: int) -> str:
    """A text of at most `length` characters; a longer one ends with a hash of itself."""
    return text if len(text) <= length else f"{text[: length - 9]}-{_digest(text)}"


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "replace")).hexdigest()[:8]

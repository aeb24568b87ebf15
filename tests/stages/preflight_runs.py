"""Runs of recipes that cannot work, for the tests of the checks before a run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import micro
from tests.commands import Command
from tests.models.openai_server import Server

CARDS = {"labelled": 9, "unlabelled": 0, "validation": 9, "test": 9, "image_size": 28}


def write(folder: Path, url: str, **changes: Any) -> Path:
    """A recipe whose teacher is an endpoint that annotates; `a__b=1` sets the field a.b."""
    endpoint = {"base_url": url, "model": "big-vl", "max_attempts": 2, "backoff_s": 0.01}
    content = micro.RECORDED | {"annotate": {"endpoint": endpoint}}
    return micro.write(folder, content, data__postcards=CARDS, **changes)


@pytest.fixture
def refused(distill: Command, tmp_path: Path) -> Callable[..., str]:
    """Runs a recipe that cannot work: returns the message of `distill run`, after comparing it with the plan."""

    def check(**changes: Any) -> str:
        with Server() as server:
            path = write(tmp_path, server.url, **changes)
            plan = distill("plan", "--config", path)
            result = distill("run", "--config", path)
        assert (result.status, server.requests) == (2, 0), result.stderr
        assert not (tmp_path / "runs/micro/chain.json").exists()
        assert plan.status == 0, plan.stderr
        listed = plan.stdout.partition("Problems that stop distill run before its first stage:\n")[2]
        listed = listed.partition("\n\n")[0]
        message, _, more = result.error.partition(" (the first of ")
        assert listed.splitlines()[0] == message
        assert len(listed.splitlines()) == int((re.match(r"\d+", more) or ["1"])[0])
        return message

    return check


def pretrained(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "image_size": 28, "batch_size": 64} | more

"""The examples in docs/capacity.md are what the commands print with the files on the page."""

import re
from pathlib import Path

import pytest

from tests.commands import Command
from tests.documents import ROOT, named_files, text

PAGE = text(ROOT / "docs" / "capacity.md")


def example(begin: str) -> str:
    (found,) = re.findall(rf"^```text\n({begin}.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_plan_of_the_page_is_printed(distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = named_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = distill(
        "plan", "--config", ROOT / "recipes" / "quickstart.yaml", "--config", files["hardware.yaml"],
        "--posts", "100_000_000",
    )  # fmt: skip
    assert result.stdout.rstrip() == example("quickstart for 100,000,000 posts")


def test_the_simulation_of_the_page_is_printed(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = named_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = distill(
        "simulate", "--config", ROOT / "recipes" / "twitter15.yaml", "--config", files["day.yaml"],
        "--posts", "10_000_000", "--serve.rationale", "false",
    )  # fmt: skip
    assert result.stdout.rstrip() == example("Simulation of twitter15 in service")

"""The share of decoding in a training step."""

import subprocess
import sys
from pathlib import Path

import pytest

from distill.files import read_json

ROOT = Path(__file__).parents[2]


def test_steps_with_and_without_decoding_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("av")
    script = [sys.executable, str(ROOT / "benchmarks" / "clip_step.py"), "--cases", "small", "--steps", "2"]
    options = ["--rounds", "2", "--workers", "1", "--json", str(tmp_path / "found.json")]
    found = subprocess.run(script + options, capture_output=True, text=True, check=True, cwd=ROOT)
    table = found.stdout.splitlines()
    assert len(table) == 3 and table[2].startswith("| small | ")
    steps = read_json(tmp_path / "found.json")["small"]
    assert {name: list(map(len, rounds)) for name, rounds in steps.items()} == {"files": [2, 2], "cache": [2, 2]}
    assert all(step["waiting"] < step["seconds"] for epoch in steps["files"] for step in epoch)

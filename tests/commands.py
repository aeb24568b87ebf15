"""Helpers for tests of the command line: results of a command, and recipes over given rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests import micro

ROWS = [
    {"id": f"p{n}", "text": f"post {n}", "label": ("negative", "neutral", "positive")[n % 3], "image": None}
    for n in range(36)
]


class Result(NamedTuple):
    """Exit status and output of a command."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The error message of a failed command: exactly one line, the last one on stderr, and no traceback."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("distill: ")]
        assert len(lines) == 1 and self.stderr.rstrip().splitlines()[-1] == lines[0], self.stderr
        assert "Traceback" not in self.stderr and "unexpected" not in lines[0]
        return lines[0].removeprefix("distill: ")


Command = Callable[..., Result]


def rows_recipe(folder: Path, **files: list[dict[str, Any]]) -> Path:
    """Write JSONL files of the given rows, and a recipe over them that uses recorded rationales."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for name, rows in files.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {name: [f"{name}.jsonl"] if name in files else [] for name in ("train", "validation", "test")}
    return micro.write(folder, micro.RECORDED | {"data": {"source": "jsonl", **splits}})

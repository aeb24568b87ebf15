"""Stages that only write their outputs, and recipes for them."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill import chain
from distill.chain import STAGES
from distill.recipe import Recipe
from distill.stages.context import Context
from tests import micro


class Fakes:
    """Replaces all stages by ones that only write their outputs; those in `failing` raise after the first output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing: dict[str, BaseException] = {}
        self.folders: list[Path] = []
        self.extra: dict[str, list[str]] = {}
        monkeypatch.setattr(chain.preflight, "problems", lambda *_: [])  # these stages can run on any data and models
        for name, stage in STAGES.items():
            monkeypatch.setitem(chain.STAGES, name, stage._replace(run=self.stage(name, stage.outputs)))

    def stage(self, name: str, outputs: tuple[str, ...]) -> Any:
        def run(context: Context, tracked: object) -> None:
            folder = context.folder / name
            self.folders.append(folder)
            (folder / outputs[0]).write_text(context.fingerprints[name])
            for file in self.extra.get(name, ()):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text("of another training")
            if name in self.failing:
                raise self.failing.pop(name)
            for output in outputs[1:]:
                (folder / output).write_text(context.fingerprints[name])

        return run


def jsonl_recipe(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Recipe:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = micro.RECORDED | {"data": {"source": "jsonl", "train": ["train.jsonl"], "validation": [], "test": []}}
    return micro.read(micro.write(folder, content, **changes))


ROWS = [
    {"id": str(n), "text": f"post {n}", "label": ("negative", "neutral", "positive")[n % 3], "image": None}
    for n in range(9)
]

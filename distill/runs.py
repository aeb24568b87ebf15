"""Recipes and runs, for programs."""

import json
from collections.abc import Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from distill.data import jsonl
from distill.data.source import media_root
from distill.errors import SettingsError
from distill.files import read_json
from distill.recipe import Recipe, load, parser


def load_recipe(path: str | PathLike[str], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and check it.

    Args:
        overrides: values of fields by their dotted names, as in `{"student.distillation.weight": 0.5}`.

    Raises:
        SettingsError: a name or a value is invalid.
    """
    arguments = ["--config", str(path)]
    for name, value in (overrides or {}).items():
        arguments += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return load(parser("run"), arguments)[0]


class Run:
    """A finished or unfinished run: its recipe, and its results as pandas frames.

    Args:
        folder: the run's folder, such as `runs/quickstart`.

    Raises:
        SettingsError: the folder holds no run.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / "recipe.yaml").exists():
            raise SettingsError(f"{self.folder} is no run: it has no recipe.yaml")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that the run was made with. Passwords in addresses are masked in it."""
        place = {"runs": str(self.folder.absolute().parent), "name": self.folder.absolute().name}
        return load_recipe(self.folder / "recipe.yaml", place)

    @property
    def stages(self) -> pd.DataFrame:
        """The stages that ran: `status`, `started` and `seconds`, which a running stage does not have yet."""
        stages = read_json(self.folder / "chain.json")["stages"]
        return pd.DataFrame.from_dict(stages, orient="index").reindex(columns=["status", "started", "seconds"])

    @property
    def metrics(self) -> pd.DataFrame:
        """The metrics on the test split that are numbers, a row for each role and baseline, and for the cascade."""
        rows = read_json(self._file("evaluate", "metrics.json"))
        if (cascade := self.folder / "cascade" / "metrics.json").exists():
            rows = rows | {"cascade": read_json(cascade)}
        numbers = {
            role: {name: value for name, value in row.items() if isinstance(value, int | float)}
            for role, row in rows.items()
        }
        return pd.DataFrame.from_dict(numbers, orient="index")

    @property
    def predictions(self) -> pd.DataFrame:
        """The test posts: `text`, `aspect`, `images` (their paths), `gold`, and for each role its label and the text of
        its rationale."""
        rows, root = [], media_root(self.recipe.data)
        for row in jsonl.read(self._file("evaluate", "predictions.jsonl")):
            fields = {name: row.fields[name] for name in ("id", "text", "aspect", "gold")}
            fields["images"] = [root / name for name in row.fields["images"]]
            for role, answer in row.fields["roles"].items():
                fields |= {role: answer["label"], f"{role}_rationale": answer["rationale"]}
            rows.append(fields)
        return pd.DataFrame(rows).set_index("id")

    @property
    def decisions(self) -> pd.DataFrame:
        """The decisions of the cascade on the test posts: `gold`, `label`, `stage`, `reason`, `degraded`,
        `teacher_calls`, the `uncertainty` of the student, and `seconds`."""
        names = ("id", "gold", "label", "stage", "reason", "degraded", "teacher_calls")
        rows = []
        for row in jsonl.read(self._file("cascade", "decisions.jsonl")):
            fields = {name: row.fields[name] for name in names}
            fields["uncertainty"] = row.fields["student"]["uncertainty"]
            rows.append(fields | {"seconds": row.fields["cost"]["seconds"]})
        return pd.DataFrame(rows).set_index("id")

    def _file(self, stage: str, name: str) -> Path:
        path = self.folder / stage / name
        if not path.exists():
            raise SettingsError(f"{path} is missing: the stage {stage} has not run")
        return path

"""The Python interface, whose names `distill` itself has: recipes, chains, finished runs, students, cascades."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from distill import chain
from distill.cascade.cascade import CascadePolicy, Decision, run_cascade
from distill.cascade.uncertainty import uncertainty
from distill.data import jsonl
from distill.data.posts import as_samples
from distill.errors import SettingsError
from distill.files import read_json
from distill.models import backbone
from distill.models.backbone import ModelSettings
from distill.models.endpoint import Endpoint
from distill.models.local import Local
from distill.models.reasoner import Cost, Reasoner, Sampling
from distill.planning.tables import plan_text
from distill.recipe import Recipe, load, parser
from distill.stages.cascade import calibrated_policy
from distill.stages.context import Context
from distill.task.labels import LabelSpace, Scale
from distill.task.rationale import FIELDS, InvalidRationale, parse

__all__ = ["Cascade", "Recipe", "Run", "Student", "load_recipe", "plan", "run"]

Post = Mapping[str, Any]
"""A post: `text`, `image` or `images` (paths, PIL images or rows of `datasets`), `aspect`, `id`; all are optional, but
there is a text or an image. Other fields are ignored."""


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


def run(recipe: Recipe, *, until: str | None = None, only: str | None = None) -> "Run":
    """Run the stages that are not up to date, as `distill run`.

    Args:
        until: stop after this stage.
        only: run this stage alone.

    Raises:
        SettingsError: the recipe or the data cannot be used.
        RunError: a stage failed. The same call continues.
    """
    chain.run(recipe, until=until, only=only)
    return Run(recipe.folder)


def plan(recipe: Recipe) -> str:
    """What a chain would do: data, teacher requests, FLOP, memory and cost, as text. Raises SettingsError."""
    return plan_text(recipe)


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
        """The stages that ran: `status`, `started` and `seconds`."""
        stages = read_json(self.folder / "chain.json")["stages"]
        return pd.DataFrame.from_dict(stages, orient="index", columns=None)[["status", "started", "seconds"]]

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
        """The test posts: `text`, `aspect`, `gold`, and for each role its label and the text of its rationale."""
        rows = []
        for row in jsonl.read(self._file("evaluate", "predictions.jsonl")):
            fields = {name: row.fields[name] for name in ("id", "text", "aspect", "gold")}
            for role, answer in row.fields["roles"].items():
                fields |= {role: answer["label"], f"{role}_rationale": answer["rationale"]}
            rows.append(fields)
        return pd.DataFrame(rows).set_index("id")

    @property
    def decisions(self) -> pd.DataFrame:
        """The decisions of the cascade on the test posts: `gold`, `label`, `stage`, `reason`, `degraded`,
        `teacher_calls` and `seconds`."""
        rows = [row.fields for row in jsonl.read(self._file("cascade", "decisions.jsonl"))]
        names = ("id", "gold", "label", "stage", "reason", "degraded", "teacher_calls")
        return pd.DataFrame(
            [{name: row[name] for name in names} | {"seconds": row["cost"]["seconds"]} for row in rows]
        ).set_index("id")

    def _file(self, stage: str, name: str) -> Path:
        path = self.folder / stage / name
        if not path.exists():
            raise SettingsError(f"{path} is missing: the stage {stage} has not run")
        return path


class Student:
    """A student that classifies posts and explains its answers.

    Attributes:
        labels: the names of the labels.
    """

    def __init__(self, model: Local) -> None:
        self._model = model
        self._labels = model.backbone.labels
        self.labels = list(self._labels.names)

    @classmethod
    def from_run(cls, folder: str | PathLike[str], *, device: str | None = None) -> "Student":
        """Load the student of a run.

        Args:
            device: of torch; None: the first GPU, or the CPU without one.

        Raises:
            SettingsError: the run has no trained student.
        """
        opened = Run(folder)
        if opened.recipe.student is None:
            raise SettingsError(f"{opened.folder} has no student section")
        return cls(Local(Context(opened.recipe, {}).load("student"), "student", _device(device)))

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], *, device: str | None = None) -> "Student":
        """Load an exported student.

        Raises:
            SettingsError: the folder is no export, or one of a version that did not write what is needed here.
        """
        try:
            scoring = read_json(Path(folder) / "scoring.json")
            scale = None if scoring["scale"] is None else Scale(**scoring["scale"])
            labels = LabelSpace(tuple(scoring["labels"]), tuple(scoring["polarity"]), scale)
            size = scoring["image_size"]
            dtype = read_json(Path(folder) / "config.json")["dtype"]
        except OSError as error:
            raise SettingsError(f"{folder} is no exported student: {error.filename} is missing") from None
        except (LookupError, TypeError) as error:
            raise SettingsError(f"{folder} was exported by an earlier version ({error}); export it again") from None
        pixels = {} if size is None else {"image_size": size}
        settings = ModelSettings(str(folder), images=size is not None, dtype=dtype, **pixels)
        model = backbone.create(settings, labels, Path(folder), train=False)
        return cls(Local(model, "student", _device(device)))

    def classify(self, posts: Iterable[Post]) -> list[dict[str, Any]]:
        """The label of each post.

        Returns:
            For each post `id`, `label`, `probabilities` by label, and `uncertainty` in [0, 1], the entropy of the
            probabilities over its maximum; on a scale also the `value`.

        Raises:
            ValueError: a post has neither text nor image, or a field of another type. The message names the post.
        """
        with as_samples(posts) as samples:
            probabilities = self._model.classify(samples).probabilities
            rows = zip(samples, probabilities, uncertainty(probabilities, "entropy"), strict=True)
            return [
                {"id": post.id, **_label(self._labels, row), "uncertainty": float(unsure)} for post, row, unsure in rows
            ]

    def reason(
        self, posts: Iterable[Post], *, temperature: float = 0.0, max_new_tokens: int = 512, seed: int = 42
    ) -> list[dict[str, Any]]:
        """The rationale of each post, whose last field is a label of its own; `classify` may give another one.

        Returns:
            For each post `id`, the `text` that was generated, the fields of the `rationale` by name, its `label`, and
            the `problem`, why the text is no valid rationale: then `rationale` and `label` are None.

        Raises:
            ValueError: as `classify`.
        """
        sampling = Sampling(temperature, max_new_tokens, seed=seed)
        with as_samples(posts) as samples:
            answers = dict(self._model.reason(samples, "reason", sampling))
            return [
                {"id": post.id, "text": answers[index].text} | self._rationale(answers[index].text)
                for index, post in enumerate(samples)
            ]

    def _rationale(self, text: str) -> dict[str, Any]:
        try:
            found = parse(text, self._labels)
        except InvalidRationale as error:
            return {"rationale": None, "label": None, "problem": str(error)}
        fields = dict(zip(FIELDS, astuple(found), strict=True))
        return {"rationale": fields, "label": found.prediction, "problem": None}


class Cascade:
    """A student and its teacher: the student answers what it is certain of, the teacher the rest (U-ACS)."""

    def __init__(self, student: Reasoner, teacher: Reasoner, policy: CascadePolicy) -> None:
        self._student, self._teacher, self._policy = student, teacher, policy
        self.labels = list(policy.labels.names)

    @classmethod
    def from_run(cls, folder: str | PathLike[str]) -> "Cascade":
        """Load student, teacher and calibration of a run, on the device of its recipe.

        Raises:
            SettingsError: one of the stages teacher, student and calibrate is missing or not up to date.
        """
        recipe = Run(folder).recipe
        needed = ("teacher", "student", "calibrate")
        context = Context(recipe, chain.input_fingerprints(recipe, "Cascade.from_run", needed))
        teacher = context.teacher(recipe.cascade_teacher)
        assert teacher is not None  # calibrate has run
        return cls(context.reasoner("student"), teacher, calibrated_policy(context))

    def classify(self, posts: Iterable[Post]) -> list[dict[str, Any]]:
        """The final answer on each post.

        Returns:
            For each post `id`, `label`, `probabilities` by label, on a scale `value`; `stage` and `reason`, which say
            who answered and why; `uncertainty` of the student; `degraded`, whether the teacher was needed and did not
            answer; `teacher_calls`, 0, 1 or 2; `seconds` and `price`, None without prices.

        Raises:
            ValueError: as `Student.classify`.
            RunError: a teacher behind a server cannot be reached.
        """
        with as_samples(posts) as samples:
            decisions = run_cascade(samples, self._student.classify(samples), self._teacher, self._policy)
            return [
                {
                    "id": post.id,
                    **_label(self._policy.labels, decision.probabilities),
                    "stage": decision.stage,
                    "reason": decision.reason,
                    "uncertainty": decision.student.uncertainty,
                    "degraded": decision.degraded,
                    "teacher_calls": decision.teacher_calls,
                    "seconds": decision.cost.seconds,
                    "price": self._price(decision),
                }
                for post, decision in zip(samples, decisions, strict=True)
            ]

    def _price(self, decision: Decision) -> float | None:
        if not isinstance(self._teacher, Endpoint):
            return None
        asked = [prediction.cost for prediction in (decision.teacher, decision.review) if prediction is not None]
        cost = sum(asked, Cost())
        return self._teacher.cost(cost.prompt_tokens, cost.completion_tokens)


def _label(labels: LabelSpace, probabilities: np.ndarray) -> dict[str, Any]:
    """Label and probabilities [K] of a post by name, and on a scale the value, whose bin is the label."""
    named = {"probabilities": dict(zip(labels.names, map(float, probabilities), strict=True))}
    if labels.scale is None:
        return {"label": labels.names[int(probabilities.argmax())]} | named
    value = float(np.clip(labels.scale.expectation(probabilities), labels.scale.low, labels.scale.high))
    return {"label": labels.name(value), "value": value} | named


def _device(name: str | None) -> str:
    return name or ("cuda" if torch.cuda.is_available() else "cpu")

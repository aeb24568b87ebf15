"""Comparison of runs on the same test posts: a row for each role and variant, with paired intervals and tests.

Runs that differ in their seed alone are one variant.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from distill import chain
from distill.data import jsonl
from distill.errors import RunError, SettingsError
from distill.evaluation.comparison_page import METRICS, ROLES, page
from distill.evaluation.paired import difference_interval, mcnemar, paired_differences
from distill.files import atomic_write, read_json
from distill.recipe import Recipe
from distill.runs import Run
from distill.serving.settings import ServeSettings
from distill.tracking import TrackingSettings


@dataclass
class Variant:
    """Runs of one recipe with different seeds."""

    name: str
    runs: list[Run] = field(default_factory=list)

    @property
    def seeds(self) -> list[int]:
        return [run.recipe.seed for run in self.runs]


@dataclass(frozen=True)
class _Outcome:
    """The results of a run on its test posts.

    Attributes:
        gold: by id, the label, or on a scale the value.
        qualities: by role and id, 1 or 0 for a correct or wrong label, on a scale minus the absolute error; NaN for a
            post without an answer.
        metrics: by role, the metrics of METRICS.
    """

    run: Run
    gold: dict[str, Any]
    qualities: dict[str, dict[str, float]]
    metrics: dict[str, dict[str, float | None]]


def variants(folders: Sequence[str | os.PathLike[str]]) -> list[Variant]:
    """Group the runs of some folders: those that differ in their seed alone are one variant.

    Raises:
        SettingsError: a folder holds no run or is given twice, or two runs of a variant have the same seed.
    """
    found: dict[str, Variant] = {}
    seen: set[Path] = set()
    for folder in folders:
        run = Run(folder)
        if (path := run.folder.resolve()) in seen:
            raise SettingsError(f"compare: {run.folder} is given twice")
        seen.add(path)
        try:
            variant = found.setdefault(recipe_key(run.recipe), Variant(""))
        except SettingsError as error:
            raise SettingsError(f"{run.folder}: {error}") from None
        if run.recipe.seed in variant.seeds:
            other = variant.runs[variant.seeds.index(run.recipe.seed)]
            raise SettingsError(f"compare: {run.folder} has the recipe and the seed of {other.folder}")
        variant.runs.append(run)
    for variant in found.values():
        variant.runs.sort(key=lambda run: run.recipe.seed)
        suffix = f"-{variant.seeds[0]}"
        variant.name = variant.runs[0].folder.absolute().name
        if len(variant.runs) > 1:
            variant.name = variant.name.removesuffix(suffix)
    names = [variant.name for variant in found.values()]
    for variant in found.values():
        if names.count(variant.name) > 1:
            variant.name = str(variant.runs[0].folder)
    return list(found.values())


def recipe_key(recipe: Recipe) -> str:
    """The fields of a recipe that its results depend on, without the seed."""
    same = dataclasses.replace(
        recipe, name="run", runs="", seed=0, serve=ServeSettings(), tracking=TrackingSettings()
    )  # fmt: skip
    return json.dumps(dataclasses.asdict(same), sort_keys=True, default=str)


def compare(folders: Sequence[str | os.PathLike[str]], resamples: int = 2000) -> pd.DataFrame:
    """Compare runs on the same test posts with the first one, role by role.

    Runs whose recipes differ in their seed alone are one variant. Posts that a role of any run did not answer are left
    out for this role.

    Args:
        folders: of the runs.
        resamples: number of bootstrap samples behind each interval.

    Returns:
        A row for each role and variant: `role`, `variant`, the numbers of `runs` and `posts`, `metric` (accuracy, or
        mae on a scale) and its `value`, the mean over the runs; `difference` from the first variant's, with its 95%
        interval `low` and `high`, and McNemar's `p` (None on a scale); then the means of the metrics of METRICS. The
        first variant has no difference.

    Raises:
        SettingsError: fewer than two variants, a run without up-to-date results, or runs with different test posts.
    """
    found = variants(folders)
    if len(found) < 2:
        raise SettingsError("compare needs runs of two recipes or more; runs that differ in their seed alone are one")
    outcomes = {variant.name: [_read(run) for run in variant.runs] for variant in found}
    everyone = [outcome for group in outcomes.values() for outcome in group]
    _add_unrefined(everyone)
    _check_same_posts(everyone)
    first, posts, scale = found[0], list(everyone[0].gold), everyone[0].run.recipe.labels.scale is not None
    sign, rows = -1 if scale else 1, []
    for role in ROLES:
        having = [each for each in found if all(role in outcome.metrics for outcome in outcomes[each.name])]
        if not having:
            continue
        tables = [
            np.array([[outcome.qualities[role][post] for post in posts] for outcome in outcomes[variant.name]]).T
            for variant in having
        ]
        kept = ~np.isnan(np.concatenate(tables, axis=1)).any(axis=1)
        if not kept.any():
            raise SettingsError(f"compare: there is no test post that the {ROLES[role]} of every run answered")
        for variant, table in zip(having, tables, strict=True):
            group, quality = outcomes[variant.name], table[kept]
            row: dict[str, Any] = {"role": role, "variant": variant.name, "runs": len(group), "posts": int(kept.sum())}
            row |= {"metric": "mae" if scale else "accuracy", "value": float(sign * quality.mean())}
            row |= dict.fromkeys(("difference", "low", "high", "p"))
            if variant is not first and having[0] is first:
                paired = variant.seeds == first.seeds
                differences = sign * paired_differences(tables[0][kept], quality, paired_runs=paired)
                low, high = difference_interval(differences, resamples=resamples)
                row |= {"difference": float(differences.mean()), "low": low, "high": high}
                row |= {"p": None if scale else mcnemar(differences)}
            for name in METRICS:
                values: list[Any] = [outcome.metrics[role][name] for outcome in group]
                row[name] = None if None in values else fmean(values)
            rows.append(row)
    return pd.DataFrame(rows)


def _add_unrefined(outcomes: Sequence[_Outcome]) -> None:
    """If a run has a refined student, the student of each other run stands beside it."""
    if not any("student_refined" in outcome.metrics for outcome in outcomes):
        return
    for outcome in outcomes:
        for values in (outcome.metrics, outcome.qualities):
            values.setdefault("student_refined", values["student"])  # type: ignore[arg-type]


def _check_same_posts(outcomes: Sequence[_Outcome]) -> None:
    first = outcomes[0]
    for outcome in outcomes[1:]:
        if outcome.run.recipe.labels.names != first.run.recipe.labels.names:
            raise SettingsError(f"compare: {outcome.run.folder} has other labels than {first.run.folder}")
        if outcome.gold != first.gold:
            posts = outcome.gold.keys() | first.gold.keys()
            post = min(post for post in posts if outcome.gold.get(post) != first.gold.get(post))
            raise SettingsError(
                f"compare: {outcome.run.folder} and {first.run.folder} have other test posts or labels, such as {post}"
            )


# ---- the results of a run ----


def _read(run: Run) -> _Outcome:
    """The results of a run. Raises SettingsError if they are missing, damaged or older than what they are made from."""
    _check_current(run)
    cascade = run.recipe.cascade is not None
    files = ["evaluate/metrics.json", "evaluate/predictions.jsonl"]
    files += ["cascade/metrics.json", "cascade/decisions.jsonl"] if cascade else []
    for file in files:
        if not (run.folder / file).is_file():
            raise SettingsError(f"{run.folder / file} is missing; run: distill run")
    scale = run.recipe.labels.scale is not None
    try:
        file = files[1]
        rows = _rows(run.folder / file)
        gold = {post: float(row["value"]) if scale else str(row["gold"]) for post, row in rows.items()}
        roles = sorted({role for row in rows.values() for role in row["roles"]})
        answers = {role: {post: row["roles"][role] for post, row in rows.items()} for role in roles}
        qualities = {
            role: {post: _quality(answer, gold[post], "value" if scale else "label") for post, answer in each.items()}
            for role, each in answers.items()
        }
        file = files[0]
        written = read_json(run.folder / file)
        metrics = {role: _metrics(written[role]) for role in roles}
        if cascade:
            file = files[3]
            decided = _rows(run.folder / file)
            qualities["cascade"] = {post: _quality(decided[post], truth, "label") for post, truth in gold.items()}
            file = files[2]
            metrics["cascade"] = _metrics(read_json(run.folder / file))
    except KeyError as error:
        raise SettingsError(f"{run.folder / file}: {error} is missing; run: distill run") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SettingsError(f"{run.folder / file} is damaged ({error}); run: distill run") from None
    return _Outcome(run, gold, qualities, metrics)


def _rows(path: Path) -> dict[str, Any]:
    """The rows of a file by id. Raises KeyError or ValueError for a row that cannot be used."""
    found: dict[str, Any] = {}
    for row in jsonl.read(path):
        if row.problem is not None:
            raise ValueError(f"row {row.number}: {row.problem}")
        if not isinstance(post := row.fields["id"], str) or post in found:
            raise ValueError(f"row {row.number} has no id of its own")
        found[post] = row.fields
    if not found:
        raise ValueError("there are no rows")
    return found


def _quality(answer: Mapping[str, Any], gold: Any, name: str) -> float:
    if answer[name] is None:
        return math.nan
    if isinstance(gold, str):
        return float(answer[name] == gold)
    if not math.isfinite(value := float(answer[name])):
        raise ValueError(f"{name} is {value}")
    return -abs(value - gold)


def _metrics(row: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: None if row.get(name) is None else float(row[name]) for name in METRICS}


def _check_current(run: Run) -> None:
    """Raise SettingsError if the results are not finished, or older than a stage that they read."""
    if run.recipe.evaluate is None:
        raise SettingsError(f"{run.folder} has no evaluate section, so there is nothing to compare")
    manifest = chain.read_manifest(run.folder)
    for name in ("evaluate", *(["cascade"] if run.recipe.cascade is not None else [])):
        manifest.check_current(name)


# ---- output ----


def check_output(path: Path) -> None:
    """Raise SettingsError for a file that `write` cannot write."""
    if path.suffix.casefold() not in (".csv", ".html"):
        raise SettingsError(f"--output: {path.name} must end in .csv or .html")
    if path.is_dir():
        raise SettingsError(f"--output: {path} is a folder")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SettingsError(f"--output: {path} cannot be written, because {parent} is no writable folder")


def write(frame: pd.DataFrame, path: Path) -> None:
    """Write a comparison as CSV or HTML. Raises RunError if the file cannot be written."""
    text = page(frame) if path.suffix.casefold() == ".html" else frame.to_csv(index=False)
    try:
        with atomic_write(path) as file:
            file.write(text)
    except OSError as error:
        raise RunError(f"--output: cannot write {path}: {error.strerror or error}") from error

"""Comparison of runs on the same test posts: a row for each role and variant, with paired intervals and tests.

Runs that differ in their seed alone are one variant.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from distill import chain
from distill.data import jsonl
from distill.errors import SettingsError
from distill.evaluation.comparison_page import METRICS, ROLES, page
from distill.evaluation.paired import difference_interval, mcnemar, paired_differences
from distill.files import atomic_folder, atomic_write, read_json
from distill.recipe import Recipe, check, load, parser
from distill.runs import Run

log = logging.getLogger(__name__)


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
    """The test posts of a run: gold by id, and for each role the quality by id, correctness or minus absolute error."""

    run: Run

    @cached_property
    def scale(self) -> bool:
        return self.run.recipe.labels.scale is not None

    @cached_property
    def rows(self) -> dict[str, Any]:
        return {row.fields["id"]: row.fields for row in jsonl.read(self.run.folder / "evaluate" / "predictions.jsonl")}

    @cached_property
    def gold(self) -> dict[str, Any]:
        return {post: row["value" if self.scale else "gold"] for post, row in self.rows.items()}

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """`metrics.json` of evaluate and cascade by role, without the baselines."""
        found = {
            role: row for role, row in read_json(self.run.folder / "evaluate" / "metrics.json").items() if role in ROLES
        }
        path = self.run.folder / "cascade" / "metrics.json"
        return found | ({"cascade": read_json(path)} if path.exists() else {})

    @cached_property
    def qualities(self) -> dict[str, dict[str, float]]:
        answers: dict[str, dict[str, Any]] = {
            role: {post: row["roles"][role] for post, row in self.rows.items()}
            for role in self.metrics
            if role != "cascade"
        }
        if "cascade" in self.metrics:
            decided = jsonl.read(self.run.folder / "cascade" / "decisions.jsonl")
            answers["cascade"] = {row.fields["id"]: row.fields for row in decided}
        return {role: dict(self._of(role, by_post)) for role, by_post in answers.items()}

    def _of(self, role: str, answers: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
        for post, gold in self.gold.items():
            if post not in answers:
                raise SettingsError(f"{self.run.folder}: the {ROLES[role]} has no answer on the test post {post}")
            answer = answers[post]
            if not self.scale:
                yield post, float(answer["label"] == gold)
            else:
                yield post, -abs(float(answer["label" if role == "cascade" else "value"]) - gold)


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
        recipe = dataclasses.replace(run.recipe, name="run", runs="", seed=0)
        variant = found.setdefault(json.dumps(dataclasses.asdict(recipe), sort_keys=True, default=str), Variant(""))
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


def compare(folders: Sequence[str | os.PathLike[str]], resamples: int = 2000) -> pd.DataFrame:
    """Compare runs on the same test posts with the first one, role by role.

    Runs whose recipes differ in their seed alone are one variant.

    Args:
        folders: of the runs.
        resamples: number of bootstrap samples behind each interval.

    Returns:
        A row for each role and variant: `role`, `variant`, the numbers of `runs` and `posts`, `metric` (accuracy, or
        mae on a scale) and its `value`, the mean over the runs; `difference` from the first variant's, with its 95%
        interval `low` and `high`, and McNemar's `p` (None on a scale); then the means of the metrics of METRICS. The
        first variant has no difference.

    Raises:
        SettingsError: fewer than two variants, a run that was not evaluated, or runs with different test posts.
    """
    found = variants(folders)
    if len(found) < 2:
        raise SettingsError("compare needs runs of two recipes or more; runs that differ in their seed alone are one")
    outcomes = {variant.name: [_Outcome(run) for run in variant.runs] for variant in found}
    everyone = [outcome for group in outcomes.values() for outcome in group]
    for outcome in everyone:
        outcome.run.metrics  # noqa: B018 - raises SettingsError without an evaluation
    _check_same_posts(everyone)
    first, posts, scale = found[0], list(everyone[0].gold), everyone[0].scale
    rows = []
    for role in ROLES:
        base: np.ndarray | None = None
        for variant in found:
            group = outcomes[variant.name]
            if not all(role in outcome.metrics for outcome in group):
                continue
            quality = np.array([[outcome.qualities[role][post] for post in posts] for outcome in group]).T
            sign = -1 if scale else 1
            row = {"role": role, "variant": variant.name, "runs": len(group), "posts": len(posts)}
            row |= {"metric": "mae" if scale else "accuracy", "value": float(sign * quality.mean())}
            row |= dict.fromkeys(("difference", "low", "high", "p"))
            if variant is first:
                base = quality
            elif base is not None:
                paired = variant.seeds == first.seeds
                differences = sign * paired_differences(base, quality, paired_runs=paired)
                low, high = difference_interval(differences, resamples=resamples)
                row |= {"difference": float(differences.mean()), "low": low, "high": high}
                row |= {"p": None if scale else mcnemar(differences)}
            for name in METRICS:
                values: list[Any] = [outcome.metrics[role].get(name) for outcome in group]
                row[name] = None if None in values else fmean(values)
            rows.append(row)
    return pd.DataFrame(rows)


def _check_same_posts(outcomes: Sequence[_Outcome]) -> None:
    first = outcomes[0]
    for outcome in outcomes[1:]:
        if outcome.run.recipe.labels.names != first.run.recipe.labels.names:
            raise SettingsError(f"compare: {outcome.run.folder} has other labels than {first.run.folder}")
        if outcome.gold != first.gold:
            differing = set(outcome.gold.items()) ^ set(first.gold.items())
            post = min(differing)[0]
            raise SettingsError(
                f"compare: {outcome.run.folder} and {first.run.folder} have other test posts or labels, such as {post}"
            )


def check_output(path: Path) -> None:
    """Raise SettingsError for a file that `write` cannot write."""
    if path.suffix.casefold() not in (".csv", ".html"):
        raise SettingsError(f"--output: {path.name} must end in .csv or .html")


def write(frame: pd.DataFrame, path: Path) -> None:
    """Write a comparison as CSV or HTML. Raises SettingsError for another suffix, OSError for an unwritable file."""
    check_output(path)
    text = page(frame) if path.suffix.casefold() == ".html" else frame.to_csv(index=False)
    with atomic_write(path) as file:
        file.write(text)


def run_variants(
    config: Path, overlays: Sequence[Path], seeds: Sequence[int], overrides: Sequence[str] = ()
) -> list[Path]:
    """Run a recipe and its variants with some seeds; what is done is not run again.

    The run of a variant begins as a copy of the recipe's own run, so that only the stages that differ run, and no
    answer of a teacher is paid for twice.

    Args:
        overlays: recipes of the variants, with the fields alone that differ.
        seeds: empty: the recipe's own.
        overrides: options of the command line for all of them, such as `--data.root`.

    Returns:
        The folders of the runs: NAME and NAME-VARIANT, with `-SEED` if seeds are given.

    Raises:
        SettingsError: a recipe is invalid; then none was run.
        RunError: a stage failed.
    """
    if len({path.stem for path in overlays}) < len(overlays):
        raise SettingsError("compare: two variants have the same file name")
    recipes: list[tuple[Recipe, Recipe]] = []  # the recipe of each run, and that of the run it begins from
    for own, suffix in [(["--seed", str(seed)], f"-{seed}") for seed in seeds] or [([], "")]:
        base: Recipe | None = None
        for path in [None, *overlays]:
            files = [item for file in (config, path) if file for item in ("--config", str(file))]
            recipe = load(parser("run"), [*files, *overrides, *own])[0]
            name = base.name.removesuffix(suffix) if base is not None else recipe.name
            name += suffix if path is None else f"-{path.stem}{suffix}"
            recipe = dataclasses.replace(recipe, name=name)
            check(recipe)
            base = base or recipe
            recipes.append((recipe, base))
    for recipe, base in recipes:
        if recipe is not base and not recipe.folder.exists():
            with chain.locked(base.folder), atomic_folder(recipe.folder) as new:
                absent = [name for name in chain.STAGES if getattr(recipe, name) is None]
                ignored = shutil.ignore_patterns("wandb", "report.html", "checkpoints", ".lock", *absent)
                shutil.copytree(base.folder, new, ignore=ignored, dirs_exist_ok=True)
        log.info("run %s", recipe.folder)
        chain.run(recipe)
    return [recipe.folder for recipe, _ in recipes]

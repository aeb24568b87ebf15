"""A recipe and its variants: each is run as a run of its own, with the stages that differ."""

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from distill import chain
from distill.comparison import recipe_key
from distill.errors import RunError, SettingsError
from distill.files import atomic_folder, read_json, write_json, write_text
from distill.recipe import Recipe, check, load, parser, to_yaml
from distill.training import processes

log = logging.getLogger(__name__)

_RESULTS = ("evaluate", "calibrate", "cascade", "export")
"""Stages whose results are never taken over from another run; only the paid answers in their ledgers are."""


def run_variants(
    config: Path, overlays: Sequence[Path], seeds: Sequence[int], overrides: Sequence[str] = ()
) -> list[Path]:
    """Run a recipe and its variants with some seeds; what is done is not run again.

    The run of a variant begins as a copy of the recipe's own run without its results, so that only the stages that
    differ run, and no answer of a teacher is paid for twice.

    Args:
        overlays: recipes of the variants, with the fields alone that differ.
        seeds: empty: the recipe's own.
        overrides: options of the command line for all of them, such as `--data.root`.

    Returns:
        The folders of the runs: NAME and NAME-VARIANT, with `-SEED` if seeds are given.

    Raises:
        SettingsError: the recipes cannot be run or compared; then none was run.
        RunError: a stage failed, or a run cannot be copied.
    """
    if processes.by_torchrun():
        raise SettingsError("compare: torchrun starts one chain; start distill as one process")
    if len({path.stem for path in overlays}) < len(overlays):
        raise SettingsError("compare: two variants have the same file name")
    if len(set(seeds)) < len(seeds):
        raise SettingsError("compare: a seed is given twice")
    own = _load(config, None, overrides)
    if own.evaluate is None:
        raise SettingsError(f"compare: {config} has no evaluate section, so there is nothing to compare")
    keys, others = {recipe_key(own): str(config)}, {}
    for path in overlays:
        if path.stem.isdigit():
            raise SettingsError(f"compare: {path} has a number as its name, which would be taken for a seed")
        other = others[path] = _load(config, path, overrides)
        for name in ("name", "runs", "seed"):
            if getattr(other, name) != getattr(own, name):
                raise SettingsError(f"compare: {path} sets {name}, which is the same for all variants")
        if (same := keys.setdefault(recipe_key(other), str(path))) != str(path):
            raise SettingsError(f"compare: {path} does not differ from {same}")
    folders = []
    for seed in seeds or [own.seed]:
        suffix = f"-{seed}" if seeds else ""
        base = dataclasses.replace(own, seed=seed, name=f"{own.name}{suffix}")
        check(base)
        folders.append(_run(base))
        for path, other in others.items():
            variant = dataclasses.replace(other, seed=seed, name=f"{own.name}-{path.stem}{suffix}")
            check(variant)
            _copy(base, variant)
            folders.append(_run(variant))
    return folders


def _load(config: Path, overlay: Path | None, overrides: Sequence[str]) -> Recipe:
    files = [item for file in (config, overlay) if file for item in ("--config", str(file))]
    return load(parser("run"), [*files, *overrides])[0]


def _run(recipe: Recipe) -> Path:
    log.info("run %s", recipe.folder)
    chain.run(recipe)
    return recipe.folder


def _copy(base: Recipe, variant: Recipe) -> None:
    """Begin the run of a variant as a copy of the recipe's own run, without results, unless it has begun.

    Raises:
        RunError: another process uses the run, or it cannot be copied.
    """
    if variant.folder.exists():
        return
    absent = {name for name in chain.STAGES if getattr(variant, name) is None}

    def ignored(folder: str, names: list[str]) -> set[str]:
        place = Path(folder).relative_to(base.folder)
        if place == Path():
            return {"wandb", "report.html", ".lock"} | absent
        return set(names) - {"ledger.jsonl"} if place.parts[0] in _RESULTS else {"checkpoints"}

    try:
        with chain.locked(base.folder), atomic_folder(variant.folder) as new:
            shutil.copytree(base.folder, new, ignore=ignored, dirs_exist_ok=True)
            write_text(new / "recipe.yaml", to_yaml(variant))
            manifest = read_json(new / "chain.json")
            manifest["stages"] = {
                name: entry for name, entry in manifest["stages"].items() if name not in {*_RESULTS, *absent}
            }
            write_json(new / "chain.json", manifest)
    except (OSError, shutil.Error) as error:
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror or error
        raise RunError(f"{variant.folder}: cannot copy {base.folder}: {reason}") from error

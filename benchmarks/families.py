"""The table of model families: what each can do, measured on a tiny random model of its real classes.

    python -m benchmarks.families                # prints a Markdown table; about a minute on one core
    python -m benchmarks.families gemma3 mllama  # some families, by `model_type`

Families whose processor needs a library that is not installed are listed with it and have no other cell. The checks are
those of `tests/models/family_checks.py`. The exit status is 1 if a check fails.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from distill.errors import SettingsError
from distill.models import families
from distill.models.backbone import LoraSettings
from tests.models import family_checks
from tests.models.family_table import FAMILIES

COLUMNS = ("trains", "reloads", *family_checks.CHECKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="model_type", help=", ".join(FAMILIES))
    kinds = parser.parse_args().kinds or list(FAMILIES)
    if unknown := set(kinds) - FAMILIES.keys():
        parser.error(f"unknown families: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print("| family | model | pictures |", " | ".join(COLUMNS), "|")
    print("| --- " * (3 + len(COLUMNS)) + "|")
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for kind in kinds:
            cells = row(kind, Path(scratch) / kind)
            failed |= any(cell.startswith("no:") for cell in cells)
            print("|", " | ".join(cells), "|", flush=True)
    sys.exit(failed)


def row(kind: str, folder: Path) -> list[str]:
    """The cells of a family: its name, `model_type`, numbers of pictures in one batch, and the result of each check."""
    try:
        backbone = family_checks.load(kind, folder / "model")
        adapted = family_checks.load(kind, folder / "model", LoraSettings(r=2, dropout=0.0, targets="all-linear"))
    except SettingsError as error:
        name = families.FAMILIES[kind].name if kind in families.FAMILIES else kind
        return [name, kind, str(error).replace(str(folder), "…"), *["–"] * len(COLUMNS)]
    posts = family_checks.posts(folder / "posts", kind)
    counts = sorted({len(post.images) for post in posts})
    results = [
        cell(lambda: family_checks.trains(adapted, posts)),
        cell(lambda: family_checks.reloads(adapted, posts, folder / "saved")),
        *(cell(lambda check=check: check(backbone, posts)) for check in family_checks.CHECKS.values()),
    ]
    return [backbone.family.name, kind, ", ".join(map(str, counts)), *results]


def cell(check: Callable[[], object]) -> str:
    """Result of a check: yes, no (of a check that returns False), or why it failed."""
    try:
        return "no" if check() is False else "yes"
    except Exception as error:  # noqa: BLE001 - every failure is a cell of the table
        return f"no: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


if __name__ == "__main__":
    main()

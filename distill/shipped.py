"""The recipes that come with the package."""

import re
from pathlib import Path

from distill.errors import SettingsError
from distill.files import write_text

FOLDER = Path(__file__).parent / "recipes"


def recipes() -> dict[str, str]:
    """Names of the recipes, without `.yaml`, and what each is for: the first sentence of its header."""
    return {path.stem: _purpose(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yaml"))}


def write(name: str, folder: Path = Path()) -> Path:
    """Write a copy of a recipe into a folder. Returns its path.

    Raises:
        SettingsError: there is no such recipe, or the file exists.
    """
    stem = name.removesuffix(".yaml")
    if stem not in (known := recipes()):
        raise SettingsError(f"init: {name!r} is not a recipe of distill; the recipes are {', '.join(known)}")
    source = FOLDER / f"{stem}.yaml"
    path = folder / source.name
    if path.exists():
        raise SettingsError(f"init: {path} exists; it is not overwritten")
    write_text(path, source.read_text(encoding="utf-8").replace(f"recipes/{source.name}", source.name))
    return path


def _purpose(recipe: str) -> str:
    lines = [line.removeprefix("#").strip() for line in recipe.splitlines()[2:] if line.startswith("#")]
    paragraph = " ".join(lines[: lines.index("")] if "" in lines else lines)
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]

"""The recipes that come with the package."""

import re
from pathlib import Path

from distill.errors import SettingsError
from distill.files import write_text

FOLDER = Path(__file__).parent / "recipes"


def recipes() -> dict[str, str]:
    """Names of the recipes, without `.yaml`, and what each is for: the first sentence of its header.

    A folder is one entry: variants of a recipe, for `distill compare`, or `overlays` for several devices.
    """
    found = {path.stem: _purpose(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yaml"))}
    for folder in sorted(path for path in FOLDER.iterdir() if path.is_dir()):
        names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        kind = "Variants of a recipe for distill compare"
        if folder.name == "overlays":
            kind = "Files on top of a recipe, for several devices"
        found[folder.name] = f"{kind}: {names}."
    return found


def write(name: str, folder: Path = Path()) -> Path:
    """Write a copy of a recipe, or of a folder of them, into a folder. Returns its path.

    Raises:
        SettingsError: there is no such recipe, or the file or folder exists.
    """
    stem = name.removesuffix(".yaml")
    if stem not in (known := recipes()):
        raise SettingsError(f"init: {name!r} is not a recipe of distill; the recipes are {', '.join(known)}")
    source = FOLDER / stem if (FOLDER / stem).is_dir() else FOLDER / f"{stem}.yaml"
    path = folder / source.name
    if path.exists():
        raise SettingsError(f"init: {path} exists; it is not overwritten")
    for file in sorted(source.glob("*.yaml")) if source.is_dir() else [source]:
        text = re.sub(r"\brecipes/(?=\S+\.yaml)", "", file.read_text(encoding="utf-8"))
        write_text(folder / file.relative_to(FOLDER), text)
    return path


def _purpose(recipe: str) -> str:
    lines = [line.removeprefix("#").strip() for line in recipe.splitlines()[2:] if line.startswith("#")]
    paragraph = " ".join(lines[: lines.index("")] if "" in lines else lines)
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]

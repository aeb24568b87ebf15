"""The table of families in docs/models.md is that of the code."""

import re
from pathlib import Path

import pytest
from transformers.utils import is_torchvision_available

from distill.errors import SettingsError
from distill.models import families
from distill.models.processors import processor_class
from distill.models.text_models import is_text_only
from tests.models.family_folders import write
from tests.models.family_table import FAMILIES

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = {
    cells[1].strip("`"): cells
    for line in re.findall(r"^\| (.*) \|$", PAGE, re.MULTILINE)
    if (cells := line.split(" | "))[1].startswith("`") and cells[0] != "family"
}


def test_each_family_has_a_row() -> None:
    assert ROWS.keys() == families.FAMILIES.keys()


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_says_what_the_code_says(kind: str) -> None:
    name, _, packed, pictures, videos, sound, _, notes = ROWS[kind]
    family = families.FAMILIES[kind]
    config = FAMILIES[kind].config(4000, lambda token: 7)
    assert packed == ("yes" if families.packs(config) else "no")
    read = "needed" if family.needs_picture else "any number"
    sees = hasattr(config, "vision_config")
    assert pictures == ("none, text only" if is_text_only(config) else read if sees else "none")
    assert videos == (family.video if sees else "–")
    assert sound == ("yes" if family.audio else "–")
    assert (name, notes) == (family.name, family.note or "–")


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
@pytest.mark.parametrize("kind", [*(kind for kind in ROWS if FAMILIES[kind].processor), "pixtral"])
def test_which_processors_load_without_torchvision(kind: str, tmp_path: Path) -> None:
    cell = ROWS["llava" if kind == "pixtral" else kind][6]
    expected = {"llava": "LLaVA yes", "pixtral": "Pixtral no"}.get(kind, cell)
    try:
        folder = write(FAMILIES[kind], tmp_path)
        processor_class(FAMILIES[kind].config(4000, lambda token: 7), str(folder))
        found = True
    except (SettingsError, ImportError):  # Gemma 3n needs timm, and timm torchvision
        found = False
    assert expected in cell and found == expected.endswith("yes")

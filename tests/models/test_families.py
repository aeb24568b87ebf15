"""Model families of `distill/models/families.py`, each on a tiny random model of its real classes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from distill.errors import SettingsError
from distill.models import families
from distill.models.backbone import Backbone, LoraSettings
from distill.task.sample import Sample
from tests.models import family_checks
from tests.models.family_table import FAMILIES

Load = Callable[..., tuple[Backbone, Sequence[Sample]]]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Load the tiny model of a family with its posts; skip if it needs a library that is not installed."""
    root = tmp_path_factory.mktemp("families")
    models: dict[str, Backbone] = {}

    def loaded(kind: str, lora: LoraSettings | None = None) -> tuple[Backbone, Sequence[Sample]]:
        try:
            if lora is not None:
                backbone = family_checks.load(kind, root / kind, lora)
            else:
                backbone = models[kind] = models.get(kind) or family_checks.load(kind, root / kind)
        except SettingsError as error:
            if any(name in str(error) for name in ("needs torchvision", "num2words", "timm")):
                pytest.skip(str(error).partition(" needs ")[2] or str(error))
            raise
        return backbone, family_checks.posts(root / "posts", kind)

    return loaded


def test_each_row_of_the_table_has_a_tiny_model() -> None:
    assert families.FAMILIES.keys() <= FAMILIES.keys()
    assert FAMILIES.keys() - families.FAMILIES.keys() == {"pixtral", "paligemma2"}, "of the types llava and paligemma"


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("check", family_checks.CHECKS)
def test_a_family(kind: str, check: str, load: Load) -> None:
    family_checks.CHECKS[check](*load(kind))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_trained_and_saved(kind: str, load: Load, tmp_path: Path) -> None:
    backbone, posts = load(kind, LoraSettings(r=2, dropout=0.0, targets="all-linear"))
    family_checks.trains(backbone, posts)
    backbone.model.eval()
    family_checks.reloads(backbone, posts, tmp_path)

"""A micro chain with a trained teacher, run once for the tests of all stages."""

from pathlib import Path

import pytest

from distill import chain
from distill.recipe import Recipe
from tests import micro


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe whose chain has run; tests must not change its folder."""
    recipe = micro.read(micro.write(tmp_path_factory.mktemp("chain"), micro.WITH_TEACHER))
    assert chain.run(recipe) == chain.stages_of(recipe)
    return recipe


@pytest.fixture(scope="session")
def folder(finished: Recipe) -> Path:
    """The folder of that chain."""
    return finished.folder

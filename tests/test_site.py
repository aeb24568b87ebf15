"""The documentation builds without a warning, and the site needs nothing from other hosts."""

import logging
import re
from pathlib import Path

import pytest

from distill.recipe import Recipe
from distill.settings_reference import sections
from tests.documents import PAGES, ROOT

mkdocs_build = pytest.importorskip("mkdocs.commands.build")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does: strict, so that a bad link, anchor or docstring fails."""
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    logging.getLogger("mkdocs").setLevel(logging.WARNING)
    config.plugins.on_startup(command="build", dirty=False)
    mkdocs_build.build(config)
    return folder


def test_every_page_is_built(site: Path) -> None:
    for page in PAGES[1:]:
        name = "index.html" if page.name == "index.md" else f"{page.stem}/index.html"
        assert (site / name).is_file(), name
    assert (site / "chain.svg").is_file() and not (site / "hooks.py").exists()
    assert 'src="chain.svg"' in (site / "index.html").read_text(encoding="utf-8")


def test_the_settings_page_has_every_field(site: Path) -> None:
    text = (site / "settings" / "index.html").read_text(encoding="utf-8")
    for section in sections(Recipe):
        assert not section.name or f'id="{section.name}"' in text, section.name
        for entry in section.fields:
            assert f'id="{entry.name}"' in text, entry.name


def test_nothing_is_loaded_from_other_hosts(site: Path) -> None:
    for path in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"?(https?:[^\"\s>]+)", path.read_text())
        assert not loaded, path.name
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?https?:", path.read_text(encoding="utf-8")), path.name

"""The README and the pages of docs/ as their tests see them: fenced blocks, commands, and the files that they name."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GENERATED = ROOT / "docs" / "settings.md"
"""A page that exists in the built site alone."""


def text(page: Path) -> str:
    """The content of a page or recipe."""
    return page.read_text(encoding="utf-8")


def blocks(language: str, page: Path) -> list[str]:
    """The fenced blocks of one language, without the indent of a list that they may be in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text(page), re.MULTILINE | re.DOTALL)
    return ["".join(line.removeprefix(indent) for line in block.splitlines(True)) for indent, block in found]


def commands(program: str, page: Path) -> list[list[str]]:
    """The arguments of every call of a program on a page, in fenced blocks and in running text."""
    lines = [line for block in blocks("bash", page) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text(page))
    calls = [shlex.split(line, comments=True) for line in lines if line.split()[:1] == [program]]
    return [call[1:] for call in calls if call[1:]]


def named_files(folder: Path) -> dict[str, str]:
    """Every YAML block that begins with `# NAME.yaml`, written to `folder`: the name and the path."""
    found: dict[str, str] = {}
    for page in PAGES:
        for block in blocks("yaml", page):
            if name := re.match(r"# (\S+\.yaml)\n", block):
                path = folder / name[1]
                path.write_text(block, encoding="utf-8")
                found[name[1]] = str(path)
    return found

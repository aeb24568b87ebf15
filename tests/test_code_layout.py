"""The layers of docs/code-layout.md are those that import-linter enforces."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_lists_the_enforced_layers_from_bottom_to_top() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    enforced = [set(re.findall(r"\w+", layer)) for layer in reversed(contract["layers"])]
    page = (ROOT / "docs" / "code-layout.md").read_text(encoding="utf-8").partition("Outside the package")[0]
    rows = [re.findall(r"`(\w+)(?:\.py|/)`", row.split(" | ")[0]) for row in page.splitlines() if row.startswith("| `")]
    names = [name for row in rows for name in row]
    for layer in enforced:
        assert set(names[: len(layer)]) == layer
        del names[: len(layer)]
    assert not names

"""The example in docs/cost.md is what `distill plan` prints for the quickstart."""

import re
from pathlib import Path

from distill import recipe
from distill.planning.tables import plan_text

ROOT = Path(__file__).parents[1]


def test_the_example_is_the_plan_of_the_quickstart(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```text\n(Plan of .*?)\n```$", page, re.MULTILINE | re.DOTALL)
    arguments = ["--config", str(ROOT / "recipes" / "quickstart.yaml"), "--runs", str(tmp_path)]
    settings, _ = recipe.load(recipe.parser("plan"), [*arguments, "--data.root", str(tmp_path / "postcards")])
    lines = plan_text(settings).replace(str(tmp_path), "runs").splitlines()
    assert example.splitlines() == [line for line in lines if " is left out: " not in line]  # depends on the machine

"""The recipes in the package, and the commands that list and write them."""

import subprocess
import sys
from pathlib import Path

import pytest

from distill import shipped
from distill.recipe import load, parser
from tests.commands import Command

ROOT = Path(__file__).resolve().parents[1]


def test_they_are_those_of_the_repository(distill: Command) -> None:
    names = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert {"quickstart", "twitter15"} <= names == set(shipped.recipes()) - {"ablations", "overlays", "refine"}
    result = distill("recipes")
    assert (result.status, result.stderr) == (0, "")
    lines = dict(line.split(None, 1) for line in result.stdout.splitlines())
    assert lines == shipped.recipes()
    assert lines["quickstart"].startswith("The whole chain on a laptop's CPU, without downloads")
    assert all(purpose.endswith(".") and len(purpose) > 30 for purpose in lines.values())


def test_a_copy_is_the_same_recipe_and_is_never_written_over_a_file(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = distill("init", "quickstart")
    assert (result.status, result.stdout) == (0, "wrote quickstart.yaml; its first line is the command that runs it\n")
    assert Path("quickstart.yaml").read_text().splitlines()[0] == "# distill run --config quickstart.yaml"
    copy, _ = load(parser("run"), ["--config", "quickstart.yaml"])
    original, _ = load(parser("run"), ["--config", str(ROOT / "recipes" / "quickstart.yaml")])
    assert copy == original
    Path("quickstart.yaml").write_text("mine")
    result = distill("init", "quickstart.yaml")
    assert (result.status, result.error) == (2, "init: quickstart.yaml exists; it is not overwritten")
    assert Path("quickstart.yaml").read_text() == "mine"


def test_a_folder_is_written_with_its_variants(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert distill("init", "quickstart").status == distill("init", "ablations").status == 0
    files = sorted(Path("ablations").glob("*.yaml"))
    assert [path.name for path in files] == sorted(path.name for path in (ROOT / "recipes" / "ablations").iterdir())
    assert len(files) == 4
    command = "# distill compare --config quickstart.yaml --variants ablations/*.yaml --seeds 1 2 3"
    whole, _ = load(parser("run"), ["--config", "quickstart.yaml"])
    for path in files:
        assert path.read_text().splitlines()[0] == command
        variant, _ = load(parser("run"), ["--config", "quickstart.yaml", "--config", str(path)])
        assert variant != whole and variant.name == "quickstart"
    assert "it is not overwritten" in distill("init", "ablations").error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("init", "../twitter15"), "init: '../twitter15' is not a recipe of distill; the recipes are "),
        (("init", ""), "init: '' is not a recipe of distill; the recipes are "),
        (("init",), "init: the following arguments are required: recipe"),
        (("init", "quickstart", "twitter15"), "init: unrecognized arguments: twitter15"),
        (("recipes", "--config"), "recipes: unrecognized arguments: --config"),
    ],
)
def test_what_is_no_recipe_is_refused(
    arguments: tuple[str, ...], message: str, distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = distill(*arguments)
    assert result.status == 2 and result.error.startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["init", "recipes"])
def test_help_lists_the_recipes(command: str, distill: Command) -> None:
    result = distill(command, "--help")
    assert result.status == 0 and f"usage: distill {command}" in result.stdout and "quickstart" in result.stdout


def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distill", "recipes"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert any(line.startswith("mosi-cpu ") for line in result.stdout.splitlines())

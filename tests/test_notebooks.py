"""The notebooks: committed with their outputs, and executed here on the finished quickstart."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from distill import chain, recipe

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELL_TIMEOUT_S = 300


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def output_kinds(notebook: Any) -> list[list[str]]:
    """Per code cell, what it shows; consecutive prints may arrive in several parts and count once."""
    kinds = []
    for cell in code_cells(notebook):
        shown = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
        mimes = ["stream" if o.output_type == "stream" else " ".join(sorted(o.data)) for o in shown]
        kinds.append([mime for n, mime in enumerate(mimes) if n == 0 or mime != "stream" or mimes[n - 1] != "stream"])
    return kinds


@pytest.fixture
def finished_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings, _ = recipe.load(recipe.parser("run"), ["--config", "recipes/quickstart.yaml"])
    if not all(chain.up_to_date(settings).values()):
        pytest.skip("runs/quickstart is not finished; run make quickstart")


def test_there_are_notebooks() -> None:
    assert {"01_chain", "02_your_data", "03_cascade", "04_distillation", "05_deploy"} <= {
        path.stem for path in NOTEBOOKS
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run all cells in order"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert [output for output in outputs if "image/png" in output.get("data", {})], "no plot or image is shown"
    assert str(ROOT) not in path.read_text(encoding="utf-8"), "an output holds a path of one machine"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_on_the_finished_quickstart(path: Path, finished_quickstart: None) -> None:
    committed = nbformat.read(path, as_version=4)
    executed = nbformat.read(path, as_version=4)
    client = NotebookClient(
        executed, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()  # raises CellExecutionError where a cell fails
    assert output_kinds(executed) == output_kinds(committed)

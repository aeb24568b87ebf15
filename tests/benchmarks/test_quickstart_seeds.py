"""The quickstart's figures beside their targets."""

import subprocess
import sys
from pathlib import Path

from benchmarks.quickstart_seeds import ROWS, table
from benchmarks.seeds import Run

ROOT = Path(__file__).parents[2]


def run(student: float, reviewed: int | None) -> Run:
    """A run whose teacher has an accuracy of 0.98 and whose cascade has the student's and 0.05 more."""
    roles = {"teacher": {"accuracy": 0.98, "grounded": 0.9}, "student": {"accuracy": student, "reasoned_accuracy": 0.9}}
    cascade = {"accuracy": student + 0.05, "teacher_calls_per_sample": 0.35, "cost_ratio": {"seconds": None}}
    chain = {"stages": {"teacher": {"seconds": 90, "peak_memory_mb": {"host": 1024}}}}
    return Run(roles, cascade | {"review_flips": None if reviewed is None else {"reviewed": reviewed}}, chain)


def test_a_figure_is_compared_with_its_target_in_each_seed() -> None:
    lines = {line.split(" | ")[0]: line for line in table({1: run(0.92, 12), 2: run(0.95, 9)}).splitlines()}
    assert (
        lines["| student: accuracy, at most"]
        == "| student: accuracy, at most | 0.920 | 0.950 | 0.935 | <= 0.94 | 1 of 2 |"
    )
    assert lines["| teacher - cascade"] == "| teacher - cascade | 0.010 | -0.020 | -0.005 | <= 0.01 | 2 of 2 |"
    assert lines["| cascade - student"] == "| cascade - student | 0.050 | 0.050 | 0.050 | >= 0.03 | 2 of 2 |"
    assert lines["| cascade: posts reviewed"] == "| cascade: posts reviewed | 12 | 9 | 10 | >= 10 | 1 of 2 |"
    assert lines["| cascade: teacher calls per post"].endswith("| <= 0.35 | 2 of 2 |")
    assert lines["| peak memory, GiB"] == "| peak memory, GiB | 1.00 | 1.00 | 1.00 | <= 1.5 | 2 of 2 |"


def test_what_is_not_known_is_a_dash_and_holds_no_target() -> None:
    lines = table({1: run(0.92, None)}).splitlines()
    assert "| cascade: seconds / teacher's | – | – | <= 0.6 | 0 of 1 |" in lines
    assert "| cascade: posts reviewed | – | – | >= 10 | 0 of 1 |" in lines
    assert "| student: grounded | – | – | >= 0.85 | 0 of 1 |" in lines
    assert len(lines) == len(ROWS) + 2


def test_the_script_runs_from_another_folder(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "quickstart_seeds.py"
    shown = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "seeds" in shown.stdout

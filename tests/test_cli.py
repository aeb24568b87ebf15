"""The command line: usage, exit statuses, and the output of a chain."""

import csv
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from distill import __version__, logs
from distill.cli import COMMANDS, OTHERS, main
from tests import micro
from tests.commands import Command, Result

# ---- usage ----


def test_without_a_command_the_usage_is_printed_and_the_status_is_2(distill: Command) -> None:
    alone, usage = distill(), distill("--help")
    assert (alone.status, usage.status) == (2, 0)
    assert alone.stdout == usage.stdout
    for name, description in (COMMANDS | OTHERS).items():
        assert f"{name} " in usage.stdout and description in usage.stdout
    assert distill("--version") == Result(0, f"{__version__}\n", "")


def test_an_unknown_command_is_named_with_the_known_ones(distill: Command) -> None:
    result = distill("deploy", "--config", "x.yaml")
    assert result.status == 2
    assert result.error == f"deploy is not a command; the commands are {', '.join(COMMANDS | OTHERS)}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, distill: Command) -> None:
    result = distill(command, "--help")
    assert result.status == 0 and result.stderr == ""
    assert f"usage: distill {command}" in result.stdout and "--student.help" in result.stdout
    assert ("Stop after this stage" in result.stdout) == (command == "run")


def test_the_usage_does_not_import_torch() -> None:
    script = "import sys; from distill.cli import main; main(['--help']); main(['x']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n")


def test_an_interrupted_command_says_how_to_continue(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.chain.run", interrupted)
    result = distill("run", "--config", micro.write(tmp_path, micro.RECORDED))
    assert result.status == 130
    assert result.error == "interrupted; run the same command again to continue"


def test_an_unexpected_error_prints_a_traceback_and_one_line(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("distill.chain.run", broken)
    result = distill("run", "--config", micro.write(tmp_path, micro.RECORDED))
    assert result.status == 1
    assert "Traceback" in result.stderr and result.stderr.endswith("distill: unexpected TypeError: a bug\n")


def test_routine_messages_of_lightning_are_hidden() -> None:
    logs.configure()
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        assert not logging.getLogger(f"lightning.pytorch.{name}").isEnabledFor(logging.INFO)


def test_a_closed_pipe_prints_no_traceback() -> None:
    code = "from distill import cli; cli._command = lambda *_: print('x' * 10**6); raise SystemExit(cli.main(['run']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 1 and "Traceback" not in errors and "BrokenPipe" not in errors


# ---- output of a chain ----


@pytest.fixture(scope="module")
def micro_chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The recipe and the folder of a chain that `distill run` has run."""
    folder = tmp_path_factory.mktemp("cli")
    path = micro.write(folder, micro.RECORDED)
    assert main(["run", "--config", str(path)]) == 0
    yield path, folder / "runs" / "micro"


@pytest.fixture
def finished(micro_chain: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of that run, which a test may change."""
    content = yaml.safe_load(micro_chain[0].read_text()) | {"runs": str(tmp_path / "runs")}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    shutil.copytree(micro_chain[1], tmp_path / "runs" / "micro")
    return path, tmp_path / "runs" / "micro"


def test_a_second_run_does_nothing_and_prints_the_table(finished: tuple[Path, Path], distill: Command) -> None:
    path, folder = finished
    assert distill("run", "--config", path).status == 0  # the copied files are not in the cache of digests
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    result = distill("run", "--config", path)
    assert result.status == 0
    first, *table = result.stdout.splitlines()
    assert first == f"{folder}: nothing to do, all stages are up to date"
    assert [line.split("  ")[0] for line in table if line.startswith(("majority", "assistant", "student"))] == [
        "majority class (negative)", "assistant", "student", "student, hard labels", "student",
    ]  # fmt: skip
    assert table[-2:] == [f"report   {folder / 'report.html'}", f"student  {folder / 'export'}"]
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_another_distillation_weight_runs_only_student_and_later_stages(
    finished: tuple[Path, Path], distill: Command
) -> None:
    path, folder = finished
    kept = [folder / stage for stage in ("annotate", "assistant", "augment", "tokenizer")]
    before = {file: file.stat().st_mtime_ns for stage in kept for file in stage.rglob("*")}
    reported = (folder / "report.html").read_text()
    result = distill("run", "--config", path, "--student.distillation.weight", "0.9")
    assert result.status == 0 and result.stdout.startswith("ran student, evaluate, export\n")
    assert {file: file.stat().st_mtime_ns for stage in kept for file in stage.rglob("*")} == before
    assert (folder / "report.html").read_text() != reported
    assert "weight: 0.9" in (folder / "export" / "README.md").read_text()


def test_a_plan_matches_the_run_and_changes_no_file(finished: tuple[Path, Path], distill: Command) -> None:
    path, folder = finished
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    result = distill("plan", "--config", path)
    assert (result.status, result.stderr) == (0, "")
    assert "\nup to date  annotate, assistant, augment, student, evaluate, export\n" in result.stdout
    assert "would run" not in result.stdout and "up to " not in result.stdout.replace("up to date", "")
    rows = {line.split("  ")[0]: line.split() for line in result.stdout.splitlines()}
    with (folder / "assistant" / "metrics.csv").open() as file:
        steps = 1 + max(int(row["step"]) for row in csv.DictReader(file))
    assert rows["optimizer steps"][2] == str(steps)
    assert sum(path.stat().st_size for path in (folder / "student" / "soft_targets").glob("*")) > 0
    result = distill("plan", "--config", path, "--student.distillation.weight", "0.9")
    assert "\nwould run   student, evaluate, export\nup to date  annotate, assistant, augment\n" in result.stdout
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_a_plan_rejects_what_a_run_rejects(distill: Command, tmp_path: Path) -> None:
    path = micro.write(tmp_path, micro.RECORDED)
    result = distill("plan", "--config", path, "--student.distilation.weight", "1")
    assert result.status == 2 and "student.distilation" in result.error
    result = distill("plan", "--config", path, "--data.source", "jsonl", "--data.root", str(tmp_path / "nowhere"))
    assert result.status == 2 and result.error.startswith("data.train: cannot read")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()


def test_the_command_of_a_stage_needs_its_inputs(finished: tuple[Path, Path], distill: Command) -> None:
    path, folder = finished
    shutil.rmtree(folder / "augment")
    result = distill("student", "--config", path, "--student.batch_size", "4")
    assert result.status == 2
    assert result.error == "student reads augment, which has not run with this recipe; run it first"
    assert distill("augment", "--config", path).status == 0
    assert (folder / "augment" / "rationales.jsonl").exists()
    assert "nothing to do" in distill("augment", "--config", path).stdout
    result = distill("run", "--config", path, "--until", "serve")
    assert result.status == 2 and result.error.startswith("the recipe has no section serve; its stages are annotate")


def test_a_report_is_written_again_and_names_missing_inputs(finished: tuple[Path, Path], distill: Command) -> None:
    path, folder = finished
    (folder / "report.html").unlink()
    result = distill("report", "--config", path)
    assert result.status == 0 and "majority class" in result.stdout
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    metrics = folder / "evaluate" / "metrics.json"
    metrics.write_text("{}")
    result = distill("report", "--config", path)
    assert result.status == 2 and result.error == (
        f"{metrics} has no metrics of student; delete it and run: distill run, which rebuilds it"
    )
    metrics.unlink()
    result = distill("report", "--config", path)
    assert result.status == 2
    assert result.error == (
        f"{folder / 'evaluate' / 'metrics.json'} is missing; run: distill run --until evaluate with the same recipe"
    )

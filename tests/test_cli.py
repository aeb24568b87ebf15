"""The command: exit statuses, one sentence on stderr, and what a user sees of a chain."""

import csv
import json
import logging
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from distill import __version__, cli
from distill.cli import COMMANDS, main
from tests import micro
from tests.models.openai_server import Server

ROWS = [
    {"id": f"p{n}", "text": f"post {n}", "label": ("negative", "neutral", "positive")[n % 3], "image": None}
    for n in range(36)
]


class Outcome(NamedTuple):
    status: int
    stdout: str
    stderr: str

    @property
    def sentence(self) -> str:
        """The one line on stderr in which a command that failed says why."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("distill: ")]
        assert len(lines) == 1 and self.stderr.rstrip().splitlines()[-1] == lines[0], self.stderr
        assert "Traceback" not in self.stderr and "unexpected" not in lines[0]
        return lines[0].removeprefix("distill: ")


@pytest.fixture
def distill(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def command(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        return Outcome(status, *capsys.readouterr())

    return command


Command = Callable[..., Outcome]


def rows_recipe(folder: Path, **files: list[dict[str, Any]]) -> Path:
    """A recipe over JSONL files of these rows; the rationales that they lack are no fault."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for name, rows in files.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {name: [f"{name}.jsonl"] if name in files else [] for name in ("train", "validation", "test")}
    return micro.write(folder, micro.RECORDED | {"data": {"source": "jsonl", **splits}})


def classifier(path: Path, model: Path, **changes: Any) -> Path:
    """Make a recipe one that trains nothing but a student from the model in a folder, on labels alone."""
    content = yaml.safe_load(path.read_text()) | changes
    for stage in ("annotate", "assistant", "augment", "evaluate", "export"):
        content.pop(stage, None)
    content["student"] |= {"tasks": {"classify": 1.0}, "distillation": {"weight": 0.0}, "hard_labels_baseline": False}
    content["student"]["model"] = {"path": str(model), "image_size": 28}
    path.write_text(yaml.safe_dump(content))
    return path


# ---- the command itself ----


def test_alone_it_shows_its_commands_and_fails(distill: Command) -> None:
    alone, asked = distill(), distill("--help")
    assert (alone.status, asked.status) == (2, 0)
    assert alone.stdout == asked.stdout
    for name, what in COMMANDS.items():
        assert f"{name} " in asked.stdout and what in asked.stdout
    assert distill("--version") == Outcome(0, f"{__version__}\n", "")


def test_an_unknown_command_is_named_with_those_there_are(distill: Command) -> None:
    outcome = distill("deploy", "--config", "x.yaml")
    assert outcome.status == 2
    assert outcome.sentence == f"deploy is not a command; the commands are {', '.join(COMMANDS)}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, distill: Command) -> None:
    outcome = distill(command, "--help")
    assert outcome.status == 0 and outcome.stderr == ""
    assert f"usage: distill {command}" in outcome.stdout and "--student.help" in outcome.stdout
    assert ("Stop after this stage" in outcome.stdout) == (command == "run")


def test_the_usage_needs_no_torch() -> None:
    script = "import sys; from distill.cli import main; main(['--help']); main(['x']); print('torch' in sys.modules)"
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert outcome.stdout.endswith("False\n")


def test_an_interrupted_command_says_how_to_go_on(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.chain.run", interrupted)
    outcome = distill("run", "--config", micro.write(tmp_path, micro.RECORDED))
    assert outcome.status == 130
    assert outcome.sentence == "interrupted; the same command goes on from here"


def test_a_fault_of_ours_ends_with_a_trace_and_a_sentence(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("distill.chain.run", broken)
    outcome = distill("run", "--config", micro.write(tmp_path, micro.RECORDED))
    assert outcome.status == 1
    assert "Traceback" in outcome.stderr and outcome.stderr.endswith("distill: unexpected TypeError: a bug\n")


# ---- a chain, as its user sees it ----


@pytest.fixture(scope="module")
def micro_chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The recipe and the folder of a chain that the command has run."""
    folder = tmp_path_factory.mktemp("cli")
    path = micro.write(folder, micro.RECORDED)
    assert main(["run", "--config", str(path)]) == 0
    yield path, folder / "runs" / "micro"


@pytest.fixture
def finished(micro_chain: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of that run which a test may change."""
    content = yaml.safe_load(micro_chain[0].read_text()) | {"runs": str(tmp_path / "runs")}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    shutil.copytree(micro_chain[1], tmp_path / "runs" / "micro")
    return path, tmp_path / "runs" / "micro"


def test_a_second_run_does_nothing_and_shows_the_table_again(finished: tuple[Path, Path], distill: Command) -> None:
    path, folder = finished
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    outcome = distill("run", "--config", path)
    assert outcome.status == 0
    first, *table = outcome.stdout.splitlines()
    assert first == f"{folder}: nothing to do, every stage is up to date"
    assert [line.split("  ")[0] for line in table if line.startswith(("majority", "assistant", "student"))] == [
        "majority class (negative)", "assistant", "student", "student, hard labels", "student",
    ]  # fmt: skip
    assert table[-2:] == [f"report   {folder / 'report.html'}", f"student  {folder / 'export'}"]
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_another_weight_distils_and_judges_anew_and_nothing_before(
    finished: tuple[Path, Path], distill: Command
) -> None:
    path, folder = finished
    kept = [folder / stage for stage in ("annotate", "assistant", "augment", "tokenizer")]
    before = {file: file.stat().st_mtime_ns for stage in kept for file in stage.rglob("*")}
    reported = (folder / "report.html").read_text()
    outcome = distill("run", "--config", path, "--student.distillation.weight", "0.9")
    assert outcome.status == 0 and outcome.stdout.startswith("ran student, evaluate, export\n")
    assert {file: file.stat().st_mtime_ns for stage in kept for file in stage.rglob("*")} == before
    assert (folder / "report.html").read_text() != reported
    assert "weight: 0.9" in (folder / "export" / "README.md").read_text()


def test_a_plan_foretells_what_ran_and_touches_nothing(finished: tuple[Path, Path], distill: Command) -> None:
    path, folder = finished
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    outcome = distill("plan", "--config", path)
    assert (outcome.status, outcome.stderr) == (0, "")
    assert "\nup to date  annotate, assistant, augment, student, evaluate, export\n" in outcome.stdout
    assert "would run" not in outcome.stdout and "up to " not in outcome.stdout.replace("up to date", "")
    rows = {line.split("  ")[0]: line.split() for line in outcome.stdout.splitlines()}
    with (folder / "assistant" / "metrics.csv").open() as file:
        steps = 1 + max(int(row["step"]) for row in csv.DictReader(file))
    assert rows["optimiser steps"][2] == str(steps)
    assert sum(path.stat().st_size for path in (folder / "student" / "soft_targets").glob("*")) > 0
    outcome = distill("plan", "--config", path, "--student.distillation.weight", "0.9")
    assert "\nwould run   student, evaluate, export\nup to date  annotate, assistant, augment\n" in outcome.stdout
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_a_plan_refuses_what_a_run_refuses(distill: Command, tmp_path: Path) -> None:
    path = micro.write(tmp_path, micro.RECORDED)
    outcome = distill("plan", "--config", path, "--student.distilation.weight", "1")
    assert outcome.status == 2 and "student.distilation" in outcome.sentence
    outcome = distill("plan", "--config", path, "--data.source", "jsonl", "--data.root", str(tmp_path / "nowhere"))
    assert outcome.status == 2 and outcome.sentence.startswith("data.train: cannot read")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()


def test_a_stage_runs_by_its_own_command_once_what_it_reads_is_there(
    finished: tuple[Path, Path], distill: Command
) -> None:
    path, folder = finished
    shutil.rmtree(folder / "augment")
    outcome = distill("student", "--config", path, "--student.batch_size", "4")
    assert outcome.status == 2
    assert outcome.sentence == "student reads augment, which has not run with this recipe; run it first"
    assert distill("augment", "--config", path).status == 0
    assert (folder / "augment" / "rationales.jsonl").exists()
    assert "nothing to do" in distill("augment", "--config", path).stdout
    outcome = distill("run", "--config", path, "--until", "serve")
    assert outcome.status == 2 and outcome.sentence.startswith(
        "the recipe has no section serve; its stages are annotate"
    )


def test_a_report_is_written_anew_and_asks_for_what_it_needs(finished: tuple[Path, Path], distill: Command) -> None:
    path, folder = finished
    (folder / "report.html").unlink()
    outcome = distill("report", "--config", path)
    assert outcome.status == 0 and "majority class" in outcome.stdout
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    (folder / "evaluate" / "metrics.json").unlink()
    outcome = distill("report", "--config", path)
    assert outcome.status == 2
    assert outcome.sentence == (
        f"{folder / 'evaluate' / 'metrics.json'} is missing; run: distill run --until evaluate with the same recipe"
    )


# ---- bad recipes and bad data: 2 ----


def test_a_typo_in_a_recipe(distill: Command, tmp_path: Path) -> None:
    path = micro.write(tmp_path, micro.RECORDED, student__distillation__wieght=0.5)
    outcome = distill("run", "--config", path)
    assert outcome.status == 2
    assert outcome.sentence == (
        "student.distillation.wieght is not a field (did you mean weight?); "
        "student.distillation takes weight, temperature, positions, soft_targets, top_k"
    )
    assert not (tmp_path / "runs").exists()


def test_a_missing_data_file(distill: Command, tmp_path: Path) -> None:
    path = rows_recipe(tmp_path, train=ROWS)
    (tmp_path / "data" / "train.jsonl").unlink()
    outcome = distill("run", "--config", path)
    assert outcome.status == 2
    assert outcome.sentence == f"data.train: cannot read {tmp_path / 'data' / 'train.jsonl'}: No such file or directory"


def test_a_file_without_rows(distill: Command, tmp_path: Path) -> None:
    outcome = distill("run", "--config", rows_recipe(tmp_path, train=ROWS, test=[]))
    assert (outcome.status, outcome.sentence) == (2, "data.test: test.jsonl has no rows")


def test_a_split_that_cannot_be_made(distill: Command, tmp_path: Path) -> None:
    outcome = distill("run", "--config", rows_recipe(tmp_path, train=ROWS[:1], test=ROWS[1:]))
    assert outcome.status == 2
    assert outcome.sentence.startswith("data.") and "too few to set a part aside" in outcome.sentence


def test_unknown_labels_throughout(distill: Command, tmp_path: Path) -> None:
    rows = [row | {"label": "happy"} for row in ROWS]
    outcome = distill("run", "--config", rows_recipe(tmp_path, train=rows))
    assert outcome.status == 2
    assert outcome.sentence == (
        "data.train: none of the 36 rows of train.jsonl can be used; row 1: "
        "unknown label 'happy'; the labels are negative, neutral, positive"
    )


def test_a_bad_row_is_left_out_with_a_word_and_stops_nothing(
    distill: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rationale = "\n".join(f'"{name}": "words"' for name in FIELDS) + '\n"Prediction": '
    rows = [row | {"rationale": rationale + str(row["label"])} for row in ROWS]
    bad = [rows[0] | {"id": "p36", "label": "happy"}, rows[0] | {"text": "another, of the same id"}]
    with caplog.at_level(logging.WARNING, logger="distill"):
        outcome = distill("run", "--config", rows_recipe(tmp_path, train=rows + bad), "--until", "annotate")
    assert outcome.status == 0
    report = tmp_path / "runs" / "micro" / "quarantine.jsonl"
    assert f"2 rows are left out and listed in {report}; the first: train.jsonl row 37: unknown label" in caplog.text
    dropped = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(row["file"], row["row"], row["id"]) for row in dropped] == [
        ("train.jsonl", 37, "p36"),
        ("train.jsonl", 38, "p0"),
    ]
    assert dropped[1]["reason"] == "id 'p0' is already that of train.jsonl row 1"


FIELDS = ("Text_analysis", "Image_analysis", "Conflict_resolution", "Final_conclusion")


def test_a_teacher_without_anything_to_teach(distill: Command, tmp_path: Path) -> None:
    outcome = distill("run", "--config", rows_recipe(tmp_path, train=ROWS))
    assert outcome.status == 2
    assert outcome.sentence.startswith("assistant: no training rows are left; ")


# ---- bad models: 2 ----


def test_a_model_that_is_not_there(distill: Command, tmp_path: Path) -> None:
    path = classifier(rows_recipe(tmp_path, train=ROWS), tmp_path / "nowhere")
    outcome = distill("run", "--config", path)
    assert outcome.status == 2
    assert outcome.sentence.startswith(f"model.path: {tmp_path / 'nowhere'} cannot be loaded")


def test_a_model_without_a_chat_template(distill: Command, tmp_path: Path, model_folder: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    (model / "chat_template.jinja").unlink()
    outcome = distill("run", "--config", classifier(rows_recipe(tmp_path, train=ROWS), model))
    assert (outcome.status, outcome.sentence) == (2, f"model.path: {model} has no chat template to ask it with")


def test_labels_that_begin_with_one_token_are_learned_too(distill: Command, tmp_path: Path, model_folder: Path) -> None:
    rows = [row | {"label": ("positive", "positively")[n % 2]} for n, row in enumerate(ROWS)]
    path = classifier(rows_recipe(tmp_path, train=rows), model_folder, task={"labels": ["positive", "positively"]})
    outcome = distill("run", "--config", path)
    assert (outcome.status, outcome.stdout) == (0, "ran student\n")


# ---- failures while running: 1 ----


def endpoint_recipe(folder: Path, url: str, **settings: Any) -> Path:
    endpoint = {"base_url": url, "model": "big-vl", "max_attempts": 2, "backoff_s": 0.01} | settings
    path = rows_recipe(folder, train=ROWS)
    content = yaml.safe_load(path.read_text()) | {"annotate": {"endpoint": endpoint}}
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_dead_endpoint(distill: Command, tmp_path: Path) -> None:
    outcome = distill("run", "--config", endpoint_recipe(tmp_path, "http://127.0.0.1:9/v1"))
    assert outcome.status == 1
    assert outcome.sentence.startswith("no server answers at base_url http://127.0.0.1:9/v1: ")
    status = json.loads((tmp_path / "runs/micro/chain.json").read_text())["stages"]["annotate"]["status"]
    assert status == "failed"


def test_a_key_that_expired_or_is_not_set(distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(refuse=lambda body: (401, "expired")) as server:
        path = endpoint_recipe(tmp_path, server.url, api_key_env="TEACHER_KEY")
        outcome = distill("run", "--config", path)
        assert outcome.status == 2
        assert outcome.sentence.endswith("api_key_env: the environment variable TEACHER_KEY is not set")
        monkeypatch.setenv("TEACHER_KEY", "secret")
        outcome = distill("run", "--config", path)
    assert outcome.status == 1
    assert outcome.sentence == f"the endpoint {server.url} refuses the key in TEACHER_KEY (status 401)"
    assert "secret" not in "".join(file.read_text() for file in (tmp_path / "runs").rglob("*.json*"))


def test_a_disk_that_fills_up_in_a_training_and_is_freed_again(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file may grow beyond 200 kB, which only a checkpoint does: the kernel's own error, through torch's writer."""
    path = micro.write(tmp_path, micro.RECORDED)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        outcome = distill("run", "--config", path, "--until", "assistant")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.status == 1
    folder = tmp_path / "runs" / "micro"
    assert outcome.sentence == f"{folder}: File too large"
    assert json.loads((folder / "chain.json").read_text())["stages"]["assistant"]["status"] == "failed"
    assert not (folder / "assistant" / "checkpoints" / "last.ckpt").exists()
    assert distill("run", "--config", path, "--until", "assistant").stdout == "ran assistant\n"


def test_a_folder_that_may_not_be_written(distill: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = distill("run", "--config", micro.write(tmp_path, micro.RECORDED), "--runs", tmp_path / "file")
    assert outcome.status == 1
    assert outcome.sentence == f"{tmp_path / 'file' / 'micro'}: Not a directory"


def test_lightnings_chatter_is_kept_from_the_user() -> None:
    cli._quieten()
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        assert not logging.getLogger(f"lightning.pytorch.{name}").isEnabledFor(logging.INFO)


def test_a_reader_that_has_seen_enough_gets_no_trace() -> None:
    code = "from distill import cli; cli._command = lambda *_: print('x' * 10**6); raise SystemExit(cli.main(['run']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 1 and "Traceback" not in said and "BrokenPipe" not in said

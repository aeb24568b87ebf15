"""`--log-format json`: every line on stderr of a real process is one JSON object."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import micro
from tests.forks import Script

COMMAND = "import sys; from distill.cli import main; sys.exit(main(sys.argv[1:]))"


def in_fork(folder: Path, code: str, *arguments: object) -> tuple[int | None, str, list[dict[str, Any]]]:
    """Exit status, stdout and the objects on stderr of a script."""
    (folder / "script.py").write_text(code)
    script = Script(folder / "script.py", *map(str, arguments), env=dict(os.environ))
    out, err = script.communicate(120)
    return script.returncode, out, [json.loads(line) for line in err.splitlines()]


def test_a_chain_logs_its_stages_as_json(tmp_path: Path) -> None:
    trainer = {name: value for name, value in micro.RECORDED["trainer"].items() if name != "enable_progress_bar"}
    path = micro.write(tmp_path, micro.RECORDED, trainer=trainer)
    command = [sys.executable, "-m", "distill", "run", "--config", path, "--until", "assistant", "--log-format", "json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    lines = [json.loads(line) for line in ran.stderr.splitlines()]
    assert ran.returncode == 0 and ran.stdout.strip() == "ran annotate, assistant"
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    stages = [line for line in lines if "number" in line]
    assert [(line["number"], line["of"], line["stage"]) for line in stages] == [
        (1, 6, "annotate"), (1, 6, "annotate"), (2, 6, "assistant"), (2, 6, "assistant"),
    ]  # fmt: skip
    assert [line["message"].split(",")[0].rpartition(" ")[2] for line in stages] == [
        "annotate", "done", "assistant", "done",
    ]  # fmt: skip
    assert stages[0]["remaining_s"] is None and stages[-1]["elapsed_s"] > 0


def test_the_error_at_the_end_is_json_and_shows_no_password(tmp_path: Path) -> None:
    endpoint = {"base_url": "http://user:hunter2@127.0.0.1:9/v1", "model": "m", "max_attempts": 1}
    path = micro.write(tmp_path, micro.RECORDED, annotate={"endpoint": endpoint})
    status, _, lines = in_fork(tmp_path, COMMAND, "run", "--config", path, "--log-format=json")
    assert status == 1
    assert (lines[-1]["level"], lines[-1]["stage"]) == ("error", "annotate")
    assert "***@127.0.0.1:9" in lines[-1]["message"] and "hunter2" not in json.dumps(lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("deploy",), "deploy is not a command"), (("run", "--config", "none.yaml"), "none.yaml")],
)
def test_errors_before_a_stage_are_json(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    status, _, (line,) = in_fork(tmp_path, COMMAND, "--log-format", "json", *arguments)
    assert status == 2 and line["level"] == "error" and said in line["message"] and "stage" not in line


def test_an_unexpected_error_has_its_traceback_in_one_line(tmp_path: Path) -> None:
    code = "from distill import chain\ndef run(*_, **__): raise TypeError('a bug')\nchain.run = run\n" + COMMAND
    path = micro.write(tmp_path, micro.RECORDED)
    status, _, (line,) = in_fork(tmp_path, code, "run", "--config", path, "--log-format", "json")
    assert status == 1 and line["message"] == "unexpected TypeError: a bug"
    assert line["details"].startswith("Traceback")


def test_what_libraries_print_is_json(tmp_path: Path) -> None:
    code = """
import logging, sys, warnings
from distill import logs
logs.configure("json")
logs.configure()
print("two\\nlines", file=sys.stderr)
sys.stderr.write("10%\\r20")
sys.stderr.write("%\\n")
warnings.warn("careful")
logging.getLogger("library").warning("from %s", "https://user:hunter2@host")
logging.getLogger("library").info("routine")
"""
    _, _, lines = in_fork(tmp_path, code)
    messages = [line["message"] for line in lines]
    assert messages[:4] == ["two", "lines", "10%", "20%"]
    assert "careful" in messages[4] and messages[5:] == ["from https://***@host"]
    assert {line["level"] for line in lines} == {"warning"}


@pytest.mark.parametrize("argument", ["--log-format=xml", "--log-format"])
def test_another_format_is_refused(argument: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(COMMAND)
    script = Script(tmp_path / "script.py", "run", argument, env=dict(os.environ))
    _, err = script.communicate(60)
    value = argument.partition("=")[2]
    assert (script.returncode, err) == (2, f"distill: --log-format is {value!r}; it takes text or json\n")

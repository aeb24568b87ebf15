"""The completion scripts, in the shells themselves."""

import builtins
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from distill.cli import COMMANDS, OTHERS
from tests.commands import Command


def completions(script: str, words: str, folder: Path) -> set[str]:
    """What bash offers for the last of some words."""
    (folder / "completion.bash").write_text(script)
    ask = f"""
        source completion.bash
        COMP_WORDS=({words}); [[ "{words}" == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        "$(complete -p distill | sed 's/.*-F \\([^ ]*\\) .*/\\1/')"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", ask], cwd=folder, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_bash_completes_commands_options_and_files(distill: Command, tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    result = distill("completion", "bash")
    assert (result.status, result.stderr) == (0, "")
    (tmp_path / "mine.yaml").write_text("")
    assert completions(result.stdout, "distill ", tmp_path) >= set(COMMANDS | OTHERS)
    assert completions(result.stdout, "distill ca", tmp_path) == {"calibrate", "cascade"}
    assert completions(result.stdout, "distill run --un", tmp_path) == {"--until"}
    assert "--data.postcards.image_size" in completions(result.stdout, "distill plan --data.p", tmp_path)
    assert completions(result.stdout, "distill predict --explain ", tmp_path) == {"student", "teacher", "none"}
    assert completions(result.stdout, "distill review --por", tmp_path) == {"--port"}
    assert "mine.yaml" in completions(result.stdout, "distill run --config mi", tmp_path)


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_read_their_script(shell: str, distill: Command, tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    result = distill("completion", shell)
    assert result.status == 0 and "calibrate" in result.stdout
    if shutil.which(shell):
        (tmp_path / "script").write_text(result.stdout)
        subprocess.run([shell, "-n", "script"], cwd=tmp_path, check=True)


def test_without_shtab_one_sentence_says_what_to_install(distill: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "shtab":
            raise ImportError(name)
        return load(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    result = distill("completion", "bash")
    assert (result.status, result.error) == (2, "completion needs shtab: pip install 'distill[completion]'")
    result = distill("completion", "fish")
    assert result.status == 2 and result.error.startswith("completion: argument shell: invalid choice: 'fish'")

"""The wheel in a fresh environment, from an empty folder. The environment sees the dependencies of this one."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    *("--data.postcards.labelled", "27", "--data.postcards.unlabelled", "9"),
    *("--data.postcards.validation", "9", "--data.postcards.test", "9", "--annotate.recorded", "true"),
    *(flag for name in ("teacher", "assistant", "student") for flag in (f"--{name}.trainer", "{max_epochs: 1}")),
    *("--teacher.trainer.check_val_every_n_epoch", "1", "--student.hard_labels_baseline", "false"),
    *("--calibrate.min_label_mass", "0.0", "--tracking.mode", "disabled"),
]
"""The quickstart, small enough for a test."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of an environment with the wheel. The build needs setuptools in this environment."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("environment")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "distill", source / "distill", ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "-w", folder, source]
    subprocess.run([*build, "-q", "--no-deps"], check=True)
    (wheel,) = folder.glob("distill-*.whl")
    subprocess.run([programs / "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    assert (packages / "distill" / "py.typed").exists()
    return programs


@pytest.mark.slow
def test_the_quickstart_runs_from_an_empty_folder(environment: Path, tmp_path: Path) -> None:
    def run(*command: str) -> str:
        program, *arguments = command
        done = subprocess.run([environment / program, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert str(environment.parent) in run("python", "-c", "import distill; print(distill.__file__)")
    assert "quickstart" in run("distill", "recipes")
    run("distill", "init", "quickstart")
    assert "would run" in run("python", "-m", "distill", "plan", "--config", "quickstart.yaml", *SMALL)
    table = run("distill", "run", "--config", "quickstart.yaml", *SMALL)
    assert "cascade" in table and (tmp_path / "runs" / "quickstart" / "export" / "config.json").exists()
    assert (tmp_path / "data" / "postcards").is_dir()

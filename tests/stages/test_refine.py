"""Stage `refine` in a chain: which weights later stages use, what makes it run again, kills, and refusals."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import distill
from distill.chain import run, stages_of, up_to_date
from distill.errors import SettingsError
from distill.recipe import Recipe
from distill.stages import preflight
from distill.stages.context import Context
from tests import micro
from tests.commands import Command
from tests.fake_stages import Fakes
from tests.stages.preflight_runs import refused
from tests.test_chain_killed import start

pytest.importorskip("trl")

__all__ = ["refused"]

SHORT = {"max_steps": 4, "batch_size": 2, "max_new_tokens": 8, "generations": 2, "learning_rate": 1e-2}
AFTER = ["evaluate", "export"]


def write(folder: Path, method: str = "distill", **changes: Any) -> Path:
    refine = SHORT | {"method": method, "rewards": {"grounded": 1.0}}
    return micro.write(folder, micro.RECORDED, refine=refine, student__hard_labels_baseline=False, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A chain whose student is trained, but not refined."""
    recipe = micro.read(write(tmp_path_factory.mktemp("trained")))
    run(recipe, until="student")
    return recipe


@pytest.fixture
def folder(trained: Recipe, tmp_path: Path) -> Path:
    """A copy of its runs and data."""
    shutil.copytree(trained.folder.parents[1], tmp_path, dirs_exist_ok=True)
    return tmp_path


def weights(recipe: Recipe, stage: str) -> dict[str, torch.Tensor]:
    return load_file(recipe.folder / stage / "adapter" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["distill", "grpo"])
def test_later_stages_use_the_refined_student(method: str, folder: Path, distill_command: Command) -> None:
    path = write(folder, method)
    recipe = micro.read(path)
    result = distill_command("run", "--config", path)
    assert result.status == 0, result.stderr
    assert "ran refine, evaluate, export" in result.stdout and "student, refined" in result.stdout
    assert run(recipe) == []
    assert (recipe.folder / "refine" / "metrics.csv").is_file()
    assert sorted(path.name for path in (recipe.folder / "refine").iterdir()) == [
        "adapter",
        "checkpoints",
        "metrics.csv",
    ]
    metrics = json.loads((recipe.folder / "evaluate" / "metrics.json").read_text())
    assert list(metrics) == ["assistant", "student", "student_refined", "majority_class"]
    assert {"accuracy", "parse_rate", "grounded"} <= metrics["student_refined"].keys()
    refined, first = weights(recipe, "refine"), weights(recipe, "student")
    processors = [
        {path.name: path.read_bytes() for path in (recipe.folder / stage / "adapter").iterdir()}
        for stage in ("student", "refine")
    ]
    differ = {name for name in processors[0] if processors[0][name] != processors[1].get(name)}
    assert differ <= {"model.safetensors", "config.json"} and len(processors[0]) == len(processors[1])
    assert "use_cache" not in json.loads(processors[1]["config.json"])
    exported = load_file(recipe.folder / "export" / "model.safetensors")
    assert same(exported, refined) and (not same(exported, first) or "its weights are kept" in result.stderr)
    loaded = distill.Student.from_run(recipe.folder, device="cpu").model.backbone.model
    expected = Context(recipe, {}).load("refine").model
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))


@pytest.fixture
def distill_command(distill: Command) -> Command:
    return distill


# ---- which stages run again ----


def test_what_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fakes(monkeypatch)
    path = write(tmp_path)
    assert run(micro.read(path)) == ["annotate", "assistant", "augment", "student", "refine", *AFTER]
    assert run(micro.read(path, "--refine.learning_rate", "1e-3")) == ["refine", *AFTER]
    assert run(micro.read(path, "--evaluate.max_new_tokens", "9", "--refine.learning_rate", "1e-3")) == AFTER
    assert run(micro.read(path, "--student.batch_size", "3"))[0] == "student"
    with pytest.raises(SettingsError, match="refine reads student, which has not run with this recipe"):
        run(micro.read(path, "--student.batch_size", "4"), only="refine")


def test_a_chain_of_before_goes_on_with_refine_and_without_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fakes(monkeypatch)
    path = write(tmp_path)
    without = micro.read(path, "--refine", "null")
    run(without)
    assert "refine" not in stages_of(without)
    assert run(micro.read(path)) == ["refine", *AFTER]
    assert run(without) == AFTER, "the roles of evaluate and the exported student are others"


def test_a_teacher_that_the_chain_trains_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fakes(monkeypatch)
    teacher = micro.LEARNER | {"tasks": {"predict": 1.0, "reason": 1.0, "classify": 1.0}}
    changes: dict[str, Any] = {"teacher": teacher, "annotate": {"max_new_tokens": 50}}
    recipe = micro.read(write(tmp_path, **changes), "--refine.teacher", "teacher")
    run(recipe)
    assert "teacher" in micro.manifest(recipe)["refine"]["inputs"]
    (recipe.folder / "teacher" / "adapter").write_text("edited")
    assert not up_to_date(recipe)["refine"]


# ---- kills ----


def wait_for_another_checkpoint(process: Any, recipe: Recipe, seen: set[Path]) -> None:
    deadline = time.monotonic() + 120
    while not set((recipe.folder / "refine" / "checkpoints").glob("checkpoint-*/trainer_state.json")) - seen:
        assert process.is_alive() and time.monotonic() < deadline, "there is no checkpoint"
        time.sleep(0.002)


@pytest.mark.parametrize("method", ["distill", "grpo"])
def test_a_killed_stage_ends_with_the_weights_of_one_that_was_not(method: str, folder: Path, trained: Recipe) -> None:
    path = write(folder, method, refine__max_steps=16, refine__arguments={"save_steps": 2})
    recipe = micro.read(path)
    other = replace(recipe, name="whole")
    shutil.copytree(recipe.folder, other.folder)
    run(other, until="refine")
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
        seen = set((recipe.folder / "refine" / "checkpoints").glob("checkpoint-*/trainer_state.json"))
        process = start(path)
        wait_for_another_checkpoint(process, recipe, seen)
        os.kill(process.pid, number)
        process.join(70)
        assert process.exitcode == status
        assert micro.manifest(recipe)["refine"]["status"] in ("running", "failed")
        assert not (recipe.folder / "refine" / "adapter").exists()
    assert run(recipe, until="refine") == ["refine"]
    assert same(weights(recipe, "refine"), weights(other, "refine"))
    assert run(recipe, until="refine") == []


# ---- refusals ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student__tasks": {"classify": 1.0}}, "refine needs reason in student.tasks"),
        ({"student__tasks": {"reason": 1.0}}, "refine.classify_weight must be 0 if student.tasks has no classify"),
        ({"assistant__tasks": {"classify": 1.0}, "augment": None}, "refine needs reason in assistant.tasks"),
        ({"annotate": None, "assistant": None, "augment": None}, "refine needs an annotate section"),
        ({"student": None, "evaluate": None, "export": None}, "refine needs a student section"),
        ({"refine__teacher": "teacher"}, "refine.teacher: teacher needs a teacher on this machine"),
        ({"refine__rewards": {"format": 0, "label": 0, "consistency": 0}}, "refine.rewards.format, label, consistency"),
        ({"refine__method": "sft"}, "refine.method"),
        ({"refine__lr": 1}, "refine.lr"),
    ],
)
def test_a_recipe_without_what_the_stage_needs_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if changes.get("annotate", True) is None:
        changes |= {"student__distillation": {"weight": 0.0}, "student__tasks": {"classify": 1.0}}
    with pytest.raises(SettingsError) as raised:
        micro.read(write(tmp_path, **changes))
    assert message in str(raised.value)


def test_without_an_assistant_rewards_remain(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"assistant": None, "augment": None, "student__distillation": {"weight": 0.0}}
    with pytest.raises(SettingsError, match=r"needs an assistant section; or set refine\.method"):
        micro.read(write(tmp_path, **changes))
    assert "refine" in stages_of(micro.read(write(tmp_path, "grpo", **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refine": {"arguments": {"lr": 1}}}, "refine.arguments.lr is not an argument of trl's DistillationConfig"),
        (
            {
                "refine": {},
                "student__distillation": {"weight": 0.0},
                "student__model": micro.MODEL | {"tiny": micro.MODEL["tiny"] | {"vocabulary": 500}},
            },
            "refine: student and assistant have different tokenizers; set refine.method to grpo",
        ),
    ],
)
def test_what_trl_would_refuse_stops_the_run_before_its_first_question(
    refused: Callable[..., str], changes: dict[str, Any], message: str
) -> None:
    assert refused(**changes) == message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainer.devices", "2"], "refine trains on one device, the first: set trainer.devices to 1"),
        (["--refine.method", "grpo", "--data.source", "jsonl"], "refine.rewards.grounded must be 0"),
    ],
)
def test_what_the_stage_cannot_do_is_found_before_it(
    flags: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = micro.read(write(folder), *flags[:2])
    context = Context(recipe, {})
    if "jsonl" in flags:
        bare = [replace(post, attributes={}) for post in context.posts.train]
        context.__dict__["posts"] = replace(context.posts, train=bare)
    found = preflight.problems(context, ["refine"])
    assert [problem for problem in found if message in problem], found


def test_the_library_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    recipe = micro.read(write(folder))
    with pytest.raises(SettingsError, match=r"refine needs trl 1.10 or later: pip install 'distill\[trl\]'"):
        run(recipe)
    assert "refine" not in micro.manifest(recipe)


def test_the_plan_shows_the_stage(folder: Path, distill: Command) -> None:
    plan = distill("plan", "--config", write(folder, "grpo")).stdout
    assert "would run   refine, evaluate, export" in plan
    assert "refine (grpo): 4 steps, each on 4 rationales of at most 8 tokens that the student generates" in plan

"""Every output of a finished chain, truncated, deleted and edited: what is said, and what runs again."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill import chain
from distill.chain import STAGES
from distill.errors import SettingsError
from distill.recipe import Recipe
from tests import micro

ADAPTER = (
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
TRAINED = (*(f"adapter/{file}" for file in ADAPTER), "metrics.csv")
OUTPUTS = {
    "teacher": TRAINED,
    "annotate": ("curated.jsonl", "quarantine.jsonl", "rationales.jsonl", "summary.json"),
    "assistant": TRAINED,
    "augment": ("rationales.jsonl", "summary.json"),
    "student": (*TRAINED, *(f"hard_labels/{file}" for file in TRAINED)),
    "evaluate": ("metrics.json", "predictions.jsonl"),
    "calibrate": ("calibration.json",),
    "cascade": ("decisions.jsonl", "deferral_curve.csv", "metrics.json"),
    "export": ("README.md", *ADAPTER, "export.json", "scoring.json"),
}
FILES = [(stage, file) for stage, files in OUTPUTS.items() for file in files]
TEXTS = (".md",)  # cut anywhere, it is still a text


@pytest.fixture
def recipe(finished: Recipe, tmp_path: Path) -> Recipe:
    """The finished chain, in a folder that a test may change."""
    shutil.copytree(finished.folder, tmp_path / "runs" / finished.name)
    return replace(finished, runs=str(tmp_path / "runs"))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], list[str]]:
    """A function that returns the stages that `distill run` would run, without running them."""
    monkeypatch.setattr(chain, "_run_stage", lambda *_: None)
    return chain.run


def readers(stage: str, file: str) -> list[str]:
    """The stages that depend on an output."""
    read = re.search(r"(^|/)adapter/|rationales|curated|calibration", file) if stage != "export" else None
    if not read and (stage, file) != ("evaluate", "metrics.json"):
        return []
    found = {stage}
    for name, entry in STAGES.items():
        if found & set(entry.reads):
            found.add(name)
    return [name for name in STAGES if name in found - {stage, "refine"}]  # the recipe has no refine


def edit(path: Path) -> None:
    """Change the content of a file, which stays well-formed."""
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(json.loads(path.read_text()) | {"edited": True}))
        case ".jsonl":
            path.write_text(path.read_text() + "{}\n")
        case ".csv":
            path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
        case ".safetensors":
            weights = load_file(path)
            name = sorted(weights)[0]
            weights[name] = weights[name] + 1
            save_file(weights, path, {"format": "pt"})
        case _:
            path.write_text(path.read_text() + "\n")


def test_the_manifest_lists_every_output(recipe: Recipe) -> None:
    for name, entry in micro.manifest(recipe).items():
        assert tuple(sorted(file for file, digest in entry["files"].items() if digest)) == tuple(sorted(OUTPUTS[name]))
        work = {file for file, digest in entry["files"].items() if digest is None}
        assert all("checkpoints/" in file for file in work)


@pytest.mark.parametrize(("stage", "file"), FILES, ids="/".join)
def test_an_output_truncated_deleted_and_edited(
    stage: str,
    file: str,
    recipe: Recipe,
    planned: Callable[[Recipe], list[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    assert planned(recipe) == []
    path = recipe.folder / stage / file
    content = path.read_bytes()

    path.write_bytes(content[: len(content) * 6 // 10])
    if not content:
        assert planned(recipe) == []
    elif path.suffix in TEXTS:
        assert planned(recipe) == readers(stage, file)
        assert f"{path} was edited by hand and is used as it is" in caplog.text
    else:
        message = rf"^{re.escape(str(path))} is damaged \([^\n]+\); delete it and run: distill run, which rebuilds it$"
        for command in (planned, chain.up_to_date, chain.check_outputs):
            with pytest.raises(SettingsError, match=message):
                command(recipe)

    path.unlink()
    assert planned(recipe) == [stage]

    path.write_bytes(content)
    caplog.clear()
    assert planned(recipe) == [] and not caplog.records
    edit(path)
    assert planned(recipe) == readers(stage, file)
    (message,) = (text for text in caplog.messages if " is left out: " not in text)  # of metrics, on some machines
    assert message == (f"{path} was edited by hand and is used as it is; to rebuild it, delete it and run: distill run")


def test_a_run_of_an_earlier_version_is_complete_and_its_damaged_files_are_named(
    recipe: Recipe, planned: Callable[[Recipe], list[str]]
) -> None:
    path = recipe.folder / "chain.json"
    content = json.loads(path.read_text())
    for entry in content["stages"].values():
        for field in ("identity", "files", "contents", "rest", "limits"):
            entry.pop(field, None)
    before = {name: entry["identity"] for name, entry in micro.manifest(recipe).items()}
    for entry in content["stages"].values():  # its names of models are those of its fingerprints
        entry["inputs"] = {name: content["stages"][name]["fingerprint"] for name in entry["inputs"]}
    path.write_text(json.dumps(content))
    rationales = recipe.folder / "annotate" / "rationales.jsonl"
    text = rationales.read_text()
    rationales.write_text(text[: len(text) * 6 // 10])
    with pytest.raises(SettingsError, match=r"rationales\.jsonl is damaged"):
        planned(recipe)
    rationales.write_text(text)
    assert planned(recipe) == []
    assert {name: entry["identity"] for name, entry in micro.manifest(recipe).items()} != before
    assert set(micro.manifest(recipe)["cascade"]["files"]) == {"metrics.json", "decisions.jsonl", "deferral_curve.csv"}
    rationales.write_text(text + "{}\n")
    assert planned(recipe) == readers("annotate", "rationales.jsonl")


# ---- rebuilt for real ----


def test_deleted_weights_are_rebuilt_from_the_checkpoint_and_nothing_else_runs(recipe: Recipe) -> None:
    weights = recipe.folder / "student" / "adapter" / "model.safetensors"
    before = load_file(weights)
    weights.unlink()
    assert chain.run(recipe) == ["student"]
    after = load_file(weights)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert chain.run(recipe) == []


def test_curated_rationales_are_trained_on_and_kept(recipe: Recipe) -> None:
    path = recipe.folder / "augment" / "rationales.jsonl"
    rows = [json.loads(line) for line in (recipe.folder / "annotate" / "rationales.jsonl").read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    curated = path.read_text()
    assert chain.run(recipe, until="student") == ["student"]
    assert path.read_text() == curated
    assert chain.run(recipe, until="student") == []
    (recipe.folder / "augment" / "summary.json").unlink()
    chain.run(recipe, until="augment")
    assert path.with_name("rationales.jsonl.edited").read_text() == curated


def test_a_curated_row_that_cannot_be_used_is_named(recipe: Recipe) -> None:
    path = recipe.folder / "annotate" / "rationales.jsonl"
    rows = path.read_text().splitlines()
    for field, value, reason in (("label", "happy", "unknown label"), ("rationale", None, "has no rationale")):
        path.write_text("\n".join([json.dumps(json.loads(rows[0]) | {field: value}), *rows[1:]]) + "\n")
        with pytest.raises(SettingsError, match=rf"rationales\.jsonl, row 1: {reason}.*; correct the row, or delete"):
            chain.run(recipe, until="assistant")


def test_more_epochs_go_on_from_the_checkpoint_and_other_settings_do_not(recipe: Recipe, finished: Recipe) -> None:
    def epochs(recipe: Recipe) -> int:
        path = recipe.folder / "student" / "checkpoints" / "last.ckpt"
        return int(torch.load(path, weights_only=True)["epoch"])

    def longer(**changes: Any) -> Recipe:
        assert recipe.student is not None
        trainer = recipe.student.trainer | {"max_epochs": 3}
        return replace(recipe, student=replace(recipe.student, trainer=trainer, **changes))

    assert epochs(recipe) == 1
    assert chain.run(longer(), until="student") == ["student"]
    rows = (recipe.folder / "student" / "metrics.csv").read_text().splitlines()
    before = (finished.folder / "student" / "metrics.csv").read_text().splitlines()
    assert rows[: len(before)] == before and len(rows) > len(before)  # the first epochs were not trained again
    assert epochs(recipe) == 2
    changed = longer(learning_rate=1e-4)
    chain.run(changed, until="student")
    rows = (recipe.folder / "student" / "metrics.csv").read_text().splitlines()
    assert rows[: len(before)] != before

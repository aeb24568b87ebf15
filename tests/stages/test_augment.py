"""Stage `augment`: rationales by the assistant, kept if their label is correct."""

import json
from pathlib import Path

import pytest

from distill import chain
from distill.data.corpus import read_corpus
from distill.errors import RunError
from distill.recipe import Recipe
from distill.task.rationale import check
from tests import micro


def test_kept_rationales_are_correct_and_dropped_ones_are_counted(finished: Recipe, folder: Path) -> None:
    kept = [json.loads(line) for line in (folder / "augment" / "rationales.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "augment" / "summary.json").read_text())
    assert summary["kept"] == len(kept) > 0
    assert summary["kept"] + sum(summary["dropped"].values()) == summary["n"]
    gold = {sample.id: sample.label for sample in read_corpus(finished.data, finished.labels).train}
    annotated = {
        row["id"]: row["label"]
        for row in map(json.loads, (folder / "annotate" / "rationales.jsonl").read_text().splitlines())
    }
    assert summary["n"] == len({name for name, label in gold.items() if label} | set(annotated))
    for row in kept:
        assert check(row["rationale"], finished.labels, row["label"])
        assert row["label"] == (gold[row["id"]] or annotated[row["id"]]), "gold labels take precedence"
        assert row["source"] == "augmented" and row["teacher_label"] == (gold[row["id"]] is None)


def test_each_post_gets_one_reason_prompt_without_its_label(folder: Path) -> None:
    ledger = [json.loads(line) for line in (folder / "augment" / "ledger.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "augment" / "summary.json").read_text())
    assert {(entry["template"], entry["temperature"]) for entry in ledger} == {("reason", 0.7)}
    assert len({entry["key"] for entry in ledger}) == len(ledger) == summary["n"]


def test_an_assistant_without_a_usable_rationale_is_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trained for two epochs, it does not keep the format; the student then learns from the teacher alone."""
    recipe = micro.read(micro.write(tmp_path, micro.RECORDED, stop_after_invalid=10))
    with pytest.raises(RunError, match=r"^augment: the first 10 answers are all invalid"):
        chain.run(recipe, until="augment")
    lines = (recipe.folder / "augment" / "ledger.jsonl").read_bytes().count(b"\n")
    assert 10 <= lines <= 27
    recipe = micro.read(micro.write(tmp_path, micro.RECORDED, stop_after_invalid=0))
    with caplog.at_level("WARNING", logger="distill"):
        assert chain.run(recipe, until="augment") == ["augment"]
    summary = json.loads((recipe.folder / "augment" / "summary.json").read_text())
    assert summary["kept"] == 0 and sum(summary["dropped"].values()) == 27
    reason, count = max(summary["dropped"].items(), key=lambda item: item[1])
    assert f"augment: none of the assistant's 27 rationales is kept ({count} {reason}" in caplog.text


def test_a_limit_of_posts_takes_answers_that_are_in_the_ledger(tmp_path: Path) -> None:
    flags = {"stop_after_invalid": 0}
    chain.run(recipe := micro.read(micro.write(tmp_path, micro.RECORDED, **flags)), until="augment")
    ledger = (recipe.folder / "augment" / "ledger.jsonl").read_bytes()
    recipe = micro.read(micro.write(tmp_path, micro.RECORDED, **flags), "--augment.posts", "9")
    assert chain.run(recipe, until="augment") == ["augment"]
    summary = json.loads((recipe.folder / "augment" / "summary.json").read_text())
    assert summary["n"] == 9
    assert (recipe.folder / "augment" / "ledger.jsonl").read_bytes() == ledger

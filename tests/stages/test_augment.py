"""Stage `augment`: the assistant's own rationales, kept when right."""

import json
from pathlib import Path

from distill.data.corpus import read_corpus
from distill.recipe import Recipe
from distill.task.rationale import check


def test_what_is_kept_is_right_and_what_is_not_is_counted(finished: Recipe, folder: Path) -> None:
    kept = [json.loads(line) for line in (folder / "augment" / "rationales.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "augment" / "summary.json").read_text())
    assert summary["kept"] == len(kept) > 0
    assert summary["kept"] + sum(summary["dropped"].values()) == summary["n"]
    gold = {sample.id: sample.label for sample in read_corpus(finished.data, finished.labels).train}
    taught = {
        row["id"]: row["label"]
        for row in map(json.loads, (folder / "annotate" / "rationales.jsonl").read_text().splitlines())
    }
    assert summary["n"] == len({name for name, label in gold.items() if label} | set(taught))
    for row in kept:
        assert check(row["rationale"], finished.labels, row["label"])
        assert row["label"] == (gold[row["id"]] or taught[row["id"]]), "gold labels come before the teacher's"
        assert row["source"] == "augmented" and row["teacher_label"] == (gold[row["id"]] is None)


def test_it_asks_about_each_post_once_and_without_the_label(folder: Path) -> None:
    ledger = [json.loads(line) for line in (folder / "augment" / "ledger.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "augment" / "summary.json").read_text())
    assert {(entry["template"], entry["temperature"]) for entry in ledger} == {("reason", 0.7)}
    assert len({entry["key"] for entry in ledger}) == len(ledger) == summary["n"]

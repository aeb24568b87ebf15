"""Stage `annotate`: rationales, ledger and summary, with a model, a recording and a server."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from distill import chain
from distill.data.corpus import read_corpus
from distill.errors import RunError
from distill.recipe import Recipe
from distill.task.rationale import check
from tests import micro
from tests.models.bad_server import error
from tests.models.openai_server import ChatRequest, Server, rationale


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_rationale_is_valid_and_predicts_its_label(finished: Recipe, folder: Path) -> None:
    kept = rows(folder / "annotate" / "rationales.jsonl")
    gold = {sample.id: sample.label for sample in read_corpus(finished.data, finished.labels).train}
    assert len(kept) > 10
    for row in kept:
        assert check(row["rationale"], finished.labels, row["label"]).prediction == row["label"]
        assert row["teacher_label"] == (gold[row["id"]] is None)
        assert gold[row["id"]] in (None, row["label"])
    assert {row["source"] for row in kept} <= {"predicted", "explained"}
    assert any(row["teacher_label"] for row in kept), "unlabelled posts get the teacher's label"


def test_every_post_is_kept_or_quarantined_and_counted(finished: Recipe, folder: Path) -> None:
    summary = json.loads((folder / "annotate" / "summary.json").read_text())
    kept = rows(folder / "annotate" / "rationales.jsonl")
    quarantined = rows(folder / "annotate" / "quarantine.jsonl")
    train = read_corpus(finished.data, finished.labels).train
    assert not {row["id"] for row in kept} & {row["id"] for row in quarantined}
    dropped = summary["unannotated"] + summary["unlabelled"]["below_threshold"]
    assert len(kept) + len(quarantined) + dropped == summary["n"] == len(train) == 36
    sources = Counter(row["source"] for row in kept if not row["teacher_label"])
    assert (sources["predicted"], sources["explained"]) == (summary["predicted"], summary["explained"])
    assert Counter(row["reason"] for row in quarantined) == summary["quarantined"]["by_reason"]
    assert sum(row["teacher_label"] for row in kept) == summary["unlabelled"]["kept"]
    assert 0 < summary["teacher_accuracy"] <= 1


def test_the_ledger_has_each_answer_once(folder: Path) -> None:
    ledger = rows(folder / "annotate" / "ledger.jsonl")
    assert len({entry["key"] for entry in ledger}) == len(ledger)
    assert json.loads((folder / "annotate" / "summary.json").read_text())["paid"]["answers"] == len(ledger)
    assert {entry["template"] for entry in ledger} <= {"predict", "explain", "classify"}


def test_the_datasets_library_reads_the_rationales(folder: Path, tmp_path: Path) -> None:
    path = folder / "annotate" / "rationales.jsonl"
    table = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    assert len(table) == len(rows(path))
    assert {"id", "text", "label", "images", "rationale", "source", "teacher_label", "split"} <= set(table.column_names)


def test_a_recording_is_used_unchanged_and_sends_no_requests(tmp_path: Path) -> None:
    recipe = micro.read(micro.write(tmp_path, micro.RECORDED))
    chain.run(recipe, until="annotate")
    kept = rows(recipe.folder / "annotate" / "rationales.jsonl")
    recorded = [sample for sample in read_corpus(recipe.data, recipe.labels).train if sample.rationale]
    assert [(row["id"], row["rationale"]) for row in kept] == [(sample.id, sample.rationale) for sample in recorded]
    assert {row["source"] for row in kept} == {"recorded"}
    assert (recipe.folder / "annotate" / "ledger.jsonl").read_bytes() == b""
    summary = json.loads((recipe.folder / "annotate" / "summary.json").read_text())
    assert summary["recorded"] == 27
    assert summary["recording"]["test"] == {"rationales": 9, "valid": 9}


def test_answers_of_a_server_are_not_requested_again_when_the_stage_runs_again(tmp_path: Path) -> None:
    """Wrongly predicted posts are explained; a second recipe with the same server sends no requests."""

    def answer(request: ChatRequest) -> str:
        hint = request.text.partition("The sentiment is ")[2].partition(".")[0]
        return rationale(hint or "negative")

    with Server(answer=answer) as server:
        endpoint = {"base_url": server.url, "model": "big-vl", "backoff_s": 0.01}
        content = micro.RECORDED | {"annotate": {"endpoint": endpoint}}
        recipe = micro.read(micro.write(tmp_path, content))
        chain.run(recipe, until="annotate")
        summary = json.loads((recipe.folder / "annotate" / "summary.json").read_text())
        assert (summary["predicted"], summary["explained"]) == (12, 15)  # four of nine cells of the grid are negative
        assert server.paid == 27 + 15
        ledger = (recipe.folder / "annotate" / "ledger.jsonl").read_bytes()
        for changes in ({"chunk": 3}, {"retries": 0, "confidence": 0.8}):
            other = micro.read(micro.write(tmp_path, content | {"annotate": {"endpoint": endpoint} | changes}))
            assert chain.run(other, until="annotate") == ["annotate"]
            assert len(rows(recipe.folder / "annotate" / "rationales.jsonl")) == 27
        assert server.paid == 27 + 15
        assert (recipe.folder / "annotate" / "ledger.jsonl").read_bytes() == ledger


def test_after_a_failure_of_the_server_only_the_ledger_remains(tmp_path: Path) -> None:
    with Server(answer=lambda request: rationale("negative")) as server:
        server.refuse = lambda body: (401, "expired") if server.paid > 9 else None
        endpoint = {"base_url": server.url, "model": "big-vl", "concurrency": 2}
        recipe = micro.read(micro.write(tmp_path, micro.RECORDED | {"annotate": {"endpoint": endpoint, "retries": 0}}))
        with pytest.raises(RunError, match="key"):
            chain.run(recipe, until="annotate")
        assert [path.name for path in (recipe.folder / "annotate").iterdir()] == ["ledger.jsonl"]
        paid = server.paid
        assert len(rows(recipe.folder / "annotate" / "ledger.jsonl")) == paid
        server.refuse = lambda body: None
        chain.run(recipe, until="annotate")
    summary = json.loads((recipe.folder / "annotate" / "summary.json").read_text())
    assert summary["predicted"] == 12 == len(rows(recipe.folder / "annotate" / "rationales.jsonl"))
    assert summary["quarantined"]["total"] == 15 == len(rows(recipe.folder / "annotate" / "quarantine.jsonl"))
    assert summary["paid"]["answers"] == 27 + 15 == server.paid


def test_unlabelled_posts_are_skipped_by_default(tmp_path: Path) -> None:
    recipe = micro.read(micro.write(tmp_path, micro.RECORDED))
    chain.run(recipe, until="annotate")
    summary = json.loads((recipe.folder / "annotate" / "summary.json").read_text())
    assert (summary["unlabelled"]["seen"], summary["unlabelled"]["kept"]) == (9, 0)


@pytest.mark.parametrize("stage", ["annotate", "augment"])
def test_image_names_are_relative_to_the_data_root(stage: str, finished: Recipe, folder: Path) -> None:
    kept = rows(folder / stage / "rationales.jsonl")
    assert all((Path(finished.data.root) / name).is_file() for row in kept for name in row["images"])
    assert all(row["images"] and row["attributes"]["face"] for row in kept)


def test_without_any_rationale_the_stage_fails_and_only_the_ledger_remains(tmp_path: Path) -> None:
    """A content filter refuses every post."""
    with Server(script=lambda request: error("filtered", code="content_filter")) as server:
        endpoint = {"base_url": server.url, "model": "big-vl"}
        recipe = micro.read(micro.write(tmp_path, micro.RECORDED | {"annotate": {"endpoint": endpoint}}))
        message = r"^annotate: none of the 36 posts has a valid rationale \(27 filtered, 9 without a label\)$"
        with pytest.raises(RunError, match=message):
            chain.run(recipe)
    assert [path.name for path in (recipe.folder / "annotate").iterdir()] == ["ledger.jsonl"]


def test_unanswered_posts_are_named_with_the_command_that_asks_them_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Server() as server:
        server.refuse = lambda body: (400, "not this one") if server.requests in (3, 6) else None
        endpoint = {"base_url": server.url, "model": "big-vl", "concurrency": 1, "json_schema": False}
        recipe = micro.read(micro.write(tmp_path, micro.RECORDED | {"annotate": {"endpoint": endpoint}}))
        with caplog.at_level("WARNING", logger="distill"):
            chain.run(recipe, until="annotate")
        summary = recipe.folder / "annotate" / "summary.json"
        unanswered = json.loads(summary.read_text())["quarantined"]["by_reason"]["unanswered"]
        quarantine = recipe.folder / "annotate" / "quarantine.jsonl"
        assert f"{unanswered} posts got no answer; the reasons are in {quarantine}; to ask for them again, delete " in (
            caplog.text
        )
        server.refuse, paid = lambda body: None, server.paid
        summary.unlink()
        chain.run(recipe, until="annotate")
        assert unanswered == 2 and server.paid >= paid + 2
    assert len(rows(recipe.folder / "annotate" / "rationales.jsonl")) == 27

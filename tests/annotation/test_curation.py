"""Decisions about the reasoning data: the file under hostile lines and kills, and what decisions change."""

import itertools
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.annotation.curation import Decision, append, curate, digest, effective, read_decisions
from distill.errors import RunError, SettingsError
from distill.task.labels import LabelSpace
from distill.task.sample import Sample
from tests.models.openai_server import rationale

LABELS = LabelSpace()
EDIT = Decision("b", "edit", "positive", rationale("positive"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "annotate" / "curation.jsonl"


def write(path: Path, *lines: bytes | str | dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join((text.encode() if isinstance(text, str) else text) + b"\n" for text in texts))


# ---- the file ----


def test_without_a_file_there_are_no_decisions(path: Path) -> None:
    assert read_decisions(path, LABELS) == {}


def test_the_last_decision_counts_and_a_reset_removes_it(path: Path) -> None:
    for decision in (Decision("a", "drop"), Decision("b", "keep"), Decision("a", "relabel", "neutral"), EDIT):
        append(path, decision)
    found = read_decisions(path, LABELS)
    assert [item.action for item in found.values()] == ["relabel", "edit"]
    assert found["a"].label == "neutral" and found["b"].rationale == EDIT.rationale
    assert all(item.time and item.time.endswith("+00:00") for item in found.values())
    append(path, Decision("a", "reset"))
    assert list(read_decisions(path, LABELS)) == ["b"]
    assert len(path.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[1]", "is not a JSON object"),
        ("{", "is not valid JSON"),
        (b"\xff{}", "is not UTF-8"),
        ('{"id": "a", "id": "b", "action": "drop"}', "is not valid JSON: id is given twice"),
        ({"action": "drop"}, "id is missing"),
        ({"id": "", "action": "drop"}, "id is missing"),
        ({"id": 3, "action": "drop"}, "id must be text, not '3'"),
        ({"id": "a"}, "action is 'missing'; it takes keep, edit, drop, relabel, reset"),
        ({"id": "a", "action": "Drop"}, "action is 'Drop'; it takes keep"),
        ({"id": "a", "action": "relabel"}, "relabel needs a label"),
        ({"id": "a", "action": "relabel", "label": "glad"}, "unknown label 'glad'"),
        ({"id": "a", "action": "edit"}, "malformed: Text_analysis is missing"),
        ({"id": "a", "action": "edit", "label": "neutral", "rationale": rationale("positive")},
         "contradicts: predicts positive, the label is neutral"),
        ({"id": "a", "action": "drop", "note": "x"}, "'note' is no field of a decision"),
        ("[" * 100_000, "is not valid JSON"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_an_invalid_line_is_named(line: Any, reason: str, path: Path) -> None:
    write(path, {"id": "a", "action": "drop"}, "", line, {"id": "b", "action": "drop"})
    with pytest.raises(SettingsError) as raised:
        read_decisions(path, LABELS)
    assert str(raised.value).startswith(f"{path}, row 3: {reason}")
    assert str(raised.value).endswith("; correct or delete the row") and "\n" not in str(raised.value)


def test_a_line_that_a_kill_cut_is_ignored_and_replaced(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    append(path, Decision("a", "drop"))
    whole = path.read_bytes()
    append(path, Decision("ü", "relabel", "neutral"))
    line = path.read_bytes()[len(whole) :]
    for length in range(1, len(line) - 1):
        path.write_bytes(whole + line[:length])
        caplog.clear()
        assert list(read_decisions(path, LABELS)) == ["a"]
        assert caplog.messages == [f"{path} ends with an incomplete line, which is ignored"]
    append(path, Decision("b", "drop"))
    assert list(read_decisions(path, LABELS)) == ["a", "b"]
    path.write_bytes(whole + line[:-1])  # complete but for its end
    append(path, Decision("b", "drop"))
    assert list(read_decisions(path, LABELS)) == ["a", "ü", "b"]


def test_a_killed_process_loses_no_decision_that_it_reported(path: Path) -> None:
    script = f"""
from pathlib import Path
from distill.annotation.curation import Decision, append
for number in range(10**6):
    append(Path({str(path)!r}), Decision(str(number), "drop"))
    print(number, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reported = [int(line) for line in itertools.islice(process.stdout, 20)]
        process.send_signal(signal.SIGKILL)
        reported += [int(line) for line in process.stdout]
    found = read_decisions(path, LABELS)
    assert set(map(str, reported)) <= set(found) and len(found) <= len(reported) + 1


def test_a_file_that_cannot_be_written_is_named(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(RunError, match=r"the decision cannot be written to .*curation\.jsonl: Is a directory"):
        append(path, Decision("a", "drop"))
    with pytest.raises(SettingsError, match=r"curation\.jsonl cannot be read: Is a directory"):
        read_decisions(path, LABELS)


# ---- what it changes ----


def test_the_digest_is_that_of_the_decisions_that_change_data() -> None:
    drop, keep = Decision("a", "drop", time="2026"), Decision("c", "keep")
    assert digest({}) is None and digest({"c": keep}) is None
    assert digest({"a": drop, "b": EDIT}) == digest({"b": EDIT, "c": keep, "a": Decision("a", "drop", time="2027")})
    others = [{"a": drop}, {"b": EDIT}, {"a": Decision("a", "relabel", "neutral")}]
    others += [{"a": Decision("a", "relabel", "positive")}, {"b": Decision("b", "edit", None, EDIT.rationale)}]
    assert len({digest(item) for item in others}) == len(others)
    assert effective({"a": drop, "c": keep}) == {"a": drop}


def test_posts_are_dropped_relabelled_and_edited() -> None:
    posts = [Sample(name, name, label="neutral") for name in "abcd"] + [Sample("e", "e"), Sample("f", "f")]
    decisions = {
        "a": Decision("a", "drop"),
        "b": EDIT,
        "c": Decision("c", "relabel", "negative"),
        "d": Decision("d", "keep"),
        "e": Decision("e", "edit", None, rationale("positive", "This is labeled as positive.")),
        "z": Decision("z", "drop"),
    }
    found = curate(posts, decisions, LABELS)
    assert [(post.id, post.label) for post in found.posts] == [
        ("b", "positive"), ("c", "negative"), ("d", "neutral"), ("e", "positive"), ("f", None),
    ]  # fmt: skip
    assert {name: item.prediction for name, item in found.edits.items()} == {"b": "positive", "e": "positive"}
    assert found.counts == {"edited": 2, "dropped": 1, "relabelled": 1}
    assert found.unknown == ["z"]


def test_an_edit_without_a_label_must_argue_for_the_gold_one() -> None:
    edit = Decision("a", "edit", None, rationale("positive"), row=7)
    with pytest.raises(SettingsError, match=r"^annotate/curation\.jsonl, row 7: contradicts: predicts positive"):
        curate([Sample("a", "a", label="negative")], {"a": edit}, LABELS)


def test_ten_thousand_decisions_are_read_at_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    write(path, *({"id": str(n % 5000), "action": "drop" if n < 5000 else "keep"} for n in range(10_000)))
    assert {item.action for item in read_decisions(path, LABELS).values()} == {"keep"} and not caplog.messages

"""The annotation protocol, with scripted teachers and against a server that fails as servers do."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.annotation.annotate import AnnotateSettings, Kept, Quarantined, Tally, annotate
from distill.annotation.ledger import Ledger
from distill.errors import RunError, SettingsError
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.models.reasoner import Answer, ClassScores, Sampling
from distill.task.labels import LabelSpace
from distill.task.sample import Sample
from tests.models.openai_server import COLOURS, Question, Server, picture, rationale, token

LABELS = LabelSpace()
ROOT = Path(__file__).parents[2]

Script = Callable[[Sample, str, int], Answer]


def right(label: str) -> Answer:
    return Answer(rationale(label), True, 10, 5)


class Scripted:
    """A teacher that follows a script, and remembers what it was asked: (id, template, attempt, temperature)."""

    name = "scripted"

    def __init__(self, script: Script, probabilities: dict[str, list[float]] | None = None) -> None:
        self.script = script
        self.probabilities = probabilities or {}
        self.asked: list[tuple[str, str, int, float]] = []
        self.sizes: list[int] = []

    def classify(self, samples: Sequence[Sample], earlier: object = None) -> ClassScores:
        self.asked += [(sample.id, "classify", 0, 0.0) for sample in samples]
        return ClassScores(np.array([self.probabilities[sample.id] for sample in samples]), np.ones(len(samples)))

    def reason(
        self, samples: Sequence[Sample], template: str = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        self.sizes.append(len(samples))
        for index, sample in reversed(list(enumerate(samples))):
            self.asked.append((sample.id, template, sampling.attempt, sampling.temperature))
            yield index, self.script(sample, template, sampling.attempt)


@dataclass
class Annotated:
    """All that came of the samples."""

    kept: list[Kept]
    quarantined: list[Quarantined]
    summary: dict[str, Any]


def run(
    folder: Path, samples: Iterable[Sample], teacher: Any, progress: Any = None, **settings: Any
) -> tuple[Annotated, dict[str, Any]]:
    tally = Tally()
    with Ledger(folder / "ledger.jsonl") as ledger:
        found = list(annotate(samples, LABELS, teacher, AnnotateSettings(**settings), ledger, tally, progress))
    kept = [item for item in found if isinstance(item, Kept)]
    quarantined = [item for item in found if isinstance(item, Quarantined)]
    return Annotated(kept, quarantined, tally.summary), tally.summary


def one(folder: Path, script: Script, sample: Sample | None = None, **settings: Any) -> tuple[Annotated, Scripted]:
    teacher = Scripted(script)
    return run(folder, [sample or Sample("s", "words", label="positive")], teacher, **settings)[0], teacher


# ---- the protocol ----


def test_a_right_prediction_is_kept(tmp_path: Path) -> None:
    done, teacher = one(tmp_path, lambda sample, template, attempt: right("positive"))
    kept = done.kept[0]
    assert (kept.source, kept.label, kept.teacher_label, kept.rationale.prediction) == (
        "predicted", "positive", False, "positive",
    )  # fmt: skip
    assert teacher.asked == [("s", "predict", 0, 0.0)]
    assert done.summary["teacher_accuracy"] == 1.0


def test_a_wrong_prediction_is_explained_and_not_predicted_again(tmp_path: Path) -> None:
    done, teacher = one(tmp_path, lambda s, template, a: right("negative" if template == "predict" else "positive"))
    assert [item.source for item in done.kept] == ["explained"]
    assert teacher.asked == [("s", "predict", 0, 0.0), ("s", "explain", 0, 0.0)]
    assert (done.summary["explained"], done.summary["retried"], done.summary["teacher_accuracy"]) == (1, 0, 0.0)


def test_an_invalid_answer_is_asked_again_with_rising_temperature(tmp_path: Path) -> None:
    done, teacher = one(
        tmp_path, lambda s, t, attempt: right("positive") if attempt == 2 else Answer("?", True), temperature=0.1
    )
    assert [item.source for item in done.kept] == ["predicted"]
    assert teacher.asked == [("s", "predict", 0, 0.1), ("s", "predict", 1, 0.4), ("s", "predict", 2, 0.7)]
    # The teacher's accuracy is that of its first answers.
    assert (done.summary["retried"], done.summary["teacher_accuracy"]) == (1, 0.0)


def test_a_wrong_prediction_after_a_retry_is_explained_from_the_first_temperature(tmp_path: Path) -> None:
    def script(sample: Sample, template: str, attempt: int) -> Answer:
        if template == "explain":
            return right("positive") if attempt == 1 else right("neutral")
        return Answer("?", True) if attempt == 0 else right("negative")

    done, teacher = one(tmp_path, script)
    assert [item.source for item in done.kept] == ["explained"]
    assert [asked[1:3] for asked in teacher.asked] == [("predict", 0), ("predict", 1), ("explain", 0), ("explain", 1)]


@pytest.mark.parametrize(
    ("template", "answer", "reason"),
    [
        ("predict", Answer("no idea", True), "malformed"),
        ("predict", Answer(rationale("positive"), False), "unfinished"),
        ("predict", Answer(rationale("positive", "the post is labeled as such"), True), "leaks"),
        ("explain", right("negative"), "contradicts"),
        ("explain", Answer(rationale("positive", "as the given label says"), True), "leaks"),
    ],
)
def test_after_all_retries_a_sample_is_quarantined_with_its_reason(
    tmp_path: Path, template: str, answer: Answer, reason: str
) -> None:
    done, teacher = one(
        tmp_path,
        lambda s, asked, a: right("neutral") if (asked, template) == ("predict", "explain") else answer,
        retries=2,
    )
    assert done.kept == []
    assert [(item.id, item.reason, item.answer) for item in done.quarantined] == [("s", reason, answer.text)]
    assert done.quarantined[0].detail and not done.quarantined[0].detail.startswith(reason)
    assert [asked[2] for asked in teacher.asked if asked[1] == template] == [0, 1, 2]
    assert done.summary["quarantined"] == {"total": 1, "by_reason": {reason: 1}}


def test_a_leaking_or_cut_first_answer_counts_for_accuracy_by_what_it_predicts(tmp_path: Path) -> None:
    leaks = Answer(rationale("positive", "she is known to be kind"), True)
    assert one(tmp_path / "a", lambda s, t, a: leaks)[0].summary["teacher_accuracy"] == 1.0
    cut = Answer(rationale("positive"), False)
    assert one(tmp_path / "b", lambda s, t, a: cut)[0].summary["teacher_accuracy"] == 0.0


def test_a_sample_without_an_answer_is_quarantined_and_asked_in_the_next_run(tmp_path: Path) -> None:
    done, teacher = one(tmp_path, lambda s, t, a: Answer("", False, error="refused: policy"))
    assert (done.quarantined[0].reason, done.quarantined[0].detail) == ("unanswered", "refused: policy")
    assert len(teacher.asked) == 1
    assert done.summary["teacher_accuracy"] is None
    assert done.summary["paid"]["answers"] == 0
    again, teacher = one(tmp_path, lambda s, t, a: right("positive"))
    assert len(again.kept) == 1


def test_rounds_are_large_and_results_keep_the_order_of_the_samples(tmp_path: Path) -> None:
    samples = [Sample(f"s{i}", f"post {i}", label=LABELS.names[i % 3]) for i in range(30)]
    seen: list[tuple[int, int]] = []
    teacher = Scripted(lambda s, template, a: right("positive" if template == "predict" else str(s.label)))
    done, summary = run(tmp_path, samples, teacher, lambda settled, total: seen.append((settled, total)), chunk=12)
    assert teacher.sizes == [12, 12, 6, 12, 8]
    assert [item.sample.id for item in done.kept] == [sample.id for sample in samples]
    assert (summary["n"], summary["predicted"], summary["explained"]) == (30, 10, 20)
    assert summary["teacher_accuracy"] == pytest.approx(1 / 3)
    assert summary["paid"] == {"answers": 50, "prompt_tokens": 500, "completion_tokens": 250, "cost": None}
    assert seen == [(settled, 30) for settled in range(1, 31)]


def test_a_second_run_asks_nothing_and_says_the_same(tmp_path: Path) -> None:
    samples = [Sample(f"s{i}", f"post {i}", label=LABELS.names[i % 3]) for i in range(9)]

    def script(sample: Sample, template: str, attempt: int) -> Answer:
        return right(str(sample.label)) if attempt else Answer("?", True)

    first, again = Scripted(script), Scripted(script)
    assert run(tmp_path, samples, first)[0] == run(tmp_path, samples, again)[0]
    assert (len(first.asked), again.asked) == (18, [])


def test_more_retries_later_pay_only_for_the_further_ones(tmp_path: Path) -> None:
    def script(sample: Sample, template: str, attempt: int) -> Answer:
        return right("positive") if attempt == 3 else Answer("?", True)

    assert one(tmp_path, script, retries=1)[0].quarantined
    done, teacher = one(tmp_path, script, retries=3)
    assert len(done.kept) == 1
    assert [asked[2] for asked in teacher.asked] == [2, 3]


@pytest.mark.parametrize("label", ["angry", 1.5])
def test_an_unknown_label_is_refused_with_the_sample(tmp_path: Path, label: Any) -> None:
    with pytest.raises(SettingsError, match=r"sample s7: unknown label .*negative, neutral, positive"):
        one(tmp_path, lambda s, t, a: right("positive"), Sample("s7", "words", label=label))


@pytest.mark.parametrize("field", ["retries", "temperature", "confidence", "chunk", "max_new_tokens"])
def test_impossible_settings(field: str) -> None:
    with pytest.raises(SettingsError, match=f"annotate.{field}"):
        AnnotateSettings(**{field: -1})


# ---- recordings ----


def recordings() -> list[Sample]:
    return [
        Sample("good", "a", label="positive", rationale=rationale("positive")),
        Sample("wrong", "b", label="positive", rationale=rationale("negative")),
        Sample("broken", "c", label="positive", rationale="Prediction: positive"),
        Sample("none", "d", label="positive"),
    ]


def test_recordings_are_held_against_the_same_rules(tmp_path: Path) -> None:
    done, summary = run(tmp_path, recordings(), None, recorded=True)
    assert [(item.sample.id, item.source) for item in done.kept] == [("good", "recorded")]
    assert [(item.id, item.reason) for item in done.quarantined] == [("wrong", "contradicts"), ("broken", "malformed")]
    assert summary["recorded_defects"] == {"contradicts": 1, "malformed": 1}
    assert (summary["recorded"], summary["unannotated"], summary["teacher_accuracy"]) == (1, 1, None)


def test_a_teacher_explains_invalid_recordings_and_predicts_missing_ones(tmp_path: Path) -> None:
    teacher = Scripted(lambda s, t, a: right("positive"))
    done, summary = run(tmp_path, recordings(), teacher, recorded=True)
    assert [item.source for item in done.kept] == ["recorded", "explained", "explained", "predicted"]
    assert sorted(asked[:2] for asked in teacher.asked) == [
        ("broken", "explain"), ("none", "predict"), ("wrong", "explain"),
    ]  # fmt: skip
    assert (summary["recorded"], summary["explained"], summary["predicted"]) == (1, 2, 1)
    assert summary["recorded_defects"] == {"contradicts": 1, "malformed": 1}
    assert summary["teacher_accuracy"] == 1.0


def test_recordings_are_not_looked_at_unless_asked_for(tmp_path: Path) -> None:
    assert run(tmp_path, recordings(), None)[1]["unannotated"] == 4


def test_the_released_rationales_of_twitter15(tmp_path: Path) -> None:
    data = ROOT.parent / "shared" / "data" / "twitter15"
    files = sorted(data.glob("*.jsonl")) if data.is_dir() else []
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    rows = [row for row in rows if row.get("rationale") and row.get("label") in LABELS.names]
    if not rows:
        pytest.skip("the Twitter-2015 rationales are not beside the repository")
    samples = [
        Sample(f"{i}", row["text"], label=row["label"], rationale=row["rationale"]) for i, row in enumerate(rows)
    ]
    done, summary = run(tmp_path, samples, None, recorded=True)
    assert summary["recorded"] + summary["quarantined"]["total"] == summary["n"] == len(rows)
    assert 0.9 < summary["recorded"] / len(rows) < 1
    assert all(item.rationale.prediction == item.label for item in done.kept)


# ---- posts without a label ----


def test_unlabelled_posts_are_skipped_by_default(tmp_path: Path) -> None:
    teacher = Scripted(lambda s, t, a: right("positive"))
    done, summary = run(tmp_path, [Sample("u", "words")], teacher)
    assert (done.kept, done.quarantined, teacher.asked) == ([], [], [])
    assert summary["unlabelled"] == {"seen": 1, "kept": 0, "quarantined": 0, "below_threshold": 0}


def test_confident_predictions_label_what_nobody_labelled(tmp_path: Path) -> None:
    samples = [
        Sample("sure", "a"),
        Sample("unsure", "b"),
        Sample("torn", "c"),  # classified as positive, and yet the rationale argues for negative
        Sample("late", "d"),  # agrees at the second try
        Sample("gold", "e", label="neutral"),
    ]
    probabilities = {"sure": [0.95, 0.03, 0.02], "unsure": [0.6, 0.3, 0.1], "torn": [0, 0.1, 0.9], "late": [0, 1, 0]}

    def script(sample: Sample, template: str, attempt: int) -> Answer:
        assert template == "predict" and sample.id != "unsure"
        late = "neutral" if attempt == 1 else "positive"
        return right({"sure": "negative", "torn": "negative", "late": late, "gold": "neutral"}[sample.id])

    teacher = Scripted(script, probabilities)
    done, summary = run(tmp_path, samples, teacher, unlabelled="keep_confident", confidence=0.9, retries=2)
    assert [(item.sample.id, item.label, item.source, item.teacher_label) for item in done.kept] == [
        ("sure", "negative", "predicted", True),
        ("late", "neutral", "predicted", True),
        ("gold", "neutral", "predicted", False),
    ]
    assert [(item.id, item.reason) for item in done.quarantined] == [("torn", "contradicts")]
    assert [asked[2] for asked in teacher.asked if asked[:2] == ("torn", "predict")] == [0, 1, 2]
    assert summary["unlabelled"] == {"seen": 4, "kept": 2, "quarantined": 1, "below_threshold": 1}
    # The teacher is not praised for agreeing with itself.
    assert (summary["predicted"], summary["teacher_accuracy"]) == (1, 1.0)
    again = Scripted(script, probabilities)
    assert run(tmp_path, samples, again, unlabelled="keep_confident", confidence=0.9, retries=2)[0] == done
    assert again.asked == []


# ---- a remote teacher ----

FAILURES = {"429": 0.10, "500": 0.05, "truncated": 0.05, "malformed": 0.03, "broken": 0.02}


def remote(url: str, **settings: Any) -> Endpoint:
    fast = {"backoff_s": 0.002, "max_attempts": 30, "concurrency": 16, "prompt_price": 1.0, "completion_price": 10.0}
    return Endpoint(EndpointSettings(url, "big-vl", **(fast | settings)), LABELS)


def posts(folder: Path, count: int) -> list[Sample]:
    """Posts with a tiny picture each; of every fifth the picture says something else than the label."""
    names = list(COLOURS)
    shown = [picture(folder / f"{i}.png", names[(i + (i % 5 == 0)) % 3], 4 + i % 9) for i in range(count)]
    return [Sample(f"s{i}", f"post {i}", (shown[i],), label=names[i % 3]) for i in range(count)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_500_rows_from_a_server_that_fails(tmp_path: Path) -> None:
    samples = posts(tmp_path, 500)
    with Server(rates=FAILURES) as server:
        done, summary = run(tmp_path, samples, remote(server.url))
        assert all(server.sent[kind] > 0 for kind in FAILURES)
        asked = server.requests
        again, _ = run(tmp_path, samples, remote(server.url))
        assert server.requests == asked
    assert again == done
    settled = {item.sample.id for item in done.kept} | {item.id for item in done.quarantined}
    assert settled == {sample.id for sample in samples} and len(done.kept) + len(done.quarantined) == 500
    assert all(item.reason and item.detail for item in done.quarantined)
    assert all(item.rationale.prediction == item.sample.label for item in done.kept)
    assert len(done.kept) > 490 and summary["retried"] > 20
    assert 95 <= summary["explained"] <= 100  # of every fifth post the picture misleads
    assert summary["teacher_accuracy"] == pytest.approx(0.8 * 0.75 / 0.83, abs=0.1)  # 0.83 is paid, 0.75 valid
    written = lines(tmp_path)
    assert len(written) == len({line["key"] for line in written}) == server.paid == summary["paid"]["answers"]
    assert summary["paid"]["cost"] == pytest.approx(server.paid * (100 * 1.0 + 10 * 10.0) / 1e6)


def test_a_crash_loses_only_what_was_in_flight(tmp_path: Path) -> None:
    samples = posts(tmp_path, 150)
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.annotation.test_annotate import remote, run, Sample, LABELS
samples = [Sample(f"s{{i}}", f"post {{i}}", (Path({str(tmp_path)!r}, f"{{i}}.png"),), label=LABELS.names[i % 3])
           for i in range(150)]
run(Path({str(tmp_path)!r}), samples, remote(sys.argv[1], concurrency=8))
"""
    with Server(rates=FAILURES, delay_s=0.01) as server:
        for enough in (30, 90):
            child = subprocess.Popen([sys.executable, "-c", program, server.url], cwd=ROOT)
            while server.paid < enough and child.poll() is None:
                time.sleep(0.002)
            child.kill()
            assert child.wait() == -signal.SIGKILL
        time.sleep(0.1)
        lost = server.paid - (tmp_path / "ledger.jsonl").read_bytes().count(b"\n")
        assert 0 <= lost <= 2 * 8
        before, kept = server.paid, server.paid - lost
        done, summary = run(tmp_path, samples, remote(server.url))
        assert server.paid - before == len(lines(tmp_path)) - kept
    assert len(done.kept) + len(done.quarantined) == 150
    assert len({line["key"] for line in lines(tmp_path)}) == len(lines(tmp_path)) == server.paid - lost
    assert summary["paid"]["answers"] == len(lines(tmp_path))


@pytest.mark.parametrize("knows", ["log-probabilities", "answers alone"])
def test_remote_probabilities_are_paid_once(tmp_path: Path, knows: str) -> None:
    samples = [replace(sample, label=None) for sample in posts(tmp_path, 12)]

    def logprobs(question: Question) -> list[dict[str, Any]]:
        return [token(question.sentiment, **(dict.fromkeys(COLOURS, 0.02) | {question.sentiment: 0.96}))]

    settings = {"unlabelled": "keep_confident", "confidence": 0.85}
    with Server(logprobs=logprobs if knows == "log-probabilities" else lambda question: None) as server:
        done, summary = run(tmp_path, samples, remote(server.url), **settings)
        asked = server.requests
        assert run(tmp_path, samples, remote(server.url), **settings)[0] == done
        assert server.requests == asked
    assert summary["unlabelled"] == {"seen": 12, "kept": 12, "quarantined": 0, "below_threshold": 0}
    assert [item.label for item in done.kept] == [list(COLOURS)[(i + (i % 5 == 0)) % 3] for i in range(12)]
    assert summary["paid"]["prompt_tokens"] == 100 * server.paid
    assert Counter(line["template"] for line in lines(tmp_path)) == {"classify": 12, "predict": 12}


def test_an_endpoint_that_dies_loses_nothing_that_was_paid(tmp_path: Path) -> None:
    samples = posts(tmp_path, 60)
    with Server() as server:
        server.refuse = lambda body: (503, "gone") if server.paid > 20 else None
        with pytest.raises(RunError, match="in a row"):
            run(tmp_path, samples, remote(server.url, max_attempts=2))
        time.sleep(0.1)
        assert len(lines(tmp_path)) == server.paid > 20
        server.refuse = lambda body: None
        done, _ = run(tmp_path, samples, remote(server.url))
        assert len(done.kept) == 60
        assert len(lines(tmp_path)) == server.paid


def test_a_refused_classification_is_quarantined_and_not_paid(tmp_path: Path) -> None:
    samples = [replace(sample, label=None) for sample in posts(tmp_path, 2)]
    with Server(refuse=lambda body: (400, "policy") if "post 1" in str(body) else None) as server:
        done, summary = run(tmp_path, samples, remote(server.url), unlabelled="keep_confident", confidence=0.8)
    assert [(item.id, item.reason) for item in done.quarantined] == [("s1", "unanswered")]
    assert summary["unlabelled"] == {"seen": 2, "kept": 1, "quarantined": 1, "below_threshold": 0}
    assert [line["id"] for line in lines(tmp_path)] == ["s0", "s0"]

"""The annotation protocol with scripted teachers."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.annotation.annotate import AnnotateSettings, AnnotationCounts, Kept, Quarantined, annotate
from distill.annotation.ledger import Ledger
from distill.errors import SettingsError
from distill.models.reasoner import Answer, ClassScores, Sampling
from distill.task.labels import LabelSpace
from distill.task.sample import Sample
from tests.models.openai_server import rationale

LABELS = LabelSpace()
ROOT = Path(__file__).parents[2]

Script = Callable[[Sample, str, int], Answer]


def right(label: str) -> Answer:
    return Answer(rationale(label), True, 10, 5)


class Scripted:
    """A teacher that answers by a script; `asked` records (id, template, attempt, temperature) of each request."""

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
    """The results and the summary."""

    kept: list[Kept]
    quarantined: list[Quarantined]
    summary: dict[str, Any]


def run(
    folder: Path, samples: Iterable[Sample], teacher: Any, progress: Any = None, **settings: Any
) -> tuple[Annotated, dict[str, Any]]:
    counts = AnnotationCounts()
    with Ledger(folder / "ledger.jsonl") as ledger:
        results = list(annotate(samples, LABELS, teacher, AnnotateSettings(**settings), ledger, counts, progress))
    kept = [item for item in results if isinstance(item, Kept)]
    quarantined = [item for item in results if isinstance(item, Quarantined)]
    return Annotated(kept, quarantined, counts.summary), counts.summary


def one(folder: Path, script: Script, sample: Sample | None = None, **settings: Any) -> tuple[Annotated, Scripted]:
    teacher = Scripted(script)
    return run(folder, [sample or Sample("s", "words", label="positive")], teacher, **settings)[0], teacher


# ---- the protocol ----


def test_a_correct_prediction_is_kept(tmp_path: Path) -> None:
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


def test_an_invalid_answer_is_retried_at_a_higher_temperature(tmp_path: Path) -> None:
    done, teacher = one(
        tmp_path, lambda s, t, attempt: right("positive") if attempt == 2 else Answer("?", True), temperature=0.1
    )
    assert [item.source for item in done.kept] == ["predicted"]
    assert teacher.asked == [("s", "predict", 0, 0.1), ("s", "predict", 1, 0.4), ("s", "predict", 2, 0.7)]
    # Only first answers count for the accuracy.
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


def test_for_accuracy_a_leaking_first_answer_is_correct_and_an_unfinished_one_is_not(tmp_path: Path) -> None:
    leaks = Answer(rationale("positive", "she is known to be kind"), True)
    assert one(tmp_path / "a", lambda s, t, a: leaks)[0].summary["teacher_accuracy"] == 1.0
    unfinished = Answer(rationale("positive"), False)
    assert one(tmp_path / "b", lambda s, t, a: unfinished)[0].summary["teacher_accuracy"] == 0.0


def test_an_unanswered_sample_is_quarantined_and_requested_in_the_next_run(tmp_path: Path) -> None:
    done, teacher = one(tmp_path, lambda s, t, a: Answer("", False, error="refused: policy"))
    assert (done.quarantined[0].reason, done.quarantined[0].detail) == ("unanswered", "refused: policy")
    assert len(teacher.asked) == 1
    assert done.summary["teacher_accuracy"] is None
    assert done.summary["paid"]["answers"] == 0
    again, teacher = one(tmp_path, lambda s, t, a: right("positive"))
    assert len(again.kept) == 1


def test_batches_are_large_and_results_keep_the_sample_order(tmp_path: Path) -> None:
    samples = [Sample(f"s{i}", f"post {i}", label=LABELS.names[i % 3]) for i in range(30)]
    reported: list[tuple[int, int]] = []
    teacher = Scripted(lambda s, template, a: right("positive" if template == "predict" else str(s.label)))
    done, summary = run(tmp_path, samples, teacher, lambda count, total: reported.append((count, total)), chunk=12)
    assert teacher.sizes == [12, 12, 6, 12, 8]
    assert [item.sample.id for item in done.kept] == [sample.id for sample in samples]
    assert (summary["n"], summary["predicted"], summary["explained"]) == (30, 10, 20)
    assert summary["teacher_accuracy"] == pytest.approx(1 / 3)
    assert summary["paid"] == {"answers": 50, "prompt_tokens": 500, "completion_tokens": 250, "cost": None}
    assert reported == [(count, 30) for count in range(1, 31)]


def test_a_second_run_requests_nothing_and_returns_the_same(tmp_path: Path) -> None:
    samples = [Sample(f"s{i}", f"post {i}", label=LABELS.names[i % 3]) for i in range(9)]

    def script(sample: Sample, template: str, attempt: int) -> Answer:
        return right(str(sample.label)) if attempt else Answer("?", True)

    first, again = Scripted(script), Scripted(script)
    assert run(tmp_path, samples, first)[0] == run(tmp_path, samples, again)[0]
    assert (len(first.asked), again.asked) == (18, [])


def test_a_higher_retry_limit_requests_only_the_additional_answers(tmp_path: Path) -> None:
    def script(sample: Sample, template: str, attempt: int) -> Answer:
        return right("positive") if attempt == 3 else Answer("?", True)

    assert one(tmp_path, script, retries=1)[0].quarantined
    done, teacher = one(tmp_path, script, retries=3)
    assert len(done.kept) == 1
    assert [asked[2] for asked in teacher.asked] == [2, 3]


@pytest.mark.parametrize("label", ["angry", 1.5])
def test_an_unknown_label_is_an_error_that_names_the_sample(tmp_path: Path, label: Any) -> None:
    with pytest.raises(SettingsError, match=r"sample s7: unknown label .*negative, neutral, positive"):
        one(tmp_path, lambda s, t, a: right("positive"), Sample("s7", "words", label=label))


@pytest.mark.parametrize("field", ["retries", "temperature", "confidence", "chunk", "max_new_tokens"])
def test_invalid_settings(field: str) -> None:
    with pytest.raises(SettingsError, match=f"^{field} is -1; it takes"):
        AnnotateSettings(**{field: -1})


# ---- rationales in the data set ----


def recorded_samples() -> list[Sample]:
    return [
        Sample("good", "a", label="positive", rationale=rationale("positive")),
        Sample("wrong", "b", label="positive", rationale=rationale("negative")),
        Sample("broken", "c", label="positive", rationale="Prediction: positive"),
        Sample("none", "d", label="positive"),
    ]


def test_recorded_rationales_are_checked_by_the_same_rules(tmp_path: Path) -> None:
    done, summary = run(tmp_path, recorded_samples(), None, recorded=True)
    assert [(item.sample.id, item.source) for item in done.kept] == [("good", "recorded")]
    assert [(item.id, item.reason) for item in done.quarantined] == [("wrong", "contradicts"), ("broken", "malformed")]
    assert summary["recorded_defects"] == {"contradicts": 1, "malformed": 1}
    assert (summary["recorded"], summary["unannotated"], summary["teacher_accuracy"]) == (1, 1, None)


def test_a_teacher_explains_invalid_recorded_rationales_and_predicts_missing_ones(tmp_path: Path) -> None:
    teacher = Scripted(lambda s, t, a: right("positive"))
    done, summary = run(tmp_path, recorded_samples(), teacher, recorded=True)
    assert [item.source for item in done.kept] == ["recorded", "explained", "explained", "predicted"]
    assert sorted(asked[:2] for asked in teacher.asked) == [
        ("broken", "explain"), ("none", "predict"), ("wrong", "explain"),
    ]  # fmt: skip
    assert (summary["recorded"], summary["explained"], summary["predicted"]) == (1, 2, 1)
    assert summary["recorded_defects"] == {"contradicts": 1, "malformed": 1}
    assert summary["teacher_accuracy"] == 1.0


def test_recorded_rationales_are_ignored_by_default(tmp_path: Path) -> None:
    assert run(tmp_path, recorded_samples(), None)[1]["unannotated"] == 4


def test_the_released_rationales_of_twitter15(tmp_path: Path) -> None:
    data = ROOT.parent / "shared" / "data" / "twitter15"
    files = sorted(data.glob("*.jsonl")) if data.is_dir() else []
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    rows = [row for row in rows if row.get("rationale") and row.get("label") in LABELS.names]
    if not rows:
        pytest.skip("the Twitter-2015 rationales are not available")
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


def test_confident_predictions_label_unlabelled_posts(tmp_path: Path) -> None:
    samples = [
        Sample("sure", "a"),
        Sample("unsure", "b"),
        Sample("inconsistent", "c"),  # classified as positive, but the rationale predicts negative
        Sample("retried", "d"),  # consistent in the second attempt
        Sample("gold", "e", label="neutral"),
    ]
    probabilities = {
        "sure": [0.95, 0.03, 0.02],
        "unsure": [0.6, 0.3, 0.1],
        "inconsistent": [0, 0.1, 0.9],
        "retried": [0, 1, 0],
    }

    def script(sample: Sample, template: str, attempt: int) -> Answer:
        assert template == "predict" and sample.id != "unsure"
        retried = "neutral" if attempt == 1 else "positive"
        return right({"sure": "negative", "inconsistent": "negative", "retried": retried, "gold": "neutral"}[sample.id])

    teacher = Scripted(script, probabilities)
    done, summary = run(tmp_path, samples, teacher, unlabelled="keep_confident", confidence=0.9, retries=2)
    assert [(item.sample.id, item.label, item.source, item.teacher_label) for item in done.kept] == [
        ("sure", "negative", "predicted", True),
        ("retried", "neutral", "predicted", True),
        ("gold", "neutral", "predicted", False),
    ]
    assert [(item.id, item.reason) for item in done.quarantined] == [("inconsistent", "contradicts")]
    assert [asked[2] for asked in teacher.asked if asked[:2] == ("inconsistent", "predict")] == [0, 1, 2]
    assert summary["unlabelled"] == {"seen": 4, "kept": 2, "quarantined": 1, "below_threshold": 1}
    # Posts with a teacher label do not count for the accuracy.
    assert (summary["predicted"], summary["teacher_accuracy"]) == (1, 1.0)
    again = Scripted(script, probabilities)
    assert run(tmp_path, samples, again, unlabelled="keep_confident", confidence=0.9, retries=2)[0] == done
    assert again.asked == []

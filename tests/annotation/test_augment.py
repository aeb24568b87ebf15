"""Self-augmentation: only correct rationales are kept, and no answer is requested twice."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.annotation.augment import AugmentSettings, augment, select
from distill.annotation.ledger import Ledger
from distill.errors import RunError
from distill.models.reasoner import Answer, ClassScores, Sampling
from distill.task.labels import LabelSpace
from distill.task.prompts import Template
from distill.task.rationale import Rationale
from distill.task.sample import Sample
from tests.models.openai_server import rationale

LABELS = LabelSpace()
POSTS = [Sample(f"p{n}", f"post {n}", label=LABELS.names[n % 3]) for n in range(12)]


class Assistant:
    """Returns `answers` by sample id, otherwise `positive`. Fails before its answer number `fails_at`."""

    name = "assistant"

    def __init__(self, fails_at: int | None = None, **answers: Answer) -> None:
        self.answers = answers
        self.fails_at = fails_at
        self.asked: list[str] = []
        self.sampling: set[tuple[Template, Sampling]] = set()

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        self.sampling.add((template, sampling))
        for index, sample in enumerate(samples):
            if len(self.asked) == self.fails_at:
                raise RunError("killed")
            self.asked.append(sample.id)
            yield index, self.answers.get(sample.id, Answer(rationale("positive"), finished=True))

    def classify(self, samples: Sequence[Sample], earlier: object = None) -> ClassScores:
        raise AssertionError("classify must not be called")


def run(
    ledger: Ledger, assistant: Assistant, settings: AugmentSettings | None = None, progress: Any = None
) -> tuple[list[tuple[Sample, Rationale]], Counter[str]]:
    dropped: Counter[str] = Counter()
    results = augment(POSTS, LABELS, assistant, settings or AugmentSettings(), ledger, dropped, progress)
    return list(results), dropped


def test_only_correct_complete_and_valid_rationales_are_kept(tmp_path: Path) -> None:
    assistant = Assistant(
        p2=Answer(rationale("positive"), finished=False),
        p5=Answer("I would rather not say.", finished=True),
        p8=Answer(rationale("positive", "the post is labeled as positive"), finished=True),
        p0=Answer(rationale("negative", "plainly bad"), finished=True),
    )
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        kept, dropped = run(ledger, assistant)
    assert [(sample.id, item.prediction) for sample, item in kept] == [("p0", "negative"), ("p11", "positive")]
    assert kept[0][0] is POSTS[0] and kept[0][1].texts[0] == "plainly bad"
    assert dropped == {"unfinished": 1, "malformed": 1, "leaks": 1, "contradicts": 7}


def test_the_reason_template_and_the_sampling_settings_are_used(tmp_path: Path) -> None:
    assistant = Assistant()
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        run(ledger, assistant)
    assert assistant.sampling == {("reason", Sampling(0.7, 512))}
    assert assistant.asked == [post.id for post in POSTS]


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_a_failed_stage_resumes_with_the_unanswered_posts(tmp_path: Path, chunk: int) -> None:
    settings = AugmentSettings(chunk=chunk)
    path = tmp_path / "ledger.jsonl"
    first = Assistant(fails_at=7)
    with Ledger(path) as ledger, pytest.raises(RunError, match="killed"):
        run(ledger, first, settings)
    second = Assistant()
    with Ledger(path) as ledger:
        kept, dropped = run(ledger, second, settings)
    assert first.asked + second.asked == [post.id for post in POSTS]
    assert len(path.read_text().splitlines()) == 12
    assert [sample.id for sample, _ in kept] == ["p2", "p5", "p8", "p11"] and dropped == {"contradicts": 8}
    third = Assistant()
    with Ledger(path) as ledger:
        assert run(ledger, third, settings) == (kept, dropped)
    assert third.asked == []


def test_progress_is_reported(tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        run(ledger, Assistant(), progress=lambda done, total: reported.append((done, total)))
    assert reported == [(done, 12) for done in range(1, 13)]


def test_a_limited_number_of_posts_is_evenly_spaced() -> None:
    def ids(posts: int | None) -> list[str]:
        return [post.id for post in select(POSTS, AugmentSettings(posts=posts))]

    everything = [post.id for post in POSTS]
    assert ids(None) == ids(12) == ids(100) == everything
    assert ids(4) == ["p0", "p3", "p6", "p9"] and ids(1) == ["p0"]
    assert len(set(ids(5))) == 5 and ids(5) == sorted(ids(5), key=everything.index)
    assert select([], AugmentSettings(posts=3)) == []

"""Self-written rationales: only right ones stay, and what was asked is not asked again."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.annotation.augment import AugmentSettings, augment
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
    """Answers as `answers` says by id; says `positive` about everything else. Dies before it answers `dies_at`."""

    name = "assistant"

    def __init__(self, dies_at: int | None = None, **answers: Answer) -> None:
        self.answers = answers
        self.dies_at = dies_at
        self.asked: list[str] = []
        self.sampling: set[tuple[Template, Sampling]] = set()

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        self.sampling.add((template, sampling))
        for index, sample in enumerate(samples):
            if len(self.asked) == self.dies_at:
                raise RunError("killed")
            self.asked.append(sample.id)
            yield index, self.answers.get(sample.id, Answer(rationale("positive"), finished=True))

    def classify(self, samples: Sequence[Sample], earlier: object = None) -> ClassScores:
        raise AssertionError("nobody is asked to classify")


def run(
    ledger: Ledger, assistant: Assistant, settings: AugmentSettings | None = None, progress: Any = None
) -> tuple[list[tuple[Sample, Rationale]], Counter[str]]:
    dropped: Counter[str] = Counter()
    found = augment(POSTS, LABELS, assistant, settings or AugmentSettings(), ledger, dropped, progress)
    return list(found), dropped


def test_only_right_finished_and_valid_rationales_stay(tmp_path: Path) -> None:
    assistant = Assistant(
        p2=Answer(rationale("positive"), finished=False),
        p5=Answer("I would rather not say.", finished=True),
        p8=Answer(rationale("positive", "the post is labeled as positive"), finished=True),
        p0=Answer(rationale("negative", "plainly bad"), finished=True),
    )
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        kept, dropped = run(ledger, assistant)
    assert [(sample.id, found.prediction) for sample, found in kept] == [("p0", "negative"), ("p11", "positive")]
    assert kept[0][0] is POSTS[0] and kept[0][1].text_analysis == "plainly bad"
    assert dropped == {"unfinished": 1, "malformed": 1, "leaks": 1, "contradicts": 7}


def test_it_asks_the_task_of_the_paper_with_its_sampling(tmp_path: Path) -> None:
    assistant = Assistant()
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        run(ledger, assistant)
    assert assistant.sampling == {("reason", Sampling(0.7, 512))}
    assert assistant.asked == [post.id for post in POSTS]


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_a_killed_stage_goes_on_with_what_was_not_answered(tmp_path: Path, chunk: int) -> None:
    settings = AugmentSettings(chunk=chunk)
    path = tmp_path / "ledger.jsonl"
    first = Assistant(dies_at=7)
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


def test_it_tells_how_far_it_is(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        run(ledger, Assistant(), progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 12) for done in range(1, 13)]

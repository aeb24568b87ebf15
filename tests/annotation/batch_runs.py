"""Annotation with batch files against `BatchServer`, as the stage does it."""

import json
from pathlib import Path
from typing import Any

from distill.annotation.annotate import AnnotateSettings, AnnotationCounts, annotate
from distill.annotation.batch import Batches
from distill.annotation.cached_teacher import CachedTeacher, Start
from distill.annotation.first_answers import FirstAnswers
from distill.annotation.ledger import Ledger
from distill.models.endpoint import BatchSettings, Endpoint, EndpointSettings
from distill.task.sample import Sample
from tests.annotation.test_annotate import LABELS
from tests.models.batch_server import BatchServer


def remote(url: str, **settings: Any) -> Endpoint:
    fast = {"backoff_s": 0.002, "max_attempts": 4, "concurrency": 8, "prompt_price": 1.0, "completion_price": 10.0}
    return Endpoint(EndpointSettings(url, "big-vl", **(fast | settings)), LABELS)


def batch(**settings: Any) -> BatchSettings:
    return BatchSettings(**({"poll_s": 0.01} | settings))


def run(
    folder: Path, samples: list[Sample], teacher: Endpoint, settings: BatchSettings | None, **fields: Any
) -> tuple[list[Any], dict[str, Any]]:
    """What the stage does: fill the ledger, annotate, close the batches. Returns results and summary."""
    counts, found = AnnotationCounts(), list[Batches]()

    def prefill(cached: CachedTeacher, start: Start) -> None:
        found.append(Batches(cached, folder, settings, "test", "annotate"))
        found[0].fill(samples, [start])

    options = AnnotateSettings(batch=settings, **fields)
    first = FirstAnswers("annotate", LABELS, 50)
    with Ledger(folder / "ledger.jsonl") as ledger:
        results = list(
            annotate(samples, LABELS, teacher, options, ledger, counts, first_answers=first, prefill=prefill)
        )
        summary = counts.summary | {"batch": found[0].summary}
        found[0].close()
    return results, summary


def answers(folder: Path) -> dict[str, str]:
    """The text of each answer in a ledger, which has each once."""
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    found = {line["key"]: line["answer"]["text"] for line in lines}
    assert len(found) == len(lines)
    return found


def direct(folder: Path, samples: list[Sample], **fields: Any) -> tuple[list[Any], dict[str, str]]:
    """Results and answers by direct calls."""
    with BatchServer() as server:
        results, _ = run(folder / "direct", samples, remote(server.url), None, **fields)
    return results, answers(folder / "direct")

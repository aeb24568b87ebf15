"""Annotation of posts on Ray workers, as the stage does it; as a program that a test can kill."""

import sys
from collections.abc import Sequence
from pathlib import Path

from distill.annotation.annotate import AnnotateSettings, AnnotationCounts, Kept, Quarantined, annotate
from distill.annotation.cached_teacher import CachedTeacher, Start
from distill.annotation.first_answers import FirstAnswers
from distill.annotation.ledger import Ledger
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.models.local import Local
from distill.models.source import ModelSource
from distill.task.labels import LabelSpace
from distill.task.sample import Sample
from distill.workers.fill import fill
from distill.workers.settings import RaySettings
from tests.models.openai_server import COLOURS, write_image

LABELS = LabelSpace()
CONCURRENCY = 4


def posts(root: Path, count: int) -> list[Sample]:
    """Posts with one of three images; every fifth image has the colour of another label, and two posts are the same."""
    names = list(COLOURS)
    root.mkdir(exist_ok=True)
    files = [write_image(root / f"{name}.png", name, size=16) for name in names]
    made = [
        Sample(f"s{i}", f"post {i}", (files[(i + (i % 5 == 0)) % 3],), label=names[i % 3]) for i in range(count - 1)
    ]
    return [*made, Sample("copy", "post 1", made[1].images, label=made[1].label)]


def endpoint(url: str) -> Endpoint:
    return Endpoint(EndpointSettings(url, "big-vl", backoff_s=0.01, concurrency=CONCURRENCY), LABELS)


def on_ray(
    folder: Path,
    root: Path,
    samples: Sequence[Sample],
    teacher: Endpoint | ModelSource | Local,
    settings: RaySettings | None,
    options: AnnotateSettings = AnnotateSettings(),  # noqa: B008
    stop_after: int = 0,
) -> list[Kept | Quarantined]:
    """Annotate; without settings in this process."""

    def prefill(cached: CachedTeacher, start: Start) -> None:
        if settings is not None:
            fill(cached, folder, settings, root, samples, [start])

    with Ledger(folder / "ledger.jsonl") as ledger:
        counts, first = AnnotationCounts(), FirstAnswers("annotate", LABELS, stop_after)
        return list(annotate(samples, LABELS, teacher, options, ledger, counts, first_answers=first, prefill=prefill))


if __name__ == "__main__":
    address, url, folder, root, count = sys.argv[1:]
    ray = RaySettings(address=address, workers=2, batch_size=10)
    on_ray(Path(folder), Path(root), posts(Path(root), int(count)), endpoint(url), ray)

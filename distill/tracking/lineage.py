"""What each stage logs, and which run used or logged which artifact: the edges of the lineage graph of a chain."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from distill.files import append_line

FILE = "wandb/lineage.jsonl"
"""Where the edges are kept in a run's folder."""

UPLOADS = "wandb/uploads"
"""Where the files of artifacts are kept in a run's folder until they are uploaded, one folder for each offline run."""


class Output(NamedTuple):
    """The artifact that a stage logs: its name after the group, its type, and its files in the stage's folder."""

    name: str
    type: str
    files: tuple[str, ...]


OUTPUTS = {
    "teacher": Output("teacher", "model", ("adapter",)),
    "annotate": Output(
        "rationales",
        "dataset",
        ("rationales.jsonl", "quarantine.jsonl", "curated.jsonl", "summary.json", "ledger.jsonl"),
    ),
    "assistant": Output("assistant", "model", ("adapter",)),
    "augment": Output("augmented-rationales", "dataset", ("rationales.jsonl", "summary.json")),
    "student": Output("student", "model", ("adapter",)),
    "refine": Output("refined", "model", ("adapter",)),
    "evaluate": Output("evaluation", "evaluation", ("metrics.json", "predictions.jsonl")),
    "calibrate": Output("calibration", "calibration", ("calibration.json",)),
    "cascade": Output(
        "decisions", "evaluation", ("metrics.json", "decisions.jsonl", "deferral_curve.csv", "risk_coverage.csv")
    ),
    "export": Output("export", "model", (".",)),
    "report": Output("report", "report", ("../report.html",)),
}
"""The artifact of each stage. A stage uses the artifacts of the stages that it reads."""


@dataclass(frozen=True)
class Edge:
    """A run of wandb that uses or logs a version of an artifact.

    Attributes:
        run: id of the run.
        artifact: name without version.
        digest: of the version's content; it is also an alias of the version.
        linked: whether the server has the edge. One of an offline run that logs is sent with the run.
    """

    kind: Literal["uses", "logs"]
    stage: str
    run: str
    artifact: str
    digest: str
    project: str
    entity: str
    linked: bool


class Lineage:
    """The edges of a chain in an append-only file; a line that is no edge, such as one cut off, is ignored."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def __iter__(self) -> Iterator[Edge]:
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        for line in lines:
            try:
                edge = Edge(**json.loads(line))
                hash(edge)  # TypeError for a list in place of a text
            except (ValueError, TypeError, RecursionError):
                continue
            yield edge

    def add(self, edge: Edge) -> None:
        """Append an edge."""
        append_line(self.path, json.dumps(asdict(edge)).encode())

    def digest(self, artifact: str) -> str | None:
        """The digest of the version that was logged last; None if none was logged."""
        return next(
            (edge.digest for edge in reversed([*self]) if (edge.kind, edge.artifact) == ("logs", artifact)), None
        )

    def unlinked(self) -> list[Edge]:
        """The uses that the server does not have, in their order."""
        edges = list(self)
        linked = {edge for edge in edges if edge.linked}
        missing = [edge for edge in edges if edge.kind == "uses" and replace(edge, linked=True) not in linked]
        return list(dict.fromkeys(missing))

"""Decisions of a person about the reasoning data: the append-only file of `distill review`, and what they change.

The last decision about a post counts. `keep` marks a rationale as reviewed, `reset` takes the decision back; neither
changes the data. `edit` gives the post another rationale, `relabel` another gold label, and `drop` leaves it out.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from distill.data import jsonl
from distill.data.stored import StoredPosts, changed, selected
from distill.data.text import clean
from distill.digests import combine
from distill.errors import RunError, SettingsError
from distill.files import append_line, is_torn
from distill.task.labels import LabelSpace
from distill.task.rationale import InvalidRationale, Rationale, parse
from distill.task.sample import Sample

log = logging.getLogger(__name__)

DECISIONS = "annotate/curation.jsonl"
"""All decisions, in the run's folder. Nothing of the chain writes or deletes it."""

APPLIED = "annotate/curated.jsonl"
"""The decisions that `annotate` applied when it ran last, in the run's folder."""

Action = Literal["keep", "edit", "drop", "relabel", "reset"]

_COUNTED = ("edited", "dropped", "relabelled")
_CHANGES: tuple[Action, ...] = ("edit", "drop", "relabel")


@dataclass(frozen=True)
class Decision:
    """What was decided about one post.

    Attributes:
        label: of `relabel` the new label; of `edit` the label that the text predicts, None for the gold label.
        rationale: of `edit`, the text.
        time: in UTC, ISO 8601.
        row: line of the file, 1-based.
    """

    id: str
    action: Action
    label: str | None = None
    rationale: str | None = None
    time: str | None = None
    row: int = field(default=0, compare=False)

    @property
    def content(self) -> list[str | None]:
        """What the decision changes, without its time."""
        return [self.id, self.action, self.label, self.rationale]

    def fields(self) -> dict[str, str | None]:
        """The fields of a line."""
        return {name: getattr(self, name) for name in ("id", "action", "label", "rationale", "time")}


@dataclass(frozen=True)
class Curated:
    """Training posts after the decisions.

    Attributes:
        posts: without those that are dropped, with the labels of those that are edited or relabelled.
        edits: the rationales of the edited posts, by id.
        counts: number of `edited`, `dropped` and `relabelled` posts.
        unknown: ids of decisions about posts that are not there.
    """

    posts: Sequence[Sample]
    edits: dict[str, Rationale]
    counts: dict[str, int]
    unknown: list[str]


# ---- the file ----


def read_decisions(path: Path, labels: LabelSpace) -> dict[str, Decision]:
    """The decision that counts for each post, by id. A file that does not exist has none.

    A line that a kill left incomplete at the end of the file is ignored with a warning.

    Raises:
        SettingsError: another line is not a decision; the message names the file and the row.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    *lines, rest = content.split(b"\n")
    if rest.strip():
        if is_torn(rest):
            log.warning("%s ends with an incomplete line, which is ignored", path)
        else:
            lines.append(rest)
    found: dict[str, Decision] = {}
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            decision = _decision(row, line, labels)
        except ValueError as error:
            raise SettingsError(f"{path}, row {row}: {error}; correct or delete the row") from None
        found.pop(decision.id, None)  # the order is that of the last decisions
        if decision.action != "reset":
            found[decision.id] = decision
    return found


def append(path: Path, decision: Decision) -> None:
    """Append a decision with the present time and wait until it is on disk. Several processes may append.

    Raises:
        RunError: the file cannot be written; it then ends with its last complete line.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps(replace(decision, time=now).fields(), ensure_ascii=False).encode("utf-8", "replace")
    try:
        append_line(path, line)
    except OSError as error:
        raise RunError(f"the decision cannot be written to {path}: {error.strerror}") from error


def _decision(number: int, line: bytes, labels: LabelSpace) -> Decision:
    """The decision of a line. Raises ValueError, InvalidRationale among them, with the reason why it is none."""
    try:
        row = jsonl.parse_line(number, line.decode())
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    if row.problem is not None:
        raise ValueError(row.problem)
    fields: dict[str, Any] = {name: value for name, value in row.fields.items() if value is not None}
    names = ("id", "action", "label", "rationale", "time")
    for name, value in fields.items():
        if name not in names:
            raise ValueError(f"{name[:40]!r} is no field of a decision; they are {', '.join(names)}")
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, not {str(value)[:40]!r}")
    if not fields.get("id"):
        raise ValueError("id is missing")
    if fields.get("action") not in get_args(Action):
        given = fields.get("action", "missing")
        raise ValueError(f"action is {given[:40]!r}; it takes {', '.join(get_args(Action))}")
    decision = Decision(**fields, row=number)
    if decision.label is not None:
        labels.index(decision.label)
    if decision.action == "relabel" and decision.label is None:
        raise ValueError("relabel needs a label")
    if decision.action == "edit":
        edited(decision.rationale or "", labels, decision.label)
    return decision


# ---- what it changes ----


def edited(text: str, labels: LabelSpace, expected: object) -> Rationale:
    """The rationale of an edited text. A person may overrule how an answer is worded, but not its format and label.

    Args:
        expected: the label that it must predict; None: any.

    Raises:
        InvalidRationale: the text is malformed or predicts another label.
    """
    rationale = parse(clean(text), labels)
    if expected is not None and rationale.prediction != expected:
        raise InvalidRationale("contradicts", f"predicts {rationale.prediction}, the label is {expected}")
    return rationale


def effective(decisions: Mapping[str, Decision]) -> dict[str, Decision]:
    """The decisions that change the reasoning data: without `keep`."""
    return {name: decision for name, decision in decisions.items() if decision.action in _CHANGES}


def digest(decisions: Mapping[str, Decision]) -> str | None:
    """Digest of the effective decisions, in any order; None if there are none."""
    contents = sorted((decision.content for decision in effective(decisions).values()), key=str)
    return combine(contents) if contents else None


def curate(posts: Sequence[Sample], decisions: Mapping[str, Decision], labels: LabelSpace) -> Curated:
    """Apply decisions to training posts.

    An edited post gets the label that its text predicts, also if it had none.

    Raises:
        SettingsError: an edited text without a label of its own predicts another label than the gold one.
    """
    remaining = effective(decisions)
    if isinstance(posts, StoredPosts) and not remaining:  # nothing to read them for
        return Curated(posts, {}, dict.fromkeys(_COUNTED, 0), [])
    labels_of, edits, counts = dict[str, Any](), dict[str, Rationale](), Counter[str]()

    def keep(post: Sample) -> bool:
        decision = remaining.pop(post.id, None)
        if decision is None:
            return True
        if decision.action == "drop":
            counts["dropped"] += 1
            return False
        if decision.action == "relabel":
            counts["relabelled"] += 1
            labels_of[post.id] = decision.label
            return True
        counts["edited"] += 1
        expected = post.label if decision.label is None else decision.label
        try:
            edits[post.id] = edited(decision.rationale or "", labels, expected)
        except InvalidRationale as invalid:
            raise SettingsError(f"{DECISIONS}, row {decision.row}: {invalid}; correct or delete the row") from None
        labels_of[post.id] = edits[post.id].prediction
        return True

    kept = selected(posts, keep)
    if labels_of:
        kept = changed(kept, partial(_relabelled, labels_of))
    return Curated(kept, edits, {name: counts[name] for name in _COUNTED}, list(remaining))


def _relabelled(labels: Mapping[str, Any], post: Sample) -> Sample:
    return replace(post, label=labels[post.id]) if post.id in labels else post

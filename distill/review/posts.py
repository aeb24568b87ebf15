"""The posts of a run that `distill review` shows: rationales, quarantine and disagreements, each with its decision."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distill import chain
from distill.annotation.curation import (
    APPLIED,
    DECISIONS,
    Action,
    Decision,
    append,
    edited,
    effective,
    read_decisions,
)
from distill.annotation.reasoning_data import RATIONALES, read_rationales
from distill.data import jsonl
from distill.data.images import jpeg_bytes, resolve
from distill.data.text import clean
from distill.errors import SettingsError
from distill.evaluation.reasoning import grounding
from distill.recipe import Recipe
from distill.stages.context import Context
from distill.task.rationale import InvalidRationale, Rationale, parse, render
from distill.task.sample import Sample

Status = Literal["all", "kept", "quarantined", "disagreement", "undecided", "decided"]

_SIDE = 1200  # of a picture on the page, in pixels
_PLAYERS = ("video", "audio")


class InvalidDecision(ValueError):
    """A decision that is not written; the message is one sentence for the person who took it."""


@dataclass(frozen=True)
class Filter:
    """Which posts are shown; an empty value is no condition.

    Attributes:
        label: of the post, after its decision.
        source: of the rationale.
        reason: of the quarantine.
        text: part of the id, of a text of the post, or of the rationale, in any case.
    """

    status: Status = "all"
    label: str = ""
    source: str = ""
    reason: str = ""
    text: str = ""


@dataclass(frozen=True)
class Entry:
    """One post with what the stage `annotate` wrote about it.

    Attributes:
        row: its row in `rationales.jsonl`, if it has a rationale.
        quarantined: its row in `quarantine.jsonl`, if it has none.
    """

    sample: Sample
    row: Mapping[str, Any] | None = None
    quarantined: Mapping[str, Any] | None = None

    @property
    def text(self) -> str:
        """The rationale, or the last answer of the teacher; empty without one."""
        row = self.row or {"rationale": (self.quarantined or {}).get("answer")}
        return row.get("rationale") or ""

    @property
    def label(self) -> str | None:
        """The label of the rationale; without one the label in the data."""
        label = self.sample.label if self.row is None else self.row["label"]
        return None if label is None else str(label)


class Posts:
    """The posts of a run whose stage `annotate` has finished. What a later run writes is read when it changes.

    Raises:
        SettingsError: the stage has not finished, or one of its files cannot be used.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.labels, self.folder = recipe, recipe.labels, recipe.folder
        if recipe.annotate is None:
            raise SettingsError("review needs an annotate section")
        if chain.read_manifest(self.folder).stages.get("annotate", {}).get("status") != "done":
            raise SettingsError(f"{self.folder}: the stage annotate has not finished; run: distill annotate")
        corpus = Context(recipe, {}).posts
        self.root, self._samples = corpus.root, {sample.id: sample for sample in corpus.train}
        self.decisions: dict[str, Decision] = {}
        self.applied: dict[str, Decision] = {}
        self.entries: dict[str, Entry] = {}
        self._seen: dict[str, Any] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the files that have changed; those of a running `annotate` are missing until it ends."""
        decided, applied, stage = self.folder / DECISIONS, self.folder / APPLIED, self.folder / "annotate"
        rationales, quarantine = stage / RATIONALES, stage / "quarantine.jsonl"
        if changed := self._changed(decided):
            self.decisions = read_decisions(decided, self.labels)
            self._seen |= changed
        if rationales.exists() and quarantine.exists() and (changed := self._changed(rationales, quarantine, applied)):
            self.applied = read_decisions(applied, self.labels)
            found: dict[str, Any] = {name: {} for name in (*self.applied, *self.decisions)}
            found |= {str(row.fields.get("id")): {"quarantined": row.fields} for row in jsonl.read(quarantine)}
            found |= {sample.id: {"row": row} for sample, row in read_rationales(rationales, self.root, self.labels)}
            self.entries = {name: Entry(post, **found[name]) for name, post in self._samples.items() if name in found}
            self._seen |= changed

    def _changed(self, *paths: Path) -> dict[str, Any]:
        """The stamps of the files if one of them has changed since it was read, otherwise none."""
        now = {str(path): _stamp(path) for path in paths}
        return now if any(name not in self._seen or self._seen[name] != stamp for name, stamp in now.items()) else {}

    # ---- what is shown ----

    def select(self, wanted: Filter) -> list[str]:
        """The ids of the posts that fit, in the order of the data."""
        return [name for name, entry in self.entries.items() if self._fits(entry, wanted)]

    def _fits(self, entry: Entry, wanted: Filter) -> bool:
        decision = self.decisions.get(entry.sample.id)
        fits = {
            "all": True,
            "kept": entry.row is not None,
            "quarantined": entry.quarantined is not None,
            "disagreement": self.is_disagreement(entry),
            "undecided": decision is None,
            "decided": decision is not None,
        }[wanted.status]
        label = entry.label if decision is None or decision.label is None else decision.label
        sample, draft = entry.sample, None if decision is None else decision.rationale
        texts = [sample.id, sample.text, sample.aspect, entry.text, draft]
        return (
            fits
            and wanted.label in ("", label)
            and wanted.source in ("", (entry.row or {}).get("source"))
            and wanted.reason in ("", (entry.quarantined or {}).get("reason"))
            and (not wanted.text or wanted.text.casefold() in "\n".join(filter(None, texts)).casefold())
        )

    def is_disagreement(self, entry: Entry) -> bool:
        """Whether the teacher's first prediction was not the gold label; after an invalid recording it made none."""
        assert self.recipe.annotate is not None
        recorded = self.recipe.annotate.recorded and entry.sample.rationale is not None
        return (entry.row or {}).get("source") == "explained" and not recorded

    def overview(self) -> dict[str, Any]:
        """The progress of the review, and the values that the filters take."""
        rows = self.entries.values()
        changed = effective(self.decisions).items() ^ effective(self.applied).items()
        return {
            "name": self.recipe.name,
            "labels": list(self.labels.names),
            "sources": sorted({entry.row["source"] for entry in rows if entry.row and entry.row.get("source")}),
            "reasons": sorted({str(entry.quarantined.get("reason")) for entry in rows if entry.quarantined}),
            "reviewed": sum(name in self.decisions for name in self.entries),
            "total": len(self.entries),
            "waiting": len({name for name, _ in changed}),
        }

    def show(self, name: str) -> dict[str, Any]:
        """All that the page shows about one post. Raises KeyError for an unknown id."""
        entry = self.entries[name]
        sample, decision = entry.sample, self.decisions.get(name)
        text = decision.rationale if decision is not None and decision.rationale else entry.text
        rationale = self._parsed(text)
        named = [] if rationale is None else grounding(rationale, sample.attributes)
        quarantined = entry.quarantined or {}
        return {
            "id": name,
            "text": sample.text,
            "aspect": sample.aspect,
            "images": len(sample.images),
            "players": [kind for kind in _PLAYERS if self._clip(sample, kind) is not None],
            "muted": sample.video is not None and sample.audio != sample.video,
            "gold": None if sample.label is None else str(sample.label),
            "label": entry.label,
            "status": "kept" if entry.row else "quarantined" if entry.quarantined else "dropped",
            "disagreement": self.is_disagreement(entry),
            "source": (entry.row or {}).get("source"),
            "teacher_label": bool((entry.row or {}).get("teacher_label")),
            "reason": quarantined.get("reason"),
            "detail": quarantined.get("detail"),
            "rationale": text if rationale is None else render(rationale),
            "fields": None if rationale is None else list(rationale.as_dict().items()),
            "grounded": all(named) if named else None,
            "decision": None if decision is None else decision.fields(),
        }

    def _parsed(self, text: str) -> Rationale | None:
        try:
            return parse(text, self.labels)
        except InvalidRationale:
            return None

    def image(self, name: str, index: int) -> bytes:
        """An image of a post as JPEG.

        Raises:
            KeyError, IndexError: there is no such post or image.
            ImageError, OSError: the file cannot be read, or leads out of the data root by now.
        """
        path = self.entries[name].sample.images[index]
        inside = resolve(self.root, path.relative_to(self.root).as_posix())
        return jpeg_bytes(inside, _SIDE, self.recipe.data.max_pixels)

    @staticmethod
    def _clip(sample: Sample, kind: str) -> Path | None:
        """The file of a player; a video plays its own sound."""
        return sample.video if kind == "video" else None if sample.audio == sample.video else sample.audio

    def clip(self, name: str, kind: str) -> Path:
        """The file of the player of a post.

        Raises:
            KeyError: there is no such post or player.
            ImageError: the file leads out of the data root by now.
        """
        path = self._clip(self.entries[name].sample, kind) if kind in _PLAYERS else None
        if path is None:
            raise KeyError(kind)
        return resolve(self.root, path.relative_to(self.root).as_posix())

    # ---- what is decided ----

    def decide(self, name: str, action: Action, label: str | None, rationale: str | None) -> None:
        """Check a decision and append it to the file.

        Raises:
            InvalidDecision: it cannot be applied; nothing is written.
            RunError: the file cannot be written.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise InvalidDecision(f"There is no post {name[:100]!r}.")
        if label is not None and label not in self.labels.names:
            raise InvalidDecision(f"{label[:100]!r} is not a label; the labels are {', '.join(self.labels.names)}.")
        append(self.folder / DECISIONS, self._checked(entry, action, label, rationale))
        self.refresh()

    def _checked(self, entry: Entry, action: Action, label: str | None, rationale: str | None) -> Decision:
        name, gold = entry.sample.id, entry.sample.label
        if action == "relabel" and label is None:
            raise InvalidDecision("A post is relabelled with a label.")
        if action == "relabel":
            return Decision(name, "reset" if label == gold else "relabel", None if label == gold else label)
        if action == "keep" and entry.row is None:
            action, rationale = "edit", entry.text
            if not rationale.strip():
                raise InvalidDecision("There is no answer that could be kept.")
        if action != "edit":
            return Decision(name, action)
        try:
            found = edited(rationale or "", self.labels, gold if label is None else label)
        except InvalidRationale as invalid:
            subject = "The text " if invalid.reason == "contradicts" else ""
            raise InvalidDecision(f"{subject}{invalid.detail}.") from None
        return Decision(name, "edit", found.prediction, clean(rationale or ""))


def _stamp(path: Path) -> tuple[int, int] | None:
    """Time and size of a file; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size

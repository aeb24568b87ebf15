"""`distill plan` as text: stages, dataset sizes, teacher requests, models and trainings of a chain."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distill.data.corpus import SPLITS
from distill.models.endpoint import EndpointSettings
from distill.planning.plan import Training, trainings
from distill.planning.teacher_requests import RequestForecast
from distill.planning.workload import SAMPLE, ChainForecast, Teacher
from distill.recipe import Recipe
from distill.task.sample import Sample

UNKNOWN = "?"


def plan_text(recipe: Recipe) -> str:
    """The plan of a chain, in a few tables.

    Raises:
        SettingsError: the data cannot be read.
    """
    with TemporaryDirectory() as scratch:
        forecast = ChainForecast(recipe, Path(scratch))
        problems: list[str] = []
        learners = trainings(forecast, problems)
        parts = [_stages(forecast), _posts(forecast), _questions(forecast)]
        if learners:
            parts += [_models(learners), _trainings(learners), _saving(learners)]
        parts.append("\n".join(problems + _notes(forecast, learners)))
    return "\n\n".join(part for part in parts if part)


def _stages(forecast: ChainForecast) -> str:
    waiting = [name for name, done in forecast.done.items() if not done]
    lines = [
        f"{forecast.recipe.name}, in {forecast.recipe.folder}. Nothing is run now; `distill run` would do this.",
        "",
    ]
    for what, names in (
        ("would run", waiting),
        ("up to date", [name for name in forecast.done if name not in waiting]),
    ):
        lines += [f"{what:<11} {', '.join(names)}"] if names else []
    return "\n".join(lines)


def _posts(forecast: ChainForecast) -> str:
    rows = [["posts", "all", "labelled", "with rationale"]]
    for split in SPLITS:
        posts: list[Sample] = getattr(forecast.corpus, split)
        counts = (len(posts), sum(p.label is not None for p in posts), sum(bool(p.rationale) for p in posts))
        rows.append([split, *(f"{count:,}" for count in counts)])
    left_out = len(forecast.corpus.dropped)
    return _aligned(rows) + (f"\n{left_out:,} rows of the files are left out." if left_out else "")


def _questions(forecast: ChainForecast) -> str:
    asked = list(forecast.questions())
    if not asked:
        return "No teacher is asked anything."
    rows = [["questions", "about", "at least", "at most", "prompt tokens", "answer tokens", "cost"]]
    for question, teacher in asked:
        low, high = question.answer_tokens
        answers = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
        figures = [f"{question.least:,}", f"{question.most:,}", f"{question.prompt_tokens:,.0f}", answers]
        rows.append([question.stage, question.about, *figures, _range(_cost(question, teacher))])
    total = [sum(getattr(question, name) for question, _ in asked) for name in ("least", "most")]
    costs = [cost for question, teacher in asked if (cost := _cost(question, teacher)) is not None]
    whole = (sum(low for low, _ in costs), sum(high for _, high in costs)) if costs else None
    rows.append(["in all", "", *(f"{count:,}" for count in total), "", "", _range(whole)])
    lines = [_aligned(rows if costs else [row[:-1] for row in rows], left=2)]
    ledgers = [forecast.recipe.folder / stage / "ledger.jsonl" for stage in ("annotate", "evaluate")]
    if known := sum(len(path.read_bytes().splitlines()) for path in ledgers if path.exists()):
        lines.append(f"{known:,} answers are in the ledgers of earlier runs; what is asked again costs nothing.")
    return "\n".join(lines)


def _cost(question: RequestForecast, teacher: Teacher) -> tuple[float, float] | None:
    """None where nothing has a price."""
    if not isinstance(teacher, EndpointSettings) or (teacher.prompt_price is None and teacher.completion_price is None):
        return None
    return question.cost(teacher.prompt_price or 0.0, teacher.completion_price or 0.0)


def _range(cost: tuple[float, float] | None) -> str:
    return "" if cost is None else f"{cost[0]:,.2f} to {cost[1]:,.2f}"


def _trainings(learners: Sequence[Training]) -> str:
    """Two columns for each training: as published, and with this recipe."""
    header = [
        ["trainings", *(cell for t in learners for cell in ("", t.name))],
        ["", *(cell for _ in learners for cell in ("published", "here"))],
    ]
    rows: list[list[str]] = []

    def row(name: str, of: Callable[[Training], Any], form: Callable[[Any], str] = str) -> None:
        """Pairs of figures, None where one means nothing; None for a pair that cannot be known."""
        found = [("", UNKNOWN) if (pair := of(t)) is None else pair for t in learners]
        cells = [
            "" if value is None else value if isinstance(value, str) else form(value)
            for pair in found
            for value in pair
        ]
        rows.append([name, *cells])

    row("posts", lambda t: (None, ("" if t.known else "up to ") + f"{t.rows:,}"), str)
    row("epochs", lambda t: (None, t.epochs if math.isfinite(t.epochs) else UNKNOWN), "{:,.3g}".format)
    row("optimiser steps", lambda t: (None, t.steps if math.isfinite(t.steps) else UNKNOWN), "{:,}".format)
    row("tokens a post", lambda t: t.tokens and [w.tokens for w in t.tokens], "{:,.0f}".format)
    row("  that need logits", lambda t: t.tokens and [w.logits for w in t.tokens], "{:,.0f}".format)
    row("FLOP a post", lambda t: t.flop, _si)
    row("FLOP in all", lambda t: t.in_all, _si)
    row("bytes a device", lambda t: t.memory and [m.total for m in t.memory], _si)
    row("  weights", lambda t: t.memory and [m.weights for m in t.memory], _si)
    row("  gradients, AdamW", lambda t: t.memory and [m.optimizer for m in t.memory], _si)
    row("  activations", lambda t: t.memory and [m.activations for m in t.memory], _si)
    row("  logits", lambda t: t.memory and [m.logits for m in t.memory], _si)
    row("  the assistant", lambda t: t.memory and [m.assistant for m in t.memory], _si)
    row("soft targets", lambda t: (None, t.targets if t.model else UNKNOWN), str)
    row("  bytes on disk", lambda t: (None, t.disk if t.targets == "cached" else None), _si)
    return _aligned(header + rows)


def _models(learners: Sequence[Training]) -> str:
    rows = [["models", "", "weights", "that train"]]
    for learner in learners:
        tiny, counts = learner.settings.model.tiny, [UNKNOWN, UNKNOWN]
        if learner.model is not None:
            weights = list(learner.model.model.parameters())
            counts = [_si(sum(w.numel() for w in part)) for part in (weights, [w for w in weights if w.requires_grad])]
        rows.append([learner.name, learner.settings.model.path or f"tiny {tiny.hidden} x {tiny.layers}", *counts])
    return _aligned(rows, left=2)


def _saving(learners: Sequence[Training]) -> str:
    flops = [t.in_all for t in learners if t.in_all]
    before, after = (sum(column) for column in zip(*flops, strict=True)) if flops else (0.0, 0.0)
    needs, lines = [t.memory for t in learners if t.memory], []
    if after and len(flops) == len(learners):
        less = before / after
        lines.append(f"All trainings: {_si(before)}FLOP as published, {_si(after)}FLOP here: {less:.1f} times less.")
    if needs:
        most = [max(need[side].total for need in needs) for side in (0, 1)]
        lines.append(f"A device needs {_si(most[0])}B as published, {_si(most[1])}B here.")
    return "\n".join(lines)


def _notes(forecast: ChainForecast, learners: Sequence[Training]) -> list[str]:
    notes = [
        "published: each task in a sequence of its own, padded to the data set's longest, logits at every position,",
        "  the assistant asked in every epoch. here: as this recipe trains.",
        f"tokens: the mean of {SAMPLE} posts at most, spread over all lengths.",
        "FLOP: of the matrix products in training. Validation and generation come on top, the same on both sides.",
        "bytes a device: an estimate for the longest posts in one batch, with one tensor of logits for each model.",
    ]
    if any(forecast.tokenizer(asked) is None for _, asked in forecast.questions()):
        notes.append("questions: their tokens are guessed, one for four characters, as the tokenizer cannot be had.")
    if any(not t.known for t in learners):
        notes += [
            "up to: rationales that are not written yet are assumed: one is kept for every post, as long as those in",
            "  the data, or where it has none four fields of about 50 words.",
        ]
    return notes


def _aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns, the first ones to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{c:<{w}}" if n < left else f"{c:>{w}}" for n, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _si(value: float) -> str:
    """Three digits and the letter of a power of a thousand."""
    value = float(f"{value:.3g}")  # first, lest 999,600 be a thousand thousands
    power = min(int(math.log10(value)) // 3, 6) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {'kMGTPE'[power - 1] if power else ''}".rstrip()

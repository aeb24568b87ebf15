"""Text output of `distill plan`: stages, dataset sizes, teacher requests, models and trainings of a chain."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distill.data.source import SPLITS
from distill.models.endpoint import BatchSettings, EndpointSettings
from distill.planning.plan import TrainingForecast, forecast_trainings
from distill.planning.probe import probe
from distill.planning.teacher_requests import RequestForecast
from distill.planning.text import align, si_prefix
from distill.planning.workload import SAMPLE_SIZE, ChainForecast, Teacher
from distill.recipe import Recipe
from distill.stages import preflight
from distill.task.sample import Sample
from distill.training.refine_settings import RefineSettings

UNKNOWN = "?"


def plan_text(recipe: Recipe, *, probes: bool = False) -> str:
    """Return the plan of a chain as text tables.

    Args:
        probes: ask each endpoint one question (`probe`).

    Raises:
        SettingsError: the data cannot be read.
        RunError: another process uses the run, or an answer cannot be written to its ledger; only if `probes`.
    """
    with TemporaryDirectory() as scratch:
        forecast = ChainForecast(recipe, Path(scratch))
        problems: list[str] = []
        trainings = forecast_trainings(forecast, problems)
        parts = [_stages(forecast), _dataset_table(forecast), _request_table(forecast)]
        if workers := _workers(forecast):
            parts.append(workers)
        if trainings:
            parts += [_model_table(trainings), _training_table(trainings), _summary(trainings)]
        if recipe.refine is not None and "refine" in forecast.pending:
            parts.append(_refine(recipe.refine))
        if probes:
            parts.append("\n".join(probe(forecast)))
        if stops := preflight.problems(forecast.context, forecast.pending):
            parts.append("\n".join(["Problems that stop distill run before its first stage:", *stops]))
        notes = [problem for problem in problems if problem not in stops]
        notes += preflight.notices(forecast.context, forecast.pending) + _notes(forecast, trainings)
        parts.append("\n".join(notes))
    return "\n\n".join(part for part in parts if part)


def _stages(forecast: ChainForecast) -> str:
    pending = forecast.pending
    up_to_date = [name for name in forecast.done if name not in pending]
    lines = [f"Plan of {forecast.recipe.name} in {forecast.recipe.folder}. No stage is run.", ""]
    for title, names in (("would run", pending), ("up to date", up_to_date)):
        lines += [f"{title:<11} {', '.join(names)}"] if names else []
    return "\n".join(lines)


def _workers(forecast: ChainForecast) -> str:
    """The Ray workers of the pending stages; empty without `engine: ray`."""
    recipe = forecast.recipe
    stages = [name for name in forecast.pending if name in preflight.ON_RAY]
    if not recipe.on_ray or not stages:
        return ""
    ray, teacher = recipe.ray, recipe.annotating_teacher
    line = f"{', '.join(stages)} on Ray: {ray.workers} workers with {ray.cpus:g} CPU and {ray.gpus:g} GPU each"
    if isinstance(teacher, EndpointSettings):
        each = teacher.concurrency
        line += f"; an endpoint has {each} requests in flight per worker, {ray.workers * each} in all"
    return line


def _refine(settings: RefineSettings) -> str:
    rationales = (
        settings.batch_size
        * settings.arguments.get("gradient_accumulation_steps", 1)
        * (settings.generations if settings.method == "grpo" else 1)
    )
    return (
        f"refine ({settings.method}): {settings.max_steps:,} steps, each on {rationales:,} rationales of at most "
        f"{settings.max_new_tokens:,} tokens that the student generates; FLOP and time: –"
    )


def _dataset_table(forecast: ChainForecast) -> str:
    rows = [["posts", "all", "labelled", "with rationale"]]
    for split in SPLITS:
        posts: list[Sample] = getattr(forecast.corpus, split)
        counts = (len(posts), sum(p.label is not None for p in posts), sum(bool(p.rationale) for p in posts))
        rows.append([split, *(f"{count:,}" for count in counts)])
    dropped = len(forecast.corpus.dropped) + forecast.corpus.unlisted
    return align(rows) + (f"\n{dropped:,} rows of the files are left out." if dropped else "")


def _request_table(forecast: ChainForecast) -> str:
    requests = list(forecast.teacher_requests())
    if not requests:
        return "No teacher requests."
    rows = [["teacher requests", "purpose", "minimum", "maximum", "prompt tokens", "answer tokens", "cost"]]
    for request, teacher in requests:
        low, high = request.answer_tokens
        answers = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
        figures = [f"{request.minimum:,}", f"{request.maximum:,}", f"{request.prompt_tokens:,.0f}", answers]
        rows.append([request.stage, request.purpose, *figures, _format_cost(_cost(request, teacher))])
    totals = [sum(getattr(request, name) for request, _ in requests) for name in ("minimum", "maximum")]
    costs = [cost for request, teacher in requests if (cost := _cost(request, teacher)) is not None]
    total_cost = (sum(low for low, _ in costs), sum(high for _, high in costs)) if costs else None
    rows.append(["total", "", *(f"{count:,}" for count in totals), "", "", _format_cost(total_cost)])
    rows = rows if costs else [row[:-1] for row in rows]
    if any(_batch(forecast.recipe, request.stage) for request, _ in requests):
        with_batches = [_cost_with_batches(forecast.recipe, request, teacher) for request, teacher in requests]
        known = [cost for cost in with_batches if cost is not None]
        total = (sum(low for low, _ in known), sum(high for _, high in known)) if len(known) == len(rows) - 2 else None
        for row, text in zip(rows, ["cost with batches", *map(_or_dash, [*with_batches, total])], strict=True):
            row.append(text)
    lines = [align(rows, left=2)]
    ledgers = [forecast.recipe.folder / stage / "ledger.jsonl" for stage in ("annotate", "evaluate")]
    if answers_paid := sum(len(path.read_bytes().splitlines()) for path in ledgers if path.exists()):
        lines.append(f"{answers_paid:,} answers are in the ledgers of earlier runs; requests found there cost nothing.")
    return "\n".join(lines)


def _cost(request: RequestForecast, teacher: Teacher) -> tuple[float, float] | None:
    """Return the minimum and maximum cost; None if the teacher has no prices."""
    if not isinstance(teacher, EndpointSettings) or (teacher.prompt_price is None and teacher.completion_price is None):
        return None
    return request.cost(teacher.prompt_price or 0.0, teacher.completion_price or 0.0)


def _batch(recipe: Recipe, stage: str) -> BatchSettings | None:
    return getattr(getattr(recipe, stage), "batch", None)


def _cost_with_batches(recipe: Recipe, request: RequestForecast, teacher: Teacher) -> tuple[float, float] | None:
    """Return the cost if all requests of a stage with a batch section are in batches; None if it is unknown."""
    if (batch := _batch(recipe, request.stage)) is None:
        return _cost(request, teacher)
    if batch.prompt_price is None and batch.completion_price is None:
        return None
    return request.cost(batch.prompt_price or 0.0, batch.completion_price or 0.0)


def _or_dash(cost: tuple[float, float] | None) -> str:
    return _format_cost(cost) or "–"


def _format_cost(cost: tuple[float, float] | None) -> str:
    return "" if cost is None else f"{cost[0]:,.2f} to {cost[1]:,.2f}"


def _training_table(trainings: Sequence[TrainingForecast]) -> str:
    """Format two columns per training: the published procedure and this recipe."""
    header = [
        ["trainings", *(cell for t in trainings for cell in ("", t.name))],
        ["", *(cell for _ in trainings for cell in ("published", "recipe"))],
    ]
    rows: list[list[str]] = []

    def add(name: str, value: Callable[[TrainingForecast], Any], form: Callable[[Any], str] = str) -> None:
        """Add a row. `value` returns a pair of cells, None for an empty cell; None instead of a pair if unknown."""
        pairs = [("", UNKNOWN) if (pair := value(t)) is None else pair for t in trainings]
        cells = [
            "" if cell is None else cell if isinstance(cell, str) else form(cell) for pair in pairs for cell in pair
        ]
        rows.append([name, *cells])

    add("posts", lambda t: (None, ("" if t.exact else "up to ") + f"{t.rows:,}"), str)
    add("epochs", lambda t: (None, t.epochs if math.isfinite(t.epochs) else UNKNOWN), "{:,.3g}".format)
    add("optimizer steps", lambda t: (None, t.steps if math.isfinite(t.steps) else UNKNOWN), "{:,}".format)
    add("tokens per post", lambda t: t.tokens and [w.tokens for w in t.tokens], "{:,.0f}".format)
    add("  with logits", lambda t: t.tokens and [w.logits for w in t.tokens], "{:,.0f}".format)
    add("FLOP per post", lambda t: t.flops, si_prefix)
    add("FLOP in total", lambda t: t.total_flops, si_prefix)
    add("bytes per device", lambda t: t.memory and [m.total for m in t.memory], si_prefix)
    add("  weights", lambda t: t.memory and [m.weights for m in t.memory], si_prefix)
    add("  gradients, AdamW", lambda t: t.memory and [m.optimizer for m in t.memory], si_prefix)
    if any(t.memory and t.memory[1].gathered for t in trainings):
        add("  gathered at a time", lambda t: t.memory and ["", t.memory[1].gathered], si_prefix)
    add("  activations", lambda t: t.memory and [m.activations for m in t.memory], si_prefix)
    add("  logits", lambda t: t.memory and [m.logits for m in t.memory], si_prefix)
    add("  assistant", lambda t: t.memory and [m.assistant for m in t.memory], si_prefix)
    add("soft targets", lambda t: (None, t.source if t.model else UNKNOWN), str)
    add("  bytes on disk", lambda t: (None, t.disk if t.source == "cached" else None), si_prefix)
    return align(header + rows)


def _model_table(trainings: Sequence[TrainingForecast]) -> str:
    rows = [["models", "", "parameters", "trainable"]]
    for training in trainings:
        tiny, counts = training.settings.model.tiny, [UNKNOWN, UNKNOWN]
        if training.model is not None:
            weights = list(training.model.model.parameters())
            parts = (weights, [w for w in weights if w.requires_grad])
            counts = [si_prefix(sum(w.numel() for w in part)) for part in parts]
        rows.append([training.name, training.settings.model.path or f"tiny {tiny.hidden} x {tiny.layers}", *counts])
    return align(rows, left=2)


def _summary(trainings: Sequence[TrainingForecast]) -> str:
    flops = [t.total_flops for t in trainings if t.total_flops]
    published, ours = (sum(side) for side in zip(*flops, strict=True)) if flops else (0.0, 0.0)
    memory, lines = [t.memory for t in trainings if t.memory], []
    if ours and len(flops) == len(trainings):
        lines.append(
            f"All trainings: {si_prefix(published)}FLOP as published, {si_prefix(ours)}FLOP with this recipe "
            f"({published / ours:.1f} times less)."
        )
    if memory:
        highest = [max(pair[side].total for pair in memory) for side in (0, 1)]
        lines.append(
            f"Memory per device: {si_prefix(highest[0])}B as published, {si_prefix(highest[1])}B with this recipe."
        )
    return "\n".join(lines)


def _notes(forecast: ChainForecast, trainings: Sequence[TrainingForecast]) -> list[str]:
    notes = [
        "published: one sequence per task, padded to the longest of the data set, logits at all positions, the",
        "  assistant in every epoch. recipe: with the settings of this recipe.",
        f"tokens: mean over at most {SAMPLE_SIZE} posts, sampled evenly by length.",
        "FLOP: matrix products of training; validation and generation are not included and are the same on both sides.",
        "bytes per device: estimate for a batch of the longest posts, with one logits tensor per model.",
    ]
    if any(t.memory and t.memory[1].gathered for t in trainings):
        notes += [
            "gathered at a time: embeddings, output head and two layers, which each device has whole; all other",
            "  weights, gradients and AdamW's state are divided among the devices.",
        ]
    if any(forecast.tokenizer(teacher) is None for _, teacher in forecast.teacher_requests()):
        notes.append("teacher requests: no tokenizer is available; tokens are estimated as one per four characters.")
    if forecast.recipe.cascade is not None and not forecast.recipe.teacher_learned("review"):
        notes.append("cascade: stage 3 is skipped, because teacher.tasks has no review.")
    if any(not t.exact for t in trainings):
        notes += [
            "up to: rationales that are not written yet are assumed, one per post, as long as those in the data, or",
            "  four fields of about 50 words if the data has none.",
        ]
    return notes

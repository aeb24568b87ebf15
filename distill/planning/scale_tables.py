"""`distill plan --posts N`: the forecast of a chain for N posts as a text table."""

from pathlib import Path
from tempfile import TemporaryDirectory

from distill.planning.scale import Range, StageScale, forecast_scale, total
from distill.planning.text import align, si_prefix
from distill.planning.workload import ChainForecast
from distill.recipe import Recipe

DASH = "–"

_NOTES = [
    "requests: answers of a model, and posts that the student labels in service. tokens in: read, and in a training",
    "  trained on, in all epochs. device hours: of one device; an endpoint that is paid by tokens has none here.",
    "money: in the currency of the prices. FLOP and time of validation, loading and restarts are not included.",
]


def scale_text(recipe: Recipe, posts: int) -> str:
    """Return the forecast for N posts as a text table.

    The recipe's data are read, and nothing of the size of N. The training posts stand for the N posts.

    Raises:
        SettingsError: the data cannot be read.
    """
    with TemporaryDirectory() as scratch:
        forecast = ChainForecast(recipe, Path(scratch))
        problems: list[str] = []
        rows = forecast_scale(forecast, posts, problems)
        read = len(forecast.corpus.train)
    head = f"{recipe.name} for {posts:,} posts, scaled from the {read:,} training posts of its data. Nothing is run."
    sources = [f"{row.name}: {'; '.join(row.sources)}." for row in rows if row.sources]
    unknown: dict[tuple[str, str], list[str]] = {}  # the stages of each remedy and figure
    for row in rows:
        for figure, remedy in row.unknown.items():
            unknown.setdefault((remedy, figure), []).append(row.name)
    notes = problems + _NOTES
    if recipe.refine is not None:
        notes.append("refine is not included: its steps do not grow with the posts, and its FLOP are not counted.")
    parts = [
        head,
        _table(rows),
        "\n".join(["where the figures come from:", *(f"  {line}" for line in sources)]),
        "\n".join([f"{DASH} is not known. What would fill it:", *map(_remedy, unknown.items())]) if unknown else "",
        "\n".join(notes),
    ]
    return "\n\n".join(part for part in parts if part)


def _remedy(entry: tuple[tuple[str, str], list[str]]) -> str:
    (remedy, figure), stages = entry
    return f"  {figure} of {'; '.join(stages)}: {remedy}"


def _table(rows: list[StageScale]) -> str:
    names = ("requests", "prompt_tokens", "completion_tokens", "device_hours", "money", "hours")
    cells = [["stage", "requests", "tokens in", "tokens out", "device hours", "money", "wall time"]]
    for row in rows:
        cells.append([row.name, *(_cell(name, getattr(row, name)) for name in names)])
    sums = [DASH if name == "hours" else _cell(name, total(rows, name)) for name in names]
    cells.append(["total", *sums[:-1], ""])
    return align(cells)


def _cell(name: str, pair: Range | None) -> str:
    if pair is None:
        return DASH
    low, high = (_figure(name, value) for value in pair)
    return low if low == high else f"{low} to {high}"


def _figure(name: str, value: float) -> str:
    if name == "hours":
        return duration(value)
    if name in ("money", "device_hours"):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value else "0"
    return si_prefix(value)


def duration(hours: float) -> str:
    """A time such as `42 s`, `17 min`, `31 h`, `12 days` or `3.4 years`."""
    for limit, size, unit in ((1 / 30, 1 / 3600, "s"), (2, 1 / 60, "min"), (48, 1, "h"), (24 * 730, 24, "days")):
        if hours < limit:
            return f"{hours / size:.3g} {unit}"
    return f"{hours / 24 / 365:,.3g} years"

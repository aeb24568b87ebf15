"""The options of `distill plan` and `distill simulate`, and what they print."""

from pathlib import Path
from typing import Any

from distill.errors import SettingsError
from distill.planning import scale_tables, simulate, tables
from distill.recipe import Recipe

_MOST = 10**15


def add_options(command: str, options: Any) -> None:
    """Add the options of a command to its parser."""
    if command == "plan":
        options.add_argument("--probe", action="store_true", help="Ask each endpoint one question of the run.")
        text = "Tokens, device hours, money and time for so many posts, such as 100_000_000, instead of the plan."
        options.add_argument("--posts", type=int, default=None, help=text)
        return
    options.add_argument("--posts", type=int, default=None, help="Posts of a day, such as 100_000_000.")
    options.add_argument("--replicas", type=int, default=None, help="Their number; by default the smallest is found.")
    text = "A saved page of the gateway's /metrics, with the times of the student's batches."
    options.add_argument("--metrics", type=Path, default=None, help=text)


def output(command: str, recipe: Recipe, parsed: Any) -> str:
    """What a command prints. Raises SettingsError and RunError of the plan or the simulation."""
    for name in ("posts", "replicas"):
        value = parsed.get(name)
        if value is not None and not 1 <= value <= _MOST:
            raise SettingsError(f"--{name} is {value}; it takes a whole number from 1 to {_MOST:,}")
    if command == "simulate":
        if parsed.posts is None:
            raise SettingsError("simulate needs --posts, the number of posts in a day, such as 1_000_000")
        return simulate.simulation_text(recipe, parsed.posts, metrics=parsed.metrics, replicas=parsed.replicas)
    if parsed.posts is None:
        return tables.plan_text(recipe, probes=parsed.probe)
    if parsed.probe:
        raise SettingsError("plan: --probe and --posts are two plans; give one of them")
    return scale_tables.scale_text(recipe, parsed.posts)

"""Settings of capacity planning: hardware and prices for `distill plan --posts`, load and times for `distill simulate`.

Nothing here changes what a chain does. There is no default of a speed or a price: what is not given is not known.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from distill.errors import SettingsError
from distill.settings import Count, Fraction, NonNegative, Positive, Range, Seconds, Settings

RATED = ("teacher", "annotate", "augment", "assistant", "student")
"""The stages whose speed `scale.tokens_per_second` may state."""

_DAY = [3, 2, 1, 1, 1, 2, 4, 6, 7, 8, 8, 8, 9, 9, 8, 8, 8, 9, 10, 11, 12, 11, 8, 5]


@dataclass
class LoadSettings(Settings):
    """The load of a day. The defaults are an example of a day, and no measurement."""

    hours: list[float] = field(default_factory=lambda: [float(weight) for weight in _DAY])
    """Relative number of posts in each hour of the day: 24 numbers. One number: the same in all hours."""
    bursts: list[dict[str, float]] = field(default_factory=lambda: [{"hour": 20.0, "minutes": 10.0, "factor": 3.0}])
    """Times with `factor` times as many posts: each with `hour`, `minutes` and `factor`."""
    outages: list[dict[str, float]] = field(default_factory=lambda: [{"hour": 14.0, "minutes": 30.0}])
    """Times at which the teacher is dead: each with `hour` and `minutes`."""
    dead_teacher: Literal["silent", "refuses"] = "silent"
    """A dead teacher takes requests and never answers (`silent`), or refuses connections at once (`refuses`)."""
    sample_s: Seconds = 120.0
    """Of each stretch of the day with constant load, the first `sample_s` seconds are simulated, and as many more stand
    for the rest of it. 86400: the whole day is simulated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.hours) not in (1, 24) or not all(0 <= one < 1e12 for one in self.hours) or not sum(self.hours):
            raise SettingsError("hours takes 24 numbers, or one, of which none is negative and one is above 0")
        for name, entries, keys in (
            ("bursts", self.bursts, {"hour", "minutes", "factor"}),
            ("outages", self.outages, {"hour", "minutes"}),
        ):
            for entry in entries:
                if set(entry) != keys:
                    raise SettingsError(f"{name}: {dict(entry)} must have exactly {', '.join(sorted(keys))}")
                positive = all(0 < entry[key] < 1e6 for key in keys - {"hour"})
                if not 0 <= entry["hour"] < 24 or not positive:
                    raise SettingsError(f"{name}: {dict(entry)} takes an hour from 0 to below 24, and others above 0")


@dataclass
class ServiceSettings(Settings):
    """Measured times of one replica of `distill serve`. They replace what the run and its gateway have measured."""

    student_seconds: dict[int, float] = field(default_factory=dict)
    """Seconds in which the student labels a batch, by its size, such as {1: 0.03, 16: 0.11}; linear in between."""
    rationale_seconds: dict[int, float] = field(default_factory=dict)
    """Seconds in which the student writes a batch of rationales, by its size."""
    explain_seconds: dict[int, float] = field(default_factory=dict)
    """Seconds in which the student explains a batch of labels, by its size."""
    teacher_seconds: list[float] = field(default_factory=list)
    """Seconds of single answers of a teacher behind an endpoint, each as likely. One number: always the same."""
    teacher_batch_seconds: dict[int, float] = field(default_factory=dict)
    """Seconds in which a teacher in the gateway's process labels a batch, by its size."""
    deferred: Fraction | None = None
    """Share of the posts that the student defers to the teacher."""
    reviewed: Fraction | None = None
    """Share of the deferred posts that the teacher is asked about a second time."""
    explained: Fraction | None = None
    """Share of the posts whose label has to be explained, because the student's rationale cannot be used."""
    overhead_s: NonNegative = 0.0
    """Seconds of a request outside both models: network, parsing, decoding of media."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("student_seconds", "rationale_seconds", "explain_seconds", "teacher_batch_seconds"):
            _check_numbers(name, getattr(self, name))
            if any(size < 1 for size in getattr(self, name)):
                raise SettingsError(f"{name} takes batch sizes of 1 or more")
        _check_numbers("teacher_seconds", dict(enumerate(self.teacher_seconds)))


@dataclass
class ScaleSettings(Settings):
    """Hardware, prices and load of `distill plan --posts` and `distill simulate`; no stage reads them."""

    devices: Count | None = None
    """Number of devices that work at the same time; in service one replica runs on each."""
    device_price: NonNegative | None = None
    """Price of one device for an hour, in the currency of the endpoints' prices."""
    flops_per_second: Annotated[float, Range(0, 1e21, above=True)] | None = None
    """FLOP per second that one device reaches in a training, as measured; not the peak of its data sheet."""
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    """Measured tokens per second of one device, by stage: generated ones for annotate and augment, trained ones for
    teacher, assistant and student."""
    posts_per_second: Positive | None = None
    """Measured posts per second of the student on one device in service, with rationales if it serves them."""
    deadline_s: Seconds | None = None
    """Seconds within which 99% of the posts shall be answered; null: `serve.deadline_s`."""
    load: LoadSettings = field(default_factory=LoadSettings)
    """The load of a day."""
    service: ServiceSettings = field(default_factory=ServiceSettings)
    """Measured times of the gateway."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.tokens_per_second if name not in RATED]:
            raise SettingsError(f"tokens_per_second names {unknown[0]}; it takes {', '.join(RATED)}")
        _check_numbers("tokens_per_second", self.tokens_per_second)


def _check_numbers(name: str, values: Mapping[Any, float]) -> None:
    if wrong := [value for value in values.values() if not 0 < value < 1e12]:
        raise SettingsError(f"{name} has {wrong[0]}; it takes numbers above 0")

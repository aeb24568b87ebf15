"""From samples to the teacher's reasoning data (MulCoT-RD): predict, explain on failure, ask again, quarantine.

The protocol is a dialogue about one sample; `dialogue.py` holds many of them at once.
"""

from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from distill.annotation.cached_teacher import CachedTeacher, Question, read_scores
from distill.annotation.ledger import Ledger, Paid
from distill.annotation.scheduler import Progress, run_conversations
from distill.errors import SettingsError
from distill.models.endpoint import Endpoint
from distill.models.reasoner import Answer, Reasoner, Sampling
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.rationale import InvalidRationale, Rationale, check
from distill.task.sample import Sample

Source = Literal["predicted", "explained", "recorded"]


@dataclass
class AnnotateSettings:
    """How the teacher is asked."""

    retries: int = 3
    """How often an invalid answer is asked again before its sample goes to quarantine."""
    temperature: float = 0.0
    """Temperature of the first answer; 0 is greedy."""
    temperature_step: float = 0.3
    """By how much the temperature rises with each retry."""
    max_new_tokens: int = 1024
    """Token limit of an answer; an answer that reaches it is invalid."""
    unlabelled: Literal["skip", "keep_confident"] = "skip"
    """Posts without a gold label: skip, or keep_confident, where the teacher's own confident prediction labels them."""
    confidence: float = 0.9
    """Lowest probability of a kept prediction; k answers that agree on one of K labels give 1 - (1 - 1/K) / (k + 1)."""
    recorded: bool = False
    """Take the rationales that are already in the data, where they are valid."""
    chunk: int = 64
    """How many samples a teacher on this machine is handed at a time; an endpoint has its own `concurrency`."""

    def __post_init__(self) -> None:
        for name, valid, takes in (
            ("retries", self.retries >= 0, "0 or more"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("temperature_step", self.temperature_step >= 0, "0 or more"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("confidence", 0 < self.confidence <= 1, "above 0, at most 1"),
            ("chunk", self.chunk >= 1, "1 or more"),
        ):
            if not valid:
                raise SettingsError(f"annotate.{name} is {getattr(self, name)}; it takes {takes}")


@dataclass(frozen=True)
class Kept:
    """A valid rationale; `teacher_label` says that the label is the teacher's own, for want of a gold one."""

    sample: Sample
    rationale: Rationale
    source: Source
    label: str
    teacher_label: bool = False


@dataclass(frozen=True)
class Quarantined:
    """A sample that got no valid rationale: the rule that its last answer broke, or `unanswered`."""

    id: str
    reason: str
    detail: str
    answer: str


@dataclass
class Tally:
    """The counts of `summary.json`, sample by sample."""

    n: int = 0
    sources: Counter[Source] = field(default_factory=Counter)
    retried: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    unlabelled: Counter[str] = field(default_factory=Counter)
    unannotated: int = 0
    first_answers: Counter[bool] = field(default_factory=Counter)  # by whether they were right
    recorded_defects: Counter[str] = field(default_factory=Counter)
    paid: dict[str, Any] = field(default_factory=lambda: asdict(Paid()) | {"cost": None})

    def add(self, case: "_Case") -> None:
        """Count one settled sample."""
        kept, outcome = isinstance(case.outcome, Kept), case.outcome
        self.n += 1
        if isinstance(outcome, Kept) and not outcome.teacher_label:
            self.sources[outcome.source] += 1
        if isinstance(outcome, Quarantined):
            self.quarantined[outcome.reason] += 1
        if case.sample.label is None:
            self.unlabelled["seen"] += 1
            self.unlabelled["kept"] += kept
            self.unlabelled["quarantined"] += isinstance(outcome, Quarantined)
            self.unlabelled["below_threshold"] += case.below_threshold
        if case.first_right is not None:
            self.first_answers[case.first_right] += 1
        if case.defect is not None:
            self.recorded_defects[case.defect] += 1
        self.retried += case.retried
        self.unannotated += case.open

    @property
    def summary(self) -> dict[str, Any]:
        """What `summary.json` says."""
        return {
            "n": self.n,
            **{source: self.sources[source] for source in get_args(Source)},
            "retried": self.retried,
            "quarantined": {"total": self.quarantined.total(), "by_reason": dict(self.quarantined)},
            "unlabelled": {name: self.unlabelled[name] for name in ("seen", "kept", "quarantined", "below_threshold")},
            "unannotated": self.unannotated,
            "teacher_accuracy": self.first_answers[True] / total if (total := self.first_answers.total()) else None,
            "recorded_defects": dict(self.recorded_defects),
            "paid": self.paid,
        }


def annotate(
    samples: Iterable[Sample],
    labels: LabelSpace,
    teacher: Reasoner | None,
    settings: AnnotateSettings,
    ledger: Ledger,
    tally: Tally,
    progress: Progress | None = None,
) -> Generator[Kept | Quarantined, None, None]:
    """Get a valid rationale for every sample that can have one (DESIGN section 4).

    Outcomes come in the samples' order, as soon as they are settled; a sample that is skipped has none. However many
    samples there are, only a bounded window of them is held.

    Args:
        teacher: who is asked; None where only recorded rationales are taken.
        ledger: what was paid for already is not asked again, and every new answer is written there as it comes.
        tally: counts what is handed on.

    Raises:
        SettingsError: a sample's label is not in the label space.
        RunError: the teacher cannot be asked any more, or the ledger cannot be written.
    """

    def dialogue(sample: Sample) -> Generator[Question, Answer, _Case]:
        return _dialogue(_Case(sample, _label(sample, labels)), labels, settings, teacher is not None)

    teacher_cache = None if teacher is None else CachedTeacher(teacher, labels, ledger, settings.chunk)
    for case in run_conversations(samples, dialogue, teacher_cache, progress):
        tally.add(case)
        if case.outcome is not None:
            yield case.outcome
    tally.paid = asdict(ledger.paid) | {"cost": None}
    if isinstance(teacher, Endpoint):
        tally.paid["cost"] = teacher.cost(ledger.paid.prompt_tokens, ledger.paid.completion_tokens)


def recording_defects(samples: Iterable[Sample], labels: LabelSpace) -> dict[str, int]:
    """What is wrong with the rationales of labelled samples: counts by reason, and of all and valid ones."""
    counts = Counter({"rationales": 0, "valid": 0})
    for sample in samples:
        if sample.rationale and sample.label is not None:
            counts["rationales"] += 1
            try:
                check(sample.rationale, labels, sample.label)
                counts["valid"] += 1
            except InvalidRationale as invalid:
                counts[invalid.reason] += 1
    return dict(counts)


@dataclass
class _Case:
    """One sample on its way: the question that waits, then the outcome."""

    sample: Sample
    label: str | None
    template: prompts.Template = "predict"
    attempt: int = 0
    outcome: Kept | Quarantined | None = None
    teacher_label: bool = False
    below_threshold: bool = False
    first_right: bool | None = None  # None: never asked to predict a gold label
    retried: bool = False
    defect: str | None = None  # of the recorded rationale

    @property
    def open(self) -> bool:
        return self.outcome is None and self.label is not None

    def keep(self, rationale: Rationale, source: Source) -> None:
        assert self.label is not None
        self.outcome = Kept(self.sample, rationale, source, self.label, self.teacher_label)

    def quarantine(self, reason: str, detail: str, answer: str) -> None:
        self.outcome = Quarantined(self.sample.id, reason, detail.removeprefix(f"{reason}: "), answer)


def _label(sample: Sample, labels: LabelSpace) -> str | None:
    if sample.label is None:
        return None
    try:
        return labels.names[labels.index(sample.label)]
    except ValueError as error:
        raise SettingsError(f"sample {sample.id}: {error}") from None


def _dialogue(
    case: _Case, labels: LabelSpace, settings: AnnotateSettings, can_ask: bool
) -> Generator[Question, Answer, _Case]:
    """What the teacher is asked about one sample until it is settled, or skipped."""
    if settings.recorded:
        _take_recorded(case, labels, can_ask)
    if can_ask and case.label is None and settings.unlabelled == "keep_confident":
        _label_confident(case, (yield Question("classify")), labels, settings)
    while can_ask and case.open:
        temperature = round(settings.temperature + case.attempt * settings.temperature_step, 6)
        sampling = Sampling(temperature, settings.max_new_tokens, case.attempt)
        _advance(case, (yield Question(case.template, sampling)), labels, settings)
    return case


def _take_recorded(case: _Case, labels: LabelSpace, can_ask: bool) -> None:
    """Hold a rationale of the data against the rules; explain an invalid one anew, if there is someone to ask."""
    if case.label is None or not case.sample.rationale:
        return
    try:
        case.keep(check(case.sample.rationale, labels, case.label), "recorded")
    except InvalidRationale as invalid:
        case.defect, case.template = invalid.reason, "explain"
        if not can_ask:
            case.quarantine(invalid.reason, str(invalid), case.sample.rationale)


def _label_confident(case: _Case, answer: Answer, labels: LabelSpace, settings: AnnotateSettings) -> None:
    """Give an unlabelled sample the teacher's label, where its probability is high enough."""
    if answer.error is not None:
        case.quarantine("unanswered", answer.error, "")
        return
    probabilities, _ = read_scores(answer)
    best = max(probabilities)
    if best < settings.confidence:
        case.below_threshold = True
        return
    case.label, case.teacher_label = labels.names[probabilities.index(best)], True


def _advance(case: _Case, answer: Answer, labels: LabelSpace, settings: AnnotateSettings) -> None:
    """One step of the protocol: keep a valid answer, explain a wrong prediction, ask again, or quarantine."""
    if answer.error is not None:
        case.quarantine("unanswered", answer.error, "")
        return
    first = case.template == "predict" and case.attempt == 0 and not case.teacher_label
    try:
        rationale = check(answer.text, labels, case.label, finished=answer.finished)
    except InvalidRationale as invalid:
        right = invalid.reason == "leaks"  # of an answer that breaks no rule before
        if case.template == "predict" and invalid.reason == "contradicts" and not case.teacher_label:
            case.template, case.attempt = "explain", 0
        elif case.attempt < settings.retries:
            case.attempt, case.retried = case.attempt + 1, True
        else:
            case.quarantine(invalid.reason, str(invalid), answer.text)
    else:
        right = True
        case.keep(rationale, "predicted" if case.template == "predict" else "explained")
    if first:
        case.first_right = right

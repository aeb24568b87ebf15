"""From samples to the teacher's reasoning data (MulCoT-RD): predict, explain on failure, ask again, quarantine.

The protocol advances in rounds over all open samples, so that a teacher always has many questions to answer at once.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distill.annotation.ledger import Ledger, Memory, read_scores
from distill.errors import SettingsError
from distill.models.endpoint import Endpoint
from distill.models.reasoner import Answer, Reasoner, Sampling
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.rationale import InvalidRationale, Rationale, check, parse
from distill.task.sample import Sample

Source = Literal["recorded", "predicted", "explained"]


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
    """How many samples the teacher is handed at a time."""

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
class Annotated:
    """What came of the samples, in their order, and the counts of `summary.json`."""

    kept: list[Kept]
    quarantined: list[Quarantined]
    summary: dict[str, Any]


def annotate(
    samples: Sequence[Sample],
    labels: LabelSpace,
    teacher: Reasoner | None,
    settings: AnnotateSettings,
    ledger: Ledger,
    progress: Callable[[int, int], None] | None = None,
) -> Annotated:
    """Get a valid rationale for every sample that can have one (DESIGN section 4).

    Args:
        teacher: who is asked; None where only recorded rationales are taken.
        ledger: what was paid for already is not asked again, and every new answer is written there as it comes.
        progress: told how many of the samples that need the teacher are settled, and how many there are.

    Raises:
        SettingsError: a sample's label is not in the label space.
        RunError: the teacher cannot be asked any more, or the ledger cannot be written.
    """
    cases = [_Case(sample, _label(sample, labels)) for sample in samples]
    if settings.recorded:
        for case in cases:
            _take_recorded(case, labels, teacher)
    if teacher is None:
        return _result(cases, {}, None)
    memory = Memory(teacher, labels, ledger, settings.chunk)
    unlabelled = [case for case in cases if case.label is None and settings.unlabelled == "keep_confident"]
    total = sum(case.open for case in cases) + len(unlabelled)
    settled = 0

    def settle(case: _Case) -> None:
        nonlocal settled
        settled += not case.open
        if progress is not None:
            progress(settled, total)

    for index, answer in memory.scores([case.sample for case in unlabelled]):
        _label_confident(unlabelled[index], answer, labels, settings)
        settle(unlabelled[index])
    while waiting := [case for case in cases if case.open]:
        # The question that most samples wait for, so that the teacher is never asked about a handful while many wait.
        (template, attempt), _ = Counter((case.template, case.attempt) for case in waiting).most_common(1)[0]
        group = [case for case in waiting if (case.template, case.attempt) == (template, attempt)]
        temperature = round(settings.temperature + attempt * settings.temperature_step, 6)
        sampling = Sampling(temperature, settings.max_new_tokens, attempt)
        for index, answer in memory.reason([case.sample for case in group], template, sampling):
            _advance(group[index], answer, labels, settings)
            settle(group[index])
    return _result(cases, memory.paid, teacher)


def recording_defects(samples: Sequence[Sample], labels: LabelSpace) -> dict[str, int]:
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


def _take_recorded(case: _Case, labels: LabelSpace, teacher: Reasoner | None) -> None:
    """Hold a rationale of the data against the rules; explain an invalid one anew, if there is someone to ask."""
    if case.label is None or not case.sample.rationale:
        return
    try:
        case.keep(check(case.sample.rationale, labels, case.label), "recorded")
    except InvalidRationale as invalid:
        case.defect, case.template = invalid.reason, "explain"
        if teacher is None:
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
    if case.template == "predict" and case.attempt == 0 and not case.teacher_label:
        case.first_right = _predicts(answer, labels) == case.label
    try:
        rationale = check(answer.text, labels, case.label, finished=answer.finished)
    except InvalidRationale as invalid:
        if case.template == "predict" and invalid.reason == "contradicts" and not case.teacher_label:
            case.template, case.attempt = "explain", 0
        elif case.attempt < settings.retries:
            case.attempt, case.retried = case.attempt + 1, True
        else:
            case.quarantine(invalid.reason, str(invalid), answer.text)
    else:
        case.keep(rationale, "predicted" if case.template == "predict" else "explained")


def _predicts(answer: Answer, labels: LabelSpace) -> str | None:
    try:
        return parse(answer.text, labels).prediction if answer.finished else None
    except InvalidRationale:
        return None


def _result(cases: Sequence[_Case], paid: Mapping[str, Answer], teacher: Reasoner | None) -> Annotated:
    kept = [case.outcome for case in cases if isinstance(case.outcome, Kept)]
    quarantined = [case.outcome for case in cases if isinstance(case.outcome, Quarantined)]
    sources = Counter(item.source for item in kept if not item.teacher_label)
    first = [case.first_right for case in cases if case.first_right is not None]
    unlabelled = [case for case in cases if case.sample.label is None]
    prompt_tokens = sum(answer.prompt_tokens for answer in paid.values())
    completion_tokens = sum(answer.completion_tokens for answer in paid.values())
    summary = {
        "n": len(cases),
        "predicted": sources["predicted"],
        "explained": sources["explained"],
        "recorded": sources["recorded"],
        "retried": sum(case.retried for case in cases),
        "quarantined": {"total": len(quarantined), "by_reason": dict(Counter(item.reason for item in quarantined))},
        "unlabelled": {
            "seen": len(unlabelled),
            "kept": sum(isinstance(case.outcome, Kept) for case in unlabelled),
            "quarantined": sum(isinstance(case.outcome, Quarantined) for case in unlabelled),
            "below_threshold": sum(case.below_threshold for case in unlabelled),
        },
        "unannotated": sum(case.open for case in cases),
        "teacher_accuracy": sum(first) / len(first) if first else None,
        "recorded_defects": dict(Counter(case.defect for case in cases if case.defect is not None)),
        "paid": {
            "answers": len(paid),
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "cost": teacher.cost(prompt_tokens, completion_tokens) if isinstance(teacher, Endpoint) else None,
        },
    }
    return Annotated(kept, quarantined, summary)

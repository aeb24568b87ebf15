"""The annotation protocol of MulCoT-RD (arXiv 2508.05234): predict, explain a wrong prediction, retry, quarantine.

The protocol is a conversation about one sample; `scheduler.py` runs many of them in parallel.
"""

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, Literal

from distill.annotation.cached_teacher import CachedTeacher, Start, TeacherQuery
from distill.annotation.first_answers import FirstAnswers
from distill.annotation.ledger import Ledger, PaidTotals
from distill.annotation.scheduler import Progress, run_conversations
from distill.annotation.scores import read_scores
from distill.errors import SettingsError
from distill.models.endpoint import BatchSettings, Endpoint, EndpointSettings
from distill.models.endpoint.settings import cost
from distill.models.reasoner import Answer, Reasoner, Sampling
from distill.settings import Count, Natural, NonNegative, Range, Settings
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.rationale import InvalidRationale, Rationale, check
from distill.task.sample import Sample

Source = Literal["predicted", "explained", "recorded", "edited"]

_COUNTED: tuple[Source, ...] = ("predicted", "explained", "recorded")
"""The sources with a count of their own in `summary.json`; edited posts are counted among the curated ones."""


@dataclass
class AnnotateSettings(Settings):
    """How the teacher annotates posts."""

    retries: Natural = 3
    """Number of retries after an invalid answer before the post is quarantined."""
    temperature: NonNegative = 0.0
    """Temperature of the first answer; 0 is greedy decoding."""
    temperature_step: NonNegative = 0.3
    """Increase of the temperature with each retry."""
    max_new_tokens: Count = 1024
    """Maximum number of tokens of an answer; an answer that reaches it is invalid."""
    unlabelled: Literal["skip", "keep_confident"] = "skip"
    """Posts without a gold label: `skip`, or `keep_confident` to label them with confident teacher predictions."""
    confidence: Annotated[float, Range(0, 1, above=True)] = 0.9
    """Minimum probability of a teacher label; k samples that agree have 1 - (1 - 1/K) / (k + 1), for K labels."""
    recorded: bool = False
    """Use the rationales in the data set if they are valid."""
    chunk: Count = 64
    """Number of posts per call of a teacher on this machine; for an endpoint, `concurrency` applies instead."""
    batch: BatchSettings | None = None
    """Ask the endpoint in batch files."""


@dataclass(frozen=True)
class Kept:
    """A sample with a valid rationale. `teacher_label`: the sample has no gold label, `label` is the teacher's."""

    sample: Sample
    rationale: Rationale
    source: Source
    label: str
    teacher_label: bool = False


@dataclass(frozen=True)
class Quarantined:
    """A sample without a valid rationale.

    Attributes:
        reason: the rule that the last answer breaks, `unanswered`, or `filtered` by a content filter.
        detail: a description of the problem.
        answer: the last answer.
    """

    id: str
    reason: str
    detail: str
    answer: str


@dataclass
class AnnotationCounts:
    """Counts for `summary.json`, updated with each sample."""

    n: int = 0
    sources: Counter[Source] = field(default_factory=Counter)
    retried: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    unlabelled: Counter[str] = field(default_factory=Counter)
    unannotated: int = 0
    first_answers: Counter[bool] = field(default_factory=Counter)  # key: whether the prediction was correct
    recorded_defects: Counter[str] = field(default_factory=Counter)
    paid: dict[str, Any] = field(default_factory=lambda: asdict(PaidTotals()) | {"cost": None})

    def add(self, state: "_SampleState") -> None:
        """Count one finished sample."""
        result = state.result
        self.n += 1
        if isinstance(result, Kept) and not result.teacher_label:
            self.sources[result.source] += 1
        if isinstance(result, Quarantined):
            self.quarantined[result.reason] += 1
        if state.sample.label is None:
            self.unlabelled["seen"] += 1
            self.unlabelled["kept"] += isinstance(result, Kept)
            self.unlabelled["quarantined"] += isinstance(result, Quarantined)
            self.unlabelled["below_threshold"] += state.below_threshold
        if state.first_correct is not None:
            self.first_answers[state.first_correct] += 1
        if state.defect is not None:
            self.recorded_defects[state.defect] += 1
        self.retried += state.retried
        self.unannotated += state.needs_rationale

    @property
    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        return {
            "n": self.n,
            **{source: self.sources[source] for source in _COUNTED},
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
    counts: AnnotationCounts,
    progress: Progress | None = None,
    other_servers: Collection[str] = (),
    first_answers: FirstAnswers | None = None,
    edits: Mapping[str, Rationale] = MappingProxyType({}),
    prefill: Callable[[CachedTeacher, Start], None] | None = None,
) -> Generator[Kept | Quarantined, None, None]:
    """Annotate samples with valid rationales.

    Results are yielded in sample order, as soon as they are available; a skipped sample has none. A bounded window of
    samples is held in memory, for any number of samples.

    Args:
        teacher: the teacher; None to use only the rationales in the data set.
        ledger: answers in the ledger are not requested again; every new answer is written to it.
        counts: updated with each sample; complete after the last result.
        other_servers, first_answers: see `CachedTeacher`.
        edits: rationales that a person has edited, by the id of the sample; they are kept, and nothing is requested.
        prefill: fills the ledger before the first request, from batches for example; it is given the teacher and the
            function that begins the conversation about a sample.

    Raises:
        SettingsError: the label of a sample is not in the label space.
        RunError: the teacher no longer answers, its first answers are all invalid, or the ledger cannot be written.
    """

    conversation = partial(_begin, labels=labels, settings=settings, has_teacher=teacher is not None, edits=dict(edits))
    teacher_cache = None
    if teacher is not None:
        teacher_cache = CachedTeacher(teacher, labels, ledger, settings.chunk, other_servers, first_answers)
        if prefill is not None:
            prefill(teacher_cache, conversation)
    for state in run_conversations(samples, conversation, teacher_cache, progress):
        counts.add(state)
        if state.result is not None:
            yield state.result
    counts.paid = asdict(ledger.paid) | {"cost": None}
    if isinstance(teacher, Endpoint):
        counts.paid["cost"] = _cost(ledger, teacher.settings, settings.batch)
    if ledger.by_batch.answers:
        counts.paid["by_batch"] = asdict(ledger.by_batch)


def _begin(
    sample: Sample, labels: LabelSpace, settings: AnnotateSettings, has_teacher: bool, edits: Mapping[str, Rationale]
) -> Generator[TeacherQuery, Answer, "_SampleState"]:
    """The conversation about one sample; a module's function, so that it can be sent to another process."""
    state = _SampleState(sample, _label(sample, labels))
    if sample.id in edits:
        state.keep(edits[sample.id], "edited")
    return _conversation(state, labels, settings, has_teacher)


def _cost(ledger: Ledger, direct: EndpointSettings, batch: BatchSettings | None) -> float | None:
    """Cost of the answers that were used; None without prices, or without those of answers from batches."""
    paid, by_batch = ledger.paid, ledger.by_batch
    tokens = (paid.prompt_tokens - by_batch.prompt_tokens, paid.completion_tokens - by_batch.completion_tokens)
    one_by_one = cost(direct, *tokens)
    if not by_batch.answers:
        return one_by_one
    in_batches = None if batch is None else cost(batch, by_batch.prompt_tokens, by_batch.completion_tokens)
    return None if one_by_one is None or in_batches is None else one_by_one + in_batches


def recording_defects(samples: Iterable[Sample], labels: LabelSpace) -> dict[str, int]:
    """Counts of the rationales of labelled samples: all (`rationales`), `valid`, and the invalid ones by reason."""
    counts = Counter({"rationales": 0, "valid": 0})
    for sample in samples:
        if sample.rationale and sample.label is not None:
            counts["rationales"] += 1
            try:
                check(sample.rationale, labels, sample.label, post=sample.text)
                counts["valid"] += 1
            except InvalidRationale as invalid:
                counts[invalid.reason] += 1
    return dict(counts)


@dataclass
class _SampleState:
    """State of the protocol for one sample: the next request, then the result."""

    sample: Sample
    label: str | None
    template: prompts.Template = "predict"
    attempt: int = 0
    result: Kept | Quarantined | None = None
    teacher_label: bool = False
    below_threshold: bool = False
    first_correct: bool | None = None  # None: the teacher did not predict a gold label
    retried: bool = False
    defect: str | None = None  # of the rationale in the data set

    @property
    def needs_rationale(self) -> bool:
        return self.result is None and self.label is not None

    def keep(self, rationale: Rationale, source: Source) -> None:
        assert self.label is not None
        self.result = Kept(self.sample, rationale, source, self.label, self.teacher_label)

    def quarantine(self, reason: str, detail: str, answer: str) -> None:
        self.result = Quarantined(self.sample.id, reason, detail, answer)


def _label(sample: Sample, labels: LabelSpace) -> str | None:
    if sample.label is None:
        return None
    try:
        return labels.names[labels.index(sample.label)]
    except ValueError as error:
        raise SettingsError(f"sample {sample.id}: {error}") from None


def _conversation(
    state: _SampleState, labels: LabelSpace, settings: AnnotateSettings, has_teacher: bool
) -> Generator[TeacherQuery, Answer, _SampleState]:
    """The requests about one sample, until it has a result or is skipped."""
    if settings.recorded and state.needs_rationale:
        _use_recorded(state, labels, has_teacher)
    if has_teacher and state.label is None and settings.unlabelled == "keep_confident":
        _label_if_confident(state, (yield TeacherQuery("classify")), labels, settings)
    while has_teacher and state.needs_rationale:
        temperature = round(settings.temperature + state.attempt * settings.temperature_step, 6)
        sampling = Sampling(temperature, settings.max_new_tokens, state.attempt)
        _advance(state, (yield TeacherQuery(state.template, sampling)), labels, settings)
    return state


def _use_recorded(state: _SampleState, labels: LabelSpace, has_teacher: bool) -> None:
    """Keep a valid rationale of the data set; for an invalid one, continue with *explain* if there is a teacher."""
    if state.label is None or not state.sample.rationale:
        return
    try:
        state.keep(check(state.sample.rationale, labels, state.label, post=state.sample.text), "recorded")
    except InvalidRationale as invalid:
        state.defect, state.template = invalid.reason, "explain"
        if not has_teacher:
            state.quarantine(invalid.reason, invalid.detail, state.sample.rationale)


def _label_if_confident(state: _SampleState, answer: Answer, labels: LabelSpace, settings: AnnotateSettings) -> None:
    """Label an unlabelled sample with the teacher's prediction if its probability reaches `confidence`."""
    if answer.error is not None:
        state.quarantine(answer.kind, answer.error, "")
        return
    probabilities, _ = read_scores(answer)
    best = max(probabilities)
    if best < settings.confidence:
        state.below_threshold = True
        return
    state.label, state.teacher_label = labels.names[probabilities.index(best)], True


def _advance(state: _SampleState, answer: Answer, labels: LabelSpace, settings: AnnotateSettings) -> None:
    """One step of the protocol: keep a valid answer, explain a wrong prediction, retry, or quarantine."""
    if answer.error is not None:
        state.quarantine(answer.kind, answer.error, "")
        return
    is_first = state.template == "predict" and state.attempt == 0 and not state.teacher_label
    try:
        rationale = check(answer.text, labels, state.label, finished=answer.finished, post=state.sample.text)
    except InvalidRationale as invalid:
        correct = invalid.reason == "leaks"  # checked last, so the prediction is the label
        if state.template == "predict" and invalid.reason == "contradicts" and not state.teacher_label:
            state.template, state.attempt = "explain", 0
        elif state.attempt < settings.retries:
            state.attempt, state.retried = state.attempt + 1, True
        else:
            state.quarantine(invalid.reason, invalid.detail, answer.text)
    else:
        correct = True
        state.keep(rationale, "predicted" if state.template == "predict" else "explained")
    if is_first:
        state.first_correct = correct

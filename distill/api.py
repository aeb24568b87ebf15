"""The Python interface, whose names `distill` itself has: recipes, chains, finished runs, students, cascades."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill import chain
from distill.annotation.cached_teacher import CachedTeacher
from distill.annotation.ledger import Ledger
from distill.cascade.cascade import CascadePolicy, run_cascade
from distill.cascade.uncertainty import uncertainty
from distill.data.clips import ClipReader, VideoSettings
from distill.data.lengths import MAX_TOKENS
from distill.data.posts import as_samples
from distill.errors import SettingsError
from distill.files import read_json
from distill.models import backbone, text_limit
from distill.models.backbone import ModelSettings
from distill.models.endpoint import Endpoint
from distill.models.local import Local
from distill.models.reasoner import Cost, Reasoner, Sampling
from distill.planning.tables import plan_text
from distill.recipe import Recipe
from distill.runs import Run, load_recipe
from distill.stages.cascade import calibrated_policy
from distill.stages.context import Context
from distill.task.labels import LabelSpace, Scale
from distill.task.prompts import Template
from distill.task.rationale import InvalidRationale, check
from distill.task.sample import Sample
from distill.task.wording import Wording

log = logging.getLogger(__name__)

__all__ = ["Cascade", "Recipe", "Run", "Student", "load_recipe", "plan", "run"]

Post = Mapping[str, Any]
"""A post: `text`, `image` or `images` (paths, PIL images or rows of `datasets`), `aspect`, `id`; all are optional, but
there is a text or an image. Other fields are ignored."""


def run(recipe: Recipe, *, until: str | None = None, only: str | None = None) -> Run:
    """Run the stages that are not up to date, as `distill run`.

    Args:
        until: stop after this stage.
        only: run this stage alone.

    Raises:
        SettingsError: the recipe or the data cannot be used.
        RunError: a stage failed. The same call continues.
    """
    chain.run(recipe, until=until, only=only)
    return Run(recipe.folder)


def plan(recipe: Recipe) -> str:
    """What a chain would do: data, teacher requests, FLOP, memory and cost, as text. Raises SettingsError."""
    return plan_text(recipe)


class Student:
    """A student that classifies posts and explains its answers.

    Attributes:
        labels: the names of the labels.
    """

    def __init__(self, model: Local, max_tokens: int | None = None) -> None:
        self.model = model
        self._labels = model.backbone.labels
        self.labels = list(self._labels.names)
        self._max_tokens = max_tokens or text_limit.default_limit(model.backbone.settings, MAX_TOKENS)

    @classmethod
    def from_run(cls, folder: str | PathLike[str], *, device: str | None = None) -> "Student":
        """Load the student of a run.

        Args:
            device: of torch; None: the first GPU, or the CPU without one.

        Raises:
            SettingsError: the run has no trained student.
        """
        opened = Run(folder)
        if opened.recipe.student is None:
            raise SettingsError(f"{opened.folder} has no student section")
        model = Local(Context(opened.recipe, {}).load(opened.recipe.student_stage), "student", _device(device))
        return cls(model, opened.recipe.data.max_tokens)

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], *, device: str | None = None) -> "Student":
        """Load an exported student.

        Raises:
            SettingsError: the folder is no export, or one of a version that did not write what is needed here.
        """
        try:
            scoring = read_json(Path(folder) / "scoring.json")
            scale = None if scoring["scale"] is None else Scale(**scoring["scale"])
            wording = Wording.from_json(scoring["wording"]) if "wording" in scoring else Wording()
            labels = LabelSpace(tuple(scoring["labels"]), tuple(scoring["polarity"]), scale, wording)
            size, clips = scoring["image_size"], dict(scoring.get("clips", {}))
            sampling = VideoSettings(**clips.pop("sampling", {}))
            dtype = read_json(Path(folder) / "config.json")["dtype"]
        except OSError as error:
            raise SettingsError(f"{folder} is no exported student: {error.filename} is missing") from None
        except (LookupError, TypeError) as error:
            raise SettingsError(f"{folder} was exported by an earlier version ({error}); export it again") from None
        options = ({} if size is None else {"image_size": size}) | clips
        settings = ModelSettings(str(folder), images=size is not None, dtype=dtype, **options)
        model = backbone.create(settings, labels, Path(folder), train=False, clips=ClipReader(sampling))
        return cls(Local(model, "student", _device(device)))

    def classify(self, posts: Iterable[Post]) -> list[dict[str, Any]]:
        """The label of each post.

        Returns:
            For each post `id`, `label`, `probabilities` by label, `uncertainty` in [0, 1], the entropy of the
            probabilities over its maximum, and `seconds`; on a scale also the `value`.

        Raises:
            ValueError: a post has no text, image, video or audio, or a field has another type. The message names the
                post.
        """
        with as_samples(posts, self.clips) as samples:
            return self.label(samples)

    def label(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """`classify` of samples."""
        scores = self.model.classify(samples := self.cut(samples))
        unsure = uncertainty(scores.probabilities, "entropy")
        return [
            {"id": post.id, **_label(self._labels, row), "uncertainty": float(value), "seconds": cost.seconds}
            for post, row, value, cost in zip(samples, scores.probabilities, unsure, scores.costs, strict=True)
        ]

    def reason(
        self,
        posts: Iterable[Post],
        labels: Sequence[str] | None = None,
        *,
        temperature: float = 0.0,
        max_new_tokens: int = 512,
        seed: int = 42,
    ) -> list[dict[str, Any]]:
        """The rationale of each post.

        Args:
            labels: one for each post, which the rationale must explain (prompt *explain*). None: its last field is a
                label of its own, and `classify` may give another one.

        Returns:
            For each post `id`, the `text` that was generated, the fields of the `rationale` by name, its `label`, and
            the `problem`, why the text is no valid rationale: then `rationale` and `label` are None; `seconds`.

        Raises:
            ValueError: as `classify`, or a label is unknown.
        """
        with as_samples(posts, self.clips) as samples:
            return self.rationales(_labelled(samples, labels), Sampling(temperature, max_new_tokens, seed=seed))

    def rationales(self, samples: Sequence[Sample], sampling: Sampling = Sampling()) -> list[dict[str, Any]]:
        """`reason` of samples, of which all or none have a label."""
        samples = self.cut(samples)
        template: Template = "explain" if any(post.label is not None for post in samples) else "reason"
        return [row for row, _ in _rationales(self.model, template, samples, self._labels, sampling)]

    @property
    def clips(self) -> ClipReader:
        """Decodes the videos and sounds of posts, within the limits of the run or of the export."""
        return self.model.backbone.encoder.media.clips

    def cut(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with texts that the model takes: `data.max_tokens` of the run, or half of its context."""
        limit, tokenizer = self._max_tokens, self.model.backbone.processor.tokenizer
        texts = [
            post.text if len(post.text.encode()) <= limit else text_limit.cut(post.text, limit, tokenizer)
            for post in samples
        ]
        if long := [post.id for post, text in zip(samples, texts, strict=True) if text != post.text]:
            log.warning("%d texts are cut to %d tokens; the first is that of %s", len(long), limit, long[0])
        return [replace(post, text=text) for post, text in zip(samples, texts, strict=True)]


class Cascade:
    """A student and its teacher: the student answers what it is certain of, the teacher the rest (U-ACS).

    Attributes:
        labels: the names of the labels.
        student: the student, which can also be asked alone.
    """

    def __init__(self, student: Student, teacher: Reasoner, policy: CascadePolicy) -> None:
        self.student, self._teacher, self._policy = student, teacher, policy
        self.labels = student.labels

    @classmethod
    def from_run(cls, folder: str | PathLike[str], *, ledger: Ledger | None = None) -> "Cascade":
        """Load student, teacher and calibration of a run, on the device of its recipe.

        Args:
            ledger: keeps the teacher's answers, and gives those that it has; None: the teacher is always asked.

        Raises:
            SettingsError: one of the stages teacher, student (or refine) and calibrate is missing or not up to date.
        """
        recipe = Run(folder).recipe
        needed = ("teacher", recipe.student_stage, "calibrate")
        context = Context(recipe, chain.input_fingerprints(recipe, "Cascade.from_run", needed))
        teacher = context.teacher(recipe.cascade_teacher)
        assert teacher is not None  # calibrate has run
        if ledger is not None:
            teacher = CachedTeacher(teacher, context.labels, ledger, 256)
        student = Student(context.reasoner(recipe.student_stage), recipe.data.max_tokens)
        return cls(student, teacher, calibrated_policy(context))

    def classify(self, posts: Iterable[Post]) -> list[dict[str, Any]]:
        """The final answer on each post.

        Returns:
            For each post `id`, `label`, `probabilities` by label, on a scale `value`; `stage` and `reason`, which say
            who answered and why; `uncertainty` of the student; `degraded`, whether the teacher was needed and did not
            answer; `teacher_calls`, 0, 1 or 2; `seconds` and `price`, None without prices.

        Raises:
            ValueError: as `Student.classify`.
            RunError: a teacher behind a server cannot be reached.
        """
        with as_samples(posts, self.clips) as samples:
            return self.label(samples)

    def label(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """`classify` of samples."""
        samples = self.student.cut(samples)
        decisions = run_cascade(samples, self.student.model.classify(samples), self._teacher, self._policy)
        return [
            {
                "id": post.id,
                **_label(self._policy.labels, decision.probabilities),
                "uncertainty": decision.student.uncertainty,
                "stage": decision.stage,
                "reason": decision.reason,
                "degraded": decision.degraded,
                "teacher_calls": decision.teacher_calls,
                "seconds": decision.cost.seconds,
                "price": self._price(decision.teacher_cost),
            }
            for post, decision in zip(samples, decisions, strict=True)
        ]

    def explain(
        self, posts: Iterable[Post], labels: Sequence[str], *, max_new_tokens: int = 512
    ) -> list[dict[str, Any]]:
        """The teacher's rationale for the label of each post, one call for each (prompt *explain*).

        A teacher that the chain has trained without *explain* gets the prompt *predict*. If its rationale then argues
        for another label, that is a `problem`.

        Returns:
            As `Student.reason`, with `teacher_calls` and `price`.

        Raises:
            ValueError: as `Student.reason`.
            RunError: as `classify`.
        """
        with as_samples(posts, self.clips) as samples:
            return self.rationales(_labelled(samples, labels), Sampling(max_new_tokens=max_new_tokens))

    @property
    def clips(self) -> ClipReader:
        """As `Student.clips`."""
        return self.student.clips

    def rationales(self, samples: Sequence[Sample], sampling: Sampling = Sampling()) -> list[dict[str, Any]]:
        """`explain` of samples that have a label."""
        samples, policy = self.student.cut(samples), self._policy
        found = _rationales(self._teacher, policy.explaining, samples, policy.labels, sampling)
        return [row | {"teacher_calls": 1, "price": self._price(cost)} for row, cost in found]

    def _price(self, cost: Cost) -> float | None:
        model = self._teacher.teacher if isinstance(self._teacher, CachedTeacher) else self._teacher
        return model.cost(cost.prompt_tokens, cost.completion_tokens) if isinstance(model, Endpoint) else None


def _label(labels: LabelSpace, probabilities: np.ndarray) -> dict[str, Any]:
    """Label and probabilities [K] of a post by name, and on a scale the value, whose bin is the label."""
    label, value = labels.decide(probabilities)
    named = {"probabilities": dict(zip(labels.names, map(float, probabilities), strict=True))}
    return {"label": label} | ({} if value is None else {"value": value}) | named


def _labelled(samples: Sequence[Sample], labels: Sequence[str] | None) -> list[Sample]:
    """The samples with their labels."""
    if labels is None:
        return list(samples)
    if len(labels) != len(samples):
        raise ValueError(f"there are {len(samples)} posts and {len(labels)} labels")
    return [replace(post, label=label) for post, label in zip(samples, labels, strict=True)]


def _rationales(
    model: Reasoner, template: Template, samples: Sequence[Sample], labels: LabelSpace, sampling: Sampling
) -> list[tuple[dict[str, Any], Cost]]:
    """A model's rationales of posts, which argue for their labels if they have any, and their costs."""
    answers = dict(model.reason(samples, template, sampling))
    found: list[tuple[dict[str, Any], Cost]] = []
    for index, post in enumerate(samples):
        answer = answers[index]
        row: dict[str, Any] = {"id": post.id, "text": answer.text, "rationale": None, "label": None}
        row |= {"problem": answer.error, "seconds": answer.seconds}
        try:
            if answer.answered:
                rationale = check(answer.text, labels, post.label, finished=answer.finished, post=post.text)
                row["rationale"] = rationale.as_dict()
                row["label"] = rationale.prediction
        except InvalidRationale as error:
            row["problem"] = str(error)
        found.append((row, answer.cost))
    return found


def _device(name: str | None) -> str:
    return name or ("cuda" if torch.cuda.is_available() else "cpu")

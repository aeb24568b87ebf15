"""Forecast of a chain before it runs: training rows, models and teacher requests.

Data that earlier stages have not written yet is replaced by an upper bound: every post is kept, with a rationale as
long as those in the data.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from distill import chain
from distill.annotation.annotate import AnnotationCounts, Kept, annotate
from distill.annotation.augment import select
from distill.annotation.ledger import Ledger
from distill.annotation.reasoning_data import labels_only
from distill.data.clips import RATE, ClipReader
from distill.data.images import open_image
from distill.data.media_cache import fetch
from distill.data.source import built_in
from distill.errors import SettingsError
from distill.models.backbone import Backbone, ModelSettings
from distill.models.endpoint import EndpointSettings
from distill.models.text_limit import CHARACTERS_PER_TOKEN
from distill.planning.teacher_requests import RequestForecast, rationale_request_bounds
from distill.recipe import Recipe
from distill.stage_settings import TeacherSettings
from distill.stages.context import Context
from distill.stages.label_targets import unlabelled
from distill.task import prompts
from distill.task.prompts import Template
from distill.task.rationale import Rationale, render
from distill.task.sample import Media, Sample
from distill.training.assistant import TrainSettings
from distill.training.batches import synthetic_answers

SAMPLE_SIZE = 64
"""Maximum number of posts that are tokenized."""

TOKEN_SIDE, MIN_IMAGE_TOKENS = 28, 4
"""Qwen2.5-VL: side in pixels of the square that becomes one token, and the tokens of the smallest images."""

SOUND_TOKENS = 25
"""Qwen2.5-Omni and Qwen2-Audio: tokens of a second of sound."""

_FILLER = " ".join(["What the post says, what its picture shows and which of them prevails is weighed here."] * 3)

Teacher = EndpointSettings | ModelSettings


@dataclass(frozen=True)
class TrainingRows:
    """Samples of a training; `exact` is False if some of them are assumed."""

    samples: Sequence[Sample]
    exact: bool


class ChainForecast:
    """Forecast of a chain; temporary files are written to `scratch`."""

    def __init__(self, recipe: Recipe, scratch: Path) -> None:
        self.recipe = recipe
        self.labels = recipe.labels
        self.done = chain.up_to_date(recipe)
        data = recipe.data
        if (corpus := built_in(data)) and not corpus.is_generated(Path(data.root)):
            data = replace(data, root=str(scratch / "data"))
        self.context = Context(replace(recipe, runs=str(scratch), data=data), {})
        self.corpus = self.context.posts
        self._run_context = Context(recipe, {})
        self.context.corpus = self._run_context.corpus = self.corpus

    def model(self, settings: ModelSettings) -> Backbone:
        """Return a trainable model without its weights. Raises SettingsError if its config cannot be loaded."""
        return self.context.without_weights(settings)

    @property
    def pending(self) -> list[str]:
        """Names of the stages that would run."""
        return [name for name, done in self.done.items() if not done]

    # ---- training rows ----

    def gold_rows(self) -> TrainingRows:
        """Return the labelled posts of the training split."""
        return TrainingRows([post for post in self.corpus.train if post.label is not None], True)

    def teacher_rows(self) -> TrainingRows:
        """Return the rows of the teacher: labelled posts, with a gold rationale if a task requires one."""
        settings = self.recipe.teacher
        assert settings is not None
        labelled = [*self.gold_rows().samples, *self.corpus.teacher]
        without = settings.labelled_posts or set(settings.tasks) <= set(prompts.SCORED)
        return TrainingRows([post for post in labelled if post.rationale or without], True)

    def assistant_rows(self) -> TrainingRows:
        """Return the rows with the teacher's rationales, and the labelled posts if it trains on them."""
        assert self.recipe.assistant is not None
        return self._with_labelled_posts(self.annotated_rows(), self.recipe.assistant)

    def annotated_rows(self) -> TrainingRows:
        """Return the rows with the teacher's rationales; of recorded rationales only the valid ones."""
        settings = self.recipe.annotate
        if settings is None:
            return self.gold_rows()
        if self.done["annotate"]:
            return TrainingRows(self._run_context.rationales("annotate"), True)
        if self.teacher() is None:
            with Ledger(self.context.folder / "ledger.jsonl") as ledger:
                results = annotate(self.corpus.train, self.labels, None, settings, ledger, AnnotationCounts())
                kept = [item for item in results if isinstance(item, Kept)]
            return TrainingRows([replace(item.sample, rationale=render(item.rationale)) for item in kept], True)
        posts = self.corpus.train if settings.unlabelled == "keep_confident" else self.gold_rows().samples
        return TrainingRows(self.with_assumed_answers(posts), False)

    def student_rows(self) -> TrainingRows:
        """Return the rows with the teacher's rationales, those with the assistant's, and the unlabelled posts."""
        rows = self._rows_with_answers()
        student = self.recipe.student
        if student is None:
            return rows
        rows = self._with_labelled_posts(rows, student)
        if not student.distillation.label_weight:
            return rows
        return TrainingRows([*rows.samples, *unlabelled(self.corpus.train, rows.samples)], rows.exact)

    def _with_labelled_posts(self, rows: TrainingRows, settings: TrainSettings) -> TrainingRows:
        if not settings.labelled_posts:
            return rows
        return TrainingRows([*rows.samples, *labels_only(self.corpus.train, rows.samples)], rows.exact)

    def _rows_with_answers(self) -> TrainingRows:
        annotated = self.annotated_rows()
        if self.recipe.augment is None or self.recipe.annotate is None:
            return annotated
        if self.done["augment"]:
            return TrainingRows([*annotated.samples, *self._run_context.rationales("augment")], annotated.exact)
        return TrainingRows([*annotated.samples, *self.with_assumed_answers(self._augmented_posts())], False)

    def _augmented_posts(self) -> list[Sample]:
        assert self.recipe.augment is not None
        posts = {post.id: post for post in [*self.annotated_rows().samples, *self.gold_rows().samples]}
        return select(list(posts.values()), self.recipe.augment)

    def with_assumed_answers(self, posts: Iterable[Sample]) -> list[Sample]:
        """Return the posts with placeholders for missing rationales and labels."""
        texts, names = itertools.cycle(self._rationale_texts), itertools.cycle(self.labels.names)
        return [
            replace(post, rationale=post.rationale or text, label=name if post.label is None else post.label)
            for post, text, name in zip(posts, texts, names, strict=False)
        ]

    @cached_property
    def _rationale_texts(self) -> list[str]:
        """Placeholders for missing rationales: those in the data, or else a filler text."""
        posts = [*self.corpus.train, *self.corpus.validation, *self.corpus.test]
        names = self.labels.wording.names
        filler = Rationale((_FILLER,) * (len(names) - 1), self.labels.names[0], names)
        return [post.rationale for post in posts if post.rationale] or [render(filler)]

    # ---- teacher requests ----

    def teacher(self, *, for_cascade: bool = False) -> Teacher | None:
        """Return the server or model of the recipe's teacher; None for recorded rationales."""
        settings = self.recipe.cascade_teacher if for_cascade else self.recipe.annotating_teacher
        return settings.model if isinstance(settings, TeacherSettings) else settings

    def teacher_requests(self) -> Iterator[tuple[RequestForecast, Teacher]]:
        """Yield the teacher requests of the stages that would run, each with its teacher."""
        recipe, corpus = self.recipe, self.corpus
        teacher, cascade_teacher = self.teacher(), self.teacher(for_cascade=True)
        pending = self.pending
        if "annotate" in pending:
            yield from self.annotate_requests()
        if teacher is not None and (posts := self.posts_for_label_teacher()):
            yield replace(self._labels("student", posts, teacher), maximum=len(posts)), teacher
        evaluates_teacher = recipe.evaluate is not None and recipe.evaluate.teacher
        if recipe.evaluate is not None and evaluates_teacher and "evaluate" in pending and teacher is not None:
            yield self._labels("evaluate", corpus.test, teacher), teacher
            if recipe.annotate is not None:
                bounds = len(corpus.test), len(corpus.test)
                limit = recipe.evaluate.max_new_tokens
                yield self._rationales("evaluate", corpus.test, teacher, bounds, limit), teacher
        if "calibrate" in pending and cascade_teacher is not None:
            yield self._labels("calibrate", corpus.validation, cascade_teacher), cascade_teacher
        if recipe.cascade is not None and "cascade" in pending and cascade_teacher is not None:
            if not (
                evaluates_teacher and teacher is cascade_teacher
            ):  # otherwise the ledger has the labels from evaluate
                optional = not recipe.cascade.deferral_curve
                yield self._labels("cascade", corpus.test, cascade_teacher, optional=optional), cascade_teacher
            if recipe.teacher_learned("review"):
                yield self._labels("cascade", corpus.test, cascade_teacher, "review", optional=True), cascade_teacher

    def annotate_requests(self) -> Iterator[tuple[RequestForecast, Teacher]]:
        """Yield the requests of `annotate`, each with its teacher, whether or not the stage would run."""
        settings, teacher, posts = self.recipe.annotate, self.teacher(), self.corpus.train
        if settings is None or teacher is None:
            return
        unlabelled = [post for post in posts if post.label is None]
        if settings.unlabelled == "keep_confident" and unlabelled:
            yield self._labels("annotate", unlabelled, teacher), teacher
        bounds = rationale_request_bounds(posts, self.labels, settings)
        yield self._rationales("annotate", posts, teacher, bounds, settings.max_new_tokens), teacher

    def augment_request(self) -> RequestForecast:
        """Return the rationales that the assistant writes in `augment`: one per post, at most."""
        settings, assistant = self.recipe.augment, self.recipe.assistant
        assert settings is not None and assistant is not None
        posts = self._augmented_posts()
        bounds = len(posts), len(posts)
        return self._rationales("augment", posts, assistant.model, bounds, settings.max_new_tokens, "reason")

    def service_request(self) -> RequestForecast:
        """Return the labels that the cascade's teacher gives in service: one request per post."""
        teacher = self.teacher(for_cascade=True)
        assert teacher is not None
        posts = self.corpus.test or self.corpus.train
        return replace(self._labels("service", posts, teacher), maximum=len(posts))

    def served_tokens(self, student: Teacher, rationale: bool) -> tuple[float, float]:
        """Return the tokens per post that a student in service reads and writes: for its label, and for a rationale."""
        posts = self.corpus.test or self.corpus.train
        prompt = self._prompt_tokens("classify", posts, student)
        if not rationale:
            return prompt, 0.0
        limit = self.recipe.serve.max_new_tokens
        written = self._rationales("service", posts, student, (0, 0), limit, "reason")
        return prompt + written.prompt_tokens, written.answer_tokens[0]

    def posts_for_label_teacher(self) -> list[Sample]:
        """The posts whose labels the student will ask of the teacher, without those that `annotate` asks about."""
        student, annotate = self.recipe.student, self.recipe.annotate
        if (
            student is None
            or "student" not in self.pending
            or not student.distillation.label_weight
            or student.distillation.label_teacher != "teacher"
        ):
            return []
        posts = {row.id: row for row in self.student_rows().samples}
        if annotate is not None and annotate.unlabelled == "keep_confident":
            return [post for post in self.corpus.train if post.id in posts and post.label is not None]
        return list(posts.values())

    def _labels(
        self,
        stage: str,
        posts: Sequence[Sample],
        teacher: Teacher,
        template: Template = "classify",
        *,
        optional: bool = False,
    ) -> RequestForecast:
        """Forecast label requests: one per post, or up to `agreement_samples`; possibly none if `optional`."""
        answer = self._tokens(f"{self.labels.wording.prefix} {self.labels.names[0]}", teacher)
        samples = teacher.agreement_samples if isinstance(teacher, EndpointSettings) else 1
        minimum, maximum = 0 if optional else len(posts), samples * len(posts)
        purpose = {"classify": "labels", "review": "reviews"}[template]
        prompt = self._prompt_tokens(template, posts, teacher)
        return RequestForecast(stage, purpose, minimum, maximum, prompt, (answer, answer))

    def _rationales(
        self, stage: str, posts: Sequence[Sample], teacher: Teacher, bounds: tuple[int, int], limit: int,
        template: Template = "predict",
    ) -> RequestForecast:  # fmt: skip
        """Forecast rationales within the bounds; `limit` is the maximum number of answer tokens."""
        sampled = self.with_assumed_answers(sample_by_length(posts))
        answer = min(sum(self._tokens(post.rationale or "", teacher) for post in sampled) / len(sampled), limit)
        return RequestForecast(
            stage, "rationales", *bounds, self._prompt_tokens(template, posts, teacher), (answer, limit)
        )

    def _prompt_tokens(self, template: Template, posts: Sequence[Sample], teacher: Teacher) -> float:
        """Return the mean prompt tokens of the posts, including image tokens."""
        sampled, total, tokenizer = sample_by_length(posts), 0.0, self.tokenizer(teacher)
        labels = self.context.teacher_labels
        for post in sampled:
            earlier = synthetic_answers(post, self.labels) if template == "review" else None
            text = prompts.render(template, post, labels, earlier)
            images = post.images if isinstance(teacher, EndpointSettings) or teacher.images else ()
            total += sum(_image_tokens(path, teacher) for path in images)
            total += _clip_tokens(post.media, teacher, self.context.clips)
            if tokenizer is None:
                total += len(text) / CHARACTERS_PER_TOKEN
            else:
                shown = images if tokenizer.encoder.reads_images else ()
                message = tokenizer.encoder.render(text, Media(tuple(shown)))
                total += len(tokenizer.processor.tokenizer(message)["input_ids"]) - len(shown)
        return total / len(sampled)

    def _tokens(self, text: str, teacher: Teacher) -> float:
        tokenizer = self.tokenizer(teacher)
        return len(text) / CHARACTERS_PER_TOKEN if tokenizer is None else len(tokenizer.answer_tokens(text))

    def tokenizer(self, teacher: Teacher) -> Backbone | None:
        """Return the model that counts a teacher's tokens: the teacher, or a pretrained model that the chain trains."""
        trained = [section.model for section in (self.recipe.assistant, self.recipe.student) if section is not None]
        for settings in [teacher] if isinstance(teacher, ModelSettings) else [model for model in trained if model.path]:
            try:
                return self.model(settings)
            except SettingsError:
                continue
        return None


def sample_by_length(rows: Iterable[Sample]) -> list[Sample]:
    """Return at most SAMPLE_SIZE of the rows, at evenly spaced ranks of the rows by length, including the longest."""
    by_length = sorted(rows, key=lambda row: len(row.text) + len(row.rationale or ""))
    last = len(by_length) - 1
    if last < SAMPLE_SIZE:
        return by_length
    return [by_length[round(n * last / (SAMPLE_SIZE - 1))] for n in range(SAMPLE_SIZE)]


def largest_clip(rows: Iterable[Sample]) -> list[Sample]:
    """Return the row with the largest files of video and sound, probably the longest; none if no row has any."""
    clips = (row for row in rows if row.video or row.audio)
    found = max(clips, key=lambda row: sum(path.stat().st_size for path in row.media.files), default=None)
    return [] if found is None else [found]


def _image_tokens(path: Path, teacher: Teacher) -> float:
    """Estimate the tokens of an image from its size in pixels."""
    fetch(path)
    with open_image(path) as image:
        return _picture_tokens(*image.size, teacher)


def _clip_tokens(media: Media, teacher: Teacher, clips: ClipReader) -> float:
    """Estimate the tokens of a video's frames and of a sound; those of the frames' times are not counted."""
    total = 0.0
    if media.video is not None and teacher.video != "ignore":
        frames = clips.frames(media.video, teacher.frames).images
        total += sum(_picture_tokens(frame.shape[1], frame.shape[0], teacher) for frame in frames)
    if media.audio is not None and teacher.audio != "ignore" and (sound := clips.sound(media.audio)) is not None:
        total += len(sound) / RATE * SOUND_TOKENS
    return total


def _picture_tokens(width: int, height: int, teacher: Teacher) -> float:
    if isinstance(teacher, ModelSettings):
        width, height = (teacher.image_size, teacher.image_size) if teacher.image_size else (width, height)
    else:
        scale = min(1.0, teacher.max_image_side / max(width, height))
        width, height = round(width * scale), round(height * scale)
    return max(round(width / TOKEN_SIDE) * round(height / TOKEN_SIDE), MIN_IMAGE_TOKENS)

"""What the stages of a run would refuse or leave out, found before the first of them asks a teacher or trains.

Models are checked by their configs and processors, without weights, as `distill plan` loads them; no endpoint is asked.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from distill.cascade.calibration import quality_target
from distill.cascade.thresholds import largest_quality, threshold_for_risk
from distill.data.corpus import Corpus
from distill.errors import SettingsError, in_section
from distill.evaluation.reasoning import left_out
from distill.models.backbone import Backbone, ModelSettings
from distill.models.encoding import PromptWithAnswers
from distill.models.endpoint import EndpointSettings
from distill.models.endpoint.http import read_key
from distill.models.pretrained import check_libraries, check_weights
from distill.recipe import Recipe
from distill.stage_settings import Teacher
from distill.stages.context import Context
from distill.task import prompts
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.tracking import not_logged_in
from distill.training.assistant import TrainSettings
from distill.training.batches import synthetic_answers
from distill.training.processes import process_count
from distill.training.refine import check_models
from distill.training.refine_settings import check_arguments
from distill.training.soft_targets import check_same_inputs
from distill.training.student import StudentSettings
from distill.workers.settings import check as check_ray

_TRAININGS = ("teacher", "assistant", "student")

ON_RAY = {"annotate", "augment", "evaluate"}
"""The stages that `engine: ray` runs on workers."""

_LOADED_BY = {
    "teacher": {"annotate", "refine", "evaluate", "calibrate", "cascade"},
    "assistant": {"augment", "refine", "evaluate"},
    "student": {"refine", "evaluate", "calibrate", "cascade", "export"},
}
"""The stages that load the model of an earlier training; an adapter needs the weights of its base model again."""


def check(context: Context, stages: Collection[str]) -> None:
    """Raise SettingsError for the first of the `problems`, with the number of the others."""
    if found := problems(context, stages):
        more = f" (the first of {len(found)} problems; distill plan lists all)" if len(found) > 1 else ""
        raise SettingsError(found[0] + more)


def problems(context: Context, stages: Collection[str]) -> list[str]:
    """Why stages of the recipe cannot run to their end, one sentence each.

    Args:
        stages: names of the stages that will run.

    Raises:
        SettingsError: the data cannot be read.
    """
    if not stages:  # then the data is not read
        return []
    recipe, posts = context.recipe, context.corpus.train
    found: dict[str, None] = {}  # ordered, each once: several stages may use one model

    @contextmanager
    def noted() -> Iterator[None]:
        try:
            yield
        except SettingsError as error:
            found[str(error)] = None

    for name in _TRAININGS:
        settings: TrainSettings | None = getattr(recipe, name)
        if settings is not None:
            with noted(), in_section(name):
                if name in stages:
                    _check_training(context, settings, posts)
                elif settings.model.lora is not None and not _LOADED_BY[name].isdisjoint(stages):
                    check_weights(settings.model)
    if recipe.on_ray and not ON_RAY.isdisjoint(stages):
        with noted():
            check_ray(recipe.ray)
    for teacher in _teachers(recipe, stages):
        with noted(), in_section(recipe.section_of(teacher)):
            _check_teacher(context, teacher, posts)
    if "student" in stages:
        with noted():
            _check_student(context, posts)
    if "refine" in stages:
        with noted():
            _check_refine(context, posts)
    if "calibrate" in stages or "cascade" in stages:
        with noted():
            _check_promise(context)
    return list(found)


def notices(context: Context, stages: Collection[str]) -> list[str]:
    """What stages of the recipe would leave out without failing, one sentence each."""
    recipe, found = context.recipe, list[str]()
    models = {name: getattr(recipe, name).model for name in _TRAININGS if name in stages}
    models |= {
        recipe.section_of(model): model for model in _teachers(recipe, stages) if isinstance(model, ModelSettings)
    }
    for name, model in models.items():
        found += _left_out(context, name, model)
    if recipe.evaluate is not None and "evaluate" in stages and recipe.annotate is not None:
        found += [f"evaluate: {text}" for text in left_out(recipe.evaluate.similarity_model)]
    if stages and not_logged_in(recipe.tracking):
        found.append("tracking.mode: online needs a login (wandb login, or WANDB_API_KEY); the stages run offline")
    return found


def _left_out(context: Context, name: str, model: ModelSettings) -> Iterator[str]:
    """What a model of a section is not given of the posts."""
    ignored = {"images": not model.images, "video": model.video == "ignore", "audio": model.audio == "ignore"}
    if not any(ignored.values()):
        return
    values = {"images": "false: the images", "video": "ignore: the videos", "audio": "ignore: the sounds"}
    for field, what in values.items():
        if ignored[field] and (count := sum(bool(getattr(post, field)) for post in _posts(context.corpus))):
            yield f"{name}.model.{field} is {what} of {count} posts are left out"
    given = {"text", *(field for field in ignored if not ignored[field])}
    if empty := [post.id for post in _posts(context.corpus) if given.isdisjoint(post.modalities)]:
        yield f"{name}.model is given nothing of {len(empty)} posts without text, such as {empty[0]}"


def _posts(corpus: Corpus, *more: Iterable[Sample]) -> Iterator[Sample]:
    """The posts of the three splits, of which those of a stream are read one by one, and `more`."""
    return itertools.chain(corpus.train, corpus.validation, corpus.test, *more)


def _check_training(context: Context, settings: TrainSettings, posts: Sequence[Sample]) -> None:
    model = _load(context, settings.model)
    evaluated = context.recipe.evaluate is not None and context.recipe.evaluate.modalities
    _check_media(model, context.corpus, ("images", "video") if evaluated else context.recipe.data.drop_modality)
    published = isinstance(settings, StudentSettings) and settings.distillation.positions == "all"
    _check_pictures(model, context.corpus)
    dropped = [name for name in ("images", "video") if context.recipe.data.drop_modality.get(name)]
    if model.family.needs_picture and dropped:
        raise SettingsError(
            f"model.path: {model.family.name} needs a picture in each post; remove {dropped[0]} from data.drop_modality"
        )
    tasks: Any = list(settings.tasks) if settings.packing and model.packs and not published else []
    if tasks and isinstance(settings, StudentSettings) and settings.distillation.label_weight > 0:
        tasks.append("classify")  # the prompt of the label distribution
    _check_inputs(model, posts, tasks)


def _load(context: Context, settings: ModelSettings, *, train: bool = True) -> Backbone:
    """The model without its weights, after checking that they are there."""
    check_libraries(settings)
    model = context.without_weights(settings, train=train)
    check_weights(settings)
    return model


def _teachers(recipe: Recipe, stages: Collection[str]) -> list[Teacher]:
    """The teachers that the stages ask, except one that the chain trains."""
    asked = []
    options = recipe.student.distillation if recipe.student is not None and "student" in stages else None
    if options is not None and options.label_weight > 0 and options.label_teacher == "teacher":
        asked.append(recipe.annotating_teacher)
    if "refine" in stages and recipe.refine is not None and recipe.refine.learns_from == "teacher":
        asked.append(recipe.annotating_teacher)
    if "annotate" in stages or ("evaluate" in stages and recipe.evaluate is not None and recipe.evaluate.teacher):
        asked.append(recipe.annotating_teacher)
    if "calibrate" in stages or "cascade" in stages:
        asked.append(recipe.cascade_teacher)
    return [teacher for teacher in asked if isinstance(teacher, EndpointSettings | ModelSettings)]


def _check_teacher(context: Context, teacher: Teacher, posts: Sequence[Sample]) -> None:
    if isinstance(teacher, EndpointSettings):
        read_key(teacher)
    elif isinstance(teacher, ModelSettings):
        model = _load(context, teacher, train=False)
        _check_media(model, context.corpus)
        _check_pictures(model, context.corpus)
        _check_inputs(model, posts)


def _check_inputs(model: Backbone, posts: Sequence[Sample], packed: Sequence[Template] = ()) -> None:
    """Encode the posts with the most and the fewest media, and pack the first with the prompts of these tasks.

    Raises:
        SettingsError: the processor does not take the posts.
    """
    most = fewest = None
    for post in posts:
        if post.label is not None:
            most = post if most is None or post.media.extent > most.media.extent else most
            fewest = post if fewest is None or post.media.extent <= fewest.media.extent else fewest
    if most is None or fewest is None:
        return
    texts = [
        prompts.render(task, most, model.labels, synthetic_answers(most, model.labels) if task == "review" else None)
        for task in packed
    ]
    model.encode([most, fewest] if fewest.media.extent < most.media.extent else [most], "classify")
    if texts:
        end = [[model.processor.tokenizer.eos_token_id]]
        model.encoder.pack([[PromptWithAnswers((text, most.media), [], end) for text in texts]])


def _check_media(model: Backbone, corpus: Corpus, taken: Collection[str] = ()) -> None:
    """Raise SettingsError if posts have media that the model cannot be given, before any is decoded.

    Args:
        taken: modalities without which posts are given as well; the sound alone may be what it cannot be given.
    """
    for post in _posts(corpus, corpus.teacher):
        model.encoder.media.check(post.media)
        model.encoder.media.check(post.without(*{"images", "video"}.intersection(taken)).media)


def _check_pictures(model: Backbone, corpus: Corpus) -> None:
    """Raise SettingsError if posts have no picture and the model's family needs one in each."""
    if not model.family.needs_picture:
        return
    without = [post.id for post in _posts(corpus, corpus.teacher) if not model.encoder.media.shows(post.media)]
    if without:
        total = sum(map(len, (corpus.train, corpus.validation, corpus.test, corpus.teacher)))
        raise SettingsError(
            f"model.path: {model.family.name} needs a picture in each post; {len(without)} of {total} posts have "
            f"none, such as {without[0]}"
        )


def _check_student(context: Context, posts: Sequence[Sample]) -> None:
    student, assistant = context.recipe.student, context.recipe.assistant
    assert student is not None
    if student.hard_labels_baseline and all(post.label is None for post in posts):
        raise SettingsError("student.hard_labels_baseline must be false: no training post has a label")
    if student.distillation.weight == 0 or assistant is None:
        return
    try:
        models = [context.without_weights(section.model) for section in (assistant, student)]
    except SettingsError:  # a model of a stage that will run is reported there; a finished assistant has its own copy
        return
    check_same_inputs(*models)


def _check_refine(context: Context, posts: Sequence[Sample]) -> None:
    recipe, settings = context.recipe, context.recipe.refine
    assert settings is not None and recipe.student is not None
    if clips := [post.id for post in posts if post.video or post.audio]:
        raise SettingsError(f"refine does not take posts with videos or sound, such as {clips[0]}; remove the section")
    check_arguments(settings)
    if process_count(recipe.trainer) > 1 or context.device not in ("cpu", "cuda:0", "mps:0"):
        raise SettingsError("refine trains on one device, the first: set trainer.devices to 1")
    if settings.method == "grpo" and settings.rewards.grounded and not any(post.attributes for post in posts):
        raise SettingsError("refine.rewards.grounded must be 0: no training post has attributes")
    learner: Any = None
    if settings.learns_from == "assistant":
        learner = recipe.assistant
    elif settings.learns_from == "teacher":
        learner = recipe.annotating_teacher
    try:
        student = context.without_weights(recipe.student.model)
        model = getattr(learner, "model", learner)
        teacher = None if model is None else context.without_weights(model)
    except SettingsError:  # a model of a stage that will run is reported there; a finished student has its own copy
        return
    check_models(student, teacher, settings.teacher)


def _check_promise(context: Context) -> None:
    """Whether the validation posts support the risk or the quality if there is no error on them."""
    settings, n = context.recipe.calibrate, len(context.corpus.validation)
    assert settings is not None
    if settings.by == "quality":
        if context.recipe.cascade is not None and context.recipe.cascade.on_agreement == "average":
            raise SettingsError("calibrate.by: quality needs cascade.on_agreement: teacher")
        target = quality_target(settings, context.labels)
        if largest_quality(np.ones(n), settings.confidence) < target:
            raise SettingsError(
                f"calibrate.quality: {n} validation posts cannot support {settings.quality:g} at a confidence of "
                f"{settings.confidence:g}, even without an error"
            )
    if settings.by == "risk" and settings.student_threshold is None:
        try:
            threshold_for_risk(np.linspace(0, 0.5, n), np.zeros(n), settings.risk, settings.confidence)
        except ValueError as error:
            raise SettingsError(f"calibrate.risk: {error}, even without a wrong answer") from None

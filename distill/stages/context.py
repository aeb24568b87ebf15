"""The context of a stage: recipe, run folder, data, models of earlier stages, and training."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tqdm import tqdm

from distill import logs
from distill.annotation.cached_teacher import CachedTeacher
from distill.annotation.curation import APPLIED, DECISIONS, Decision, curate, effective, read_decisions
from distill.annotation.examples import with_examples
from distill.annotation.first_answers import FirstAnswers
from distill.annotation.ledger import Ledger, digest
from distill.annotation.reasoning_data import RATIONALES, labels_only, read_rationales, stored_rationales
from distill.data import jsonl
from distill.data.clips import ClipReader
from distill.data.corpus import Corpus, read_corpus, write_quarantine
from distill.data.lengths import MAX_TOKENS, limit_lengths, longest_text
from distill.data.source import SPLITS
from distill.data.stored import labelled
from distill.errors import SettingsError, in_section
from distill.models import backbone, text_limit
from distill.models.backbone import Backbone, ModelSettings
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.models.local import Local
from distill.models.reasoner import Reasoner
from distill.models.source import ModelSource, pretrained_name
from distill.recipe import Recipe
from distill.stage_settings import Teacher, TeacherSettings
from distill.stages.tiny_tokenizer import tiny_tokenizer
from distill.task.labels import LabelSpace
from distill.task.rationale import Rationale, render
from distill.task.sample import Sample
from distill.tracking import StageRun
from distill.training.assistant import AssistantModule, TrainSettings
from distill.training.datamodule import ReasoningDataModule
from distill.training.fit import fit
from distill.training.length_limit import limit_length
from distill.training.processes import should_train, worker_folder
from distill.training.trainer_arguments import with_defaults

log = logging.getLogger(__name__)

_FITS = 256
"""A text of so many bytes fits the context of every model."""


@dataclass
class Context:
    """The state that the stages of one chain share.

    Attributes:
        fingerprints: identities of the stages; they are part of model names.
        foreign: files in the folder of the running stage that are not the stage's, relative to it.
        variants: digests of weights that replaced others in the same folder, by the folder.
    """

    recipe: Recipe
    fingerprints: dict[str, str]
    foreign: list[str] = field(default_factory=list)
    variants: dict[str, str] = field(default_factory=dict)
    _without_weights: dict[str, Backbone | SettingsError] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.recipe.folder

    @cached_property
    def labels(self) -> LabelSpace:
        """The label space of the recipe."""
        return self.recipe.labels

    @cached_property
    def clips(self) -> ClipReader:
        """Decodes the videos and sounds of the posts."""
        return ClipReader(self.recipe.data.video)

    @cached_property
    def teacher_labels(self) -> LabelSpace:
        """The label space with the examples that the prompts of the annotating teacher show."""
        return with_examples(self.labels, self.corpus.train, self.recipe.task.examples)

    @cached_property
    def corpus(self) -> Corpus:
        """The data, read and validated once. Dropped rows are written to `quarantine.jsonl` in the run's folder."""
        corpus = self.posts
        if worker_folder() is None:  # workers of a distributed training do not write it
            write_quarantine(report := self.folder / "quarantine.jsonl", corpus.dropped)
            if corpus.dropped:
                log.warning("data: %s %s row %d: %s", *corpus.dropped_summary(report))
        return corpus

    @cached_property
    def posts(self) -> Corpus:
        """The data with texts of at most `data.max_tokens`, counted by the model that the recipe trains."""
        corpus, data, recipe = self._as_read, self.recipe.data, self.recipe
        if (longest := longest_text(corpus)) <= (data.max_tokens or _FITS):  # the usual case: no model is loaded
            return corpus
        model = next((part.model for part in (recipe.student, recipe.assistant, recipe.teacher) if part), None)
        limit = data.max_tokens or text_limit.default_limit(model, MAX_TOKENS)
        if longest <= limit:
            return corpus
        tokenizer = text_limit.tokenizer(model, self.tokenizer(model)) if model else None
        return limit_lengths(corpus, data, limit, partial(text_limit.cut, tokenizer=tokenizer))

    @cached_property
    def _as_read(self) -> Corpus:
        """The data with texts of any length, on which the tokenizer of tiny models is trained."""
        return read_corpus(self.recipe.data, self.labels)

    @cached_property
    def decisions(self) -> dict[str, Decision]:
        """The decisions of `distill review` that change the reasoning data, as a command finds them when it starts."""
        has_rationales = self.recipe.annotate is not None
        return effective(read_decisions(self.folder / DECISIONS, self.labels)) if has_rationales else {}

    @property
    def curated(self) -> Sequence[Sample]:
        """The training posts of augment and student: with the decisions that the stage annotate has applied."""
        applied = {} if self.recipe.annotate is None else read_decisions(self.folder / APPLIED, self.labels)
        return curate(self.corpus.train, applied, self.labels).posts

    def tokenizer(self, settings: ModelSettings) -> Path:
        """The folder of the tokenizer for tiny models of one vocabulary size; trained on the corpus if missing."""
        return tiny_tokenizer(self.recipe, settings, lambda: self._as_read)

    def train(
        self,
        stage: str,
        module: Callable[[Backbone, Sequence[Sample]], AssistantModule],
        samples: Sequence[Sample],
        tracked: StageRun,
        *,
        part: str = "",
        epoch_factor: int = 1,
    ) -> None:
        """Train one model and save its best weights to `adapter/` in the stage's folder.

        Args:
            module: creates the Lightning module for a new model and the samples that it is trained on.
            part: a subfolder of the stage's folder, for a second training of the same stage.
            epoch_factor: multiplies the number of epochs, and of epochs between validations.

        Raises:
            SettingsError: there are no samples.
        """
        settings: TrainSettings = getattr(self.recipe, stage)
        folder = self.folder / stage / part
        if not should_train(folder):
            return
        if not samples:
            raise SettingsError(
                f"{stage}: no training rows are left; the reasons are in {self.folder}/*/quarantine.jsonl"
            )
        # leave cores for the workers: threads that wait for a core slow training down
        torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - settings.workers)))
        L.seed_everything(self.recipe.seed, workers=True, verbose=False)
        with in_section(stage):
            model = backbone.create(settings.model, self.labels, self.tokenizer(settings.model), clips=self.clips)
            tasks: Any = settings.tasks
            kept = limit_length(samples, model, tasks, packing=settings.packing, max_length=settings.max_length)
        learner = module(model, kept)
        data = ReasoningDataModule(
            model,
            kept,
            self.corpus.validation,
            learner.settings.tasks,  # type: ignore[arg-type]
            learner.encode,
            batch_size=settings.batch_size,
            workers=settings.workers,
            seed=self.recipe.seed,
            label_targets=learner.label_targets,
            drop=self.recipe.data.drop_modality,
        )
        arguments = self.trainer_arguments(settings)
        for name in ("max_epochs", "check_val_every_n_epoch"):
            if isinstance(arguments.get(name), int) and arguments[name] > 0:
                arguments[name] *= epoch_factor
        with in_section(stage):
            fit(learner, data, folder, arguments, tracked.lightning_loggers(part))
        model.save(folder / "adapter")

    def trainer_arguments(self, settings: TrainSettings) -> dict[str, Any]:
        """Arguments of lightning.Trainer for one training."""
        return with_defaults(self.recipe.trainer, settings.trainer)

    def weights(self, stage: str) -> str:
        """Hash of the weights that a stage trained, including the path and revision of the base model."""
        model: ModelSettings = getattr(self.recipe, self.recipe.model_section(stage)).model
        files = sorted((self.folder / stage / "adapter").glob("*.safetensors"))
        return sha256(repr([model.path, model.revision, *map(digest, files)]).encode()).hexdigest()

    def load(self, stage: str, part: str = "", *, train: bool = False) -> Backbone:
        """Load the model that a stage trained; with `train` to train it further."""
        section, folder = self.recipe.model_section(stage), self.folder / stage / part / "adapter"
        with in_section(section):
            settings = getattr(self.recipe, section).model
            return backbone.load(settings, self.labels, folder, train=train, clips=self.clips)

    def without_weights(self, settings: ModelSettings, *, train: bool = True) -> Backbone:
        """A model for its shapes and its processor, created once; `train` adds the adapter.

        Raises:
            SettingsError: the config or the processor of the model cannot be loaded or used.
        """
        name = repr((settings, train))
        if name not in self._without_weights:
            try:
                with torch.random.fork_rng(devices=()):  # tiny models have weights
                    self._without_weights[name] = backbone.create(
                        settings, self.labels, self.tokenizer(settings), train=train, weights=False, clips=self.clips
                    )
            except SettingsError as error:
                self._without_weights[name] = error
        if isinstance(model := self._without_weights[name], SettingsError):
            raise model
        return model

    def source(self, stage: str, part: str = "") -> ModelSource:
        """Where the model that a stage trained comes from."""
        section, folder = self.recipe.model_section(stage), self.folder / stage / part / "adapter"
        settings, name = getattr(self.recipe, section).model, self.reasoner_name(stage, part)
        return ModelSource(name, settings, self.labels, folder, section, trained=True, video=self.recipe.data.video)

    def reasoner(self, stage: str, part: str = "") -> Local:
        """Load the model that a stage trained, for inference."""
        return self.source(stage, part).load(self.device, self.clips)

    def reasoner_name(self, stage: str, part: str = "") -> str:
        """Name of the model that a stage trained; it contains the stage's fingerprint."""
        return f"{stage}{part}-{self.fingerprints[stage]}"

    def teacher(
        self, settings: Teacher | None, labels: LabelSpace | None = None, *, on_workers: bool = False
    ) -> Reasoner | None:
        """The teacher that `Recipe.annotating_teacher` or `Recipe.cascade_teacher` names; None for None.

        Args:
            labels: of a teacher that is not trained; None: those of the recipe.
            on_workers: if it is a model, Ray workers hold it: it is not loaded here.
        """
        if isinstance(settings, EndpointSettings):
            with in_section(self.recipe.section_of(settings)):
                return Endpoint(settings, labels or self.labels, self.recipe.data.max_pixels, self.clips)
        if settings is None:
            return None
        if isinstance(settings, TeacherSettings):
            source = self.source("teacher")
        else:
            source = self._pretrained(settings, labels or self.labels)
        return source if on_workers else source.load(self.device, self.clips)

    def _pretrained(self, settings: ModelSettings, labels: LabelSpace) -> ModelSource:
        section, video, tokenizer = self.recipe.section_of(settings), self.recipe.data.video, self.tokenizer(settings)
        more = [self.variants[settings.path]] if settings.path in self.variants else []
        if any(post.video or post.audio for split in SPLITS for post in getattr(self.corpus, split)):
            with in_section(section):
                media = self.without_weights(settings, train=False).encoder.media
            more.append(f"clips {sha256(media.fingerprint().encode()).hexdigest()[:12]}")
        name = pretrained_name(settings, *more)
        return ModelSource(name, settings, labels, tokenizer, section, trained=False, video=video)

    @contextmanager
    def cached_teacher(self, stage: str) -> Iterator[CachedTeacher | None]:
        """The teacher for evaluate, calibrate and cascade, which share a ledger: no request is paid for twice.

        Raises:
            RunError: the answers of an endpoint are all invalid. Those of a model on this machine are a result.
        """
        for_cascade = stage != "evaluate"
        settings = self.recipe.cascade_teacher if for_cascade else self.recipe.annotating_teacher
        teacher = self.teacher(settings, self.teacher_labels, on_workers=self.recipe.on_ray and not for_cascade)
        if teacher is None:
            yield None
            return
        with Ledger(self.folder / "evaluate" / "ledger.jsonl") as ledger:
            others = self.recipe.other_servers(for_cascade=for_cascade)
            first = self.first_answers(stage) if isinstance(teacher, Endpoint) else None
            yield CachedTeacher(teacher, self.teacher_labels, ledger, 256, others, first)
            if first is not None:
                first.end()

    def first_answers(self, stage: str) -> FirstAnswers:
        """A check of the first answers that a stage gets."""
        return FirstAnswers(stage, self.labels, self.recipe.stop_after_invalid)

    @property
    def device(self) -> str:
        """Device for inference: the first device of the trainer. Raises SettingsError if it is not available."""
        trainer, devices = self.recipe.trainer, self.recipe.trainer.get("devices")
        try:
            first = L.Trainer(
                accelerator=trainer.get("accelerator", "auto"), devices=devices[:1] if isinstance(devices, list) else 1,
                logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            ).strategy.root_device  # fmt: skip
        except MisconfigurationException as error:
            raise SettingsError(f"trainer: {' '.join(str(error).split())}") from error
        return str(first)

    def write_rationales(self, stage: str, kept: Iterable[tuple[Sample, Rationale, dict[str, Any]]]) -> None:
        """Write `rationales.jsonl` of a stage from samples, rationales and extra fields, in order of arrival."""
        rows = (
            jsonl.to_row(replace(sample, rationale=render(rationale)), self.corpus.root) | extra | {"split": "train"}
            for sample, rationale, extra in kept
        )
        jsonl.write_rows(self.folder / stage / RATIONALES, rows)

    def rationales(self, *stages: str) -> Sequence[Sample]:
        """The reasoning data of the given stages, if the recipe has them; that of a streamed corpus stays in its files.

        Raises:
            SettingsError: a row, edited by hand perhaps, cannot be used.
        """
        paths = [self.folder / stage / RATIONALES for stage in stages if getattr(self.recipe, stage) is not None]
        if self.recipe.data.source == "stream":
            return stored_rationales(paths, self.corpus.root, self.labels)
        return [sample for path in paths for sample, _ in read_rationales(path, self.corpus.root, self.labels)]

    def training_samples(self, *stages: str, labelled_posts: bool = False) -> Sequence[Sample]:
        """Training data of assistant and student: reasoning data, or labelled posts without an annotate section.

        With `labelled_posts`, the labelled posts without a rationale are appended.
        """
        if self.recipe.annotate is None:
            return labelled(self.corpus.train)
        rows = self.rationales(*stages)
        return [*rows, *labels_only(self.curated, rows)] if labelled_posts else rows


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar; the yielded function takes the numbers of completed and of all posts."""
    with tqdm(desc=description, unit="post", leave=False, disable=logs.quiet()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show

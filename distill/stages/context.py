"""What every stage is given: the recipe, the run's folder, the data, the models of earlier stages, a way to train."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tqdm import tqdm

from distill.annotation.cached_teacher import CachedTeacher
from distill.annotation.ledger import Ledger, digest
from distill.data import jsonl
from distill.data.corpus import Corpus, data_fingerprint, read_corpus, write_quarantine
from distill.errors import SettingsError
from distill.files import atomic_folder
from distill.models import backbone, tiny
from distill.models.backbone import Backbone, ModelSettings
from distill.models.endpoint import Endpoint
from distill.models.local import Local
from distill.models.reasoner import Reasoner
from distill.recipe import AnnotateStageSettings, CalibrateStageSettings, Recipe
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.rationale import Rationale, render
from distill.task.sample import Sample
from distill.tracking import StageRun
from distill.training.assistant import AssistantModule, TrainSettings
from distill.training.batches import synthetic_answers
from distill.training.datamodule import ReasoningDataModule
from distill.training.fit import active_folder, fit, fits_here, with_defaults

log = logging.getLogger(__name__)

_TEMPLATES: tuple[prompts.Template, ...] = ("predict", "explain", "reason", "classify")


@dataclass
class Context:
    """One chain as its stages see it. `fingerprints` tells which version of each stage's output stands on disk."""

    recipe: Recipe
    fingerprints: dict[str, str]

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    @property
    def labels(self) -> LabelSpace:
        return self.recipe.labels

    @cached_property
    def corpus(self) -> Corpus:
        """The data, read and checked once; what was dropped is written to `quarantine.jsonl` in the run's folder."""
        corpus = read_corpus(self.recipe.data, self.labels)
        if active_folder() is None:  # the processes of one training would write it at once
            report = self.folder / "quarantine.jsonl"
            write_quarantine(report, corpus.dropped)
            if corpus.dropped:
                first = corpus.dropped[0]
                found = f"{len(corpus.dropped)} rows are left out and listed in {report}; the first:"
                log.warning("data: %s %s row %d: %s", found, first.file, first.row, first.reason)
        return corpus

    def tokenizer(self, settings: ModelSettings) -> Path:
        """The folder of the tokenizer that tiny models of one vocabulary size share; trained when missing."""
        texts = (data_fingerprint(self.recipe.data), self.labels.names, prompts.VERSION, self._reviews)
        parts = (*texts, settings.tiny.vocabulary)
        folder = self.folder / "tokenizer" / sha256(repr(parts).encode()).hexdigest()[:12]
        if not settings.path and not folder.exists():
            with atomic_folder(folder) as new:
                tiny.train_tokenizer(self._texts(), settings.tiny.vocabulary).save_pretrained(new)
        return folder

    @property
    def _reviews(self) -> bool:
        """Whether a teacher learns to review, so that the tokenizer must know that question too."""
        return self.recipe.teacher is not None and "review" in self.recipe.teacher.tasks

    def _texts(self) -> list[str]:
        """What the models will read and write: posts, rationales, questions and answers."""
        posts = self.corpus.train
        texts = [text for post in posts for text in (post.text, post.aspect, post.rationale) if text]
        labelled = [post for post in posts if post.label is not None]
        texts += [prompts.render(template, post, self.labels) for template in _TEMPLATES for post in labelled[:100]]
        if self._reviews:
            said = [(post, synthetic_answers(post, self.labels)) for post in labelled[:100]]
            texts += [prompts.render("review", post, self.labels, earlier) for post, earlier in said]
        return texts + [f"{prompts.CLASSIFY_PREFIX} {name}" for name in self.labels.names for _ in range(100)]

    def train(
        self,
        stage: str,
        module: Callable[[Backbone], AssistantModule],
        rows: Sequence[Sample],
        tracked: StageRun,
        *,
        part: str = "",
        longer: int = 1,
    ) -> None:
        """Train one model on `rows` in the stage's folder (or a part of it) and leave its best weights in `adapter/`.

        `longer` multiplies the epochs, and those between validations.
        """
        settings: TrainSettings = getattr(self.recipe, stage)
        folder = self.folder / stage / part
        if not fits_here(folder):
            return
        if not rows:
            raise SettingsError(f"{stage}: no training rows are left; {self.folder}/*/quarantine.jsonl says why")
        # workers need cores of their own: threads that have to wait for a core cost more than they bring
        torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - settings.workers)))
        L.seed_everything(self.recipe.seed, workers=True, verbose=False)
        model = backbone.create(settings.model, self.labels, self.tokenizer(settings.model))
        learner = module(model)
        data = ReasoningDataModule(
            model,
            rows,
            self.corpus.validation,
            learner.settings.tasks,  # type: ignore[arg-type]
            learner.encode,
            batch_size=settings.batch_size,
            workers=settings.workers,
            seed=self.recipe.seed,
        )
        logger = tracked.lightning_logger()
        arguments = self.trainer_arguments(settings)
        for name in ("max_epochs", "check_val_every_n_epoch"):
            if isinstance(arguments.get(name), int) and arguments[name] > 0:
                arguments[name] *= longer
        fit(learner, data, folder, arguments, [logger] if logger and not part else [])
        model.save(folder / "adapter")

    def trainer_arguments(self, settings: TrainSettings) -> dict[str, Any]:
        """What lightning.Trainer is given for one training."""
        return with_defaults(self.recipe.trainer, settings.trainer)

    def weights(self, stage: str) -> str:
        """A hash of the weights that a stage trained, and of what they lie on."""
        model: ModelSettings = getattr(self.recipe, stage).model
        files = sorted((self.folder / stage / "adapter").glob("*.safetensors"))
        return sha256(repr([model.path, model.revision, *map(digest, files)]).encode()).hexdigest()

    def load(self, stage: str, part: str = "") -> Backbone:
        """The model that a stage trained."""
        return backbone.load(getattr(self.recipe, stage).model, self.labels, self.folder / stage / part / "adapter")

    def reasoner(self, stage: str, part: str = "") -> Local:
        """The model that a stage trained, ready to answer; its name changes with its weights."""
        return Local(self.load(stage, part), f"{stage}{part}-{self.fingerprints[stage]}", self.device)

    def teacher(self, *, of_cascade: bool = False) -> Reasoner | None:
        """Who annotates: the trained teacher, an endpoint or a ready model; None for a recording.

        `of_cascade`: who takes what the student is not sure of; the same, unless `calibrate` names another.
        """
        recipe = self.recipe
        asked: CalibrateStageSettings | AnnotateStageSettings | None = recipe.calibrate if of_cascade else None
        if asked is None or (asked.endpoint is None and asked.model is None):
            if recipe.teacher is not None:
                return self.reasoner("teacher")
            asked = recipe.annotate
        if asked is not None and asked.endpoint is not None:
            return Endpoint(asked.endpoint, self.labels, recipe.data.max_pixels)
        if asked is not None and asked.model is not None:
            ready = backbone.create(asked.model, self.labels, self.tokenizer(asked.model), train=False)
            seen = f"{asked.model.image_size} px, {asked.model.dtype}"
            return Local(ready, f"{asked.model.path}@{asked.model.revision} ({seen})", self.device)
        return None

    @contextmanager
    def asked_teacher(self, *, of_cascade: bool = False) -> Iterator[CachedTeacher | None]:
        """The teacher as evaluate, calibrate and cascade ask it: through one ledger, so that nothing is paid twice."""
        teacher = self.teacher(of_cascade=of_cascade)
        if teacher is None:
            yield None
            return
        with Ledger(self.folder / "evaluate" / "ledger.jsonl") as ledger:
            yield CachedTeacher(teacher, self.labels, ledger, chunk=256)

    @property
    def device(self) -> str:
        """Where models answer: the first device that the trainer uses."""
        trainer, chosen = self.recipe.trainer, self.recipe.trainer.get("devices")
        try:
            first = L.Trainer(
                accelerator=trainer.get("accelerator", "auto"), devices=chosen[:1] if isinstance(chosen, list) else 1,
                logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            ).strategy.root_device  # fmt: skip
        except MisconfigurationException as error:
            raise SettingsError(f"trainer: {' '.join(str(error).split())}") from error
        return str(first)

    def write_rationales(self, stage: str, kept: Iterable[tuple[Sample, Rationale, dict[str, Any]]]) -> None:
        """`rationales.jsonl` of a stage: the samples with their rationales in the canonical look, as they come."""
        rows = (
            jsonl.row(replace(sample, rationale=render(rationale)), self.corpus.root) | extra | {"split": "train"}
            for sample, rationale, extra in kept
        )
        jsonl.write_rows(self.folder / stage / "rationales.jsonl", rows)

    def rationales(self, *stages: str) -> list[Sample]:
        """The reasoning data of the stages that the recipe has."""
        present = [stage for stage in stages if getattr(self.recipe, stage) is not None]
        paths = [self.folder / stage / "rationales.jsonl" for stage in present]
        return [jsonl.sample(row.fields, self.corpus.root) for path in paths for row in jsonl.read(path)]

    def training_rows(self, *stages: str) -> list[Sample]:
        """What assistant and student learn from: reasoning data, or the labelled posts where a recipe has none."""
        if self.recipe.annotate is None:
            return [sample for sample in self.corpus.train if sample.label is not None]
        return self.rationales(*stages)


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar as a function of what is done and what there is; it leaves an empty line, also after a failure."""
    with tqdm(desc=description, unit="post", leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show

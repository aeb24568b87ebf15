"""What a chain meets before it runs: its posts, the rows of each training, its models, and what its teacher is asked.

What is not written yet is assumed, at its most: every post is kept, and a rationale is as long as those in the data.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from PIL import Image

from distill import chain
from distill.annotation.annotate import Kept, Tally, annotate
from distill.annotation.ledger import Ledger
from distill.data.corpus import read_corpus
from distill.data.postcards import are_there
from distill.errors import SettingsError
from distill.models import backbone
from distill.models.backbone import Backbone, ModelSettings
from distill.models.endpoint import EndpointSettings
from distill.planning.teacher_requests import RequestForecast, rationale_bounds
from distill.recipe import Recipe
from distill.stages.context import Context
from distill.task import prompts
from distill.task.prompts import Template
from distill.task.rationale import Rationale, render
from distill.task.sample import Sample
from distill.training.batches import synthetic_answers

SAMPLE = 64
"""So many posts are really tokenised: spread over all lengths, the longest among them."""

TOKEN_SIDE, LEAST_TOKENS = 28, 4
"""Pixels of the square that Qwen2.5-VL makes one token of, and the tokens of its smallest pictures."""

CHARACTERS = 4
"""Of a token, where there is no tokenizer to count with."""

_FILLER = " ".join(["What the post says, what its picture shows and which of them prevails is weighed here."] * 3)

Teacher = EndpointSettings | ModelSettings


@dataclass(frozen=True)
class Rows:
    """What a training learns from; `known` where all of it is written already."""

    samples: Sequence[Sample]
    known: bool


class ChainForecast:
    """A chain before it runs; what has to be written to find out goes to `scratch`."""

    def __init__(self, recipe: Recipe, scratch: Path) -> None:
        self.recipe = recipe
        self.labels = recipe.labels
        self.done = chain.up_to_date(recipe)
        data = recipe.data
        if data.source == "postcards" and not are_there(Path(data.root), data.postcards):
            data = replace(data, root=str(scratch / "data"))
        self.corpus = read_corpus(data, self.labels)
        self.context = Context(replace(recipe, runs=str(scratch)), {})
        self._written = Context(recipe, {})
        self.context.corpus = self._written.corpus = self.corpus
        self._models: dict[str, Backbone | SettingsError] = {}

    def model(self, settings: ModelSettings) -> Backbone:
        """A model as it is trained, without its weights. Raises SettingsError where its config cannot be had."""
        name = repr(settings)
        if name not in self._models:
            try:
                tokenizer = self.context.tokenizer(settings)
                self._models[name] = backbone.create(settings, self.labels, tokenizer, weights=False)
            except SettingsError as error:
                self._models[name] = error
        if isinstance(found := self._models[name], SettingsError):
            raise found
        return found

    # ---- what is learned from ----

    def gold(self) -> Rows:
        """The labelled posts of the training split."""
        return Rows([post for post in self.corpus.train if post.label is not None], True)

    def teacher_rows(self, tasks: Iterable[str]) -> Rows:
        """The labelled posts, those with a gold rationale where a task needs one."""
        labelled = self.gold().samples
        return Rows([post for post in labelled if post.rationale or set(tasks) <= set(prompts.SCORED)], True)

    def annotated(self) -> Rows:
        """The teacher's rationales; of a recording those that the rules leave."""
        settings = self.recipe.annotate
        if settings is None:
            return self.gold()
        if self.done["annotate"]:
            return Rows(self._written.rationales("annotate"), True)
        if self.teacher() is None:
            with Ledger(self.context.folder / "ledger.jsonl") as ledger:
                found = annotate(self.corpus.train, self.labels, None, settings, ledger, Tally())
                kept = [item for item in found if isinstance(item, Kept)]
            return Rows([replace(item.sample, rationale=render(item.rationale)) for item in kept], True)
        taken = self.corpus.train if settings.unlabelled == "keep_confident" else self.gold().samples
        return Rows(self.assumed(taken), False)

    def student_rows(self) -> Rows:
        """The teacher's rationales, and behind them the assistant's own."""
        taught = self.annotated()
        if self.recipe.augment is None or self.recipe.annotate is None:
            return taught
        if self.done["augment"]:
            return Rows([*taught.samples, *self._written.rationales("augment")], taught.known)
        posts = {post.id: post for post in [*taught.samples, *self.gold().samples]}
        return Rows([*taught.samples, *self.assumed(posts.values())], False)

    def assumed(self, posts: Iterable[Sample]) -> list[Sample]:
        """Posts with rationales and labels in place of those that are not written yet."""
        texts, names = itertools.cycle(self._texts), itertools.cycle(self.labels.names)
        return [
            replace(post, rationale=post.rationale or text, label=name if post.label is None else post.label)
            for post, text, name in zip(posts, texts, names, strict=False)
        ]

    @cached_property
    def _texts(self) -> list[str]:
        """What rationales look like that are not written yet."""
        posts = [*self.corpus.train, *self.corpus.validation, *self.corpus.test]
        filler = Rationale(_FILLER, _FILLER, _FILLER, _FILLER, self.labels.names[0])
        return [post.rationale for post in posts if post.rationale] or [render(filler)]

    # ---- who is asked what ----

    def teacher(self, *, of_cascade: bool = False) -> Teacher | None:
        """Who is asked, as `Context.teacher` has it; None for a recording."""
        recipe = self.recipe
        if of_cascade and recipe.calibrate is not None:
            own = recipe.calibrate.endpoint or recipe.calibrate.model
            if own is not None:
                return own
        if recipe.teacher is not None:
            return recipe.teacher.model
        return None if recipe.annotate is None else recipe.annotate.endpoint or recipe.annotate.model

    def questions(self) -> Iterator[tuple[RequestForecast, Teacher]]:
        """What teachers are asked in the stages that would run, and which of them."""
        recipe, corpus = self.recipe, self.corpus
        first, second = self.teacher(), self.teacher(of_cascade=True)
        waiting = {name for name, done in self.done.items() if not done}
        if recipe.annotate is not None and "annotate" in waiting and first is not None:
            unlabelled = [post for post in corpus.train if post.label is None]
            if recipe.annotate.unlabelled == "keep_confident" and unlabelled:
                yield self._labels("annotate", unlabelled, first), first
            bounds = rationale_bounds(corpus.train, self.labels, recipe.annotate)
            yield self._rationales("annotate", corpus.train, first, bounds, recipe.annotate.max_new_tokens), first
        judges = recipe.evaluate is not None and recipe.evaluate.teacher
        if recipe.evaluate is not None and judges and "evaluate" in waiting and first is not None:
            yield self._labels("evaluate", corpus.test, first), first
            if recipe.annotate is not None:
                bounds = len(corpus.test), len(corpus.test)
                yield self._rationales("evaluate", corpus.test, first, bounds, recipe.evaluate.max_new_tokens), first
        if "calibrate" in waiting and second is not None:
            yield self._labels("calibrate", corpus.validation, second), second
        if recipe.cascade is not None and "cascade" in waiting and second is not None:
            if not (judges and first is second):  # evaluate has asked, and one ledger serves both
                yield self._labels("cascade", corpus.test, second, perhaps=not recipe.cascade.deferral_curve), second
            yield self._labels("cascade", corpus.test, second, "review", perhaps=True), second

    def _labels(
        self,
        stage: str,
        posts: Sequence[Sample],
        asked: Teacher,
        template: Template = "classify",
        *,
        perhaps: bool = False,
    ) -> RequestForecast:
        answer = self._tokens(f"{prompts.CLASSIFY_PREFIX} {self.labels.names[0]}", asked)
        draws = asked.agreement_samples if isinstance(asked, EndpointSettings) else 1
        least, most = 0 if perhaps else len(posts), draws * len(posts)
        about = {"classify": "labels", "review": "second looks"}[template]
        return RequestForecast(stage, about, least, most, self._prompt_tokens(template, posts, asked), (answer, answer))

    def _rationales(
        self, stage: str, posts: Sequence[Sample], asked: Teacher, bounds: tuple[int, int], limit: int
    ) -> RequestForecast:
        some = self.assumed(spread(posts))
        answer = min(sum(self._tokens(post.rationale or "", asked) for post in some) / len(some), limit)
        return RequestForecast(
            stage, "rationales", *bounds, self._prompt_tokens("predict", posts, asked), (answer, limit)
        )

    def _prompt_tokens(self, template: Template, posts: Sequence[Sample], asked: Teacher) -> float:
        some, total, tokenizer = spread(posts), 0.0, self.tokenizer(asked)
        for post in some:
            earlier = synthetic_answers(post, self.labels) if template == "review" else None
            text = prompts.render(template, post, self.labels, earlier)
            total += sum(_picture_tokens(path, asked) for path in post.images)
            if tokenizer is None:
                total += len(text) / CHARACTERS
            else:
                message = tokenizer.encoder.render(text, post.images)
                total += len(tokenizer.processor.tokenizer(message)["input_ids"]) - len(post.images)
        return total / len(some)

    def _tokens(self, text: str, asked: Teacher) -> float:
        tokenizer = self.tokenizer(asked)
        return len(text) / CHARACTERS if tokenizer is None else len(tokenizer.answer_tokens(text))

    def tokenizer(self, asked: Teacher) -> Backbone | None:
        """What a teacher's tokens are counted with: its own model, or a pretrained one that the chain trains."""
        trained = [section.model for section in (self.recipe.assistant, self.recipe.student) if section is not None]
        for settings in [asked] if isinstance(asked, ModelSettings) else [model for model in trained if model.path]:
            try:
                return self.model(settings)
            except SettingsError:
                continue
        return None


def spread(rows: Iterable[Sample]) -> list[Sample]:
    """SAMPLE of the rows at most, spread evenly over their lengths, the longest among them."""
    by_length = sorted(rows, key=lambda row: len(row.text) + len(row.rationale or ""))
    last = len(by_length) - 1
    return by_length if last < SAMPLE else [by_length[round(n * last / (SAMPLE - 1))] for n in range(SAMPLE)]


def _picture_tokens(path: Path, asked: Teacher) -> float:
    with Image.open(path) as picture:
        width, height = picture.size
    if isinstance(asked, ModelSettings):
        width, height = (asked.image_size, asked.image_size) if asked.image_size else (width, height)
    else:
        scale = min(1.0, asked.max_image_side / max(width, height))
        width, height = round(width * scale), round(height * scale)
    return max(round(width / TOKEN_SIDE) * round(height / TOKEN_SIDE), LEAST_TOKENS)

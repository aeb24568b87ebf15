"""The tokenizer that the tiny models of a chain share, trained on the data of its recipe."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from distill.data.corpus import Corpus
from distill.data.source import data_fingerprint
from distill.data.stored import StoredPosts
from distill.files import atomic_folder
from distill.models import tiny
from distill.models.pretrained import ModelSettings
from distill.recipe import Recipe
from distill.task import prompts
from distill.training.batches import synthetic_answers

_TEMPLATES: tuple[prompts.Template, ...] = ("predict", "explain", "reason", "classify")

_STORED = 10_000
"""The most posts that are not in memory from which a tokenizer learns."""


def tiny_tokenizer(recipe: Recipe, settings: ModelSettings, corpus: Callable[[], Corpus]) -> Path:
    """The folder of the tokenizer for tiny models of one vocabulary size, trained if it is missing.

    Args:
        corpus: reads the data with texts of any length.
    """
    audio, reviews = _hears(recipe), _reviews(recipe)
    parts = (data_fingerprint(recipe.data), recipe.labels.names, prompts.VERSION, reviews, settings.tiny.vocabulary)
    folder = recipe.folder / "tokenizer" / sha256(repr((*parts, "audio") if audio else parts).encode()).hexdigest()[:12]
    if not settings.path and not folder.exists():
        with atomic_folder(folder) as new:
            tiny.train_tokenizer(_texts(recipe, corpus()), settings.tiny.vocabulary, audio).save_pretrained(new)
    return folder


def _hears(recipe: Recipe) -> bool:
    """Whether a tiny model of the chain hears; then the tokenizer of all has the tokens of sounds."""
    models = [part.model for part in (recipe.teacher, recipe.assistant, recipe.student) if part is not None]
    return any(not model.path and model.tiny.audio_hidden is not None for model in models)


def _reviews(recipe: Recipe) -> bool:
    """Whether a teacher trains the *review* task, whose prompts the tokenizer is then trained on as well."""
    return recipe.teacher is not None and "review" in recipe.teacher.tasks


def _texts(recipe: Recipe, corpus: Corpus) -> list[str]:
    """Training texts: posts, rationales, prompts and answers."""
    train = corpus.train[:_STORED] if isinstance(corpus.train, StoredPosts) else corpus.train
    posts, labels = [*train, *corpus.teacher], recipe.labels
    texts = [text for post in posts for text in (post.text, post.aspect, post.rationale) if text]
    labelled = [post for post in posts if post.label is not None]
    texts += [prompts.render(template, post, labels) for template in _TEMPLATES for post in labelled[:100]]
    if _reviews(recipe):
        reviews = [(post, synthetic_answers(post, labels)) for post in labelled[:100]]
        texts += [prompts.render("review", post, labels, earlier) for post, earlier in reviews]
    return texts + [f"{labels.wording.prefix} {name}" for name in labels.names for _ in range(100)]

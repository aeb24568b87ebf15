"""Shared fixtures: offline libraries, a small postcards corpus, a tokenizer, tiny models."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import pytest
import torch

from distill import chain
from distill.cli import main
from distill.data.corpus import Corpus, DataSettings, read_corpus
from distill.data.postcards import PostcardSettings
from distill.models import tiny
from distill.models.backbone import Backbone, ModelSettings, create
from distill.models.tiny import TinySettings
from distill.recipe import Recipe
from distill.task.labels import LabelSpace
from distill.task.prompts import render
from tests import micro, reloads
from tests.commands import Command, Result
from tests.s3_server import S3

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave the modules out of garbage collection, which a chain does after every stage."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def forked_reloads() -> Iterator[None]:
    """Exports are reloaded in forks of one process, except in tests of the command itself."""
    with reloads.forked():
        yield


@pytest.fixture(scope="session")
def labels() -> LabelSpace:
    return LabelSpace()


@pytest.fixture(scope="session")
def postcards(tmp_path_factory: pytest.TempPathFactory, labels: LabelSpace) -> Corpus:
    """A small postcards corpus: labelled posts with gold rationales, and a few unlabelled posts."""
    root = tmp_path_factory.mktemp("postcards") / "data"
    cards = PostcardSettings(labelled=63, unlabelled=9, validation=45, test=45)
    return read_corpus(DataSettings(source="postcards", root=str(root), postcards=cards), labels)


FAKE_CAMERA = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
"""The browser of the tests records a test picture and beeps, and asks nobody."""


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, postcards: Corpus, labels: LabelSpace) -> Path:
    """A tokenizer trained on prompts and rationales of the postcards."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [render("predict", sample, labels) for sample in postcards.train]
    texts += [sample.rationale for sample in postcards.train if sample.rationale]
    tiny.train_tokenizer(texts, 768).save_pretrained(folder)
    return folder


MakeBackbone = Callable[..., Backbone]


@pytest.fixture(scope="session")
def make_backbone(tokenizer_folder: Path, labels: LabelSpace) -> MakeBackbone:
    """A factory of tiny models with random weights; the same seed gives the same model."""

    def make(seed: int = 0, hidden: int = 64, batch_size: int = 16) -> Backbone:
        L.seed_everything(seed, verbose=False)
        size = TinySettings(hidden=hidden, layers=2, vision_hidden=32, vision_depth=1)
        settings = ModelSettings(tiny=size, image_size=56, batch_size=batch_size)
        backbone = create(settings, labels, tokenizer_folder)
        backbone.model.eval()
        return backbone

    return make


@pytest.fixture(scope="session")
def backbone(make_backbone: MakeBackbone) -> Backbone:
    """A tiny model; tests must not change it."""
    return make_backbone()


@pytest.fixture(scope="session")
def model_folder(make_backbone: MakeBackbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL saved to disk in the format of a real model."""
    folder = tmp_path_factory.mktemp("qwen")
    make_backbone(seed=3).save(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe of a chain with a trained teacher that has run; tests must not change its folder."""
    recipe = micro.read(micro.write(tmp_path_factory.mktemp("chain"), micro.WITH_TEACHER))
    assert chain.run(recipe) == chain.stages_of(recipe)
    return recipe


@pytest.fixture(scope="session")
def folder(finished: Recipe) -> Path:
    """The folder of that chain."""
    return finished.folder


@pytest.fixture(scope="session")
def recipe_file(folder: Path) -> Path:
    """The recipe of that chain as a file."""
    return folder / "recipe.yaml"


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 server, which the clients of this process reach."""
    for name in ("s3fs", "moto", "flask"):
        pytest.importorskip(name, reason=f"needs {name}, which is in the extra dev")
    with S3() as server:
        yield server


@pytest.fixture
def distill(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `distill` with the given arguments in this process."""

    def command(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        return Result(status, *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium or Chrome of this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if (program := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("neither chromium nor google-chrome is on PATH")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox", *FAKE_CAMERA])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: "Browser") -> Iterator["Page"]:
    """A page; script errors and violations of its content security policy fail the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda log: errors.append(log.text) if "Content Security Policy" in log.text else None)
    yield page
    context.close()
    assert not errors

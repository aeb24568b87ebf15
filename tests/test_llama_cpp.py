"""The program for llama.cpp in docs/serve-elsewhere.md, run on llama.cpp itself.

`DISTILL_PRETRAINED` names the folder of a Gemma 3 of images and text, `DISTILL_LLAMA_CPP` the source of llama.cpp with
its converter; the package xllamacpp has its server.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.data.corpus import Corpus
from distill.export.card import scoring
from distill.files import write_json
from distill.models.backbone import Backbone, LoraSettings, ModelSettings, create
from tests.test_use_elsewhere import SPACES, block, probabilities, publish, run

MODEL = Path(os.environ.get("DISTILL_PRETRAINED") or "missing")
SOURCE = Path(os.environ.get("DISTILL_LLAMA_CPP") or "missing")
SERVER = """
import sys, time, xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.mmproj.path, settings.mmproj_use_gpu = sys.argv[1], sys.argv[2], False
settings.n_ctx, settings.port, settings.cpuparams.n_threads = 2048, int(sys.argv[3]), 1
server = xllamacpp.Server(settings)
while True:
    time.sleep(1)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL / "processor_config.json").exists(), reason="DISTILL_PRETRAINED names no Gemma 3"),
    pytest.mark.skipif(not SOURCE.is_dir(), reason="DISTILL_LLAMA_CPP names no source of llama.cpp"),
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"),
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A student with an adapter that is not zero."""
    torch.manual_seed(0)
    settings = ModelSettings(str(MODEL), lora=LoraSettings(r=4, dropout=0.0), image_size=56)
    backbone = create(settings, SPACES["first tokens"], tmp_path_factory.mktemp("student"))
    for weights in backbone.model.parameters():
        if weights.requires_grad:
            weights.data.normal_(0, 0.02)
    backbone.model.eval()
    return backbone


@pytest.fixture(scope="module")
def address(student: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a llama.cpp server with the converted student."""
    folder = tmp_path_factory.mktemp("gguf")
    publish(student, folder / "export")
    published_names(folder / "export" / "model.safetensors")
    environment = os.environ | {"PYTHONPATH": str(SOURCE / "gguf-py")}
    for name, options in {"student": (), "mmproj": ("--mmproj",)}.items():
        script = [sys.executable, str(SOURCE / "convert_hf_to_gguf.py"), str(folder / "export")]
        script += ["--outfile", str(folder / f"{name}.gguf"), "--outtype", "f32", *options]
        subprocess.run(script, check=True, capture_output=True, env=environment)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    files = [str(folder / "student.gguf"), str(folder / "mmproj.gguf")]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-c", SERVER, *files, str(port)], stdout=log, stderr=log)
    try:
        wait(f"http://127.0.0.1:{port}/health", server, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder)


def published_names(path: Path) -> None:
    """Name the weights of the image encoder as Gemma 3 was published, which the converter expects."""
    inner = "vision_tower.vision_model."
    weights = {
        name if inner in name else name.replace("vision_tower.", inner): value
        for name, value in load_file(path).items()
    }
    save_file(weights, path, {"format": "pt"})


def wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text(errors="replace")[-2000:]
        try:
            with urlopen(url) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace")[-2000:])


@pytest.mark.parametrize(("space", "images"), [("first tokens", False), ("first tokens", True), ("whole labels", True)])
def test_the_program_gives_the_probabilities_of_the_student(
    space: str, images: bool, student: Backbone, address: str, postcards: Corpus, tmp_path: Path
) -> None:
    labels = Backbone(student.model, student.processor, SPACES[space], student.settings)
    write_json(tmp_path / "scoring.json", scoring(labels))
    code = block("localhost:8080").replace("runs/mosi/export", str(tmp_path))
    code = code.replace("http://localhost:8080", address).replace("n_probs=100", f"n_probs={len(student.head)}")
    classify = run(code)["classify"]
    for post in postcards.test[: 3 if space == "first tokens" else 1]:  # whole labels take many requests
        post = post if images else replace(post, images=())
        found = classify(post.text, post.images)
        assert found == pytest.approx(probabilities(labels, post), abs=3e-3)

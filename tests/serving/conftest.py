"""A student trained just enough to answer in the format, gateways around it over real HTTP, and rules to route by."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import lightning as L
import pytest

from distill.cascade.cascade import Calibration, CascadePolicy
from distill.data.corpus import Corpus
from distill.models.backbone import Backbone, ModelSettings, create
from distill.models.local import Local
from distill.models.reasoner import Reasoner
from distill.models.tiny import TinySettings
from distill.serving.gateway import Gateway
from distill.serving.server import Server
from distill.serving.settings import ServeSettings
from distill.task.labels import LabelSpace
from distill.training.assistant import TrainSettings
from tests.training.test_assistant import learn

CALIBRATION = Calibration(
    student="tiny", teacher="other", measure="entropy", student_temperature=1.0, teacher_temperature=1.0,
    student_threshold=1.0, teacher_threshold=1.0,
)  # fmt: skip


def policy(**thresholds: float) -> CascadePolicy:
    """Unless told otherwise the student is certain of everything."""
    return CascadePolicy(LabelSpace(), replace(CALIBRATION, **thresholds))  # type: ignore[arg-type]


NEVER_SURE = policy(student_threshold=-1.0)
"""Everything is deferred; the teacher is certain of all of it."""


@pytest.fixture(scope="session")
def fluent(postcards: Corpus, tokenizer_folder: Path, labels: LabelSpace) -> Backbone:
    """A tiny student that writes rationales in the format, if not the truth."""
    L.seed_everything(1, verbose=False)
    size = TinySettings(hidden=64, layers=1, vision_hidden=32, vision_depth=1)
    backbone = create(ModelSettings(tiny=size, image_size=28, batch_size=16), labels, tokenizer_folder)
    samples = [sample for sample in postcards.train if sample.rationale]
    settings = TrainSettings(batch_size=4, learning_rate=5e-3, warmup_steps=10)
    learn(
        backbone, postcards, samples, settings,
        max_steps=140, max_epochs=-1, limit_val_batches=0, gradient_clip_val=1.0,
    )  # fmt: skip
    return backbone


@pytest.fixture(scope="session")
def student(fluent: Backbone) -> Local:
    return Local(fluent, "tiny")


@contextmanager
def running(
    student: Reasoner,
    teacher: Reasoner | None = None,
    chosen: CascadePolicy | None = None,
    *,
    ready: bool = True,
    **settings: Any,
) -> Iterator[httpx.Client]:
    """A gateway on a free port, in a thread of this process, and a client of it."""
    settings = {"port": 0, "max_new_tokens": 96} | settings
    server = Server(Gateway(ServeSettings(**settings), chosen or policy(), student, teacher, "pair"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            until(lambda: not ready or client.get("/health/ready").status_code == 200)
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def metric(client: httpx.Client, name: str) -> float:
    """The sum of one metric over its labels."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def message(reply: httpx.Response, status: int) -> str:
    """The sentence of a refusal, in OpenAI's shape."""
    assert reply.status_code == status, reply.text
    error = json.loads(reply.text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["message"].count("\n") == 0
    return error["message"]


@pytest.fixture(scope="module")
def gateway(student: Local) -> Iterator[httpx.Client]:
    """The student alone, certain of everything."""
    with running(student) as client:
        yield client

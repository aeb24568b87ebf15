"""Fixtures: a tiny trained student, gateways over real HTTP, and cascade policies."""

import json
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
from tests.web_servers import in_thread

CALIBRATION = Calibration(
    student="tiny", teacher="other", measure="entropy", student_temperature=1.0, teacher_temperature=1.0,
    student_threshold=1.0, teacher_threshold=1.0,
)  # fmt: skip


def policy(**thresholds: float) -> CascadePolicy:
    """A policy with these thresholds; by default it accepts every answer of the student."""
    return CascadePolicy(LabelSpace(), replace(CALIBRATION, **thresholds))  # type: ignore[arg-type]


DEFER_ALL = policy(student_threshold=-1.0)
"""Defers every post and accepts every answer of the teacher."""


@pytest.fixture(scope="session")
def fluent(postcards: Corpus, tokenizer_folder: Path, labels: LabelSpace) -> Backbone:
    """A tiny student that writes well-formed rationales, right or wrong."""
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
    cascade_policy: CascadePolicy | None = None,
    *,
    ready: bool = True,
    **settings: Any,
) -> Iterator[httpx.Client]:
    """A client of a gateway that runs on a free port in a thread of this process."""
    settings = {"port": 0, "max_new_tokens": 96} | settings
    server = Server(Gateway(ServeSettings(**settings), cascade_policy or policy(), student, teacher, "cascade"))
    with in_thread(server) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: not ready or client.get("/health/ready").status_code == 200)
        yield client


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.01)


def metric(client: httpx.Client, name: str) -> float:
    """The sum of one metric over its labels."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def message(reply: httpx.Response, status: int) -> str:
    """The message of an error response, which must be in OpenAI's format."""
    assert reply.status_code == status, reply.text
    error = json.loads(reply.text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["message"].count("\n") == 0
    return error["message"]


@pytest.fixture(scope="module")
def gateway(student: Local) -> Iterator[httpx.Client]:
    """A gateway without a teacher that accepts every answer of the student."""
    with running(student) as client:
        yield client

"""Gateways whose student is served by other processes: `distill serve` speaks vLLM's protocol for the student alone."""

import base64
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from distill.data.corpus import read_corpus
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.models.local import Local
from distill.recipe import Recipe
from distill.serving.settings import endpoint_for_serving
from distill.stages.context import Context
from distill.task.sample import Sample
from tests.serving.balancer import balanced
from tests.serving.conftest import metric, running, wait_until

Served = tuple["subprocess.Popen[str]", str]


def start(recipe: Path, port: int = 0) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "distill", "serve", "--config", str(recipe)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([*command, "--serve.port", str(port)], stderr=subprocess.PIPE, text=True, env=environment)


def address(process: "subprocess.Popen[str]") -> str:
    """The address that a server logs when it listens."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"http://[\d.:]+", line):
            return found[0]
    pytest.fail("".join(lines))


@pytest.fixture(scope="module")
def students(recipe_file: Path) -> Iterator[list[Served]]:
    """Two processes that serve the student."""
    processes = [start(recipe_file) for _ in range(2)]
    try:
        yield [(process, address(process)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def gateway(urls: Sequence[str], finished: Recipe) -> Iterator[httpx.Client]:
    """A gateway without a teacher whose student has replicas at these addresses."""
    first, *others = (f"{url}/v1" for url in urls)
    settings = endpoint_for_serving(EndpointSettings(first, "micro-student", replicas=others), 30.0)
    student = Endpoint(settings, finished.labels, forced_prefix=True, image_size=28)
    with running(student, rationale=False) as client:
        yield client
    student.close()


@pytest.fixture(scope="module")
def samples(finished: Recipe) -> list[Sample]:
    corpus = read_corpus(finished.data, finished.labels)
    return [*corpus.test, *corpus.validation, *corpus.train[:12]]


def answer(client: httpx.Client, sample: Sample) -> dict[str, Any]:
    image = base64.b64encode(sample.images[0].read_bytes()).decode()
    reply = client.post("/v1/sentiment", json={"text": sample.text, "image": image})
    assert reply.status_code == 200, reply.text
    return reply.json() | {"cost": None}


def test_labels_and_answers_do_not_depend_on_the_processes(
    students: list[Served], finished: Recipe, samples: list[Sample]
) -> None:
    local = Local(Context(finished, {}).load("student"), "student")
    probabilities = local.classify(samples).probabilities
    urls = [url for _, url in students]
    with gateway(urls, finished) as one, gateway(urls[::-1], finished) as two:
        found = [answer(one, sample) for sample in samples]
        assert metric(one, "distill_replica_requests_total") >= len(samples)
        assert metric(one, 'distill_replica_up{replica="') == 2
        with balanced([str(one.base_url), str(two.base_url)]) as (url, sent), httpx.Client(base_url=url) as client:
            assert [answer(client, sample) for sample in samples] == [
                one_answer | {"probabilities": pytest.approx(one_answer["probabilities"], abs=1e-5),
                              "uncertainty": pytest.approx(one_answer["uncertainty"], abs=1e-5)}
                for one_answer in found
            ]  # fmt: skip
            assert max(sent.values()) - min(sent.values()) <= 1 and len(sent) == 2
    assert [one_answer["label"] for one_answer in found] == [
        finished.labels.names[row.argmax()] for row in probabilities
    ]
    for one_answer, row in zip(found, probabilities, strict=True):
        assert list(one_answer["probabilities"].values()) == pytest.approx(list(row), abs=1e-4)


def test_a_killed_student_loses_no_request_and_comes_back(
    students: list[Served], recipe_file: Path, finished: Recipe, samples: list[Sample]
) -> None:
    urls = [url for _, url in students]
    with gateway(urls, finished) as client, ThreadPoolExecutor(8) as threads:
        expected = [answer(client, sample)["label"] for sample in samples]
        futures = [threads.submit(answer, client, sample) for sample in samples * 3]
        wait_until(lambda: sum(future.done() for future in futures) >= 5)
        process = students[0][0]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert [future.result()["label"] for future in futures] == expected * 3
        assert metric(client, 'distill_replica_up{replica="' + urls[0]) == 0
        revived = start(recipe_file, int(urls[0].rpartition(":")[2]))
        try:
            assert address(revived) == urls[0]
            wait_until(lambda: metric(client, 'distill_replica_up{replica="') == 2, 60)
            before = metric(client, 'distill_replica_requests_total{replica="' + urls[0])
            assert [answer(client, sample)["label"] for sample in samples] == expected
            assert metric(client, 'distill_replica_requests_total{replica="' + urls[0]) > before
        finally:
            revived.kill()
            revived.wait()

"""Labels and throughput of a gateway whose student runs in other processes, with 1 and 2 replicas.

    python benchmarks/serving_replicas.py                                   # the quickstart
    python benchmarks/serving_replicas.py --config RECIPE --posts 100 --ways endpoint
    python benchmarks/serving_replicas.py --ways endpoint --students http://host:8001/v1 http://host:8002/v1 \
        --student_model student                                             # servers that run, such as vLLM

The posts are postcards with their pictures; some are sent before, to warm up. The labels of the student behind its
servers are compared with those of the student in this process, and the labels of gateways with those of a gateway that
has the student in its process. `endpoint`: before 1 and 2 processes of `distill serve`, or the servers of --students.
`ray`: Ray Serve with 1 and 2 replicas of the gateway. The recipe must have run up to calibrate. Exit status 1: a
label differs or a request failed.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from distill import chain
from distill.data.corpus import DataSettings, read_corpus
from distill.data.postcards import PostcardSettings
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.recipe import Recipe, load, parser
from distill.stages.context import Context
from distill.task.sample import Sample

ROOT = Path(__file__).resolve().parents[1]
Url = str


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


@contextlib.contextmanager
def serving(config: str, *flags: str) -> Iterator[Url]:
    """A process of `distill serve`; its address."""
    port = free_port()
    command = [sys.executable, "-m", "distill", "serve", "--config", config, "--serve.port", str(port)]
    process = subprocess.Popen([*command, *flags], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(url: Url, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health/ready", timeout=30).status_code == 200:
                return
        time.sleep(0.3)
    raise SystemExit(f"distill serve ended with status {process.returncode}")


def request_body(sample: Sample) -> bytes:
    image = base64.b64encode(sample.images[0].read_bytes()).decode()
    return json.dumps({"text": sample.text, "image": image, "rationale": False}).encode()


async def ask(url: Url, bodies: list[bytes], callers: int) -> tuple[list[str | None], float]:
    """The label of each post (None: no answer), and the answers per second."""
    labels: list[str | None] = [None] * len(bodies)
    numbers = iter(range(len(bodies)))
    async with httpx.AsyncClient(timeout=120) as client:

        async def caller() -> None:
            for number in numbers:
                reply = await client.post(f"{url}/v1/sentiment", content=bodies[number])
                labels[number] = reply.json()["label"] if reply.status_code == 200 else None

        begin = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(callers)))
    return labels, sum(label is not None for label in labels) / (time.perf_counter() - begin)


class Measurement:
    """Sends the posts to gateways and prints a line for each.

    Attributes:
        expected: the labels of the first gateway.
        passed: whether all labels were equal, and all requests answered.
    """

    def __init__(self, samples: list[Sample], callers: int) -> None:
        self.samples, self.callers = samples, callers
        self.bodies = [request_body(sample) for sample in samples]
        self.expected: list[str | None] | None = None
        self.passed = True

    def gateway(self, name: str, url: Url) -> None:
        asyncio.run(ask(url, self.bodies[: 2 * self.callers], self.callers))  # to warm up
        labels, rate = asyncio.run(ask(url, self.bodies, self.callers))
        self.expected = self.expected or labels
        self.report(name, labels, self.expected, rate)
        self.passed &= None not in labels

    def students(self, name: str, servers: list[Url], model: str, recipe: Recipe, expected: list[str]) -> None:
        """The student's own labels, scored through its servers."""
        assert recipe.student is not None
        size = (recipe.student.model.image_size or None) if recipe.student.model.images else 0
        settings = EndpointSettings(servers[0], model, replicas=servers[1:], concurrency=self.callers)
        endpoint = Endpoint(settings, recipe.labels, forced_prefix=True, image_size=size)
        endpoint.classify(self.samples[: self.callers])
        begin = time.perf_counter()
        scores = endpoint.classify(self.samples)
        rate = len(self.samples) / (time.perf_counter() - begin)
        found = zip(scores.probabilities, scores.answered, strict=True)
        labels = [recipe.labels.names[row.argmax()] if answered else None for row, answered in found]
        self.report(name, labels, list(expected), rate)
        print(f"{'':<40} requests by server: {', '.join(str(state.answered) for state in endpoint.replicas)}"
              f"{'; ' if endpoint.given_up else ''}{'; '.join(endpoint.given_up)}")  # fmt: skip
        endpoint.close()

    def report(self, name: str, labels: list[str | None], expected: list[str | None], rate: float) -> None:
        equal = sum(one == other for one, other in zip(labels, expected, strict=True))
        self.passed &= equal == len(labels)
        print(f"{name:<40} {equal} of {len(labels)} labels equal, {rate:.1f} posts per second", flush=True)


def local_labels(recipe: Recipe, samples: list[Sample]) -> list[str]:
    """The labels of the student in this process."""
    needed = ("teacher", recipe.student_stage, "calibrate")
    context = Context(recipe, chain.input_fingerprints(recipe, "serve", needed))
    scores = context.reasoner(recipe.student_stage).classify(samples)
    return [recipe.labels.names[row.argmax()] for row in scores.probabilities]


def main() -> int:
    options = argparse.ArgumentParser(description="Labels and throughput of a gateway with replicas.")
    options.add_argument("--config", default="recipes/quickstart.yaml", help="a recipe that has run")
    options.add_argument("--posts", type=int, default=500)
    options.add_argument("--callers", type=int, default=16, help="requests in flight (default: 16)")
    options.add_argument("--ways", nargs="*", choices=("endpoint", "ray"), default=["endpoint"])
    options.add_argument("--students", nargs="+", default=[], metavar="URL", help="base URLs of servers of the student")
    options.add_argument("--student_model", help="the student's name there")
    parsed = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended
    recipe = load(parser("serve"), ["--config", parsed.config])[0]
    common = ["--serve.rationale", "false", "--serve.queue", str(4 * parsed.callers)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        cards = PostcardSettings(labelled=9, unlabelled=0, validation=9, test=parsed.posts)
        corpus = read_corpus(DataSettings(source="postcards", root=f"{folder}/cards", postcards=cards), recipe.labels)
        measured = Measurement(corpus.test[: parsed.posts], parsed.callers)
        with serving(parsed.config, *common) as url:
            measured.gateway("gateway with the student", url)
        if "endpoint" in parsed.ways:
            model, servers = parsed.student_model or f"{recipe.name}-student", list(parsed.students)
            if not servers:
                servers = [f"{stack.enter_context(serving(parsed.config, *common))}/v1" for _ in range(2)]
            expected = local_labels(recipe, measured.samples)
            for count in range(1, len(servers) + 1):
                behind = servers[:count]
                measured.students(f"student behind {count} server(s)", behind, model, recipe, expected)
                flags = ["--serve.student.base_url", behind[0], "--serve.student.replicas", json.dumps(behind[1:])]
                flags += ["--serve.student.model", model, "--serve.student.concurrency", str(parsed.callers)]
                with serving(parsed.config, *common, *flags) as url:
                    measured.gateway(f"gateway, student behind {count} server(s)", url)
            stack.close()
        if "ray" in parsed.ways:
            for count in (1, 2):
                flags = ["--engine", "ray", "--serve.ray.min_replicas", str(count), "--serve.ray.max_replicas"]
                with serving(parsed.config, *common, *flags, str(count)) as url:
                    measured.gateway(f"Ray Serve, {count} replica(s)", url)
    return 0 if measured.passed else 1


if __name__ == "__main__":
    sys.exit(main())

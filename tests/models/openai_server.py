"""An OpenAI-compatible server of the tests' own: it looks at the picture, and fails as often as it is told to."""

import base64
import io
import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from PIL import Image, ImageStat

from distill.models.endpoint import Endpoint, EndpointSettings
from distill.models.reasoner import Answer, Sampling
from distill.task.labels import LabelSpace
from distill.task.sample import Sample

LABELS = LabelSpace()

COLOURS = {"negative": (200, 30, 30), "neutral": (30, 30, 200), "positive": (30, 200, 30)}
"""The mean colour of a picture is its sentiment."""


@dataclass
class Question:
    """One request as the server understood it."""

    body: dict[str, Any]
    text: str
    images: list[Image.Image]

    @property
    def sentiment(self) -> str:
        """The label whose colour the picture has; neutral without a picture."""
        if not self.images:
            return "neutral"
        mean = ImageStat.Stat(self.images[0].convert("RGB")).mean
        return min(COLOURS, key=lambda label: math.dist(COLOURS[label], mean))


def rationale(label: str, words: str = "the words are plain") -> str:
    names = ("Text_analysis", "Image_analysis", "Conflict_resolution", "Final_conclusion")
    return "\n".join([f'"{name}": "{words}"' for name in names] + [f'"Prediction": {label}'])


def answer(question: Question) -> str:
    """Explain the label that is given away, else predict what the picture shows; classify in one line."""
    hint = question.text.partition("\nThe sentiment is ")[2].partition(".")[0]
    if question.text.startswith("Classify"):
        return f'"Prediction": {question.sentiment}'
    return rationale(hint or question.sentiment)


def token(text: str, **top: float) -> dict[str, Any]:
    """One entry of `logprobs.content`; `top` are probabilities, of `text` itself among others."""
    likely = [{"token": other, "logprob": math.log(p)} for other, p in (top or {text: 1.0}).items()]
    return {"token": text, "logprob": math.log(top.get(text, 1.0)), "top_logprobs": likely}


@dataclass
class Server:
    """Use as a context manager. A failure happens at its rate, drawn anew for each request from the seed.

    The kinds of failure: a status such as "429" or "500"; "truncated" (finish_reason length), "malformed" (a 200 in no
    format), "broken" (a 200 whose body is not JSON), "empty" (a 200 without choices). Only the last two are not paid.
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    answer: Callable[[Question], str] = answer
    logprobs: Callable[[Question], list[dict[str, Any]] | None] = lambda question: None
    refuse: Callable[[dict[str, Any]], tuple[int, str] | None] = lambda body: None
    tokenize: Callable[[str], list[int]] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drip_s: float = 0.0
    seed: int = 0
    questions: list[Question] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    tokenized: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0
    connections: int = 0
    cut: int = 0
    """How many replies are still to break off before their end."""

    def __enter__(self) -> Self:
        self.lock = threading.Lock()
        self.random = random.Random(self.seed)
        self.at_once = 0
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_of_tests": self}))
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.shutdown()
        self.http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    @property
    def requests(self) -> int:
        return len(self.questions)

    @property
    def paid(self) -> int:
        """How many answers were delivered: whole replies of status 200 with a choice in them."""
        return self.sent["right"] + self.sent["truncated"] + self.sent["malformed"]

    def reply(self, question: Question) -> tuple[str, int, bytes]:
        """What becomes of a question: its kind, a status and a body."""
        with self.lock:
            draw = self.random.random()
        refused = self.refuse(question.body)
        if refused is not None:
            return "refused", refused[0], json.dumps({"error": {"message": refused[1]}}).encode()
        kind = "right"
        for name, rate in self.rates.items():
            if draw < rate:
                kind = name
                break
            draw -= rate
        if kind.isdigit():
            return kind, int(kind), b'{"error": {"message": "not now"}}'
        if kind == "broken":
            return kind, 200, b'{"choices": [{"message": {"cont'
        if kind == "empty":
            return kind, 200, b'{"error": {"message": "overloaded"}}'
        text = "I would rather not say." if kind == "malformed" else self.answer(question)
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if kind == "truncated":
            choice |= {"message": {"role": "assistant", "content": text[:40]}, "finish_reason": "length"}
        if question.body.get("logprobs") and (tokens := self.logprobs(question)) is not None:
            choice["logprobs"] = {"content": tokens}
        return kind, 200, json.dumps({"choices": [choice], "usage": _USAGE}).encode()


_USAGE = {"prompt_tokens": 100, "completion_tokens": 10}


class _Handler(BaseHTTPRequestHandler):
    server_of_tests: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        with self.server_of_tests.lock:
            self.server_of_tests.connections += 1

    def do_POST(self) -> None:
        server = self.server_of_tests
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":  # beside /v1, as vLLM has it
            return self.tokens(body)
        question = _understand(body)
        with server.lock:
            server.questions.append(question)
            server.keys.append(self.headers.get("Authorization"))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        time.sleep(server.delay_s)
        kind, status, content = server.reply(question)
        with server.lock:
            server.at_once -= 1
        try:
            path = urlsplit(self.path).path  # as a proxy it is told the whole address
            self.send_response(status if path == "/v1/chat/completions" else 404)
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if server.cut:
                server.cut, content, self.close_connection = server.cut - 1, content[:-8], True
            for begin in range(0, len(content), 16 if server.drip_s else len(content)):
                self.wfile.write(content[begin : begin + (16 if server.drip_s else len(content))])
                time.sleep(server.drip_s)
        except OSError:
            kind = "hung up"
        with server.lock:
            server.sent[kind] += 1

    def tokens(self, body: dict[str, Any]) -> None:
        server = self.server_of_tests
        with server.lock:
            server.tokenized.append(body["prompt"])
        content = b"{}" if server.tokenize is None else json.dumps({"tokens": server.tokenize(body["prompt"])}).encode()
        self.send_response(404 if server.tokenize is None else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _understand(body: dict[str, Any]) -> Question:
    content = body["messages"][0]["content"]
    if isinstance(content, str):
        return Question(body, content, [])
    data = [part["image_url"]["url"].partition("base64,")[2] for part in content if part["type"] == "image_url"]
    images = [Image.open(io.BytesIO(base64.b64decode(url))) for url in data]
    return Question(body, next(part["text"] for part in content if part["type"] == "text"), images)


def picture(path: Path, label: str, size: int = 8) -> Path:
    """A picture in one label's colour."""
    Image.new("RGB", (size, size), COLOURS[label]).save(path)
    return path


def endpoint(url: str, **settings: Any) -> Endpoint:
    """A client of the server that does not wait long."""
    return Endpoint(EndpointSettings(url, "big-vl", **({"backoff_s": 0.01, "concurrency": 4} | settings)), LABELS)


def posts(folder: Path, count: int) -> list[Sample]:
    """Posts whose pictures show their labels, in turn."""
    names = list(COLOURS)
    pictures = [picture(folder / f"{name}.png", name) for name in names]
    return [Sample(f"s{i}", f"post {i}", (pictures[i % 3],), label=names[i % 3]) for i in range(count)]


def answers(
    teacher: Endpoint, samples: list[Sample], sampling: Sampling = Sampling(), template: Any = "predict"
) -> list[Answer]:
    """What an endpoint answers to each sample, in their order; there is one answer to each."""
    found = dict(teacher.reason(samples, template, sampling))
    assert sorted(found) == list(range(len(samples)))
    return [found[i] for i in range(len(samples))]

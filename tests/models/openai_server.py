"""A fake OpenAI-compatible server: it predicts the label from the colour of the image and fails at given rates."""

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
"""Mean image colour of each label."""

DROPPED = 0
"""Instead of a status: the connection is closed without a reply."""


@dataclass
class ChatRequest:
    """One parsed request: the body, and the text and images of its message."""

    body: dict[str, Any]
    text: str
    images: list[Image.Image]

    @property
    def sentiment(self) -> str:
        """The label with the colour of the first image; neutral without an image."""
        if not self.images:
            return "neutral"
        mean = ImageStat.Stat(self.images[0].convert("RGB")).mean
        return min(COLOURS, key=lambda label: math.dist(COLOURS[label], mean))


def rationale(label: str, analysis: str = "the words are plain") -> str:
    names = ("Text_analysis", "Image_analysis", "Conflict_resolution", "Final_conclusion")
    return "\n".join([f'"{name}": "{analysis}"' for name in names] + [f'"Prediction": {label}'])


def answer(request: ChatRequest) -> str:
    """Explain the label given in the prompt, otherwise predict the label of the image; classify in one line."""
    hint = request.text.partition("\nThe sentiment is ")[2].partition(".")[0]
    if request.text.startswith("Classify"):
        return f'"Prediction": {request.sentiment}'
    return rationale(hint or request.sentiment)


def token(text: str, **top: float) -> dict[str, Any]:
    """One entry of `logprobs.content`. `top` are the probabilities of the top-k tokens, including `text`."""
    top_logprobs = [{"token": other, "logprob": math.log(p)} for other, p in (top or {text: 1.0}).items()]
    return {"token": text, "logprob": math.log(top.get(text, 1.0)), "top_logprobs": top_logprobs}


@dataclass
class Server:
    """A context manager that runs the server. Failures are sampled for each request, from `seed`.

    Attributes:
        rates: the rate of each kind of failure: a status such as "429" or "500", "truncated" (finish_reason length),
            "malformed" (status 200, text in no format), "broken" (status 200, invalid JSON) or "empty" (status 200
            without choices). The client pays for truncated and malformed replies.
        answer, logprobs: text and log-probabilities of a reply.
        refuse: status and message of a refusal, or None.
        script: status and body of a reply to the given request, instead of all of the above; None: as above.
        tokenize: the `/tokenize` route; None: there is none.
        health: the status of the `/health` route.
        headers: sent with every reply.
        delay_s: seconds before each reply.
        chunk_delay_s: seconds after each 16 bytes of a reply.
        received, keys, traces, tokenized: the requests, their Authorization and traceparent headers, and the texts sent
            to `/tokenize`.
        sent: number of replies of each kind; "valid" is a reply without failure.
        broken_off: number of replies that still have to be closed before their end.
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    answer: Callable[[ChatRequest], str] = answer
    logprobs: Callable[[ChatRequest], list[dict[str, Any]] | None] = lambda request: None
    refuse: Callable[[dict[str, Any]], tuple[int, str] | None] = lambda body: None
    script: Callable[[ChatRequest], tuple[int, Any] | None] = lambda request: None
    tokenize: Callable[[str], list[int]] | None = None
    health: Callable[[], int] = lambda: 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    chunk_delay_s: float = 0.0
    seed: int = 0
    received: list[ChatRequest] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    traces: list[str | None] = field(default_factory=list)
    tokenized: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    max_in_flight: int = 0
    connections: int = 0
    broken_off: int = 0

    @property
    def handler(self) -> type[BaseHTTPRequestHandler]:
        """The class that answers requests."""
        return Handler

    def __enter__(self) -> Self:
        self.lock = threading.Lock()
        self.random = random.Random(self.seed)
        self.in_flight = 0
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Server", (self.handler,), {"test_server": self}))
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
        return len(self.received)

    @property
    def paid(self) -> int:
        """Number of delivered answers: complete replies with status 200 and a choice."""
        return self.sent["valid"] + self.sent["truncated"] + self.sent["malformed"]

    def reply(self, request: ChatRequest) -> tuple[str, int, bytes]:
        """Kind, status and body of the reply to a request."""
        with self.lock:
            draw = self.random.random()
        if (scripted := self.script(request)) is not None:
            return "scripted", scripted[0], json.dumps(scripted[1]).encode()
        refused = self.refuse(request.body)
        if refused is not None:
            return "refused", refused[0], json.dumps({"error": {"message": refused[1]}}).encode()
        kind = "valid"
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
        text = "I would rather not say." if kind == "malformed" else self.answer(request)
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if kind == "truncated":
            choice |= {"message": {"role": "assistant", "content": text[:40]}, "finish_reason": "length"}
        if request.body.get("logprobs") and (tokens := self.logprobs(request)) is not None:
            choice["logprobs"] = {"content": tokens}
        return kind, 200, json.dumps({"choices": [choice], "usage": _USAGE}).encode()


_USAGE = {"prompt_tokens": 100, "completion_tokens": 10}


class Handler(BaseHTTPRequestHandler):
    test_server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        with self.test_server.lock:
            self.test_server.connections += 1

    def do_GET(self) -> None:
        self.send_response(self.test_server.health() if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        server = self.test_server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":  # next to /v1, as in vLLM
            return self.tokens(body)
        request = parse(body)
        with server.lock:
            server.received.append(request)
            server.keys.append(self.headers.get("Authorization"))
            server.traces.append(self.headers.get("traceparent"))
            server.in_flight += 1
            server.max_in_flight = max(server.max_in_flight, server.in_flight)
        time.sleep(server.delay_s)
        kind, status, content = server.reply(request)
        with server.lock:
            server.in_flight -= 1
        if status == DROPPED:
            self.close_connection = True
            return
        try:
            path = urlsplit(self.path).path  # a proxy receives the whole URL
            self.send_response(status if path == "/v1/chat/completions" else 404)
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if server.broken_off:
                server.broken_off, content, self.close_connection = server.broken_off - 1, content[:-8], True
            for begin in range(0, len(content), 16 if server.chunk_delay_s else len(content)):
                self.wfile.write(content[begin : begin + (16 if server.chunk_delay_s else len(content))])
                time.sleep(server.chunk_delay_s)
        except OSError:
            kind = "disconnected"
        with server.lock:
            server.sent[kind] += 1

    def tokens(self, body: dict[str, Any]) -> None:
        server = self.test_server
        with server.lock:
            server.tokenized.append(body["prompt"])
        content = b"{}" if server.tokenize is None else json.dumps({"tokens": server.tokenize(body["prompt"])}).encode()
        self.send_response(404 if server.tokenize is None else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def parse(body: dict[str, Any]) -> ChatRequest:
    content = body["messages"][0]["content"]
    if isinstance(content, str):
        return ChatRequest(body, content, [])
    data = [part["image_url"]["url"].partition("base64,")[2] for part in content if part["type"] == "image_url"]
    images = [Image.open(io.BytesIO(base64.b64decode(url))) for url in data]
    return ChatRequest(body, [part["text"] for part in content if part["type"] == "text"][-1], images)


def write_image(path: Path, label: str, size: int = 8) -> Path:
    """Write an image in the colour of a label."""
    Image.new("RGB", (size, size), COLOURS[label]).save(path)
    return path


def endpoint(url: str, **settings: Any) -> Endpoint:
    """An endpoint with a short back-off."""
    return Endpoint(EndpointSettings(url, "big-vl", **({"backoff_s": 0.01, "concurrency": 4} | settings)), LABELS)


def posts(folder: Path, count: int) -> list[Sample]:
    """Posts whose image has the colour of their label; the labels alternate."""
    names = list(COLOURS)
    images = [write_image(folder / f"{name}.png", name) for name in names]
    return [Sample(f"s{i}", f"post {i}", (images[i % 3],), label=names[i % 3]) for i in range(count)]


def answers(
    teacher: Endpoint, samples: list[Sample], sampling: Sampling = Sampling(), template: Any = "predict"
) -> list[Answer]:
    """The answers to all samples, in sample order."""
    found = dict(teacher.reason(samples, template, sampling))
    assert sorted(found) == list(range(len(samples)))
    return [found[i] for i in range(len(samples))]

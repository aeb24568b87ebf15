"""A fake service with the batch API of OpenAI: uploads, batches that end after some polls, and their results."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.models.openai_server import ChatRequest, Handler, Server, parse

Line = dict[str, Any]


@dataclass
class BatchServer(Server):
    """`Server` with `/files` and `/batches`. Chat requests are answered as well.

    Attributes:
        polls: a batch has ended at this poll; None: it goes on.
        expires: whether a request, by its number in the file, expires instead of being answered.
        results: changes the lines of results before they are written.
        as_text: changes the text of a file of results.
        final: state in which batches end.
        problem: batches are refused with this message (state `failed`).
        batch_fields: fields of every batch, over those of the server.
        refuse_call: status of the reply to a call of the batch API, by method and path; None: it is answered.
        list_reply: the reply to a request for the list of batches; None: a page of them.
        drop_reply: whether the connection is closed after a call was carried out.
        files, batches: what was uploaded or made, and the batches, by id.
        answered: number of answers by the body of the request, whichever way it came.
        calls: the calls of the batch API.
    """

    polls: int | None = 2
    expires: Callable[[int], bool] = lambda number: False
    results: Callable[[list[Line]], list[Line]] = lambda lines: lines
    as_text: Callable[[str], str] = lambda text: text
    final: str = "completed"
    problem: str = ""
    batch_fields: dict[str, Any] = field(default_factory=dict)
    refuse_call: Callable[[str, str], int | None] = lambda method, path: None
    list_reply: Any = None
    drop_reply: Callable[[str, str], bool] = lambda method, path: False
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    answered: Counter[str] = field(default_factory=Counter)
    calls: list[tuple[str, str]] = field(default_factory=list)

    @property
    def handler(self) -> type[BaseHTTPRequestHandler]:
        return _Handler

    @property
    def paid_twice(self) -> int:
        """Number of answers beyond the first to the same request."""
        return self.answered.total() - len(self.answered)

    @property
    def batched(self) -> int:
        """Number of requests in all batches."""
        return sum(len(self.lines(batch)) for batch in self.batches.values())

    def lines(self, batch: dict[str, Any]) -> list[Line]:
        return [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]

    def reply(self, request: ChatRequest) -> tuple[str, int, bytes]:
        kind, status, body = super().reply(request)
        with self.lock:
            self.answered[json.dumps(request.body, sort_keys=True)] += kind in ("valid", "truncated", "malformed")
        return kind, status, body

    # ---- the batch API ----

    def upload(self, body: bytes, kind: str) -> dict[str, Any]:
        boundary = re.search(r"boundary=(\S+)", kind)
        assert boundary is not None
        parts = dict[str, bytes]()
        for part in body.split(b"--" + boundary[1].encode())[1:-1]:
            head, _, content = part.partition(b"\r\n\r\n")
            name = re.search(rb'name="([^"]+)"', head)
            assert name is not None
            parts[name[1].decode()] = content.removesuffix(b"\r\n")
        assert parts["purpose"] == b"batch"
        return {"id": self.store(parts["file"]), "purpose": "batch"}

    def store(self, content: bytes) -> str:
        with self.lock:
            self.files[id := f"file-{len(self.files)}"] = content
        return id

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["endpoint"] == "/v1/chat/completions" and body["input_file_id"] in self.files
        with self.lock:
            id = f"batch_{len(self.batches)}"
            self.batches[id] = {"id": id, "status": "validating", "polls": 0, **body}
        return self.shown(self.batches[id])

    def shown(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name != "polls"} | self.batch_fields

    def poll(self, id: str) -> dict[str, Any]:
        batch = self.batches[id]
        batch["polls"] += 1
        total = len(self.lines(batch))
        if batch["status"] == "cancelling":
            self.end(batch, "cancelled", answered=total // 2)
        elif batch["status"] in ("validating", "in_progress"):
            batch["status"] = "in_progress"
            batch["request_counts"] = {"total": total, "completed": 0, "failed": 0}
            if self.problem:
                errors = {"object": "list", "data": [{"code": "invalid", "message": self.problem, "line": 1}]}
                batch |= {"status": "failed", "errors": errors}
            elif self.polls is not None and batch["polls"] >= self.polls:
                self.end(batch, self.final, total)
        return self.shown(batch)

    def end(self, batch: dict[str, Any], status: str, answered: int) -> None:
        """Answer the requests of a batch and write its results."""
        good, bad = [], []
        for number, line in enumerate(self.lines(batch)):
            result: Line = {
                "id": f"batch_req_{number}",
                "custom_id": line["custom_id"],
                "response": None,
                "error": None,
            }
            if number >= answered or self.expires(number):
                bad.append(result | {"error": {"code": "batch_expired", "message": "not executed in time"}})
                continue
            _, code, body = self.reply(parse(line["body"]))
            response = {"status_code": code, "request_id": f"r{number}", "body": json.loads(body)}
            (good if code == 200 else bad).append(result | {"response": response})
        batch |= {"status": status, "output_file_id": None, "error_file_id": None}
        for name, lines in (("output_file_id", self.results(good)), ("error_file_id", bad)):
            if lines:
                text = self.as_text("".join(json.dumps(line) + "\n" for line in lines))
                batch[name] = self.store(text.encode())
        batch["request_counts"] = {"total": len(good) + len(bad), "completed": len(good), "failed": len(bad)}


class _Handler(Handler):
    test_server: BatchServer

    def do_GET(self) -> None:
        self.call("GET")

    def do_POST(self) -> None:
        if urlsplit(self.path).path in ("/v1/chat/completions", "/tokenize"):
            super().do_POST()
        else:
            self.call("POST")

    def call(self, method: str) -> None:
        server, url = self.test_server, urlsplit(self.path)
        path = url.path.removeprefix("/v1")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with server.lock:
            server.calls.append((method, path))
            server.keys.append(self.headers.get("Authorization"))
        if (status := server.refuse_call(method, path)) is not None:
            return self.send(status, {"error": {"message": f"not here: {self.headers.get('Authorization')}"}})
        match method, path.strip("/").split("/"):
            case "POST", ["files"]:
                content: Any = server.upload(body, self.headers["Content-Type"])
            case "GET", ["files", id, "content"]:
                content = server.files.get(id)
            case "POST", ["batches"]:
                content = server.create(json.loads(body))
            case "GET", ["batches"]:
                content = self.page(parse_qs(url.query)) if server.list_reply is None else server.list_reply
            case "GET", ["batches", id]:
                content = server.poll(id) if id in server.batches else None
            case "POST", ["batches", id, "cancel"]:
                server.batches[id]["status"] = "cancelling"
                content = server.shown(server.batches[id])
            case _:
                content = None
        if server.drop_reply(method, path):
            self.close_connection = True
        elif content is None:
            self.send(404, {"error": {"message": f"no such thing: {path}"}})
        else:
            self.send(200, content)

    def page(self, query: dict[str, list[str]]) -> dict[str, Any]:
        """A page of two batches, the newest first."""
        known = list(self.test_server.batches.values())[::-1]
        after = [index for index, batch in enumerate(known, 1) if [batch["id"]] == query.get("after")]
        begin = after[0] if after else 0
        shown = [self.test_server.shown(batch) for batch in known[begin : begin + 2]]
        return {"object": "list", "data": shown, "has_more": begin + 2 < len(known)}

    def send(self, status: int, content: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            self.send_response(status)
            for name, value in self.test_server.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass

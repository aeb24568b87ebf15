"""A stand-in for the HTTP interface of the Hugging Face hub: repositories, large files and commits."""

import base64
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".parquet")
"""Files that are uploaded as large files (LFS); the others are part of the commit."""


@dataclass
class Hub:
    """Keeps what it receives in a folder: `repositories` by kind and name, and the files of the last commit of each.

    Args:
        folder: the files of a repository lie below `folder/KIND/USER/NAME`.
        token: the only one that is accepted.
        broken: status of the reply to commits, if they fail.
    """

    folder: Path
    token: str = "hf_secret"
    broken: int | None = None
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)

    def __enter__(self) -> Self:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                pass

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def do_POST(self) -> None:
                body = self.body()
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self.reply(401, {"error": "Invalid username or password."})
                    return
                self.reply(*hub.answer(unquote(urlsplit(self.path).path), body))

            def do_PUT(self) -> None:
                body = self.body()
                hub.large[self.path.rsplit("/", 1)[1]] = body
                self.reply(200, {})

            def do_GET(self) -> None:
                self.reply(*hub.describe(unquote(urlsplit(self.path).path).removeprefix("/api/")))

            def reply(self, status: int, content: dict[str, Any]) -> None:
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def describe(self, repository: str) -> tuple[int, dict[str, Any]]:
        if repository not in self.repositories:
            return 404, {"error": "not here"}
        private = self.repositories[repository].get("visibility") == "private"
        files = [path.relative_to(self.folder / repository) for path in (self.folder / repository).rglob("*.*")]
        siblings = [{"rfilename": file.as_posix()} for file in files]
        return 200, {"id": repository.partition("/")[2], "private": private, "siblings": siblings}

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if path == "/api/repos/create":
            request = json.loads(body)
            kind = request.get("type") or "model"
            name = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
            self.repositories.setdefault(f"{kind}s/{name}", request)
            prefix = "" if kind == "model" else f"{kind}s/"
            return 200, {"url": f"{self.url}/{prefix}{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": item["oid"], "size": item["size"],
                 "actions": {"upload": {"href": f"{self.url}/upload/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]  # fmt: skip
            return 200, {"transfer": "basic", "objects": objects}
        _, api, kind, user, name, action, *_ = path.split("/")
        assert api == "api", path
        repository = f"{kind}/{user}/{name}"
        if repository not in self.repositories:
            return 404, {"error": "Repository not found"}
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            return 200, {"files": files}
        assert action == "commit", path
        if self.broken is not None:
            return self.broken, {"error": "the disk of the hub is full"}
        self._commit(repository, [json.loads(line) for line in body.splitlines()])
        prefix = "" if kind == "models" else f"{kind}/"
        return 200, {"commitUrl": f"{self.url}/{prefix}{user}/{name}/commit/abc", "commitOid": "abc", "hookOutput": ""}

    def _commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append({"repository": repository, "summary": value["summary"]})
                continue
            if line["key"] == "deletedFile":
                (self.folder / repository / value["path"]).unlink()
                continue
            content = base64.b64decode(value["content"]) if line["key"] == "file" else self.large[value["oid"]]
            (path := self.folder / repository / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

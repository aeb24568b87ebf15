"""A stand-in for the wandb server: GraphQL, files and histories of runs, artifacts and the edges of their lineage."""

import base64
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

ENTITY = "tester"
_DATE = "2026-01-01T00:00:00Z"
KEY = "0123456789abcdef" * 2 + "01234567"


@dataclass
class WandbServer:
    """Keeps what it receives. `with WandbServer() as server:` serves it at `server.url`.

    Args:
        refuse: names of GraphQL operations that are answered with an error.
        key: the only API key that is accepted.

    Attributes:
        runs: fields of each run by its id, with its `files`, its `history` and `state`.
        artifacts: fields of each version of an artifact by its id.
        edges: (`logs` or `uses`, id of a run, id of a version) in order of arrival, with repetitions.
        unknown: operations that the stand-in has no answer to.
    """

    refuse: set[str] = field(default_factory=set)
    key: str = KEY
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    edges: list[tuple[str, str, str]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    operations: list[str] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Self:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                login = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
                if self.path.startswith("/sdk/otel"):  # wandb's telemetry
                    self.reply(200, {})
                elif login != f"api:{server.key}":
                    self.reply(401, {"errors": [{"message": "user is not logged in"}]})
                elif self.path == "/graphql":
                    self.reply(200, server.graphql(json.loads(body)))
                else:
                    server.stream(self.path.split("/")[-2], json.loads(body or b"{}"))
                    self.reply(200, {"limits": {}})

            def do_PUT(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                server.files[urlsplit(self.path).path.removeprefix("/upload/")] = self.rfile.read(length)
                self.reply(200, {})

            def do_GET(self) -> None:
                self.reply(404, {"error": "not here"})

            def reply(self, status: int, content: Mapping[str, Any]) -> None:
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:  # a client that ended
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def lineage(self) -> list[tuple[str, str, str]]:
        """The edges of the lineage graph, as (job type of the run, `logs` or `uses`, name of the artifact), sorted."""
        return sorted(
            {(self.runs[run]["jobType"], kind, self.artifacts[version]["name"]) for kind, run, version in self.edges}
        )

    def stream(self, run: str, content: Mapping[str, Any]) -> None:
        """Lines of the files of a run, such as its history."""
        for name, chunk in (content.get("files") or {}).items():
            self.runs[run]["files"].setdefault(name, []).extend(
                map(json.loads, filter(None, chunk["content"]))
                if name.endswith("jsonl") or name == "wandb-summary.json"
                else chunk["content"]
            )
        if content.get("complete"):
            self.runs[run]["exitcode"] = content.get("exitcode")

    def graphql(self, request: Mapping[str, Any]) -> dict[str, Any]:
        match = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        name, variables = match[1] if match else "", request.get("variables") or {}
        with self._lock:
            self.operations.append(name)
            if name in self.refuse:
                return {"errors": [{"message": f"{name} is refused: permission denied"}]}
            answer = getattr(self, f"_{name}", None)
            if answer is None:
                self.unknown.add(name)
                return {"data": {}}
            return {"data": answer(variables.get("input") or variables)}

    def _Viewer(self, _: Any) -> Any:
        return {
            "viewer": {
                "id": "1",
                "entity": ENTITY,
                "username": ENTITY,
                "email": "",
                "flags": "{}",
                "teams": {"edges": []},
            }
        }

    _GetDefaultEntity = _Viewer

    def _ServerFeaturesQuery(self, _: Any) -> Any:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, v: Any) -> Any:
        return {"model": None}

    def _UpsertBucket(self, v: Any) -> Any:
        run, inserted = self.runs.get(v["name"]), v["name"] not in self.runs
        if run is None:
            run = self.runs[v["name"]] = {"files": {}}
        run |= {key: value for key, value in v.items() if value is not None}
        project = run.setdefault("project", "uncategorized")
        return {
            "upsertBucket": {
                "bucket": {
                    "id": f"run-{v['name']}", "name": v["name"], "displayName": run.get("displayName"),
                    "description": None, "config": run.get("config"), "sweepName": None,
                    "project": {"id": project, "name": project, "entity": {"id": ENTITY, "name": ENTITY}},
                    "historyLineCount": 0,
                },
                "inserted": inserted,
            }
        }  # fmt: skip

    def _Run(self, v: Any) -> Any:
        if v["name"] not in self.runs:
            return {"project": {"run": None}}
        run = self.runs[v["name"]]
        fields = {"id": f"run-{v['name']}", "name": v["name"], "projectId": "1", "state": "finished", "config": "{}",
                  "summaryMetrics": "{}", "systemMetrics": "{}", "jobType": run["jobType"]}  # fmt: skip
        return {"project": {"run": fields}}

    def _CreateRunFiles(self, v: Any) -> Any:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{v['run']}/{name}"} for name in v["files"]]
        return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, _: Any) -> Any:
        return {"project": None}

    def _XXHashDigestsEnabled(self, _: Any) -> Any:
        return {"entity": None}

    def _ClientIDMapping(self, v: Any) -> Any:
        found = [key for key, version in self.artifacts.items() if version["client"] == v["clientID"]]
        return {"clientIDMapping": {"serverID": found[0]} if found else None}

    def _CreateArtifact(self, v: Any) -> Any:
        """A version of a collection; one with the same digest is used again, as the server does."""
        name = v["artifactCollectionName" if "artifactCollectionName" in v else "artifactCollectionNames"]
        name = name[0] if isinstance(name, list) else name
        versions = {key: version for key, version in self.artifacts.items() if version["name"] == name}
        same = [key for key, version in versions.items() if version["digest"] == v["digest"]]
        key = same[0] if same else f"artifact-{len(self.artifacts)}"
        if not same:
            self.artifacts[key] = {
                "name": name, "type": v["artifactTypeName"], "digest": v["digest"], "index": len(versions),
                "state": "PENDING", "aliases": [], "client": v.get("clientID"), "files": [], "run": v.get("runName"),
            }  # fmt: skip
        for other in versions.values():
            other["aliases"] = [a for a in other["aliases"] if a not in [x["alias"] for x in v.get("aliases") or ()]]
        self.artifacts[key]["aliases"] += [alias["alias"] for alias in v.get("aliases") or ()]
        if v.get("runName"):
            self.edges.append(("logs", v["runName"], key))
        return {"createArtifact": {"artifact": self._version(key)}}

    def _CreateArtifactManifest(self, v: Any) -> Any:
        file = {
            "id": "1",
            "uploadUrl": f"{self.url}/upload/manifest/{v['artifactID']}/{v['name']}",
            "uploadHeaders": [],
        }
        return {"createArtifactManifest": {"artifactManifest": {"id": f"manifest-{v['artifactID']}", "file": file}}}

    def _UpdateArtifactManifest(self, v: Any) -> Any:
        file = {"id": "1", "uploadUrl": f"{self.url}/upload/{v['artifactManifestID']}", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": v["artifactManifestID"], "file": file}}}

    def _CreateArtifactFiles(self, v: Any) -> Any:
        edges = []
        for file in v["artifactFiles"]:
            path = f"{file['artifactID']}/{file['name']}"
            self.artifacts[file["artifactID"]]["files"].append(file["name"])
            edges.append({"node": {
                "storagePath": path, "uploadUrl": f"{self.url}/upload/{path}", "uploadHeaders": [],
                "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]},
            }})  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, v: Any) -> Any:
        version = self.artifacts[v["artifactID"]]
        version["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": version["digest"]}}}

    def _UseArtifact(self, v: Any) -> Any:
        self.edges.append(("uses", v["runName"], v["artifactID"]))
        return {"useArtifact": {"artifact": {"id": v["artifactID"]}}}

    def _ArtifactMembershipByName(self, v: Any) -> Any:
        name, alias = v["name"].split(":")
        for key, version in self.artifacts.items():
            if version["name"] == name and alias in (*version["aliases"], f"v{version['index']}"):
                membership = {
                    "__typename": "ArtifactCollectionMembership", "id": key, "versionIndex": version["index"],
                    "createdAt": _DATE, "aliases": [], "artifactCollection": self._collection(name, v["project"]),
                    "artifact": self._version(key, v["project"]),
                }  # fmt: skip
                return {"project": {"artifactCollectionMembership": membership}}
        return {"project": {"artifactCollectionMembership": None}}

    @staticmethod
    def _collection(name: str, project: str) -> dict[str, Any]:
        owner = {"id": project, "internalId": project, "name": project, "entity": {"name": ENTITY}}
        return {"__typename": "ArtifactSequence", "id": name, "name": name, "project": owner}

    def _version(self, key: str, project: str = "p") -> dict[str, Any]:
        version = self.artifacts[key]
        return {
            "__typename": "Artifact", "id": key, "state": version["state"], "digest": version["digest"],
            "versionIndex": version["index"], "artifactType": {"name": version["type"]}, "description": None,
            "artifactSequence": self._collection(version["name"], project) | {"latestArtifact": None}, "metadata": None,
            "ttlDurationSeconds": -2, "ttlIsInherited": True, "tags": [], "historyStep": None, "size": 0,
            "commitHash": None, "fileCount": len(version["files"]), "createdAt": _DATE,
            "updatedAt": None, "aliases": [], "digestAlgorithm": "MANIFEST_MD5",
        }  # fmt: skip

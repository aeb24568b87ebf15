"""Traces of requests: their spans, what the spans say, and the trace context from clients to endpoints."""

import builtins
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import pytest

from distill.cascade.cascade import CascadePolicy
from distill.errors import SettingsError
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.models.reasoner import Reasoner
from distill.serving.gateway import Gateway
from distill.serving.server import Server
from distill.serving.settings import ServeSettings
from distill.serving.tracing import Tracing
from distill.task.labels import LabelSpace
from tests.models.openai_server import ChatRequest, token
from tests.models.openai_server import Server as FakeServer
from tests.serving.conftest import policy
from tests.web_servers import in_thread

pytest.importorskip("opentelemetry.sdk", reason="the extra telemetry is not installed")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

SECRET = "the words of a post"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def unsure(request: ChatRequest) -> list[dict[str, Any]]:
    return [token(" neutral", **{" neutral": 0.4, " positive": 0.35, " negative": 0.25})]


def served(
    student: Reasoner, teacher: Reasoner | None, cascade_policy: CascadePolicy, path: str = "/v1/sentiment", **body: Any
) -> tuple[httpx.Response, Sequence[ReadableSpan]]:
    """The reply to one traced request, and the spans of its trace."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    settings = ServeSettings(port=0, explain="none")
    gateway = Gateway(settings, cascade_policy, student, teacher, "cascade", tracing=Tracing(provider))
    with in_thread(Server(gateway)) as url:
        reply = httpx.post(url + path, json=body, headers={"traceparent": PARENT}, timeout=60)
        httpx.get(f"{url}/health/live")
    spans = exporter.get_finished_spans()
    assert all(f"{span.context.trace_id:032x}" == PARENT[3:35] for span in spans if span.context)
    return reply, spans


def test_the_stages_of_a_request_are_spans_of_one_trace_which_endpoints_get() -> None:
    with FakeServer(logprobs=unsure) as one, FakeServer(logprobs=unsure) as two:
        student = Endpoint(EndpointSettings(one.url, "small"), LabelSpace(), forced_prefix=True)
        teacher = Endpoint(EndpointSettings(two.url, "big"), LabelSpace())
        never = policy(student_threshold=-1.0, teacher_threshold=-1.0)
        reply, spans = served(student, teacher, never, text=SECRET)
        assert reply.json()["teacher_calls"] in (1, 2)
        sent = [*one.traces, *two.traces]
    by_name = {span.name: span for span in spans}
    assert {"POST /v1/sentiment", "student", "teacher", "rationale"} <= set(by_name)
    root = by_name["POST /v1/sentiment"]
    assert root.parent is not None and f"{root.parent.span_id:016x}" == PARENT[36:52]
    for span in spans:
        attributes = dict(span.attributes or {})
        assert span is root or (span.parent is not None and span.parent.span_id == root.context.span_id)
        assert SECRET not in repr((span.name, attributes, span.events, span.status.description))
    attributes = dict(root.attributes or {})
    assert attributes["http.response.status_code"] == 200
    assert attributes["distill.deferred"] is True and attributes["distill.stage"] == reply.json()["stage"]
    assert attributes["distill.label"] == reply.json()["label"]
    found = dict(by_name["student"].attributes or {})
    p = np.array([0.4, 0.35, 0.25])
    assert found["distill.label"] == "neutral"
    assert found["distill.entropy"] == pytest.approx(float(-(p * np.log(p)).sum() / np.log(3)))
    ids = {f"{span.context.span_id:016x}" for span in spans}
    assert sent and {header[3:35] for header in sent if header} == {PARENT[3:35]}
    assert {header[36:52] for header in sent if header} <= ids


def test_errors_are_in_the_trace_without_their_message() -> None:
    with FakeServer(refuse=lambda body: (400, f"no: {SECRET}")) as server:
        student = Endpoint(EndpointSettings(server.url, "small", max_attempts=1), LabelSpace())
        reply, spans = served(student, None, policy(), text=SECRET)
    assert reply.status_code == 503
    root = next(span for span in spans if span.name == "POST /v1/sentiment")
    assert dict(root.attributes or {})["http.response.status_code"] == 503
    assert all(SECRET not in repr((span.attributes, span.events, span.status.description)) for span in spans)


def test_without_an_address_there_are_no_spans_and_no_header() -> None:
    with FakeServer(logprobs=unsure) as server:
        student = Endpoint(EndpointSettings(server.url, "small"), LabelSpace())
        tracing = Tracing.to(ServeSettings(), "cascade")
        gateway = Gateway(ServeSettings(port=0, rationale=False), policy(), student, None, "cascade", tracing=tracing)
        with in_thread(Server(gateway)) as url:
            assert httpx.post(f"{url}/v1/sentiment", json={"text": "a"}, headers={"traceparent": PARENT}).is_success
        assert set(server.traces) == {None}


def test_missing_telemetry_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    actual = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry.exporter"):
            raise ImportError(name="opentelemetry.exporter")
        return actual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingsError, match=r"serve.otlp_endpoint needs opentelemetry.*'distill\[telemetry\]'"):
        Tracing.to(ServeSettings(otlp_endpoint="http://localhost:4318"), "cascade")

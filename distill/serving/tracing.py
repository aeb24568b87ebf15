"""OpenTelemetry traces of requests: one span per request, and one for each stage that it goes through.

Spans have labels, numbers and reasons, never a text of a post or of a model.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distill.cascade.cascade import Prediction
from distill.cascade.uncertainty import uncertainty
from distill.connections import trace_headers
from distill.errors import SettingsError
from distill.serving.settings import ServeSettings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import SpanKind

Note = Callable[..., None]
"""Adds attributes to a span, as keyword arguments without their prefix `distill.`; None is left out."""

_EXPORT_S = 5.0  # time limit of one export, and so of the last one at the end


class Tracing:
    """Spans of one gateway.

    Args:
        provider: where the spans go; None: there are none.
    """

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("distill") if provider else None

    @staticmethod
    def to(settings: ServeSettings, name: str) -> "Tracing":
        """Spans that are sent to `serve.otlp_endpoint`; none if it is empty.

        The variables of OpenTelemetry's SDK hold, such as OTEL_TRACES_SAMPLER and OTEL_SERVICE_NAME.

        Args:
            name: of the service.

        Raises:
            SettingsError: OpenTelemetry is not installed.
        """
        if not settings.otlp_endpoint:
            return Tracing()
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise SettingsError(f"serve.otlp_endpoint needs {error.name}: pip install 'distill[telemetry]'") from None
        service = os.environ.get("OTEL_SERVICE_NAME", name)
        provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{settings.otlp_endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_S)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return Tracing(provider)

    def close(self) -> None:
        """Send the spans that are left."""
        if self._provider is not None:
            self._provider.shutdown()

    @contextmanager
    def request(self, method: str, path: str, headers: Mapping[str, str]) -> Iterator[Callable[[int], None]]:
        """The span of a request, in the trace that its headers name (W3C Trace Context).

        Yields:
            A function that records the status of the response.
        """
        if self._tracer is None:
            yield lambda status: None
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(headers)
        attributes = {"http.request.method": method, "url.path": path}
        with self._span(f"{method} {path}", attributes, SpanKind.SERVER, parent) as span:
            yield lambda status: span.set_attribute("http.response.status_code", status)

    @contextmanager
    def span(self, name: str, **attributes: Any) -> Iterator[Note]:
        """A span of the current request; what it waits for from an endpoint is in its trace."""
        if self._tracer is None:
            yield lambda **attributes: None
            return
        with self._span(name, _prefixed(attributes)) as span:
            yield lambda **attributes: span.set_attributes(_prefixed(attributes))

    def note(self, **attributes: Any) -> None:
        """Add attributes to the current span."""
        if self._tracer is not None:
            from opentelemetry.trace import get_current_span

            get_current_span().set_attributes(_prefixed(attributes))

    @contextmanager
    def _span(
        self,
        name: str,
        attributes: Mapping[str, Any],
        kind: "SpanKind | None" = None,
        parent: "Context | None" = None,
    ) -> Iterator[Any]:
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        assert self._tracer is not None
        options: dict[str, Any] = {"kind": kind or SpanKind.INTERNAL, "context": parent, "attributes": attributes}
        with self._tracer.start_as_current_span(
            name,
            **options,
            record_exception=False,
            set_status_on_exception=False,  # a message may quote the post
        ) as span:
            headers: dict[str, str] = {}
            TraceContextTextMapPropagator().inject(headers)
            before = trace_headers.set(headers)
            try:
                yield span
            except BaseException as error:
                span.set_status(StatusCode.ERROR, type(error).__name__)
                raise
            finally:
                trace_headers.reset(before)


def prediction_attributes(prediction: Any) -> dict[str, Any]:
    """Label, entropy (0 to 1) and uncertainty of a prediction; nothing of anything else."""
    if not isinstance(prediction, Prediction) or not prediction.answered:
        return {}
    return {
        "label": prediction.label,
        "entropy": float(uncertainty(prediction.probabilities[None])[0]),
        "uncertainty": float(prediction.uncertainty),
    }


def _prefixed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"distill.{name}": value for name, value in attributes.items() if value is not None}

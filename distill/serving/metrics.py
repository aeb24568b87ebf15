"""Prometheus metrics of a gateway, in a registry of its own."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from distill.cascade.cascade import Decision
from distill.models.endpoint import Endpoint
from distill.serving.breaker import CircuitBreaker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_BREAKER = {"closed": 0, "half-open": 1, "open": 2}


class Metrics:
    """Counters, histograms and gauges of one gateway."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "distill_requests", "Requests answered, by route and status.", ("route", "status"), registry=registry
        )
        self._seconds = Histogram(
            "distill_request_seconds", "Seconds until a request was answered.", ("route",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge("distill_queue_depth", "Requests in flight.", registry=registry)
        self._posts = Counter("distill_posts", "Posts classified, by stage.", ("stage",), registry=registry)
        self._degraded = Counter(
            "distill_degraded", "Answers without a teacher that was needed, by reason.", ("reason",), registry=registry
        )
        self._calls = Counter("distill_teacher_calls", "Calls to the teacher.", registry=registry)
        self._share = Gauge("distill_teacher_share", "Calls to the teacher per classified post.", registry=registry)
        self._batches = Histogram(
            "distill_student_batch_size", "Batch sizes of the student, by kind of work.", ("question",),
            buckets=_SIZES, registry=registry,
        )  # fmt: skip
        self._batch_seconds = Summary(
            "distill_student_batch_seconds", "Seconds of the student's batches, by kind of work and batch size.",
            ("question", "size"), registry=registry,
        )  # fmt: skip
        self._breaker = Gauge(
            "distill_teacher_breaker", "Circuit breaker of the teacher: 0 closed, 1 half-open, 2 open.",
            registry=registry,
        )  # fmt: skip
        self._n_posts = self._n_calls = 0
        self._replicas = _Replicas()
        registry.register(self._replicas)

    def watch(self, breaker: CircuitBreaker | None) -> None:
        """Show the state of the teacher's circuit breaker; without a teacher it stays 0."""
        if breaker is not None:
            self._breaker.set_function(lambda: _BREAKER[breaker.state])

    def watch_endpoint(self, role: str, endpoint: Endpoint) -> None:
        """Show the state of the servers of an endpoint.

        Args:
            role: student or teacher.
        """
        self._replicas.endpoints[role] = endpoint

    def request(self, route: str, status: int, seconds: float) -> None:
        """Record one answered request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def decision(self, decision: Decision, teacher_calls: int) -> None:
        """Record one classified post. Must be called only from the thread of the event loop."""
        self._posts.labels(decision.stage).inc()
        if decision.degraded:
            self._degraded.labels(decision.reason).inc()
        self._calls.inc(teacher_calls)
        self._n_posts += 1
        self._n_calls += teacher_calls
        self._share.set(self._n_calls / self._n_posts)

    def batch(self, kind: str, size: int) -> None:
        """Record one batch of the student."""
        self._batches.labels(kind).observe(size)

    def batch_seconds(self, kind: str, size: int, seconds: float) -> None:
        """Record the time of one batch of the student."""
        self._batch_seconds.labels(kind, str(size)).observe(seconds)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _Replicas(Collector):
    """The servers of the endpoints, with the state that they have when the metrics are read."""

    def __init__(self) -> None:
        self.endpoints: dict[str, Endpoint] = {}

    def collect(self) -> Iterator[Metric]:
        names = ("role", "replica")
        up = GaugeMetricFamily(
            "distill_replica_up", "1: the server behind an endpoint answers; 0: its last request failed.", labels=names
        )
        in_flight = GaugeMetricFamily("distill_replica_in_flight", "Requests in flight to the server.", labels=names)
        requests = CounterMetricFamily(
            "distill_replica_requests", "Requests to the server, by result.", labels=(*names, "result")
        )
        for role, endpoint in self.endpoints.items():
            for state in endpoint.replicas:
                up.add_metric((role, state.url), state.healthy)
                in_flight.add_metric((role, state.url), state.in_flight)
                requests.add_metric((role, state.url, "answered"), state.answered)
                requests.add_metric((role, state.url, "failed"), state.failed)
        yield from (up, in_flight, requests)

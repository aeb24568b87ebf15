"""Prometheus metrics of a gateway, in a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest

from distill.cascade.cascade import Decision
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

    def watch(self, breaker: CircuitBreaker | None) -> None:
        """Show the state of the teacher's circuit breaker; without a teacher it stays 0."""
        if breaker is not None:
            self._breaker.set_function(lambda: _BREAKER[breaker.state])

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

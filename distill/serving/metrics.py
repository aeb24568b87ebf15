"""What Prometheus reads of a gateway: one registry of its own per application."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from distill.cascade.cascade import Decision

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


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
        self.in_flight = Gauge("distill_queue_depth", "Requests in the house.", registry=registry)
        self._posts = Counter("distill_posts", "Posts judged, by stage.", ("stage",), registry=registry)
        self._degraded = Counter(
            "distill_degraded", "Answers without a teacher that was wanted, by reason.", ("reason",), registry=registry
        )
        self._calls = Counter("distill_teacher_calls", "Questions to the teacher.", registry=registry)
        self._share = Gauge("distill_teacher_share", "Questions to the teacher per post judged.", registry=registry)
        self._batches = Histogram(
            "distill_student_batch_size", "Sizes of the student's batches, by what was asked.", ("question",),
            buckets=_SIZES, registry=registry,
        )  # fmt: skip
        self._judged = self._asked = 0

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def decision(self, decision: Decision) -> None:
        """Count one judged post. Only the event loop's thread may call this."""
        self._posts.labels(decision.stage).inc()
        if decision.degraded:
            self._degraded.labels(decision.reason).inc()
        self._calls.inc(decision.teacher_calls)
        self._judged += 1
        self._asked += decision.teacher_calls
        self._share.set(self._asked / self._judged)

    def batch(self, question: str, size: int) -> None:
        """Count one batch of the student."""
        self._batches.labels(question).observe(size)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)

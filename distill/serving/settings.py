"""Settings of `distill serve`. Importing them needs no web framework."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from distill.errors import SettingsError
from distill.models.endpoint import EndpointSettings
from distill.settings import Count, NonNegative, Range, Seconds, Settings, Variable

MARGIN_S = 0.5
"""Seconds of the deadline that are reserved for writing the response; at most a tenth of the deadline."""


@dataclass
class ReplicaSettings(Settings):
    """Replicas of the gateway on Ray Serve (`distill serve --engine ray`)."""

    min_replicas: Count = 1
    """Fewest replicas of the gateway. Each has the student, and a teacher that is not behind an endpoint."""
    max_replicas: Count = 4
    """Most replicas. Ray starts and ends replicas with the load."""
    target_requests: Count = 16
    """Requests in flight per replica that Ray aims at; the largest batch (`batch_size`) is a good value."""
    cpus: NonNegative = 1.0
    """CPUs that Ray reserves for each replica."""
    gpus: NonNegative = 0.0
    """GPUs of each replica, such as 1 or 0.5; 0: its models compute on the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_replicas < self.min_replicas:
            raise SettingsError(
                f"max_replicas is {self.max_replicas}; it takes min_replicas ({self.min_replicas}) or more"
            )


@dataclass
class ServeSettings(Settings):
    """The HTTP gateway of student and teacher."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all network interfaces."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port to listen on; 0: any free port."""
    api_key_env: Variable = ""
    """Environment variable with the bearer token that clients must send; empty: no token is required."""
    deadline_s: Seconds = 30.0
    """Seconds within which every request is answered; if the teacher exceeds them, the student's answer is returned."""
    header_timeout_s: Seconds = 10.0
    """Seconds within which a client must have sent the headers of its request; slower connections are closed."""
    breaker_failures: Count = 3
    """Number of deferred requests in a row that wait for the teacher in vain before it is suspended."""
    breaker_retry_s: Seconds = 30.0
    """Seconds until a suspended teacher receives one request again; meanwhile the student's answers are returned."""
    queue: Count = 64
    """Most requests in flight; further requests get status 429 with Retry-After."""
    batch_size: Count = 16
    """Largest batch of the student, and of a teacher in this process."""
    batch_wait_ms: Annotated[float, Range(0, 60_000)] = 5.0
    """Longest wait for a batch to fill, in milliseconds."""
    teacher_concurrency: Count = 8
    """Most requests in flight to a teacher behind an endpoint."""
    max_body_mb: Annotated[float, Range(0, 2000, above=True)] = 10.0
    """Largest request body, and largest file fetched from a URL, in megabytes."""
    max_text_tokens: Count = 2048
    """Longest post with its aspect, in tokens of the student."""
    image_hosts: list[str] = field(default_factory=list)
    """Hosts (host or host:port) from which images, videos and sounds may be fetched by http(s) URL; empty: none are."""
    max_new_tokens: Count = 512
    """Token limit of rationales, and of completions by the student alone."""
    rationale: bool = True
    """Generate rationales with the student; a request can turn them off."""
    explain: Literal["student", "teacher", "none"] = "student"
    """Who explains the label if the student's rationale is invalid or argues for another one: the student, the teacher
    with one more call, or nobody, and the rationale is null."""
    student: EndpointSettings | None = None
    """Endpoint that serves the student; null: the recipe's student runs in this process."""
    otlp_endpoint: str = ""
    """Address of an OpenTelemetry collector (OTLP over HTTP) that receives traces of the requests, such as
    http://localhost:4318; empty: there are no traces."""
    ray: ReplicaSettings = field(default_factory=ReplicaSettings)
    """Replicas of the gateway on Ray Serve (`distill serve --engine ray`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for host in self.image_hosts:
            if not re.fullmatch(r"[\w.-]+(:\d+)?", host):
                raise SettingsError(f"image_hosts names {host!r}; it takes host names such as images.example.org")

    @property
    def answer_s(self) -> float:
        """Seconds until the result must be available; the rest of the deadline is for writing the response."""
        return self.deadline_s - min(MARGIN_S, self.deadline_s / 10)


def endpoint_for_serving(settings: EndpointSettings, deadline_s: float) -> EndpointSettings:
    """Settings of an endpoint without retries and repeated samples, and with timeouts within the gateway's deadline.

    With replicas a request has a part of the deadline for each, so that one that hangs leaves time for the next.
    """
    return dataclasses.replace(
        settings,
        max_attempts=1,
        agreement_samples=1,
        timeout_s=min(settings.timeout_s, deadline_s / (1 + len(settings.replicas))),
        deadline_s=min(settings.deadline_s, deadline_s),
    )

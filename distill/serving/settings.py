"""How the pair is served. No web framework is needed to read these settings."""

import dataclasses
import re
from dataclasses import dataclass, field

from distill.errors import SettingsError
from distill.models.endpoint import EndpointSettings

MARGIN_S = 0.5
"""Longest part of a deadline that is kept for writing the answer; of short deadlines it is a tenth."""


@dataclass
class ServeSettings:
    """The gateway in front of student and teacher."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every network of the machine."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    api_key_env: str = ""
    """Environment variable that holds the bearer token asked of callers; empty: none is wanted."""
    deadline_s: float = 30.0
    """Seconds within which every request is answered, by the student alone where the teacher is late."""
    queue: int = 64
    """How many requests may be in the house at once; one more gets 429 and Retry-After."""
    batch_size: int = 16
    """Most requests that the student, or a teacher on this machine, answers in one batch."""
    batch_wait_ms: float = 5.0
    """Longest wait for a batch to fill, in milliseconds."""
    teacher_concurrency: int = 8
    """How many questions to a teacher behind an endpoint are in flight at once."""
    max_body_mb: float = 10.0
    """Largest body of a request, and largest picture fetched from a URL, in megabytes."""
    max_text_tokens: int = 2048
    """Longest post with its aspect, in tokens of the student."""
    image_hosts: list[str] = field(default_factory=list)
    """Hosts, as host or host:port, from which pictures may be fetched by http(s) URL; none unless named here."""
    max_new_tokens: int = 256
    """Token limit of the student's reasoning and of answers by the student alone."""
    rationale: bool = True
    """Whether the student reasons about posts; a request may do without."""
    student: EndpointSettings | None = None
    """The student behind an endpoint of its own; null: the recipe's student, in this process."""

    def __post_init__(self) -> None:
        for name in (
            "deadline_s", "queue", "batch_size", "teacher_concurrency", "max_body_mb", "max_text_tokens",
            "max_new_tokens",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it takes a number above 0")
        if not self.batch_wait_ms >= 0:
            raise SettingsError(f"batch_wait_ms is {self.batch_wait_ms}; it takes 0 or more")
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"port is {self.port}; it takes 0 to 65535")
        for host in self.image_hosts:
            if not re.fullmatch(r"[\w.-]+(:\d+)?", host):
                raise SettingsError(f"image_hosts names {host!r}; it takes host names such as images.example.org")

    @property
    def answer_s(self) -> float:
        """Seconds until an answer must be decided; the rest of the deadline is for writing it."""
        return self.deadline_s - min(MARGIN_S, self.deadline_s / 10)


def in_service(settings: EndpointSettings, deadline_s: float) -> EndpointSettings:
    """An endpoint as a gateway asks it: each question once, and given up when nobody can wait for it any more."""
    return dataclasses.replace(
        settings,
        max_attempts=1,
        agreement_samples=1,
        timeout_s=min(settings.timeout_s, deadline_s),
        deadline_s=min(settings.deadline_s, deadline_s),
    )

"""Settings of an OpenAI-compatible server."""

from dataclasses import dataclass
from typing import Annotated

from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url

from distill.errors import SettingsError
from distill.settings import Count, NonNegative, Range, Seconds, Settings, Variable


@dataclass
class EndpointSettings(Settings):
    """An OpenAI-compatible server."""

    base_url: str
    """URL of the server including the API version, for example http://localhost:8000/v1."""
    model: str
    """Model name on the server."""
    api_key_env: Variable = ""
    """Environment variable that holds the API key; empty if the server requires none."""
    concurrency: Count = 8
    """Maximum number of requests in flight."""
    timeout_s: Seconds = 120.0
    """Time limit of one request, in seconds."""
    deadline_s: Seconds = 600.0
    """Time limit of one answer including all retries, in seconds."""
    max_attempts: Count = 6
    """Maximum number of attempts per answer. Replies that say the server is overloaded do not count as attempts; only
    the deadline limits them."""
    backoff_s: Annotated[float, Range(0, 1_000_000)] = 1.0
    """Maximum delay before the first retry, in seconds; it doubles with each retry, up to one minute."""
    json_schema: bool = True
    """Request rationales with a JSON schema; disabled with a warning if the server does not support it."""
    top_logprobs: Annotated[int, Range(1, 20)] = 20
    """Number of log-probabilities requested for a classification; reduced if the server refuses."""
    agreement_samples: Count = 5
    """Answers sampled per classification if the server returns no log-probabilities; their agreement rate is the
    confidence. With 1 the confidence is unknown, so the cascade uses the polarity alone; in service it is always 1."""
    max_image_side: Count = 1024
    """Maximum length of the longer image side, in pixels; larger images are scaled down before they are sent."""
    prompt_price: NonNegative | None = None
    """Price per million prompt tokens, in any currency."""
    completion_price: NonNegative | None = None
    """Price per million completion tokens, in the same currency."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            url = parse_url(self.base_url)
        except LocationParseError:
            url = Url()
        if url.scheme not in ("http", "https") or not url.host or "@" in (url.request_uri or ""):
            if "@" in self.base_url:  # it may hold a password
                raise SettingsError("base_url is not an address; it takes an address such as http://localhost:8000/v1")
            raise SettingsError(f"base_url is {self.base_url!r}; it takes an address such as http://localhost:8000/v1")

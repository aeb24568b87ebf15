"""Settings of a server that speaks the OpenAI chat protocol."""

from dataclasses import dataclass

from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url

from distill.errors import SettingsError


@dataclass
class EndpointSettings:
    """A server that speaks the OpenAI chat protocol."""

    base_url: str
    """Address of the server up to its version, such as http://localhost:8000/v1."""
    model: str
    """Name of the model, as the server knows it."""
    api_key_env: str = ""
    """Environment variable that holds the key; empty: the server wants none."""
    concurrency: int = 8
    """How many questions are in flight at once."""
    timeout_s: float = 120.0
    """Seconds that one request may take."""
    deadline_s: float = 600.0
    """Seconds that one answer may take with all its retries."""
    max_attempts: int = 6
    """How often a request is sent before its answer is given up; not counting that the server has too much to do, for
    which the deadline alone is the limit."""
    backoff_s: float = 1.0
    """Longest wait before the first retry, in seconds; it doubles with each one, up to a minute."""
    json_schema: bool = True
    """Ask for rationales by JSON schema; dropped with a warning where the server cannot."""
    top_logprobs: int = 20
    """How many log-probabilities to ask for when classifying, 1 to 20; fewer or none where the server refuses."""
    agreement_samples: int = 5
    """Answers drawn for each classification where the server tells no log-probabilities; 1 tells nothing of how sure
    the model is, so that in the cascade only its polarity counts, and in service it is always 1."""
    max_image_side: int = 1024
    """Longest side of a picture as it is sent, in pixels; larger ones are scaled down."""
    prompt_price: float | None = None
    """Price of a million prompt tokens, in any currency."""
    completion_price: float | None = None
    """Price of a million completion tokens, in the same currency."""

    def __post_init__(self) -> None:
        try:
            url = parse_url(self.base_url)
        except LocationParseError:
            url = Url()
        if url.scheme not in ("http", "https") or not url.host:
            raise SettingsError(f"base_url is {self.base_url!r}; it takes an address such as http://localhost:8000/v1")
        for name in ("concurrency", "timeout_s", "deadline_s", "max_attempts", "agreement_samples", "max_image_side"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it takes a number above 0")
        if not 1 <= self.top_logprobs <= 20:
            raise SettingsError(f"top_logprobs is {self.top_logprobs}; it takes 1 to 20")

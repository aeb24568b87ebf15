"""Settings of an OpenAI-compatible server."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url

from distill.errors import SettingsError
from distill.masking import mask
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
    replicas: list[str] = field(default_factory=list)
    """URLs of further servers with the same model, in the form of base_url. Each request goes to the least busy one
    that is healthy; if that fails, to another one."""
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
    """Maximum length of the longer side of images and frames, in pixels; larger ones are scaled down before they are
    sent."""
    video: Literal["auto", "frames", "ignore"] = "auto"
    """How the sampled frames of a video are sent. `auto`: as a video, or as images with their times if the server takes
    no videos; `frames`: as images; `ignore`: not at all."""
    frames: Count | None = None
    """Maximum number of frames of a video that the endpoint is given; null: as many as `data.video` samples."""
    audio: Literal["auto", "ignore"] = "auto"
    """`auto`: the sound of posts is sent, and a server that does not take it is refused; `ignore`: it is not sent."""
    prompt_price: NonNegative | None = None
    """Price per million prompt tokens, in any currency."""
    completion_price: NonNegative | None = None
    """Price per million completion tokens, in the same currency."""
    ledger_by_address: bool = False
    """Use only answers in the ledger that came from this base_url. False: because servers move, answers of the same
    model name from another address are used as well, with a notice; never those of another endpoint of the recipe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_address("base_url", self.base_url)
        for position, url in enumerate(self.replicas):
            _check_address(f"replicas[{position}]", url)
            if url in (self.base_url, *self.replicas[:position]):
                raise SettingsError(f"replicas[{position}] is the address of another server of this endpoint")

    @property
    def address(self) -> str:
        """`base_url` without credentials, query and trailing slash."""
        url = parse_url(self.base_url)
        return Url(url.scheme, None, url.host, url.port, url.path).url.rstrip("/")

    @property
    def shown_url(self) -> str:
        """`base_url` for messages: passwords and keys are masked, because a message can reach clients and pages."""
        return str(mask(self.base_url)).rstrip("/")

    def url_of(self, route: str, *, beside_version: bool = False) -> str:
        """The URL of a route below `base_url`, with the query of `base_url` after that of the route.

        Args:
            beside_version: the route is next to `/v1` instead of below it.
        """
        url = parse_url(self.base_url)
        path, (route, _, query) = (url.path or "").rstrip("/"), route.partition("?")
        queries = "&".join(filter(None, (query, url.query))) or None
        path = (path.removesuffix("/v1") if beside_version else path) + route
        return url._replace(path=path, query=queries, fragment=None).url


def _check_address(name: str, address: str) -> None:
    """Raise SettingsError if the address in a field is none."""
    try:
        url = parse_url(address)
    except LocationParseError:
        url = Url()
    if url.scheme not in ("http", "https") or not url.host or "@" in (url.request_uri or ""):
        if "@" in address:  # it may hold a password
            raise SettingsError(f"{name} is not an address; it takes an address such as http://localhost:8000/v1")
        raise SettingsError(f"{name} is {address!r}; it takes an address such as http://localhost:8000/v1")


@dataclass
class BatchSettings(Settings):
    """Requests of a stage in batch files, which a service answers within hours and often at a lower price."""

    submit: Literal["api", "files"] = "api"
    """`api`: the files are uploaded to the endpoint's batch API; `files`: they are left in the run's folder, for vllm
    run-batch for example, and no server is asked."""
    rounds: Count = 3
    """Number of batches one after the other: explanations and retries need the answers before them, and requests that
    failed or expired are sent again. What is left is asked one by one."""
    poll_s: Seconds = 60.0
    """Seconds between two questions about the state of a batch."""
    window: str = "24h"
    """Time that the service is given for a batch (completion_window)."""
    max_requests: Count = 50_000
    """Maximum number of requests in a file."""
    max_mb: Annotated[float, Range(0, 1_000_000, above=True)] = 200.0
    """Maximum size of a file, in 1,000,000 bytes. A larger request is asked directly."""
    prompt_price: NonNegative | None = None
    """Price per million prompt tokens in a batch, in the currency of the endpoint's prices."""
    completion_price: NonNegative | None = None
    """Price per million completion tokens in a batch, in the same currency."""


def cost(prices: EndpointSettings | BatchSettings, prompt_tokens: float, completion_tokens: float) -> float | None:
    """Cost of tokens, in the currency of the prices; None without prices."""
    if prices.prompt_price is None and prices.completion_price is None:
        return None
    return (prompt_tokens * (prices.prompt_price or 0.0) + completion_tokens * (prices.completion_price or 0.0)) / 1e6

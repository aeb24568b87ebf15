"""HTTP connections: pools with the proxy and certificates of the environment, and reads with a deadline."""

import base64
import os
import ssl
import time
from collections.abc import Mapping
from contextvars import ContextVar
from functools import cache
from types import MappingProxyType
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

import certifi
import urllib3
from huggingface_hub import constants
from urllib3.exceptions import HTTPError
from urllib3.util import parse_url

from distill.errors import SettingsError
from distill.masking import MASK, mask

_CHUNK = 65_536  # bytes

trace_headers: ContextVar[Mapping[str, str]] = ContextVar("trace_headers", default=MappingProxyType({}))
"""The W3C trace context of the request in work, as headers of the requests that it makes."""


class BodyTooLarge(Exception):
    """A response body has more bytes than allowed."""


def connection_pool(url: str, connections: int) -> urllib3.PoolManager:
    """Create a thread-safe connection pool for `url`, without retries.

    The proxy is taken from the environment: `http_proxy`, `https_proxy` or `all_proxy`, unless `no_proxy` has the host.

    Args:
        connections: number of idle connections to keep.

    Raises:
        SettingsError: the proxy in the environment cannot be used.
    """
    target, proxies = parse_url(url), getproxies()
    address = f"{target.host}:{target.port}" if target.port else f"{target.host}"
    direct = proxy_bypass(address) or proxy_bypass((target.host or "").strip("[]"))
    proxy = None if direct else proxies.get(target.scheme or "", proxies.get("all"))
    context = _ssl_context()  # shared by all connections, because loading certificates is slow
    if proxy is None:
        return urllib3.PoolManager(maxsize=connections, retries=False, ssl_context=context)
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        headers = basic_auth("Proxy-Authorization", proxy)
        return urllib3.ProxyManager(
            proxy, proxy_headers=headers, maxsize=connections, retries=False, ssl_context=context
        )
    except HTTPError as error:
        raise SettingsError(f"{mask(url)}: the environment names a proxy that cannot be used: {error}") from error


def basic_auth(header: str, url: str) -> dict[str, str]:
    """The basic-auth header of the user and password in a URL; empty if it has none.

    Raises:
        SettingsError: the login or a key in the query was masked when the recipe was saved.
        urllib3.exceptions.LocationParseError: the URL is invalid.
    """
    auth, query = parse_url(url).auth, parse_url(url).query
    if query and f"={MASK}" in unquote(query):
        raise SettingsError(f"the key in {mask(url)} was masked when the recipe was saved; write it again")
    if auth and unquote(auth) == MASK:
        raise SettingsError(f"the login in {url} was masked when the recipe was saved; write user and password again")
    return {header: f"Basic {base64.b64encode(unquote(auth).encode()).decode()}"} if auth else {}


def read_body(response: urllib3.BaseHTTPResponse, deadline: float, max_bytes: int | None = None) -> bytes:
    """Read the body of a streamed response until a deadline.

    The deadline holds for the whole body, unlike a read timeout, which restarts with every chunk.

    Args:
        deadline: on the clock of `time.monotonic`.
        max_bytes: largest allowed body; None: no limit.

    Raises:
        TimeoutError: the body is not complete by the deadline.
        BodyTooLarge: the body has more than `max_bytes`.
        urllib3.exceptions.HTTPError: the connection fails.
    """
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        if max_bytes is not None and len(body) > max_bytes:
            raise BodyTooLarge
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(body)


@cache
def hub_reachable() -> bool:
    """Whether the model hub is reachable; checked once, because the hub's client retries each file for minutes."""
    try:
        connection_pool(constants.ENDPOINT, 1).request("HEAD", constants.ENDPOINT, timeout=5, redirect=False)
    except HTTPError:
        return False
    return True


def _ssl_context() -> ssl.SSLContext:
    """An SSL context with the certificates of SSL_CERT_FILE or SSL_CERT_DIR if set, otherwise of certifi."""
    if file := os.environ.get("SSL_CERT_FILE"):
        return ssl.create_default_context(cafile=file)
    if folder := os.environ.get("SSL_CERT_DIR"):
        return ssl.create_default_context(capath=folder)
    return ssl.create_default_context(cafile=certifi.where())

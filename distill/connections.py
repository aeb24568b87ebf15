"""HTTP connections: a pool that respects the environment's proxy and certificates, and reads with a deadline."""

import base64
import os
import ssl
import time
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

import certifi
import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util import parse_url

from distill.errors import SettingsError

_CHUNK = 65_536  # bytes


class BodyTooLarge(Exception):
    """A response body has more bytes than allowed."""


def connection_pool(url: str, connections: int) -> urllib3.PoolManager:
    """A thread-safe pool of connections for `url`, without retries, through the proxy that the environment names.

    Args:
        connections: number of idle connections to keep.

    Raises:
        SettingsError: the environment names a proxy that cannot be used.
    """
    target, proxies = parse_url(url), getproxies()
    address = f"{target.host}:{target.port}" if target.port else f"{target.host}"
    direct = proxy_bypass(address) or proxy_bypass((target.host or "").strip("[]"))
    proxy = None if direct else proxies.get(target.scheme or "", proxies.get("all"))
    context = _ssl_context()  # one for all connections: loading the certificates is slow
    if proxy is None:
        return urllib3.PoolManager(maxsize=connections, retries=False, ssl_context=context)
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        headers = basic_auth("Proxy-Authorization", proxy)
        return urllib3.ProxyManager(
            proxy, proxy_headers=headers, maxsize=connections, retries=False, ssl_context=context
        )
    except HTTPError as error:
        raise SettingsError(f"{url}: the environment names a proxy that cannot be used: {error}") from error


def basic_auth(header: str, url: str) -> dict[str, str]:
    """The header for the user and password in a URL; empty without them. Raises urllib3's LocationParseError."""
    auth = parse_url(url).auth
    return {header: f"Basic {base64.b64encode(unquote(auth).encode()).decode()}"} if auth else {}


def read_body(response: urllib3.BaseHTTPResponse, deadline: float, max_bytes: int | None = None) -> bytes:
    """The body of a streamed response, however slowly it arrives.

    Args:
        deadline: on the clock of `time.monotonic`.

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


def _ssl_context() -> ssl.SSLContext:
    """Certificates from SSL_CERT_FILE or SSL_CERT_DIR where set, otherwise from certifi."""
    if file := os.environ.get("SSL_CERT_FILE"):
        return ssl.create_default_context(cafile=file)
    if folder := os.environ.get("SSL_CERT_DIR"):
        return ssl.create_default_context(capath=folder)
    return ssl.create_default_context(cafile=certifi.where())

"""The HTTP client: API key, address, proxy, connections, and parsing of replies."""

import base64
import math
from pathlib import Path
from typing import Any

import pytest

from distill.errors import RunError, SettingsError
from distill.models.endpoint import EndpointSettings
from distill.task.sample import Sample
from tests.models.openai_server import Server, answers, endpoint, posts, rationale


def test_a_missing_key_variable_is_an_error_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with Server() as server:
        with pytest.raises(SettingsError, match="TEACHER_KEY"):
            endpoint(server.url, api_key_env="TEACHER_KEY")
        assert server.requests == 0


def test_a_key_with_invalid_characters_is_an_error_that_does_not_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "\u201csecret\u201d")  # pasted with typographic quotes
    with pytest.raises(SettingsError, match="TEACHER_KEY contains characters that are not valid") as caught:
        endpoint("http://127.0.0.1:9/v1", api_key_env="TEACHER_KEY")
    assert "secret" not in str(caught.value)


def test_an_expired_key_ends_the_run_and_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "expired")
    with Server(refuse=lambda body: (401, "expired")) as server:
        with pytest.raises(RunError, match="TEACHER_KEY") as caught:
            answers(endpoint(server.url, api_key_env="TEACHER_KEY"), posts(tmp_path, 20))
        assert server.requests <= 8
    assert "expired" not in str(caught.value)
    with Server(refuse=lambda body: (403, "no")) as server, pytest.raises(RunError, match="api_key_env"):
        answers(endpoint(server.url), posts(tmp_path, 1))


def test_an_unknown_model_ends_the_run(tmp_path: Path) -> None:
    with Server() as server:
        wrong_path = server.url.removesuffix("/v1")
        with pytest.raises(RunError, match="big-vl") as caught:
            answers(endpoint(wrong_path), posts(tmp_path, 1))
    assert wrong_path in str(caught.value)


def test_an_answer_cut_by_the_token_limit_is_unfinished(tmp_path: Path) -> None:
    with Server(rates={"truncated": 1.0}) as server:
        found = answers(endpoint(server.url), posts(tmp_path, 1))
    assert (found[0].finished, found[0].error) == (False, None)
    assert server.requests == 1


def test_connections_are_reused(tmp_path: Path) -> None:
    with Server() as server:
        teacher = endpoint(server.url, concurrency=4)
        assert all(answer.error is None for answer in answers(teacher, posts(tmp_path, 60)))
        assert server.connections <= 4
        teacher.close()
        assert answers(teacher, posts(tmp_path, 1))[0].error is None


def test_connections_closed_by_the_server_cost_no_attempt(tmp_path: Path) -> None:
    with Server(headers={"Connection": "close"}) as server:
        found = answers(endpoint(server.url, concurrency=1, max_attempts=1), posts(tmp_path, 5))
    assert [answer.error for answer in found] == [None] * 5
    assert (server.requests, server.connections) == (5, 5)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/v1", "Connection refused"),
        ("http://nowhere.invalid/v1", "resolve 'nowhere.invalid'"),
        ("https://127.0.0.1:{port}/v1", "SSL"),
    ],
)
def test_an_unreachable_server_gives_one_clear_message(tmp_path: Path, url: str, message: str) -> None:
    with Server() as server, pytest.raises(RunError, match=message) as caught:
        url = url.format(port=server.http.server_address[1])
        answers(endpoint(url, max_attempts=2), posts(tmp_path, 3))
    assert str(caught.value).startswith(f"no server answers at base_url {url}: ")
    assert "object at" not in str(caught.value)


def test_the_proxy_from_the_environment_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as proxy, Server() as server:
        monkeypatch.setenv("http_proxy", proxy.url.removeprefix("http://").removesuffix("/v1"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert answers(endpoint("http://teacher.invalid/v1"), posts(tmp_path, 3))[0].error is None
        assert answers(endpoint(server.url), posts(tmp_path, 2))[0].error is None
    assert (proxy.requests, server.requests) == (3, 2)
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:9")
    with pytest.raises(SettingsError, match=r"proxy that cannot be used.*socks5"):
        endpoint("http://teacher.invalid/v1")


def test_user_and_password_in_the_url_are_sent(tmp_path: Path) -> None:
    with Server() as server:
        answers(endpoint(server.url.replace("://", "://me:p%40ss@")), posts(tmp_path, 1))
    assert server.keys == ["Basic " + base64.b64encode(b"me:p@ss").decode()]


def test_the_query_of_the_address_follows_each_route(tmp_path: Path) -> None:
    settings = EndpointSettings("http://me:p@h:8/v1/?api-version=1#x", "m")
    assert settings.url_of("/chat/completions") == "http://me:p@h:8/v1/chat/completions?api-version=1"
    assert settings.url_of("/tokenize", beside_version=True) == "http://me:p@h:8/tokenize?api-version=1"
    with Server() as server:
        (answer,) = answers(endpoint(f"{server.url}?api-version=1"), posts(tmp_path, 1))
    assert answer.error is None


def test_no_proxy_accepts_host_and_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Server() as server:
        monkeypatch.setenv("no_proxy", f"127.0.0.1:{server.http.server_address[1]}")
        assert answers(endpoint(server.url), posts(tmp_path, 1))[0].error is None


def test_an_incomplete_reply_is_retried(tmp_path: Path) -> None:
    """An incomplete refusal must not count as a refusal."""
    with Server(refuse=lambda body: (400, "later") if server.requests == 1 else None) as server:
        server.broken_off = 1
        found = answers(endpoint(server.url, concurrency=1), posts(tmp_path, 1))
    assert (found[0].error, server.requests) == (None, 2)


def test_lone_surrogates_in_requests_and_replies(tmp_path: Path) -> None:
    with Server(answer=lambda request: rationale("neutral", "lone surrogate \ud83d")) as server:
        found = answers(endpoint(server.url), [Sample("s", "lone surrogate \ud83d")])
    assert found[0].error is None
    assert found[0].text.encode()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"base_url": "http://host:port/v1"}, "base_url"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout_s": math.nan}, "timeout_s"),
        ({"top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_invalid_settings(change: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingsError, match=field):
        EndpointSettings(**({"base_url": "http://localhost/v1", "model": "m"} | change))

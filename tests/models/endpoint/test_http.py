"""One request: the key, the address, and what is read in a reply."""

import base64
import math
from pathlib import Path
from typing import Any

import pytest

from distill.errors import RunError, SettingsError
from distill.models.endpoint import EndpointSettings
from distill.task.sample import Sample
from tests.models.openai_server import Server, answers, endpoint, posts, rationale


def test_a_missing_variable_is_refused_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with Server() as server:
        with pytest.raises(SettingsError, match="TEACHER_KEY"):
            endpoint(server.url, api_key_env="TEACHER_KEY")
        assert server.requests == 0


def test_a_key_with_strange_characters_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "\u201csecret\u201d")  # pasted with the quotes of a text
    with pytest.raises(SettingsError, match="TEACHER_KEY holds characters that no key has") as caught:
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


def test_a_cut_answer_is_unfinished(tmp_path: Path) -> None:
    with Server(rates={"truncated": 1.0}) as server:
        found = answers(endpoint(server.url), posts(tmp_path, 1))
    assert (found[0].finished, found[0].error) == (False, None)
    assert server.requests == 1


def test_connections_are_kept_for_later_questions(tmp_path: Path) -> None:
    with Server() as server:
        teacher = endpoint(server.url, concurrency=4)
        assert all(answer.error is None for answer in answers(teacher, posts(tmp_path, 60)))
        assert server.connections <= 4
        teacher.close()
        assert answers(teacher, posts(tmp_path, 1))[0].error is None


def test_a_connection_that_the_server_closed_meanwhile_costs_nothing(tmp_path: Path) -> None:
    with Server(headers={"Connection": "close"}) as server:
        found = answers(endpoint(server.url, concurrency=1, max_attempts=1), posts(tmp_path, 5))
    assert [answer.error for answer in found] == [None] * 5
    assert (server.requests, server.connections) == (5, 5)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:9/v1", "Connection refused"),
        ("http://nowhere.invalid/v1", "resolve 'nowhere.invalid'"),
        ("https://127.0.0.1:{port}/v1", "SSL"),
    ],
)
def test_where_there_is_no_server_one_sentence_says_so(tmp_path: Path, url: str, says: str) -> None:
    with Server() as server, pytest.raises(RunError, match=says) as caught:
        url = url.format(port=server.http.server_address[1])
        answers(endpoint(url, max_attempts=2), posts(tmp_path, 3))
    assert str(caught.value).startswith(f"no server answers at base_url {url}: ") and "object at" not in str(
        caught.value
    )


def test_the_proxy_of_the_environment_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as proxy, Server() as server:
        monkeypatch.setenv("http_proxy", proxy.url.removeprefix("http://").removesuffix("/v1"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert answers(endpoint("http://teacher.invalid/v1"), posts(tmp_path, 3))[0].error is None
        assert answers(endpoint(server.url), posts(tmp_path, 2))[0].error is None
    assert (proxy.requests, server.requests) == (3, 2)
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:9")
    with pytest.raises(SettingsError, match=r"proxy that cannot be used.*socks5"):
        endpoint("http://teacher.invalid/v1")


def test_a_login_in_the_address_is_sent(tmp_path: Path) -> None:
    with Server() as server:
        answers(endpoint(server.url.replace("://", "://me:p%40ss@")), posts(tmp_path, 1))
    assert server.keys == ["Basic " + base64.b64encode(b"me:p@ss").decode()]


def test_a_proxy_may_be_left_out_by_host_and_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Server() as server:
        monkeypatch.setenv("no_proxy", f"127.0.0.1:{server.http.server_address[1]}")
        assert answers(endpoint(server.url), posts(tmp_path, 1))[0].error is None


def test_a_reply_that_breaks_off_is_asked_for_again(tmp_path: Path) -> None:
    """A refusal without its end would pass for one of the question."""
    with Server(refuse=lambda body: (400, "later") if server.requests == 1 else None) as server:
        server.cut = 1
        found = answers(endpoint(server.url, concurrency=1), posts(tmp_path, 1))
    assert (found[0].error, server.requests) == (None, 2)


def test_hostile_text_in_both_directions(tmp_path: Path) -> None:
    with Server(answer=lambda question: rationale("neutral", "half a pair \ud83d")) as server:
        found = answers(endpoint(server.url), [Sample("s", "half a pair \ud83d")])
    assert found[0].error is None
    assert found[0].text.encode()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"base_url": "http://host:port/v1"}, "base_url"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout_s": math.nan}, "timeout_s"),
        ({"top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_impossible_settings(change: dict[str, Any], names: str) -> None:
    with pytest.raises(SettingsError, match=names):
        EndpointSettings(**({"base_url": "http://localhost/v1", "model": "m"} | change))

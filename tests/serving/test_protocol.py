"""The wire format: request parsing, error messages and streams."""

import json
from typing import Any

import pytest

from distill.models.local import Completion, Token
from distill.serving.protocol import (
    ChatRequest,
    RequestError,
    SentimentRequest,
    completion,
    logprobs,
    read,
    read_form,
    stream,
    usage,
)


def refused(kind: Any, content: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(kind, json.dumps(content).encode())
    assert caught.value.status == 400
    return caught.value


CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "a"}]}


def test_errors_name_the_path_of_the_field() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": 3}}]
    found = refused(ChatRequest, CHAT | {"messages": [{"role": "user", "content": parts}]})
    assert found.param == "messages.0.content.1.image_url.url" and "valid string" in found.message
    for messages, path in (
        ([{"role": "user", "content": {"text": "a"}}], "messages.0.content"),
        ([{"role": "user", "content": [None]}], "messages.0.content.0"),
        ([{"role": "user", "content": [{"text": "a"}]}], "messages.0.content.0"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
        ([None, CHAT["messages"][0]], "messages.0"),
    ):
        assert refused(ChatRequest, CHAT | {"messages": messages}).param == path
    found = refused(ChatRequest, {"messages": CHAT["messages"]})
    assert (found.param, found.message) == ("model", "model is required")
    found = refused(SentimentRequest, {"text": "a", "words": "b"})
    assert found.message == "words is not a field; the fields are text, image, video, audio, aspect, rationale"


def test_a_blank_image_is_no_image() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": " "}}]
    request = read(ChatRequest, json.dumps(CHAT | {"messages": [{"role": "user", "content": parts}]}).encode())
    assert (request.messages[0].text, request.messages[0].images) == ("a", [])


def test_a_message_has_one_line() -> None:
    assert RequestError(404, "a\nb is not a model").message == "a b is not a model"


def test_texts_and_images_of_a_message_keep_their_order() -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "data:1"}},
        {"type": "text", "text": "one"},
        {"type": "image_url", "image_url": {"url": "data:2"}},
        {"type": "text", "text": "two"},
    ]
    request = read(ChatRequest, json.dumps(CHAT | {"messages": [{"role": "user", "content": parts}]}).encode())
    assert request.messages[0].text == "one\ntwo" and request.messages[0].images == ["data:1", "data:2"]


def test_lone_surrogates_are_replaced_and_surrogate_pairs_are_kept() -> None:
    assert read(SentimentRequest, b'{"text": "a \\ud83d\\ude42 b \\ud83d c"}').text == "a \U0001f642 b ? c"


def test_max_completion_tokens_takes_precedence() -> None:
    assert read(ChatRequest, json.dumps(CHAT | {"max_tokens": 5, "max_completion_tokens": 7}).encode()).limit == 7


def test_log_probabilities_are_finite_and_exclude_the_end_token() -> None:
    tokens = (Token("né", -0.5, {"né": -0.5, "g": float("-inf")}), Token("<end>", -0.1, {}))
    found = logprobs(Completion("né", True, 3, 2, tokens), top=True)
    assert found["content"] == [
        {
            "token": "né",
            "logprob": -0.5,
            "bytes": [110, 195, 169],
            "top_logprobs": [
                {"token": "né", "logprob": -0.5, "bytes": [110, 195, 169]},
                {"token": "g", "logprob": -9999.0, "bytes": [103]},
            ],
        }
    ]
    cut = logprobs(Completion("né", False, 3, 1, tokens[:1]), top=False)
    assert len(cut["content"]) == 1 and cut["content"][0]["top_logprobs"] == []


def test_a_stream_contains_the_same_as_the_completion() -> None:
    whole = completion("m", "one two", "stop", usage(3, 2), extra={"distill": {"stage": "student"}})
    lines = "".join(stream(whole, [("one", None), (" two", None)], True)).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert {chunk["id"] for chunk in chunks} == {whole["id"]}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == "one two"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop" and chunks[-2]["distill"] == {"stage": "student"}
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
    without = "".join(stream(whole, [], False))
    assert "usage" not in without


def form(*parts: tuple[str, bytes], boundary: str = "edge") -> bytes:
    """A multipart body: the headers after `name`, and the content of each part."""
    marks = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; name={head}\r\n\r\n".encode() + data + b"\r\n"
        for head, data in parts
    )
    return marks + f"--{boundary}--\r\n".encode()


FORM = "multipart/form-data; boundary=edge"


def test_a_form_has_fields_and_files_byte_for_byte() -> None:
    data = bytes(range(256)) * 50 + b"\r\n--edg\r\n\r\r\n\n--\x00\xff\r"
    body = form(
        ('"text"', "Grüße\nzwei".encode()), ('"rationale"', b"false"), ('"video"; filename="ä.mp4"', data),
        ('"audio"; filename=""', b""), ('"image"', b"data:image/png;base64,AA"),
    )  # fmt: skip
    post, files = read_form(body, FORM)
    assert (post.text, post.rationale, post.image) == ("Grüße\nzwei", False, "data:image/png;base64,AA")
    assert files == {"video": data, "audio": b""}


@pytest.mark.parametrize(
    ("body", "kind", "expected"),
    [
        (b"", FORM, "not a valid form"),
        (b"hello", FORM, "not a valid form"),
        (b"\xff\x00" * 100, "multipart/form-data", "not a valid form"),
        (form(('"text"', b"a"), ('"text"', b"b")), FORM, "not a valid form"),
        (form(('"text"; x="\r\nContent-Type: multipart/mixed; boundary=q', b"--q\r\n\r\na\r\n--q--")), FORM, ""),
        (form(('"extra"', b"a")), FORM, "extra is not a field"),
        (form(('"text"; filename="a.txt"', b"a"), ('"rationale"', b"perhaps")), FORM, "rationale: "),
        (form(("", b"a")), FORM, "not a valid form"),
    ],
)
def test_a_form_that_is_none_is_refused(body: bytes, kind: str, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_form(body, kind)
    assert caught.value.status == 400 and expected in caught.value.message

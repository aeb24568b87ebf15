"""The gateway through the official client of the OpenAI API."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from distill.data.corpus import Corpus
from distill.models.local import Local
from distill.task.labels import LabelSpace
from distill.task.rationale import check
from distill.task.sample import NO_MEDIA
from tests.serving.conftest import message
from tests.serving.test_media import uri

LABELS = LabelSpace()


@pytest.fixture(scope="module")
def client(gateway: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_official_client_gets_an_answer(client: openai.OpenAI, postcards: Corpus) -> None:
    sample = postcards.test[0]
    content: Any = [
        {"type": "image_url", "image_url": {"url": uri(sample.images[0].read_bytes()), "detail": "low"}},
        {"type": "text", "text": sample.text},
    ]
    messages: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": content}]
    found = client.chat.completions.create(
        model="cascade", messages=messages, temperature=0.3, top_p=0.9, user="someone", n=1, max_tokens=100, seed=1
    )
    text, result = str(found.choices[0].message.content), found.model_extra["distill"]  # type: ignore[index]
    if result["rationale"]:
        assert check(text, LABELS).prediction == result["label"]
    else:
        assert text == f'"Prediction": {result["label"]}'
    assert set(result) >= {"stage", "uncertainty", "probabilities", "degraded", "teacher_calls"}
    assert found.choices[0].finish_reason == "stop"
    assert found.usage and found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens > 0


def test_the_official_client_streams(client: openai.OpenAI, postcards: Corpus) -> None:
    for model in ("cascade", "cascade-student"):
        for post in postcards.test:  # the first whose answer has a rationale
            messages: Any = [{"role": "user", "content": post.text}]
            whole = client.chat.completions.create(model=model, messages=messages, temperature=0)
            if "Text_analysis" in str(whole.choices[0].message.content):
                break
        chunks = list(
            client.chat.completions.create(
                model=model, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
            )
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 4
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == (
            whole.choices[0].finish_reason
        )
        assert chunks[-1].usage == whole.usage and not chunks[-1].choices
        assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_official_client_lists_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["cascade", "cascade-student"]


def test_a_model_is_described_by_its_name(client: openai.OpenAI, gateway: httpx.Client) -> None:
    assert client.models.retrieve("cascade-student") == client.models.list().data[1]
    for name in ("cascade-teacher", "org/model", "情感"):
        with pytest.raises(openai.NotFoundError, match="the models are cascade, cascade-student") as caught:
            client.models.retrieve(name)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert f"{name} is not a model" in message(gateway.get(f"/v1/models/{name}"), 404)


def test_the_official_client_recognises_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="cascade-student"):
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="empty") as caught:
        client.chat.completions.create(model="cascade", messages=[{"role": "user", "content": " "}])
    assert caught.value.param == "text"


def test_the_student_answers_verbatim_with_log_probabilities(
    client: openai.OpenAI, student: Local, postcards: Corpus
) -> None:
    prompt = postcards.test[0].text
    expected = student.chat([(prompt, NO_MEDIA)], logprobs=3)[0]
    found = client.chat.completions.create(
        model="cascade-student",
        messages=[{"role": "user", "content": prompt}],
        logprobs=True,
        top_logprobs=3,
        max_tokens=5,
        extra_body={"logprob_token_ids": [7, 9]},
    )
    assert found.choices[0].logprobs and found.choices[0].logprobs.content
    tokens = found.choices[0].logprobs.content
    assert [token.token for token in tokens] == [token.text for token in expected.tokens[: len(tokens)]]
    assert tokens[0].logprob == pytest.approx(expected.tokens[0].logprob, abs=1e-4)
    requested = {student.backbone.processor.tokenizer.decode([number]) for number in (7, 9)}
    assert requested <= {likely.token for likely in tokens[0].top_logprobs}
    sampled = [
        client.chat.completions.create(
            model="cascade-student", messages=[{"role": "user", "content": prompt}], temperature=2, seed=seed
        )
        for seed in (1, 1, 2)
    ]
    texts = [answer.choices[0].message.content for answer in sampled]
    assert texts[0] == texts[1] != texts[2]


def test_an_answer_can_be_sent_back_as_it_was_received(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    earlier = client.chat.completions.create(model="cascade", messages=messages).choices[0].message
    messages += [earlier.model_dump(), {"role": "user", "content": "So glad we came"}]
    assert client.chat.completions.create(model="cascade", messages=messages).choices[0].message.content

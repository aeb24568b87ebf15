"""`Local`: label scoring, generation and joint prefill, compared with separate forward passes and a plain loop."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from distill.models.backbone import Backbone
from distill.models.local import Local, normalise_labels
from distill.models.reasoner import Answer, ClassScores, JointReasoner, Reasoner, Sampling
from distill.task.labels import LabelSpace
from distill.task.prompts import EarlierAnswers
from distill.task.sample import Sample


def answers(reasoner: Local, samples: list[Sample], **sampling: Any) -> list[Answer]:
    found = list(reasoner.reason(samples, "reason", Sampling(**sampling)))
    assert [index for index, _ in found] == list(range(len(samples)))
    return [answer for _, answer in found]


def test_local_is_a_reasoner(backbone: Backbone) -> None:
    reasoner: Reasoner = Local(backbone, "student")
    assert reasoner.name == "student"


def test_label_scoring_is_the_softmax_over_the_labels_first_tokens(backbone: Backbone, posts: list[Sample]) -> None:
    scores = Local(backbone, "").classify(posts)
    for row, sample in enumerate(posts):
        features = backbone.encode([sample], "classify")
        with torch.inference_mode():
            logits = backbone.model(**features).logits[0, -1].double()
        unnormalised = torch.softmax(logits, -1)[backbone.label_ids].numpy()
        np.testing.assert_allclose(scores.probabilities[row], unnormalised / unnormalised.sum(), atol=1e-5)
        np.testing.assert_allclose(scores.label_mass[row], unnormalised.sum(), rtol=1e-3)


def test_normalised_labels_sum_to_one_and_keep_their_mass_in_half_precision() -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) * 5
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        probabilities, mass = normalise_labels(logits.to(dtype), torch.tensor([3, 500, 7]))
        assert probabilities.dtype == mass.dtype == torch.float32
        torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
        expected = torch.softmax(logits.double(), -1)[:, [3, 500, 7]]
        torch.testing.assert_close(mass.double(), expected.sum(1), rtol=tolerance, atol=0)


def test_results_do_not_depend_on_the_batch_size(make_backbone: Any, posts: list[Sample]) -> None:
    reasoners = [Local(make_backbone(batch_size=size), "") for size in (1, 3, 16)]
    scores = [reasoner.classify(posts).probabilities for reasoner in reasoners]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)
    np.testing.assert_allclose(scores[0], scores[2], atol=1e-6)
    texts = [answers(reasoner, posts, max_new_tokens=8) for reasoner in reasoners]
    assert texts[0] == texts[1] == texts[2]  # greedy: left padding has no effect


def test_no_samples_give_empty_scores_and_no_answers(backbone: Backbone) -> None:
    scores = Local(backbone, "").classify([])
    assert scores.probabilities.shape == (0, 3) and scores.label_mass.shape == (0,)
    assert answers(Local(backbone, ""), []) == []


def test_greedy_answers_equal_those_of_a_plain_loop(make_backbone: Any, posts: list[Sample]) -> None:
    """The loop computes each token with a full forward pass over the sequence so far, without a cache."""
    backbone = make_backbone(1)
    generated = answers(Local(backbone, ""), posts, max_new_tokens=10)
    for sample, answer in zip(posts[:5], generated, strict=False):
        features = backbone.encode([sample], "reason")
        prompt = features["input_ids"].shape[1]
        for _ in range(10):
            with torch.inference_mode():
                token = backbone.model(**features).logits[:, -1:].argmax(-1)
            if int(token) == backbone.processor.tokenizer.eos_token_id:
                break
            features["input_ids"] = torch.cat([features["input_ids"], token], 1)
            features["attention_mask"] = torch.cat([features["attention_mask"], torch.ones_like(token)], 1)
            features["mm_token_type_ids"] = torch.cat([features["mm_token_type_ids"], torch.zeros_like(token)], 1)
        generated_ids = features["input_ids"][0, prompt:]
        assert answer.text == backbone.processor.tokenizer.decode(generated_ids, skip_special_tokens=True)
        assert answer.prompt_tokens == prompt


def ending_at(backbone: Backbone, length: int) -> Backbone:
    """The same model, patched to generate its end token as token number `length`."""
    generate = backbone.model.generate

    class Ending:
        def __getattr__(self, name: str) -> Any:
            return getattr(backbone.model, name)

        def generate(self, **options: Any) -> list[list[int]]:
            end = options["eos_token_id"][0]
            found = generate(**options)  # type: ignore[operator]
            return [[*tokens[: length - 1], end] if len(tokens) >= length else tokens for tokens in found]

    copy = Backbone.__new__(Backbone)
    copy.__dict__ |= backbone.__dict__ | {"model": Ending()}
    return copy


def test_finished_is_true_for_an_end_token_and_false_at_the_token_limit(
    backbone: Backbone, posts: list[Sample]
) -> None:
    for limit, finished, tokens in ((4, False, 4), (5, True, 5), (9, True, 5)):
        for answer in answers(Local(ending_at(backbone, 5), ""), posts, max_new_tokens=limit):
            assert (answer.finished, answer.completion_tokens) == (finished, tokens)
            assert "<|" not in answer.text


def test_end_tokens_of_the_generation_config_end_an_answer(make_backbone: Any, posts: list[Sample]) -> None:
    model = make_backbone()
    first = answers(Local(model, ""), posts[:1], max_new_tokens=6)[0]
    features = model.encode(posts[:1], "reason")
    third = model.model.generate(**features, max_new_tokens=3, do_sample=False)[0, -1]
    model.model.generation_config.eos_token_id = [2, int(third)]
    stopped = answers(Local(model, ""), posts[:1], max_new_tokens=6)[0]
    assert not first.finished and stopped.finished and stopped.completion_tokens <= 3
    assert first.text.startswith(stopped.text)


def test_sampling_settings_of_the_generation_config_are_overridden(make_backbone: Any, posts: list[Sample]) -> None:
    plain, tuned = make_backbone(), make_backbone()
    tuned.model.generation_config.update(do_sample=True, temperature=1e-6, top_k=1, top_p=0.001, repetition_penalty=5.0)
    for temperature in (0.0, 0.9):
        texts = [
            [a.text for a in answers(Local(model, ""), posts, temperature=temperature, max_new_tokens=12)]
            for model in (plain, tuned)
        ]
        assert texts[0] == texts[1]


def test_a_temperature_close_to_zero_is_greedy(backbone: Backbone, posts: list[Sample]) -> None:
    temperatures = (0.0, 1e-300, 1e-30)
    greedy, *close = (answers(Local(backbone, ""), posts, temperature=t, max_new_tokens=8) for t in temperatures)
    assert close == [greedy, greedy]
    assert len(answers(Local(backbone, ""), posts, temperature=1e-4, max_new_tokens=8)) == len(posts)


def test_sampling_is_reproducible_and_depends_on_seed_and_attempt(backbone: Backbone, posts: list[Sample]) -> None:
    reasoner = Local(backbone, "")
    options = {"temperature": 0.9, "max_new_tokens": 8}
    one, two = answers(reasoner, posts, **options), answers(reasoner, posts, **options)
    assert one == two
    others = [answers(reasoner, posts, **options, attempt=1), answers(reasoner, posts, **options, seed=43)]
    assert one != others[0] and one != others[1] and others[0] != others[1]


def test_repeated_posts_are_sampled_independently(make_backbone: Any, posts: list[Sample]) -> None:
    sampled = answers(Local(make_backbone(batch_size=1), ""), posts[:1] * 4, temperature=0.9, max_new_tokens=8)
    assert len({answer.text for answer in sampled}) == 4


def test_generation_and_the_callers_random_state_are_independent(make_backbone: Any, posts: list[Sample]) -> None:
    reasoner = Local(make_backbone(batch_size=2), "")
    sampling = Sampling(temperature=0.9, max_new_tokens=6)
    expected = answers(reasoner, posts, temperature=0.9, max_new_tokens=6)
    torch.manual_seed(5)
    numbers = torch.rand(len(posts))
    torch.manual_seed(5)
    found, between = [], []
    for _, answer in reasoner.reason(posts, "reason", sampling):
        found.append(answer)
        between.append(torch.rand(1))
    assert found == expected
    assert torch.equal(torch.cat(between), numbers)


def test_answers_are_generated_batch_by_batch(make_backbone: Any, posts: list[Sample]) -> None:
    model = make_backbone(batch_size=2)
    calls = []
    encode = model.encode
    model.encode = lambda *args, **options: calls.append(1) or encode(*args, **options)
    stream = Local(model, "").reason(posts, "reason", Sampling(max_new_tokens=2))
    next(stream)
    assert len(calls) == 1


def test_costs_are_tokens_per_sample_and_an_equal_share_of_the_batch_time(
    make_backbone: Any, posts: list[Sample]
) -> None:
    model = make_backbone(batch_size=3)
    costs = Local(model, "").classify(posts).costs
    lengths = [model.encode([sample], "classify")["input_ids"].shape[1] for sample in posts]
    assert [(cost.calls, cost.prompt_tokens, cost.completion_tokens) for cost in costs] == [(1, n, 0) for n in lengths]
    seconds = [cost.seconds for cost in costs]
    assert min(seconds) > 0 and seconds[0] == seconds[2] and seconds[3] == seconds[5] != seconds[6]
    answer = answers(Local(model, ""), posts[:1], max_new_tokens=3)[0]
    assert answer.cost.seconds > 0 and answer.cost.calls == 1


def test_each_review_uses_its_own_earlier_answers_in_all_batches(make_backbone: Any, posts: list[Sample]) -> None:
    earlier = [EarlierAnswers("negative", i / 10, "positive", 1 - i / 10) for i in range(len(posts))]
    found = [Local(make_backbone(batch_size=size), "").classify(posts, earlier).probabilities for size in (1, 3, 16)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    np.testing.assert_allclose(found[0], found[2], atol=1e-6)
    other = Local(make_backbone(), "").classify(posts, earlier[::-1]).probabilities
    assert (abs(found[0] - other).max(1)[[0, 1, 2, 4, 5, 6]] > 1e-6).all()  # the middle one is its own reverse
    assert abs(found[0] - Local(make_backbone(), "").classify(posts).probabilities).max() > 1e-4


# ---- joint prefill ----


def joint(reasoner: Local, samples: list[Sample], sampling: Sampling) -> tuple[ClassScores, list[Answer]]:
    found = list(reasoner.classify_and_reason(samples, "reason", sampling))
    assert [index for index, *_ in found] == list(range(len(samples)))
    return ClassScores.concatenate([scores for _, scores, _ in found]), [answer for *_, answer in found]


def assert_joint_equals_separate(reasoner: Local, samples: list[Sample], sampling: Sampling) -> None:
    scores, found = joint(reasoner, samples, sampling)
    expected = reasoner.classify(samples)
    np.testing.assert_allclose(scores.probabilities, expected.probabilities, atol=1e-5)
    np.testing.assert_allclose(scores.label_mass, expected.label_mass, rtol=1e-3)
    assert [cost.prompt_tokens for cost in scores.costs] == [cost.prompt_tokens for cost in expected.costs]
    separate = answers(reasoner, samples, **vars(sampling))
    assert [(a.text, a.finished, a.completion_tokens) for a in found] == [
        (a.text, a.finished, a.completion_tokens) for a in separate
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_joint_prefill_gives_the_results_of_separate_calls(
    make_backbone: Any, posts: list[Sample], temperature: float
) -> None:
    """Same tokens, also with sampling; in batches of three, one of them without any image."""
    without_images = [replace(sample, images=()) for sample in posts[:3]]
    reasoner = Local(make_backbone(1, batch_size=3), "")
    assert_joint_equals_separate(
        reasoner, [*posts[:6], *without_images, posts[6]], Sampling(temperature, 12, attempt=1)
    )
    assert isinstance(reasoner, JointReasoner) and reasoner._joint_prefill


def test_costs_of_a_joint_prefill_count_each_token_once(make_backbone: Any, posts: list[Sample]) -> None:
    reasoner = Local(make_backbone(batch_size=4), "")
    scores, found = joint(reasoner, posts, Sampling(max_new_tokens=3))
    separate = answers(reasoner, posts, max_new_tokens=3)
    for cost, answer, other in zip(scores.costs, found, separate, strict=True):
        assert 0 < answer.prompt_tokens < 0.5 * other.prompt_tokens
        assert cost.calls == answer.calls == 1 and cost.seconds > 0 and answer.seconds > 0
    assert len({answer.prompt_tokens for answer in found}) == 1  # the second prompt has the same suffix for all samples


def test_classify_and_reason_with_no_samples_and_with_a_scored_template(
    backbone: Backbone, posts: list[Sample]
) -> None:
    reasoner = Local(backbone, "")
    assert list(reasoner.classify_and_reason([])) == []
    found = list(reasoner.classify_and_reason(posts[:2], "classify", Sampling(max_new_tokens=2)))
    expected = [answer for _, answer in reasoner.reason(posts[:2], "classify", Sampling(max_new_tokens=2))]
    assert [answer for *_, answer in found] == expected


class IgnoresMask(Backbone):
    """A model that ignores part of the mask: each branch attends to the branches before it."""

    def hidden_states(self, inputs: Any, cache: Any = None) -> torch.Tensor:
        if "ends" in inputs:
            inputs = inputs | {"ends": torch.full_like(inputs["ends"], inputs["ends"].shape[1])}
        return super().hidden_states(inputs, cache)


def unsupported(kind: str, backbone: Backbone) -> Backbone:
    """A model that does not support a joint prefill."""
    settings = backbone.settings
    if kind == "flash":  # the kernel is not needed: only the setting is checked
        settings = replace(settings, attention="flash_attention_2")
    elif kind == "images after text":
        template = backbone.processor.chat_template
        backbone.processor.chat_template = template.replace(
            "{% for part in message['content'] %}", "{% for part in message['content'] | reverse %}"
        )
        assert backbone.processor.chat_template != template
    elif kind == "sliding window":
        text = backbone.model.config.text_config
        text.sliding_window, text.layer_types = 4096, ["sliding_attention"] * text.num_hidden_layers
        backbone.model.model.language_model.has_sliding_layers = True  # type: ignore[union-attr]
    else:
        with torch.no_grad():
            for weights in backbone.model.parameters():
                weights.mul_(3)  # amplifies the effect of attention
    return (IgnoresMask if kind == "ignores mask" else Backbone)(
        backbone.model, backbone.processor, LabelSpace(), settings
    )


@pytest.mark.parametrize("kind", ["flash", "images after text", "sliding window", "ignores mask"])
def test_unsupported_models_fall_back_to_separate_calls(make_backbone: Any, posts: list[Sample], kind: str) -> None:
    reasoner = Local(unsupported(kind, make_backbone(2, batch_size=3)), "")
    assert_joint_equals_separate(reasoner, posts[:4], Sampling(max_new_tokens=6))
    assert reasoner._joint_prefill is False

"""Packed sequences: the token tree, and the model's outputs compared with separate sequences."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.data.corpus import Corpus
from distill.errors import SettingsError
from distill.models.backbone import Backbone, LoraSettings, ModelSettings, create
from distill.models.encoding import PromptWithAnswers
from distill.models.packing import Packed, build_tree_row, pad_rows, shared_prefix_length, tree_mask
from distill.task.labels import LabelSpace
from distill.task.prompts import Template, render
from distill.task.sample import Sample
from tests.models.test_backbone import build_idefics3, build_llava

TASKS: tuple[Template, ...] = ("reason", "classify", "predict")


def test_a_row_is_in_depth_first_order() -> None:
    row = build_tree_row([([1, 2, 3], [[4, 5, 9], [6, 9]]), ([1, 2, 7, 8], [[9]])])
    assert row.tokens == [1, 2, 3, 4, 5, 6, 7, 8]
    assert row.ends == [8, 8, 6, 5, 5, 6, 8, 8]
    assert row.depths == [0, 1, 2, 3, 4, 3, 2, 3]
    assert row.predictions == [[(2, 4), (3, 5), (4, 9)], [(2, 6), (5, 9)], [(7, 9)]]
    assert row.branches


def test_one_prompt_with_one_answer_is_a_plain_sequence() -> None:
    row = build_tree_row([([1, 2], [[3, 9]])])
    assert (row.tokens, row.depths, row.branches) == ([1, 2, 3], [0, 1, 2], False)
    assert row.predictions == [[(1, 3), (2, 9)]]
    assert build_tree_row([([], [[3, 9], [4, 9]])]).predictions == [[(-1, 3), (0, 9)], [(-1, 4), (1, 9)]]


def test_answers_and_prompts_with_the_same_beginning_share_its_columns() -> None:
    """Two posts with a common first token; the answers to the second begin alike, as -3 and -2 do."""
    row = build_tree_row([([1, 2], [[5, 9]]), ([1, 3], [[6, 7, 9], [6, 8, 9], [9]])])
    assert row.tokens == [1, 2, 5, 3, 6, 7, 8]
    assert row.ends == [7, 3, 3, 7, 7, 6, 7]
    assert row.depths == [0, 1, 2, 1, 2, 3, 3]
    assert row.predictions == [[(1, 5), (2, 9)], [(3, 6), (4, 7), (5, 9)], [(3, 6), (4, 8), (6, 9)], [(3, 9)]]


def test_a_column_attends_to_its_own_path_and_padding_to_itself() -> None:
    rows = [build_tree_row([([1, 2, 3], [[4, 9]]), ([1, 2, 5], [[6, 9]])]), build_tree_row([([1], [[2, 9]])])]
    mask = tree_mask(pad_rows([row.ends for row in rows]))[:, 0]
    assert [row.nonzero().flatten().tolist() for row in mask[0]] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5],
    ]  # fmt: skip
    assert [row.nonzero().flatten().tolist() for row in mask[1]] == [[0], [0, 1], [2], [3], [4], [5]]


def test_shared_prefix_length() -> None:
    assert shared_prefix_length([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == 2
    assert shared_prefix_length([[1, 2]]) == 2
    assert shared_prefix_length([[1], [2]]) == 0


# ---- the model ----


@pytest.fixture
def posts(postcards: Corpus) -> list[Sample]:
    """A long post, a short one, one with two images, one without images."""
    long, short, two, bare = postcards.train[:4]
    return [
        replace(long, text=long.text * 4),
        short,
        replace(two, images=(two.images[0], short.images[0])),
        replace(bare, images=()),
    ]


def prompts(backbone: Backbone, sample: Sample) -> list[PromptWithAnswers]:
    """Three prompts with one answer each, and one with a forced prefix and several answers."""
    single = [
        PromptWithAnswers(
            (render(task, sample, backbone.labels), sample.media), [], [backbone.answer_tokens(f"{task} so")]
        )
        for task in TASKS
    ]
    prefix = backbone.encoder.tokens('"Prediction":')
    return [*single, single[1]._replace(prefix=prefix, answers=backbone.label_tokens)]


def log_probabilities(backbone: Backbone, packed: Packed) -> torch.Tensor:
    hidden = backbone.hidden_states(packed.inputs).flatten(0, 1)[packed.columns]
    return (hidden @ backbone.head.T).log_softmax(-1)[torch.arange(len(packed.tokens)), packed.tokens]


def separate(backbone: Backbone, item: PromptWithAnswers, answer: list[int]) -> torch.Tensor:
    """Log-probabilities of the tokens of an answer in a separate sequence, from the model's own forward pass."""
    features = backbone.encoder.encode([item.prompt], [[*item.prefix, *answer]])
    with torch.no_grad():
        logits = backbone.model(**features).logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]


@pytest.fixture(params=["qwen", "eager", "left", "lora", "llava", "idefics3"])
def made(request: pytest.FixtureRequest, make_backbone: Any, model_folder: Path, tmp_path: Path) -> Backbone:
    """Qwen2.5-VL in four configurations, and two other architectures."""
    if request.param in ("llava", "idefics3"):
        tokenizer = make_backbone().processor.tokenizer
        (build_llava if request.param == "llava" else build_idefics3)(tmp_path / "other", tokenizer)
        return create(ModelSettings(path=str(tmp_path / "other"), image_size=56), LabelSpace(), tmp_path, train=False)
    attention: Any = "eager" if request.param == "eager" else "sdpa"
    lora = LoraSettings(r=4) if request.param == "lora" else None
    settings = ModelSettings(path=str(model_folder), image_size=56, attention=attention, lora=lora)
    backbone = create(settings, LabelSpace(), tmp_path)
    if request.param == "lora":
        for name, weights in backbone.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weights, std=0.2)
    backbone.processor.tokenizer.padding_side = "left" if request.param == "left" else "right"
    backbone.model.eval()
    return backbone


def test_packed_answers_have_the_log_probabilities_of_separate_sequences(made: Backbone, posts: list[Sample]) -> None:
    posts = posts[:2] if made.settings.path.endswith("other") else posts  # one image count per batch
    rows = [prompts(made, sample) for sample in posts]
    packed = made.pack(rows)
    with torch.no_grad():
        found = log_probabilities(made, packed)
    expected = [separate(made, item, list(answer)) for row in rows for item in row for answer in item.answers]
    assert packed.answers.tolist() == [index for index, part in enumerate(expected) for _ in part]
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-6)


def test_gradients_are_those_of_separate_sequences(make_backbone: Any, posts: list[Sample]) -> None:
    backbone = make_backbone(1)
    rows = [prompts(backbone, sample) for sample in posts]
    log_probabilities(backbone, backbone.pack(rows)).sum().backward()
    packed = [weights.grad.clone() for weights in backbone.model.parameters()]
    backbone.model.zero_grad()
    for row in rows:
        for item in row:
            for answer in item.answers:
                log_probabilities(backbone, backbone.pack([[item._replace(answers=[answer])]])).sum().backward()
    for found, weights in zip(packed, backbone.model.parameters(), strict=True):
        torch.testing.assert_close(found, weights.grad, atol=2e-3, rtol=1e-3)
    assert max(float(gradient.abs().max()) for gradient in packed) > 1


def test_a_row_contains_images_and_the_common_prefix_once(backbone: Backbone, posts: list[Sample]) -> None:
    row = prompts(backbone, posts[0])
    packed = backbone.pack([row])
    each = [backbone.pack([[item]]) for item in row]
    assert torch.equal(packed.inputs["pixel_values"], each[0].inputs["pixel_values"])
    image = backbone.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert int((packed.inputs["input_ids"] == image).sum()) == int((each[0].inputs["input_ids"] == image).sum()) == 4
    ids = packed.inputs["input_ids"][0].tolist()
    assert backbone.processor.tokenizer.decode(ids).count(posts[0].text) == 1
    assert len(ids) < 0.6 * sum(part.inputs["input_ids"].shape[1] for part in each)


def test_rows_without_branches_use_a_padding_mask(backbone: Backbone, posts: list[Sample]) -> None:
    packed = backbone.pack([[prompts(backbone, sample)[0]] for sample in posts])
    assert "ends" not in packed.inputs and "position_ids" not in packed.inputs
    lengths = [len(backbone.pack([[prompts(backbone, sample)[0]]]).inputs["input_ids"][0]) for sample in posts]
    assert packed.inputs["attention_mask"].sum(1).tolist() == lengths
    assert packed.inputs["attention_mask"].shape == packed.inputs["mm_token_type_ids"].shape


def test_a_chat_template_with_images_after_the_text_is_rejected(make_backbone: Any, posts: list[Sample]) -> None:
    backbone = make_backbone()
    template = backbone.processor.chat_template
    backbone.processor.chat_template = template.replace(
        "{% for part in message['content'] %}", "{% for part in message['content'] | reverse %}"
    )
    try:
        with pytest.raises(SettingsError, match="packing: the chat template places images after the text"):
            backbone.pack([prompts(backbone, posts[0])])
    finally:
        backbone.processor.chat_template = template


def test_rows_without_images_are_joined_up_to_a_width(make_backbone: Any, posts: list[Sample]) -> None:
    """Their log-probabilities and gradients stay those of separate rows; their order stays too."""
    backbone = make_backbone(1)
    bare = [replace(post, id=str(index), images=(), text=f"{index} {post.text}") for index, post in enumerate(posts)]
    rows = [prompts(backbone, sample) for sample in [*bare, posts[1], bare[1], bare[2]]]

    def run(width: int) -> tuple[Packed, torch.Tensor, list[torch.Tensor]]:
        backbone.model.zero_grad()
        packed = backbone.pack(rows, width)
        found = log_probabilities(backbone, packed)
        (found * torch.arange(len(found))).mean().backward()
        return packed, found.detach(), [w.grad.clone() for w in backbone.model.parameters() if w.grad is not None]

    (apart, expected, gradients), (joined, found, found_gradients) = run(0), run(10**4)
    assert len(apart.inputs["input_ids"]) == 7 and len(joined.inputs["input_ids"]) == 3, "four, one with an image, two"
    assert joined.inputs["ends"][0, 0] < apart.inputs["ends"][:4, 0].sum()
    assert torch.equal(joined.tokens, apart.tokens) and torch.equal(joined.answers, apart.answers)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-6)
    for one, other in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    lengths = apart.inputs["ends"][:, 0].tolist()
    narrow = backbone.pack(rows, lengths[0] + lengths[1]).inputs["ends"][:, 0]
    assert 3 < len(narrow) < 7 and max(narrow.tolist()) <= max(lengths[0] + lengths[1], *lengths)

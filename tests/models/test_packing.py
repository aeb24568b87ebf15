"""Packed sequences: the layout against a plain reading of the tree, and the model against every path on its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.data.corpus import Corpus
from distill.errors import SettingsError
from distill.models.backbone import Backbone, LoraSettings, ModelSettings, create
from distill.models.encoding import Question
from distill.models.packing import Packed, lay_out, pad_rows, shared_length, tree_mask
from distill.task.labels import LabelSpace
from distill.task.prompts import Template, render
from distill.task.sample import Sample
from tests.models.test_backbone import build_idefics3, build_llava

TASKS: tuple[Template, ...] = ("reason", "classify", "predict")


def test_a_row_is_laid_out_depth_first() -> None:
    row = lay_out([1, 2], [([3], [[4, 5, 9], [6, 9]]), ([7, 8], [[9]])])
    assert row.tokens == [1, 2, 3, 4, 5, 6, 7, 8]
    assert row.ends == [8, 8, 6, 5, 5, 6, 8, 8]
    assert row.depths == [0, 1, 2, 3, 4, 3, 2, 3]
    assert row.predictions == [[(2, 4), (3, 5), (4, 9)], [(2, 6), (5, 9)], [(7, 9)]]
    assert row.branches


def test_one_question_with_one_answer_is_a_plain_sequence() -> None:
    row = lay_out([1, 2], [([], [[3, 9]])])
    assert (row.tokens, row.depths, row.branches) == ([1, 2, 3], [0, 1, 2], False)
    assert row.predictions == [[(1, 3), (2, 9)]]
    assert lay_out([], [([], [[3, 9], [4, 9]])]).predictions == [[(-1, 3), (0, 9)], [(-1, 4), (1, 9)]]


def test_a_column_sees_its_own_path_and_padding_sees_itself() -> None:
    rows = [lay_out([1, 2], [([3], [[4, 9]]), ([5], [[6, 9]])]), lay_out([1], [([], [[2, 9]])])]
    mask = tree_mask(pad_rows([row.ends for row in rows]))[:, 0]
    assert [row.nonzero().flatten().tolist() for row in mask[0]] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5],
    ]  # fmt: skip
    assert [row.nonzero().flatten().tolist() for row in mask[1]] == [[0], [0, 1], [2], [3], [4], [5]]


def test_what_sequences_begin_with() -> None:
    assert shared_length([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == 2
    assert shared_length([[1, 2]]) == 2
    assert shared_length([[1], [2]]) == 0


# ---- the model ----


@pytest.fixture
def posts(postcards: Corpus) -> list[Sample]:
    """A long post, a short one, one with two pictures, one without any."""
    long, short, two, bare = postcards.train[:4]
    return [
        replace(long, text=long.text * 4),
        short,
        replace(two, images=(two.images[0], short.images[0])),
        replace(bare, images=()),
    ]


def asked(backbone: Backbone, sample: Sample) -> list[Question]:
    """Questions with one answer each, and one with several behind its closing."""
    found = [
        Question((render(task, sample, backbone.labels), sample.images), [], [backbone.answer_tokens(f"{task} so")])
        for task in TASKS
    ]
    closing = backbone.encoder.tokens('"Prediction":')
    return [*found, found[1]._replace(closing=closing, answers=backbone.label_tokens)]


def log_probabilities(backbone: Backbone, packed: Packed) -> torch.Tensor:
    hidden = backbone.hidden_states(packed.inputs).flatten(0, 1)[packed.columns]
    return (hidden @ backbone.head.T).log_softmax(-1)[torch.arange(len(packed.tokens)), packed.tokens]


def alone(backbone: Backbone, question: Question, answer: list[int]) -> torch.Tensor:
    """The same answer in a sequence of its own, through the model's own forward pass."""
    features = backbone.encoder.encode([question.prompt], [[*question.closing, *answer]])
    with torch.no_grad():
        logits = backbone.model(**features).logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]


@pytest.fixture(params=["qwen", "eager", "left", "lora", "llava", "idefics3"])
def made(request: pytest.FixtureRequest, make_backbone: Any, model_folder: Path, tmp_path: Path) -> Backbone:
    """The house's own architecture in four ways, and two others."""
    if request.param in ("llava", "idefics3"):
        words = make_backbone().processor.tokenizer
        (build_llava if request.param == "llava" else build_idefics3)(tmp_path / "other", words)
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


def test_every_answer_is_what_it_would_be_in_a_sequence_of_its_own(made: Backbone, posts: list[Sample]) -> None:
    posts = posts[:2] if made.settings.path.endswith("other") else posts  # which take as many pictures in every row
    questions = [asked(made, sample) for sample in posts]
    packed = made.pack(questions)
    with torch.no_grad():
        found = log_probabilities(made, packed)
    expected = [alone(made, q, list(answer)) for row in questions for q in row for answer in q.answers]
    assert packed.answers.tolist() == [index for index, part in enumerate(expected) for _ in part]
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-6)


def test_gradients_are_those_of_the_answers_alone(make_backbone: Any, posts: list[Sample]) -> None:
    backbone = make_backbone(1)
    questions = [asked(backbone, sample) for sample in posts]
    log_probabilities(backbone, backbone.pack(questions)).sum().backward()
    together = [weights.grad.clone() for weights in backbone.model.parameters()]
    backbone.model.zero_grad()
    for row in questions:
        for question in row:
            for answer in question.answers:
                log_probabilities(backbone, backbone.pack([[question._replace(answers=[answer])]])).sum().backward()
    for found, weights in zip(together, backbone.model.parameters(), strict=True):
        torch.testing.assert_close(found, weights.grad, atol=2e-3, rtol=1e-3)
    assert max(float(gradient.abs().max()) for gradient in together) > 1


def test_pictures_and_what_the_prompts_share_stand_once_in_a_row(backbone: Backbone, posts: list[Sample]) -> None:
    row = asked(backbone, posts[0])
    packed = backbone.pack([row])
    each = [backbone.pack([[question]]) for question in row]
    assert torch.equal(packed.inputs["pixel_values"], each[0].inputs["pixel_values"])
    image = backbone.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert int((packed.inputs["input_ids"] == image).sum()) == int((each[0].inputs["input_ids"] == image).sum()) == 4
    ids = packed.inputs["input_ids"][0].tolist()
    assert backbone.processor.tokenizer.decode(ids).count(posts[0].text) == 1
    assert len(ids) < 0.6 * sum(part.inputs["input_ids"].shape[1] for part in each)


def test_rows_that_do_not_branch_go_to_the_model_with_a_plain_mask(backbone: Backbone, posts: list[Sample]) -> None:
    packed = backbone.pack([[asked(backbone, sample)[0]] for sample in posts])
    assert "ends" not in packed.inputs and "position_ids" not in packed.inputs
    lengths = [len(backbone.pack([[asked(backbone, sample)[0]]]).inputs["input_ids"][0]) for sample in posts]
    assert packed.inputs["attention_mask"].sum(1).tolist() == lengths
    assert packed.inputs["attention_mask"].shape == packed.inputs["mm_token_type_ids"].shape


def test_pictures_behind_the_text_are_refused(make_backbone: Any, posts: list[Sample]) -> None:
    backbone = make_backbone()
    template = backbone.processor.chat_template
    backbone.processor.chat_template = template.replace(
        "{% for part in message['content'] %}", "{% for part in message['content'] | reverse %}"
    )
    try:
        with pytest.raises(SettingsError, match="packing: the chat template puts pictures behind the text"):
            backbone.pack([asked(backbone, posts[0])])
    finally:
        backbone.processor.chat_template = template

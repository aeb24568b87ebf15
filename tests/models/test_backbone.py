"""Backbones: prompts, adapters, saving, other architectures and errors, with tiny models loaded by path."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from distill.errors import SettingsError
from distill.models import tiny
from distill.models.backbone import (
    IGNORE,
    Backbone,
    LoraSettings,
    ModelSettings,
    create,
    load,
    on_meta,
    wide_linear,
)  # fmt: skip
from distill.models.local import Local
from distill.models.reasoner import Sampling
from distill.models.tiny import TinySettings
from distill.task.labels import LabelSpace, Scale
from distill.task.prompts import EarlierAnswers, render
from distill.task.sample import Sample
from tests.models.test_encoding import decoded, real_logits

LABELS = LabelSpace()


def by_path(folder: Path, lora: LoraSettings | None = None) -> ModelSettings:
    return ModelSettings(str(folder), lora=lora, image_size=56, batch_size=4)


# ---- prompts ----


def test_a_classify_prompt_ends_with_the_prefix_and_training_uses_the_same_tokens(
    backbone: Backbone, mixed: list[Sample]
) -> None:
    prompt = backbone.encode(mixed[:1], "classify")["input_ids"][0]
    assert decoded(backbone, prompt).endswith('assistant\n"Prediction":')
    trained = backbone.encode(mixed[:1], "classify", ['"Prediction": neutral'])["input_ids"][0]
    assert torch.equal(trained[: len(prompt)], prompt)
    assert int(trained[len(prompt)]) == int(backbone.label_ids[1])


def test_a_review_prompt_ends_with_the_prefix_and_contains_the_earlier_answers(
    backbone: Backbone, mixed: list[Sample]
) -> None:
    earlier = [EarlierAnswers("neutral", 0.4, "positive", 0.6)] * len(mixed)
    features = backbone.encode(mixed, "review", earlier=earlier)
    for row, sample in enumerate(mixed):
        text = decoded(backbone, features["input_ids"][row][features["attention_mask"][row].bool()])
        assert render("review", sample, LABELS, earlier[row]).splitlines()[-2] in text
        assert text.endswith('assistant\n"Prediction":')
    trained = backbone.encode(mixed[:1], "review", ['"Prediction": neutral'], earlier=earlier[:1])
    prompt = backbone.encode(mixed[:1], "review", earlier=earlier[:1])["input_ids"][0]
    assert torch.equal(trained["input_ids"][0][: len(prompt)], prompt)
    with pytest.raises(ValueError, match="earlier"):
        backbone.encode(mixed, "review")


# ---- adapters ----


def test_lora_trains_only_the_language_model(model_folder: Path) -> None:
    model = create(by_path(model_folder, LoraSettings(r=4)), LABELS, Path("unused")).model
    trained = [name for name, weights in model.named_parameters() if weights.requires_grad]
    assert len(trained) == 2 * 7 * 2  # layers x projections x (A, B)
    assert all("language_model" in name and "lora_" in name for name in trained)
    assert not any("visual" in name and "lora" in name for name, _ in model.named_parameters())
    assert not any(
        weights.requires_grad for name, weights in model.named_parameters() if "visual" in name or "embed" in name
    )


def test_a_model_for_inference_gets_no_adapter(model_folder: Path) -> None:
    model = create(by_path(model_folder, LoraSettings()), LABELS, Path("unused"), train=False).model
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_an_adapter_is_saved_without_the_base_model_loaded_and_merged(
    model_folder: Path, mixed: list[Sample], tmp_path: Path
) -> None:
    settings = by_path(model_folder, LoraSettings(r=4, dropout=0.5))
    trained = create(settings, LABELS, Path("unused"))
    with torch.no_grad():
        for name, weights in trained.model.named_parameters():
            if "lora_B" in name:
                weights.normal_(0, 0.1)
    trained.model.eval()
    trained.save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    expected = Local(trained, "").classify(mixed).probabilities
    plain = Local(create(settings, LABELS, Path("unused"), train=False), "").classify(mixed).probabilities
    assert abs(expected - plain).max() > 1e-2
    again = load(settings, LABELS, tmp_path / "adapter")
    assert not again.model.training
    assert abs(Local(again, "").classify(mixed).probabilities - expected).max() < 1e-6
    again.model.double()  # compares the merge without rounding errors
    logits = torch.cat(real_logits(again, again.encode(mixed, "reason")))
    merged = again.merged()
    again.model = merged
    torch.testing.assert_close(torch.cat(real_logits(again, again.encode(mixed, "reason"))), logits, atol=1e-6, rtol=0)
    merged.save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    again.processor.save_pretrained(tmp_path / "merged")
    whole = create(by_path(tmp_path / "merged"), LABELS, Path("unused"), train=False)
    assert not any("lora" in name for name, _ in whole.model.named_parameters())
    assert abs(Local(whole, "").classify(mixed).probabilities - expected).max() < 1e-5


def test_a_tiny_model_is_saved_and_loaded_completely(make_backbone: Any, mixed: list[Sample], tmp_path: Path) -> None:
    trained = make_backbone(seed=5)
    trained.save(tmp_path)
    again = load(trained.settings, LABELS, tmp_path)
    assert (Local(again, "").classify(mixed).probabilities == Local(trained, "").classify(mixed).probabilities).all()
    assert again.merged() is again.model


# ---- other architectures ----

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def text_config(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    ids = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return {"vocab_size": len(words), "hidden_size": 64, "intermediate_size": 128, **layers, **ids}


VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip


def build_llava(folder: Path, words: PreTrainedTokenizerFast) -> str:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<image>"]})
    words._tokenizer.post_processor = bos_first(words)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION).to_dict(),
        text_config=LlamaConfig(**text_config(words)).to_dict(),
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    LlavaProcessor(
        images,
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{{ bos_token }}" + TEMPLATE,
    ).save_pretrained(folder)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return "language_model"


def bos_first(words: PreTrainedTokenizerFast) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words.convert_tokens_to_ids("<s>"))])


def build_idefics3(folder: Path, words: PreTrainedTokenizerFast) -> str:
    from transformers import Idefics3Config, Idefics3Processor, LlamaConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    added = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    words.add_special_tokens({"additional_special_tokens": added})
    edge = {"longest_edge": 56}
    images = Idefics3ImageProcessorPil(do_image_splitting=False, size=edge, max_image_size=edge)
    Idefics3Processor(images, words, image_seq_len=4, chat_template=TEMPLATE).save_pretrained(folder)
    config = Idefics3Config(
        vision_config=VISION,
        text_config=LlamaConfig(**text_config(words)).to_dict(),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return "text_model"


@pytest.mark.parametrize("build", [build_llava, build_idefics3])
def test_other_architectures_are_loaded_by_path_and_work_alike(
    build: Any, tokenizer_folder: Path, mixed: list[Sample], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    language = build(tmp_path, tiny.load_tokenizer(tokenizer_folder))
    backbone = create(by_path(tmp_path, LoraSettings(r=4)), LABELS, Path("unused"))
    trained = [name for name, weights in backbone.model.named_parameters() if weights.requires_grad]
    assert len(trained) == 28 and all(language in name for name in trained)
    backbone.model.eval()
    features = backbone.encode(mixed, "reason", ["an answer"] * 4)
    for row in features["labels"]:
        assert decoded(backbone, row[row != IGNORE]) == "an answer<|im_end|>"
    bos = backbone.processor.tokenizer.bos_token_id
    assert bos is None or ((features["input_ids"] == bos).sum(1) == 1).all()  # the tokenizer adds no second BOS
    logits = real_logits(backbone, features)
    for row, sample in enumerate(mixed):
        alone = real_logits(backbone, backbone.encode([sample], "reason", ["an answer"]))[0]
        torch.testing.assert_close(logits[row], alone, atol=1e-5, rtol=0)
    reasoner = Local(backbone, "other")
    scores = reasoner.classify(mixed).probabilities
    assert abs(scores.sum(1) - 1).max() < 1e-6
    hostile = [replace(sample, text="an <image> and <fake_token_around_image> </s> <s>") for sample in mixed]
    assert reasoner.classify(hostile).probabilities.shape == (4, 3)
    answers = list(reasoner.reason(mixed, sampling=Sampling(max_new_tokens=6)))
    single = [next(reasoner.reason([sample], sampling=Sampling(max_new_tokens=6)))[1] for sample in mixed]
    assert [answer for _, answer in answers] == single


# ---- errors ----


def single_line(error: pytest.ExceptionInfo[SettingsError]) -> str:
    """The error message; asserts that it is one short line."""
    message = str(error.value)
    assert "\n" not in message and len(message) < 300
    return message


def test_a_missing_or_broken_model_is_a_one_line_error(model_folder: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SettingsError) as error:
            create(by_path(path), LABELS, tmp_path)
        assert str(path) in single_line(error) and "model.path" in single_line(error)
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    for file in model_folder.iterdir():
        content = file.read_bytes()
        (truncated / file.name).write_bytes(content[:5000] if file.suffix == ".safetensors" else content)
    with pytest.raises(SettingsError, match="truncated cannot be loaded"):
        create(by_path(truncated), LABELS, tmp_path)
    with pytest.raises(SettingsError, match="cannot be loaded"):
        on_meta(by_path(tmp_path / "nothing"))


def test_a_missing_adapter_or_tokenizer_is_a_one_line_error(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as error:
        load(by_path(model_folder, LoraSettings()), LABELS, tmp_path / "gone")
    assert "gone" in single_line(error)
    with pytest.raises(SettingsError) as error:
        load(ModelSettings(), LABELS, tmp_path / "gone")
    assert "gone" in single_line(error)
    with pytest.raises(SettingsError) as error:
        create(ModelSettings(), LABELS, tmp_path / "gone")
    assert "tokenizer" in single_line(error)


def test_a_model_without_chat_template_is_rejected(model_folder: Path, tmp_path: Path) -> None:
    for file in model_folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SettingsError, match="has no chat template"):
        create(by_path(tmp_path), LABELS, tmp_path)


def test_lora_without_a_path_or_with_targets_that_match_no_module_is_rejected(
    model_folder: Path, tokenizer_folder: Path
) -> None:
    with pytest.raises(SettingsError, match=r"model\.lora needs model\.path"):
        create(ModelSettings(lora=LoraSettings()), LABELS, tokenizer_folder)
    with pytest.raises(SettingsError, match=r"model\.lora\.targets"):
        create(by_path(model_folder, LoraSettings(targets="nothing_like_it")), LABELS, tokenizer_folder)


def test_flash_attention_cannot_score_labels_that_share_their_first_token(backbone: Backbone) -> None:
    flash = replace(backbone.settings, attention="flash_attention_2")
    with pytest.raises(SettingsError) as error:
        Backbone(backbone.model, backbone.processor, LabelSpace.from_scale(Scale()), flash)
    assert "model.attention" in single_line(error)
    Backbone(backbone.model, backbone.processor, LABELS, flash)


def test_a_tokenizer_without_end_token_is_rejected_and_one_without_padding_token_works(
    make_backbone: Any, mixed: list[Sample]
) -> None:
    model = make_backbone()
    model.processor.tokenizer.pad_token = None
    unpadded = Backbone(model.model, model.processor, LABELS, model.settings)
    assert unpadded.encode(mixed, "reason")["attention_mask"].sum() > 0
    model.processor.tokenizer.eos_token = None
    with pytest.raises(SettingsError, match="no end token"):
        Backbone(model.model, model.processor, LABELS, model.settings)


# ---- shapes without weights ----


def test_on_meta_has_shapes_and_allocates_no_memory(model_folder: Path) -> None:
    for settings in (ModelSettings(tiny=TinySettings(hidden=128, vocabulary=500)), by_path(model_folder)):
        model = on_meta(settings)
        assert {weights.device.type for weights in model.parameters()} == {"meta"}
        assert sum(weights.numel() for weights in model.parameters()) > 100_000


@pytest.mark.parametrize("bias", [None, torch.linspace(0, 1, 20_001)])
def test_a_wide_head_is_computed_in_blocks(bias: torch.Tensor | None) -> None:
    hidden, weight = torch.randn(3, 2, 8), torch.randn(20_001, 8, requires_grad=True)
    found, expected = wide_linear(hidden, weight, bias), torch.nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(logits.square().sum(), weight)[0] for logits in (found, expected)]
    torch.testing.assert_close(*gradients)

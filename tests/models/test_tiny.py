"""Tiny models: a lossless tokenizer, the classes of the real architecture, the processor without torchvision."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from distill.data.corpus import Corpus
from distill.errors import SettingsError
from distill.models.backbone import Backbone
from distill.models.processors import processor_class
from distill.models.tiny import (
    SPECIAL_TOKENS,
    TinySettings,
    build_config,
    load_tokenizer,
    train_tokenizer,
)


def test_the_tokenizer_returns_any_text_unchanged(tokenizer_folder: Path, postcards: Corpus) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    texts = [sample.text for sample in postcards.test] + ["naïve café 😀 \u200d\x07", "  two  spaces\n\ttab ", "日本語"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens_have_the_first_ids_and_their_roles(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert len(tokenizer) == 768


def test_tokenizer_training_is_deterministic_and_a_small_vocabulary_contains_every_byte() -> None:
    one, two = (train_tokenizer(["a b c", "b c d"] * 9, 300).get_vocab() for _ in range(2))
    assert one == two
    smallest = train_tokenizer(["a b c"], 10)
    assert smallest.decode(smallest("ü?")["input_ids"]) == "ü?"


def test_the_model_is_the_real_architecture_with_tied_embeddings(backbone: Backbone) -> None:
    model = backbone.model
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    sizes = TinySettings(hidden=64, layers=3, vision_hidden=32, vision_depth=2)
    config = build_config(sizes, load_tokenizer(Path(backbone.processor.tokenizer.name_or_path)))
    built = AutoModelForImageTextToText.from_config(config)
    assert len(built.model.language_model.layers) == 3
    assert len(built.model.visual.blocks) == 2
    assert built.model.language_model.embed_tokens.weight.shape == (768, 64)


def test_a_saved_model_and_processor_load_with_transformers(backbone: Backbone, tmp_path: Path) -> None:
    backbone.save(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = processor_class(model.config, str(tmp_path)).from_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8))
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hello<|im_end|>\n"
    features = processor(text=[text], images=[image], return_tensors="pt")
    assert int((features["input_ids"] == processor.image_token_id).sum()) == 4  # 56 / 14 patches a side, merged 2 x 2
    expected = backbone.processor(text=[text], images=[image], return_tensors="pt")
    with torch.inference_mode():
        # with torchvision, its image processor rounds differently
        torch.testing.assert_close(model(**features).logits, backbone.model(**expected).logits, atol=1e-3, rtol=1e-3)


def test_the_logits_depend_on_the_image(backbone: Backbone, postcards: Corpus) -> None:
    features = backbone.encode(postcards.test[:1], "classify")
    with torch.inference_mode():
        original = backbone.model(**features).logits[0, -1]
        changed = backbone.model(**features | {"pixel_values": -features["pixel_values"]}).logits[0, -1]
    assert float((original - changed).abs().max()) > 1e-2


def test_a_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        load_tokenizer(tmp_path / "none")


@pytest.mark.parametrize("wrong", [{"hidden": 100}, {"layers": 0}, {"vision_hidden": 24}, {"vocabulary": 200}])
def test_an_invalid_size_is_rejected(wrong: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match=rf"^{next(iter(wrong))} is \d+; it takes"):
        TinySettings(**wrong)

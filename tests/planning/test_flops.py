"""FLOP counts against torch's own counter, and against the figures of published models."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, LlavaConfig, Qwen2_5_VLConfig

from distill.models.lora import LoraSettings, add_lora
from distill.planning.flops import count_sounds, flops, saved_activations
from tests.models import family_configs
from tests.test_recipes import qwen_config

PATCHES, TOKENS, ROWS = 64, 48, 2
IMAGE, IMAGE_START = 500, 501


@pytest.fixture
def tiny() -> Any:
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 160, "vocab_size": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 64,
            "fullatt_block_indexes": [], "window_size": 28,
        },
        image_token_id=IMAGE, vision_start_token_id=IMAGE_START, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager")


def inputs() -> dict[str, torch.Tensor]:
    """Rows that begin with an image of 8 x 8 patches, which are 16 tokens."""
    ids = torch.randint(0, 400, (ROWS, TOKENS))
    ids[:, 0] = IMAGE_START
    ids[:, 1 : 1 + PATCHES // 4] = IMAGE
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(ROWS * PATCHES, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * ROWS),
    }


def counted(model: Any, backward: bool, logits: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        out = model(**inputs(), logits_to_keep=logits).logits
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


SHAPE: dict[str, float] = {"tokens": ROWS * TOKENS, "patches": ROWS * PATCHES, "pairs": ROWS * TOKENS**2}


@pytest.mark.parametrize("logits", [TOKENS, 3])
def test_a_forward_pass_has_the_flops_that_torch_counts(tiny: Any, logits: int) -> None:
    assert flops(tiny, logits=ROWS * logits, **SHAPE) == pytest.approx(counted(tiny, False, logits), rel=0.03)


def test_training_all_weights_costs_three_forward_passes(tiny: Any) -> None:
    found = flops(tiny, logits=ROWS * TOKENS, backward="all", **SHAPE)
    assert found == pytest.approx(counted(tiny, True, TOKENS), rel=0.03)
    assert flops(tiny, tokens=9, logits=5, pairs=2, backward="all") == 3 * flops(tiny, tokens=9, logits=5, pairs=2)


def test_with_an_adapter_frozen_weights_and_the_vision_tower_have_no_gradient(tiny: Any) -> None:
    adapted = add_lora(tiny, LoraSettings(r=4))
    found = flops(adapted, logits=ROWS * TOKENS, backward="activations", **SHAPE)
    assert found == pytest.approx(counted(adapted, True, TOKENS), rel=0.08)  # no gradient below the first layer
    assert found < 0.8 * flops(adapted, logits=ROWS * TOKENS, backward="all", **SHAPE)


def test_each_part_equals_a_count_by_hand(tiny: Any) -> None:
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160
    block = 64 * 3 * 64 + 64 * 64 + 3 * 64 * 96
    assert flops(tiny, tokens=1, logits=0) == 2 * 2 * layer
    assert flops(tiny, tokens=0, logits=1) == 2 * 64 * 512
    assert flops(tiny, tokens=0, logits=0, patches=4) == 8 * (2 * block + 3 * 2 * 14 * 14 * 64) + 2 * (
        256**2 + 256 * 64
    )
    assert flops(tiny, tokens=0, logits=0, pairs=1) == 2 * 2 * 64 * 2


def test_the_parts_of_another_architecture_are_found_by_name() -> None:
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
        },
        text_config={
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 300,
        },
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert flops(model, tokens=1, logits=0) == 2 * 2 * (4 * 64 * 64 + 3 * 64 * 128)
    block = 4 * 48 * 48 + 2 * 48 * 96
    projection = 48 * 64 + 64 * 64
    assert flops(model, tokens=0, logits=0, patches=1) == 2 * (2 * block + 3 * 14 * 14 * 48 + projection)


def test_the_audio_tower_counts_for_sounds_and_not_for_tokens() -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(family_configs.qwen2_5_omni_thinker(300, lambda _: 1))
    layer, words = 4 * 32 * 32 + 2 * 32 * 48, model.config.get_text_config()
    assert flops(model, tokens=0, logits=0, sounds=1) == 2 * (2 * layer + 32 * 64)
    heads, groups = words.num_attention_heads, words.num_key_value_heads
    width, hidden = words.hidden_size // heads, words.hidden_size
    attention = 2 * hidden * heads * width + 2 * hidden * groups * width
    decoder = words.num_hidden_layers * (attention + 3 * hidden * words.intermediate_size)
    assert flops(model, tokens=1, logits=0) == 2 * decoder
    assert flops(model, tokens=0, logits=0, sounds=1, backward="all") == 3 * flops(model, tokens=0, logits=0, sounds=1)
    saved = 2 * (4 * 2 * 32 + 2 * (32 + 48)) + 32 + 64
    assert saved_activations(model, tokens=0, sounds=1, backward="all") == saved
    assert saved_activations(model, tokens=0, sounds=1, backward="activations") == 0


def test_the_positions_of_a_sound_are_half_the_steps_of_its_spectrogram() -> None:
    mask = torch.arange(200)[None] < torch.tensor([[120], [200]])
    assert count_sounds({"feature_attention_mask": mask}) == 160 and count_sounds({"input_ids": mask}) == 0


@pytest.fixture(scope="module")
def published_models() -> Iterator[tuple[Any, Any]]:
    """Qwen2.5-VL-3B and 7B, without weights."""
    with torch.device("meta"):
        small = qwen_config(2048, 36, 16, 2, 11008, 151_936, True)
        large = qwen_config(3584, 28, 28, 4, 18944, 152_064, False)
        yield tuple(AutoModelForImageTextToText.from_config(config) for config in (small, large))  # type: ignore[misc]


def test_the_published_step_and_ours_have_the_known_flops(published_models: tuple[Any, Any]) -> None:
    """Real Twitter-2015 rows: 1,078 padded tokens in two sequences, 623 tokens in one, 261 of them answers."""
    student, assistant = published_models
    padded = {"tokens": 1078, "logits": 1078, "pairs": 2 * (1078 / 2) ** 2 / 2}
    published_step = flops(student, backward="activations", **padded) + flops(assistant, **padded)
    packed = {"tokens": 623, "logits": 261, "patches": 400, "pairs": 623**2 / 2}
    ours = flops(student, backward="activations", **packed)
    assert published_step == pytest.approx(28e12, rel=0.05)
    assert ours == pytest.approx(8e12, rel=0.05)

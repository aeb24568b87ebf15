"""The shipped recipes: their models can be built, and the recipes of the paper have its hyperparameters."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from peft.tuners.lora import LoraLayer
from transformers import Gemma3TextConfig, Qwen2_5_VLConfig, Qwen2_5OmniThinkerConfig

from distill.errors import SettingsError
from distill.models.backbone import LoraSettings, ModelSettings, on_meta
from distill.models.lora import add_lora
from tests import micro

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def qwen_config(hidden: int, layers: int, heads: int, kv: int, intermediate: int, vocabulary: int, tied: bool) -> Any:
    """The config of a published Qwen2.5-VL with the sizes from its model card."""
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv, "intermediate_size": intermediate, "vocab_size": vocabulary,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": hidden,
            "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112,
        },
        tie_word_embeddings=tied,
    )  # fmt: skip


def omni_config(hidden: int, layers: int, heads: int, kv: int, intermediate: int, vocabulary: int, tied: bool) -> Any:
    """The config of the thinker of a published Qwen2.5-Omni."""
    vision = qwen_config(hidden, layers, heads, kv, intermediate, vocabulary, tied)
    return Qwen2_5OmniThinkerConfig(
        text_config=vision.text_config.to_dict() | {"model_type": "qwen2_5_omni_text"},
        vision_config=vision.vision_config.to_dict() | {"model_type": "qwen2_5_omni_vision_encoder"},
        audio_config={
            "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
            "num_mel_bins": 128, "n_window": 100, "output_dim": hidden,
        },
        tie_word_embeddings=tied,
    )  # fmt: skip


def gemma_config() -> Gemma3TextConfig:
    """The config of Gemma 3 270M."""
    return Gemma3TextConfig(
        hidden_size=640, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1, head_dim=256,
        intermediate_size=2048, vocab_size=262_144, architectures=["Gemma3ForCausalLM"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configs of the hub models that the recipes use."""
    sizes = {
        "models/gemma-3-270m": gemma_config(),
        "Qwen/Qwen2.5-VL-3B-Instruct": qwen_config(2048, 36, 16, 2, 11008, 151_936, True),
        "Qwen/Qwen2.5-VL-7B-Instruct": qwen_config(3584, 28, 28, 4, 18944, 152_064, False),
        "Qwen/Qwen2.5-Omni-3B": omni_config(2048, 36, 16, 2, 11008, 151_936, True),
        "Qwen/Qwen2.5-Omni-7B": omni_config(3584, 28, 28, 4, 18944, 152_064, False),
    }
    folders = {name: tmp_path_factory.mktemp("hub") for name in sizes}
    for name, folder in folders.items():
        sizes[name].save_pretrained(folder)
    return folders


SIZES = {
    ("models/gemma-3-270m", None): (0.2681e9, 18),
    ("models/gemma-3-270m", 6): (0.2012e9, 6),
    ("Qwen/Qwen2.5-VL-3B-Instruct", None): (3.7546e9, 36),
    ("Qwen/Qwen2.5-VL-7B-Instruct", None): (8.2922e9, 28),
    ("Qwen/Qwen2.5-Omni-3B", None): (4.39e9, 36),
    ("Qwen/Qwen2.5-Omni-7B", None): (8.93e9, 28),
}
"""Parameters and layers by model and the layers that are kept."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_starts_with_its_command_and_its_models_can_be_built(path: Path, hub: dict[str, Path]) -> None:
    assert path.read_text().startswith(f"# distill run --config recipes/{path.name}")
    recipe = micro.read(path)
    assert recipe.name == path.stem
    sections = [recipe.teacher, recipe.assistant, recipe.student]
    models = [section.model for section in sections if section is not None]
    assert len(models) >= 2
    for settings in models:
        if not settings.path:
            assert sum(weights.numel() for weights in on_meta(settings).parameters()) < 5e6
            continue
        model = on_meta(dataclasses.replace(settings, path=str(hub[settings.path])))
        assert {weights.device.type for weights in model.parameters()} == {"meta"}
        parameters, layers = SIZES[settings.path, settings.keep_layers]  # type: ignore[index]
        assert sum(w.numel() for w in model.parameters()) == pytest.approx(parameters, rel=1e-3)
        assert settings.lora is not None
        model = add_lora(model, settings.lora).get_base_model()
        adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
        assert len(adapted) == 7 * layers
        assert all("layers" in name and "visual" not in name for name in adapted)


@pytest.mark.parametrize("name", ["twitter15", "twitter17", "mvsa-single", "mvsa-multiple"])
def test_the_recipes_of_the_paper_have_its_hyperparameters(name: str) -> None:
    """The hyperparameters of MulCoT-RD, arXiv 2508.05234."""
    recipe = micro.read(next(path for path in RECIPES if path.stem == name))
    assert recipe.seed == 42 and recipe.assistant is not None and recipe.student is not None
    for section, path, dropout in ((recipe.assistant, "7B", 0.2), (recipe.student, "3B", 0.05)):
        assert section.model.path == f"Qwen/Qwen2.5-VL-{path}-Instruct"
        assert section.model.lora == LoraSettings(r=16, alpha=32, dropout=dropout)
        assert (section.model.image_size, section.model.dtype) == (280, "bfloat16")
        assert (section.batch_size, section.learning_rate, section.tasks) == (2, 3e-4, {"reason": 1.0, "classify": 1.0})
        assert (section.patience, section.factor, section.min_learning_rate) == (2, 0.5, 1e-6)
        trainer = recipe.trainer | section.trainer
        assert (trainer["max_epochs"], trainer["accumulate_grad_batches"]) == (20, 20)
    distillation = recipe.student.distillation
    assert (distillation.weight, distillation.temperature, distillation.positions) == (0.3, 2.0, "response")
    assert recipe.augment is not None and (recipe.augment.temperature, recipe.augment.max_new_tokens) == (0.7, 512)
    assert recipe.annotate is not None and recipe.annotate.endpoint is not None
    assert (recipe.annotate.retries, recipe.annotate.unlabelled) == (3, "skip")
    assert "72B" in recipe.annotate.endpoint.model


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^model.path: no/such-model cannot be loaded"):
        on_meta(ModelSettings(path="no/such-model"))

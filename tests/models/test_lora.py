"""LoRA targets of models whose layers are of several kinds, and the adapter of the output head."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, Lfm2VlConfig, Qwen3_5Config

from distill.errors import SettingsError
from distill.models.backbone import LoraSettings, ModelSettings, create
from distill.models.lora import EARLIER_TARGETS, add_lora, check_lora
from distill.planning.flops import flops
from distill.task.labels import LabelSpace
from tests.models.foreign_adapters import logits

TEXT = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip


def qwen() -> Any:
    """Three layers of linear attention and one of full attention."""
    heads = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
    kinds = {"layer_types": [*["linear_attention"] * 3, "full_attention"], "linear_num_value_heads": 2}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    return Qwen3_5Config(text_config=TEXT | heads | kinds, vision_config=vision)


def lfm() -> Any:
    """Three layers of short convolutions and one of attention."""
    text = TEXT | {"layer_types": ["conv", "conv", "full_attention", "conv"], "model_type": "lfm2"}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Lfm2VlConfig(text_config=text, vision_config=vision | {"model_type": "siglip2_vision_model"})


def build(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize(
    ("config", "earlier", "names"),
    [
        (qwen, "16 of 31", "in_proj_a, in_proj_b, in_proj_qkv, in_proj_z, out_proj"),
        (lfm, "3 of 22", "in_proj, out_proj, w1, w2, w3"),
    ],
)
def test_targets_that_cover_a_part_of_the_layers_are_a_warning(
    config: Any, earlier: str, names: str, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.device("meta"):
        model = build(config())
    with caplog.at_level(logging.INFO):
        check_lora(model, LoraSettings(targets=EARLIER_TARGETS))
        assert f"LoRA adapts {earlier} linear layers of the language model" in caplog.text
        assert f"model.lora.targets leaves out layers of the names {names}; all-linear adapts" in caplog.text
        caplog.clear()
        check_lora(model, LoraSettings())
    total = earlier.split()[-1]
    assert f"LoRA adapts {total} of {total}" in caplog.text and "leaves out" not in caplog.text


def targets_of(settings: LoraSettings, folder: Path) -> set[str]:
    """The names of the adapted layers in the adapter that is saved."""
    model = add_lora(AutoModelForImageTextToText.from_pretrained(folder), settings)
    return {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}


def test_the_default_adapts_what_the_earlier_default_did_in_the_usual_decoders(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        now, then = (
            targets_of(settings, model_folder) for settings in (LoraSettings(), LoraSettings(targets=EARLIER_TARGETS))
        )
    assert now == then and len(now) == 2 * 7
    assert not caplog.records


def test_names_of_layers_are_those_of_the_language_model(model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    named = targets_of(LoraSettings(targets=["q_proj", "mlp.down_proj"]), model_folder)
    assert named == targets_of(LoraSettings(targets=r".*language_model.*\.(q_proj|mlp\.down_proj)"), model_folder)
    assert len(named) == 4
    assert "leaves out layers of the names gate_proj, k_proj, o_proj, up_proj, v_proj; all-linear" in caplog.text
    with pytest.raises(SettingsError, match=r"model\.lora\.targets: wq, wk matches no module; .*q_proj"):
        targets_of(LoraSettings(targets=["q_proj", "wq", "wk"]), model_folder)
    with pytest.raises(SettingsError, match=r"targets is \[\]"):
        targets_of(LoraSettings(targets=[]), model_folder)


@pytest.mark.parametrize("config", [qwen, lfm])
def test_all_linear_adapts_every_layer_of_the_language_model_and_nothing_else(config: Any, tmp_path: Path) -> None:
    model = build(config())
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    expected = {name for name in linear if ".language_model." in name}
    plain = logits(model)
    adapted = add_lora(model, LoraSettings(r=4, targets="all-linear"))
    names = {name for name, weights in adapted.get_base_model().named_parameters() if weights.requires_grad}
    assert {name.partition(".lora_")[0] for name in names} == expected
    torch.testing.assert_close(logits(adapted), plain, atol=1e-6, rtol=0)
    for weights in adapted.parameters():
        if weights.requires_grad:
            torch.nn.init.normal_(weights, 0, 0.1)
    trained = logits(adapted)
    assert (trained - plain).abs().max() > 1e-3
    adapted.merge_and_unload().save_pretrained(tmp_path)
    merged = logits(AutoModelForImageTextToText.from_pretrained(tmp_path))
    torch.testing.assert_close(merged, trained, atol=1e-4, rtol=0)


@pytest.mark.parametrize("targets", ["", [], [""], ["q_proj", ""]])
def test_empty_targets_are_refused(targets: Any) -> None:
    with pytest.raises(SettingsError, match=r"^targets is .*; it takes all-linear, names, or a regular expression$"):
        LoraSettings(targets=targets)


def test_targets_that_match_nothing_name_the_modules_that_there_are(model_folder: Path) -> None:
    for targets, message in {
        "nothing_like_it": r"nothing_like_it matches no module; the linear layers of the language model are "
        r"model\.language_model\.\*\.\(down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj\)",
        "*proj": "is no regular expression: nothing to repeat",
        r".*layernorm": "model.lora.targets: a module that it matches, .*Norm, is no linear layer",
    }.items():
        for weights in (True, False):
            settings = ModelSettings(str(model_folder), lora=LoraSettings(targets=targets), image_size=56)
            with pytest.raises(SettingsError, match=message):
                create(settings, LabelSpace(), model_folder, weights=weights)


def test_the_flops_of_an_adapted_head_are_those_of_the_head_and_of_its_adapter(model_folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    counts = {"tokens": 100.0, "logits": 10.0}
    before = flops(model, **counts)
    adapted = add_lora(model, LoraSettings(r=4, targets=r".*lm_head"))
    head = adapted.get_output_embeddings()
    assert flops(adapted, **counts) - before == 2 * 100 * 4 * (head.in_features + head.out_features)

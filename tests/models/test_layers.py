"""Models made of some layers of another: they compute what these compute, also with a cache and when reloaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Lfm2VlConfig,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
)

from distill.data.corpus import Corpus
from distill.errors import SettingsError
from distill.export.export import ExportSettings, export
from distill.models import layers
from distill.models.backbone import Backbone, LoraSettings, ModelSettings, create, load
from distill.models.layers import keep_layers
from distill.models.tiny import TinySettings
from distill.planning.flops import flops
from distill.task.labels import LabelSpace
from tests.models.foreign_adapters import inputs, logits, lora, write

LABELS = LabelSpace()
SIZE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
ALTERNATING = ["sliding_attention", "sliding_attention", "full_attention"] * 2
LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZE),
    "qwen2.5-vl": lambda: Qwen2_5_VLConfig(text_config=SIZE | {"rope_parameters": ROPE}, vision_config=VISION),
    "gemma3": lambda: Gemma3TextConfig(**SIZE, layer_types=ALTERNATING, sliding_window=4),
    "qwen3-vl": lambda: Qwen3VLConfig(
        text_config=SIZE | {"rope_parameters": ROPE},
        vision_config=VISION | {"deepstack_visual_indexes": [0, 1]},
    ),
    "qwen3.5": lambda: Qwen3_5Config(
        text_config=SIZE | LINEAR | {"layer_types": ["linear_attention", "full_attention"] * 3}, vision_config=VISION
    ),
    "lfm2-vl": lambda: Lfm2VlConfig(
        text_config=SIZE | {"layer_types": ["conv", "full_attention"] * 3, "model_type": "lfm2"},
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "model_type": "siglip2_vision_model"},
    ),
}  # fmt: skip


def build(name: str) -> Any:
    config = CONFIGS[name]()
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if name in ("llama", "gemma3", "gemma4") else AutoModelForImageTextToText
    model = kind.from_config(config).eval()
    for weights in model.parameters():  # more than the usual initialisation, so that every layer has an effect
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, 0, 0.08)
    return model


@torch.no_grad()
def skipping(model: Any, chosen: list[int]) -> torch.Tensor:
    """Logits of the complete model in which each layer that is not chosen returns its input."""
    stack = model.get_decoder().layers
    handles = [
        layer.register_forward_hook(lambda _, arguments, output: arguments[0])
        for index, layer in enumerate(stack)
        if index not in chosen
    ]
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("choice", [2, [0, 1, 4, 5]])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_smaller_model_computes_what_its_layers_compute(name: str, choice: Any, tmp_path: Path) -> None:
    model = build(name)
    chosen = list(range(choice)) if isinstance(choice, int) else choice
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    expected = skipping(model, chosen)
    assert (expected - logits(model)).abs().max() > 1e-2
    keep_layers(model, choice)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)

    prompt = inputs()["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(prompt, **options)
    assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **options))

    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    text = again.config.get_text_config()
    assert text.num_hidden_layers == len(again.get_decoder().layers) == len(chosen)
    if kinds is not None:
        assert text.layer_types == [kinds[index] for index in chosen]
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)
    assert torch.equal(again.generate(prompt, **options), with_cache)


def test_layers_that_depend_on_others_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"is \[0, 2\]; the model adds image features to its first 2 layers"):
        keep_layers(build("qwen3-vl"), [0, 2])
    for shared in ({"num_kv_shared_layers": 2}, {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300}):
        config = Gemma4TextConfig(**SIZE, layer_types=ALTERNATING, **shared)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        with pytest.raises(SettingsError, match=r"^model\.keep_layers: ") as error:
            keep_layers(model, 3)
        assert "\n" not in str(error.value)


# ---- as a setting ----


@pytest.fixture(scope="module")
def base(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL with four layers."""
    size = TinySettings(hidden=64, layers=4, vision_hidden=32, vision_depth=1)
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    create(ModelSettings(tiny=size, image_size=56), LABELS, tokenizer_folder).save(folder)
    return folder


def trained(settings: ModelSettings, folder: Path) -> Backbone:
    backbone = create(settings, LABELS, folder)
    with torch.no_grad():
        for weights in backbone.model.parameters():
            if weights.requires_grad:
                weights.add_(torch.randn_like(weights) * 0.05)
    backbone.model.eval()
    backbone.save(folder)
    return backbone


@pytest.mark.parametrize("adapter", [LoraSettings(r=4, dropout=0.0), None], ids=["adapter", "all weights"])
def test_a_student_of_some_layers_is_trained_loaded_and_exported(
    adapter: LoraSettings | None, base: Path, postcards: Corpus, tmp_path: Path
) -> None:
    settings = ModelSettings(str(base), keep_layers=[0, 3], lora=adapter, image_size=56)
    student = trained(settings, tmp_path / "student")
    expected = logits(student.model)
    again = load(settings, LABELS, tmp_path / "student")
    torch.testing.assert_close(logits(again.model), expected, atol=1e-6, rtol=0)
    result = export(
        again, postcards.validation, tmp_path / "export", tmp_path / "student", "card", ExportSettings(check_samples=4)
    )
    assert result["labels_equal"] == 4 and result["difference"] <= 1e-4
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
    assert exported.config.text_config.num_hidden_layers == 2
    torch.testing.assert_close(logits(exported), expected, atol=1e-4, rtol=0)
    assert not (tmp_path / "export" / "adapter").exists(), "peft would apply it to all layers of the base"


def test_a_plan_counts_the_smaller_model(base: Path, tmp_path: Path) -> None:
    def of(settings: ModelSettings) -> tuple[float, int]:
        model: Any = create(settings, LABELS, tmp_path, weights=False).model
        assert {weights.device.type for weights in model.parameters()} == {"meta"}
        return flops(model, tokens=100, logits=1, pairs=50), sum(weights.numel() for weights in model.parameters())

    whole, half, one = (of(ModelSettings(str(base), keep_layers=kept, image_size=56)) for kept in (None, [1, 2], 1))
    for index in range(2):
        assert whole[index] - half[index] == 2 * (half[index] - one[index]) > 0, "a layer has its own share"


@pytest.mark.parametrize("choice", [0, -1, [], [1, 0], [1, 1], [-1, 0]])
def test_a_choice_that_is_no_ascending_list_is_refused(choice: Any) -> None:
    with pytest.raises(SettingsError, match=r"^keep_layers is .*; it takes a number of layers, 1 or more, or a list"):
        ModelSettings("some/model", keep_layers=choice)
    assert layers.problem(choice) is not None


def test_layers_that_a_model_does_not_have_are_refused_before_training(base: Path, tmp_path: Path) -> None:
    for choice in (5, 10**30, [0, 4], [0, 10**30]):
        for weights in (True, False):
            with pytest.raises(SettingsError, match=r"^model\.keep_layers is .*; the model has 4 layers$"):
                create(ModelSettings(str(base), keep_layers=choice), LABELS, tmp_path, weights=weights)
    with pytest.raises(SettingsError, match=r"keep_layers needs path; set tiny\.layers for a tiny model"):
        ModelSettings(keep_layers=1)


def test_an_adapter_has_no_layers_to_keep(base: Path, tmp_path: Path) -> None:
    write(tmp_path, base, lora())
    for adapter in (LoraSettings(), None):
        for weights in (True, False):
            with pytest.raises(SettingsError, match=r"^model\.keep_layers: model\.path .* is an adapter, .*merge it"):
                create(ModelSettings(str(tmp_path), keep_layers=2, lora=adapter), LABELS, tmp_path, weights=weights)

"""Gradient checkpointing and the number of pixels of images, set in `model`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distill.data.corpus import Corpus
from distill.errors import SettingsError
from distill.models.backbone import Backbone, LoraSettings, ModelSettings, create
from distill.models.pretrained import limit_pixels, set_checkpointing
from distill.models.tiny import TinySettings
from distill.task.labels import LabelSpace
from distill.task.sample import Media
from distill.training.assistant import AssistantModule, TrainSettings

LABELS = LabelSpace()


def gradients(backbone: Backbone, corpus: Corpus) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of the trained weights after one step, and the largest number of bytes kept for the backward pass."""
    module = AssistantModule(backbone, TrainSettings())
    backbone.model.train()
    batch, kept = module.encode(corpus.train[:4]), [0]

    def pack(values: torch.Tensor) -> torch.Tensor:
        kept[0] += values.nelement() * values.element_size()
        return values

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
        loss = module.loss(batch).total
    loss.backward()
    return {n: w.grad for n, w in backbone.model.named_parameters() if w.grad is not None}, kept[0]


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4, dropout=0.2)])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(
    model_folder: Path, postcards: Corpus, lora: LoraSettings | None
) -> None:
    settings = ModelSettings(str(model_folder), lora=lora, image_size=56)
    found = []
    for on in (False, True):
        torch.manual_seed(1)
        found.append(gradients(create(replace(settings, gradient_checkpointing=on), LABELS, Path("unused")), postcards))
    (plain, much), (recomputed, little) = found
    assert plain.keys() == recomputed.keys() and len(plain) > 4
    for name, values in plain.items():
        torch.testing.assert_close(recomputed[name], values)
    assert little < 0.5 * much


def test_qlora_checkpoints_by_default_and_inference_never(model_folder: Path, tokenizer_folder: Path) -> None:
    tiny = ModelSettings(tiny=TinySettings(hidden=64, layers=2, vision_hidden=32, vision_depth=1), image_size=56)
    model = create(tiny, LABELS, tokenizer_folder).model
    assert not model.is_gradient_checkpointing
    quantised = replace(tiny, lora=LoraSettings(quantize=True))
    set_checkpointing(model, quantised, train=False)
    set_checkpointing(model, replace(quantised, gradient_checkpointing=False), train=True)
    assert not model.is_gradient_checkpointing
    set_checkpointing(model, quantised, train=True)
    assert model.is_gradient_checkpointing
    assert create(replace(tiny, gradient_checkpointing=True), LABELS, tokenizer_folder).model.is_gradient_checkpointing


def test_a_model_that_cannot_checkpoint_is_refused() -> None:
    class Plain(torch.nn.Module):
        def gradient_checkpointing_enable(self, **_: Any) -> None:
            raise ValueError("Plain does not support gradient checkpointing.")

    with pytest.raises(SettingsError, match=r"^model\.gradient_checkpointing: Plain does not .*; set it to false$"):
        set_checkpointing(Plain(), ModelSettings(gradient_checkpointing=True), train=True)


def test_images_keep_their_proportions_within_the_number_of_pixels(model_folder: Path, tmp_path: Path) -> None:
    wide, small = tmp_path / "wide.png", tmp_path / "small.png"
    Image.new("RGB", (800, 400)).save(wide)
    Image.new("RGB", (40, 80)).save(small)
    settings = ModelSettings(str(model_folder), image_size=0, min_pixels=56 * 112, max_pixels=224 * 112)
    backbone = create(settings, LABELS, Path("unused"), train=False)
    grids = [
        backbone.encoder.encode([("a post", Media((image,)))])["image_grid_thw"][0].tolist() for image in (wide, small)
    ]
    sides = [(height * 14, width * 14) for _, height, width in grids]
    assert sides == [(112, 224), (112, 56)]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"image_size": 56, "max_pixels": 9000},
         "model.max_pixels needs model.image_size 0: now images become squares of 56 pixels"),
        ({"min_pixels": 9000, "max_pixels": 8000}, "model.min_pixels: 9000 is more than model.max_pixels, 8000"),
        ({"min_pixels": 2**30}, "model.min_pixels: 1073741824 is more than model.max_pixels, "),
    ],
)  # fmt: skip
def test_impossible_numbers_of_pixels_are_refused(model_folder: Path, changes: dict[str, Any], problem: str) -> None:
    settings = ModelSettings(str(model_folder), **{"image_size": 0, **changes})
    with pytest.raises(SettingsError) as caught:
        create(settings, LABELS, Path("unused"), train=False)
    assert str(caught.value).startswith(problem)


def test_a_processor_that_resizes_to_one_size_takes_no_number_of_pixels() -> None:
    from transformers import CLIPImageProcessorPil

    class Processor:
        image_processor = CLIPImageProcessorPil()

    with pytest.raises(SettingsError, match=r"^model\.max_pixels: CLIPImageProcessorPil does not take a number of pix"):
        limit_pixels(Processor(), ModelSettings(image_size=0, max_pixels=1000))

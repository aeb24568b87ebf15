"""Write the student as a transformers folder with merged weights and a model card."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, hf_hub_download
from peft import PeftModel

from distill.export.check import Check
from distill.files import atomic_folder, write_json, write_text
from distill.models.backbone import Backbone, hide_progress_bars, load
from distill.models.hub import load_from_hub
from distill.models.text_models import TEMPLATE_VARIABLES
from distill.settings import Natural, Settings
from distill.task.prompts import CLASSIFY_PREFIX, render
from distill.task.sample import Sample


@dataclass
class ExportSettings(Settings):
    """Export of the student."""

    check_samples: Natural = 64
    """Number of validation posts on which the reloaded export must give the student's logits and labels."""


def export(
    student: Backbone,
    samples: Sequence[Sample],
    folder: Path,
    adapter: Path,
    card: str,
    settings: ExportSettings,
    keep: Sequence[str] = (),
) -> dict[str, Any]:
    """Write `folder` atomically: merged weights as safetensors, processor, chat template, model card, and `adapter/`.

    The adapter is merged in float32, and the weights are cast once to the student's dtype. A student with a quantised
    base is merged into the model that was quantised. The folder is checked before it replaces an earlier export.

    Args:
        samples: the first `settings.check_samples` are used for the check.
        adapter: folder of the student's weights. An adapter there is copied, unless it is for some layers of its base.
        card: text of the model card.
        keep: files of an earlier folder, relative to it, that stay.

    Returns:
        The result of the check (`check.py`).

    Raises:
        RunError: the reloaded model gives other results, or does not load.
    """
    dtype = getattr(torch, student.settings.dtype)
    rounded, adapted, lora = dtype != torch.float32, isinstance(student.model, PeftModel), student.settings.lora
    check = Check.begin(student, samples[: settings.check_samples])
    if quantised := lora is not None and lora.quantize:
        unquantised = replace(student.settings, lora=replace(lora, quantize=False))
        student = load(unquantised, student.labels, adapter)
    check.record(student, changed=quantised)
    if rounded:
        student = _in_float32(student, adapter)
    check.record(student, changed=rounded)
    student.model = model = student.merged().eval()
    check.record(student, changed=adapted)
    _cast(model, dtype, torch.float32)
    check.record(student, changed=adapted and rounded)  # weights without an adapter are in the dtype already
    _cast(model, dtype)
    with atomic_folder(folder, keep) as new:
        with hide_progress_bars():
            model.save_pretrained(new)  # type: ignore[operator]
            student.processor.save_pretrained(new)
        if (adapter / "adapter_config.json").exists() and student.settings.keep_layers is None:  # peft loads all layers
            shutil.copytree(adapter, new / "adapter")
        check.reload(new)
        result = check.result()
        write_text(new / "README.md", card)
        write_json(new / "export.json", result)
    return result


def _in_float32(student: Backbone, adapter: Path) -> Backbone:
    """The student with its weights, computed in float32. It is loaded again, since buffers that are not stored, such as
    the scale of Gemma's embeddings, depend on the dtype in which a model is loaded."""
    again = load(replace(student.settings, dtype="float32"), student.labels, adapter)
    dtypes = {name: weights.dtype for name, weights in student.model.named_parameters()}
    for name, weights in again.model.named_parameters():
        weights.data = weights.data.to(dtypes[name]).float()
    return again


def _cast(model: torch.nn.Module, *dtypes: torch.dtype) -> None:
    """Convert the weights of a model, not its buffers, to dtypes, one after the other."""
    for weights in model.parameters():
        for dtype in dtypes:
            weights.data = weights.data.to(dtype)


def model_card(
    name: str,
    base: str,
    licence: str,
    data: str,
    recipe: str,
    metrics: Mapping[str, Any],
    example: Sample,
    student: Backbone,
    reasons: bool = True,
) -> str:
    """Text of the model card (README.md): prompts, test metrics, data and recipe.

    Args:
        base: name of the base model; empty for a tiny model.
        recipe: the resolved recipe as YAML.
        metrics: test metrics of the student.
        example: sample for which the prompts are shown.
        reasons: whether the student was trained to generate rationales.
    """
    with_images, text_only = student.encoder.reads_images, student.processor.image_processor is None
    task = "text-generation" if text_only else "image-text-to-text"
    header = {"library_name": "transformers", "pipeline_tag": task, "license": licence}
    if base:
        header["base_model"] = base
    keys = (
        "n", "accuracy", "weighted_f1", "macro_f1", "ece", "mae", "correlation", "acc2_with_zero", "acc2_without_zero",
        "reasoned_accuracy", "parse_rate", "consistency",
    )  # fmt: skip
    rows = "\n".join(f"| {key} | {value:.4g} |" for key in keys if isinstance(value := metrics.get(key), int | float))
    fence = "`" * 3
    rule = "the most probable label token"
    if student.labels_share_tokens:
        rule = "the label with the highest probability of all its tokens and the end token"
    origin = base or "a tiny Qwen2.5-VL with random weights"
    if student.settings.keep_layers is not None:
        config: Any = student.model.config
        origin = f"{config.get_text_config().num_hidden_layers} layers of {origin}"
    values = reasoning = ""
    if (scale := student.labels.scale) is not None:
        centres = ", ".join(f"{centre:g}" for centre in scale.centres)
        values = f"The value is the sum of the bin centres ({centres}), weighted by the label probabilities.\n\n"
    if reasons:
        prompt = render("reason", example, student.labels)
        reasoning = f"The *reason* prompt generates a rationale of five fields:\n\n{fence}text\n{prompt}\n{fence}\n\n"
    posts = "posts with text and images" if with_images else "the texts of posts"
    before, size = ", whose images go before the text in the message", f"{student.settings.image_size} pixels"
    images = f"Images are resized to squares of {size} (0: resized by the processor).\n\n" if with_images else ""
    variables = ""
    if text_only and (used := [name for name in TEMPLATE_VARIABLES if name in student.processor.chat_template]):
        values_used = ", ".join(f"`{name}={TEMPLATE_VARIABLES[name]!r}`" for name in used)
        variables = f"The chat template was applied with {values_used}.\n\n"
    text = f"""# {name}

A student model that classifies the sentiment of {posts}{" and explains it" if reasons else ""},
trained with `distill` (MulCoT-RD, arXiv 2508.05234) from {origin}.
Labels: {", ".join(student.labels.names)}.

## Usage

The label is {rule} after the *classify* prompt and the forced prefix `{CLASSIFY_PREFIX}`. The
prompt for one post{before if with_images else ""}:

{fence}text
{render("classify", example, student.labels)}
{fence}

{values}{reasoning}{images}{variables}The weights are in {student.settings.dtype}; `export.json` compares them with the
student before its adapter was merged.

## Test metrics

| metric | value |
| --- | --- |
{rows}

## Data

{data}

## Recipe

{fence}yaml
{recipe.strip()}
{fence}
"""
    card = ModelCard(f"---\n{_front_matter(header)}---\n\n{text}")
    return str(card)


def base_licence(path: str, revision: str) -> str:
    """The licence in the card of the base model; `other` if the card cannot be read, `apache-2.0` for tiny models."""
    if not path:
        return "apache-2.0"
    try:
        if Path(path).is_dir():
            source: str | Path = Path(path) / "README.md"
        else:
            source = load_from_hub(partial(hf_hub_download, filename="README.md"), path, revision=revision)
        card = ModelCard.load(source)
        return str(card.data.get("license") or "other")
    except Exception:  # noqa: BLE001 - offline, no card, or an invalid card: the licence is unknown
        return "other"


def _front_matter(header: Mapping[str, str]) -> str:
    return "".join(f"{key}: {value}\n" for key, value in header.items())

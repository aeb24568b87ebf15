"""Write the student as a plain transformers folder, and check it in a process that knows nothing of this package."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from distill.errors import RunError
from distill.files import atomic_folder, read_json, write_json, write_text
from distill.models.backbone import Backbone, quiet
from distill.task.prompts import CLASSIFY_PREFIX, render
from distill.task.sample import Sample

TOLERANCE = 1e-4
"""Largest difference of logits, in float32, between the trained student and the reloaded export."""

_BATCH = 8


@dataclass
class ExportSettings:
    """How the student is exported."""

    check_samples: int = 32
    """Test posts on which the reloaded export must answer as the student did."""


def export(
    student: Backbone, samples: Sequence[Sample], folder: Path, adapter: Path, card: str, settings: ExportSettings
) -> dict[str, Any]:
    """Write `folder`: merged weights as safetensors, processor, chat template, model card, and `adapter/`.

    The folder appears whole and checked, or not at all. Returns the figures of the check.

    Raises:
        RunError: the reloaded model answers differently, or does not load.
    """
    dtype = student.model.dtype
    model = student.merged().eval()
    with atomic_folder(folder) as new:
        with quiet():
            model.save_pretrained(new)  # type: ignore[operator]
            student.processor.save_pretrained(new)
        _name_standard_classes(new)
        if (adapter / "adapter_config.json").exists():
            shutil.copytree(adapter, new / "adapter")
        figures = check(new, model.float(), student, samples[: settings.check_samples])
        model.to(dtype)  # type: ignore[arg-type]
        write_text(new / "README.md", card)
        write_json(new / "export.json", figures)
    return figures


@torch.inference_mode()
def check(folder: Path, model: torch.nn.Module, student: Backbone, samples: Sequence[Sample]) -> dict[str, Any]:
    """Reload `folder` in a fresh process and compare logits and labels. Raises RunError where they differ."""
    batches = []
    for first in range(0, len(samples), _BATCH):
        inputs = student.encode(samples[first : first + _BATCH], "classify")
        last = inputs["attention_mask"].sum(1) - 1
        moved = {name: value.to(student.device) for name, value in inputs.items()}
        logits = model(**moved).logits[torch.arange(len(last)), last].float().cpu()
        batches.append({"inputs": inputs, "logits": logits})
    with tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch) / "expected.pt"
        torch.save({"batches": batches, "label_ids": student.label_ids}, expected)
        command = [sys.executable, "-I", str(Path(__file__).with_name("reload.py")), str(folder), str(expected)]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode:
        lines = outcome.stderr.strip().splitlines()
        raise RunError(f"export: {folder} does not load with transformers alone: {lines[-1] if lines else 'no output'}")
    figures: dict[str, Any] = json.loads(outcome.stdout.strip().splitlines()[-1])
    if figures["difference"] > TOLERANCE or figures["labels_equal"] < figures["samples"]:
        raise RunError(
            f"export: reloaded, {figures['labels_equal']} of {figures['samples']} labels agree and logits differ by "
            f"{figures['difference']:.1e}, more than {TOLERANCE:.0e}"
        )
    return figures


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
    """The README.md of an exported student: what it is, how to ask it, what it was made from, how good it is.

    `reasons` says whether it learned to reason.
    """
    header = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "license": licence}
    if base:
        header["base_model"] = base
    shown = (
        "n", "accuracy", "weighted_f1", "macro_f1", "ece", "mae", "correlation", "acc2_with_zero", "acc2_without_zero",
        "reasoned_accuracy", "parse_rate", "consistency",
    )  # fmt: skip
    rows = "\n".join(f"| {key} | {value:.4g} |" for key in shown if isinstance(value := metrics.get(key), int | float))
    fence = "`" * 3
    scored = "the likeliest label token"
    if student.labels_share_tokens:
        scored = "that of the highest probability, over all its tokens and the end token,"
    values = reasoning = ""
    if (scale := student.labels.scale) is not None:
        centres = ", ".join(f"{centre:g}" for centre in scale.centres)
        values = f"The value is the sum of the bins' centres ({centres}), each times its label's probability.\n\n"
    if reasons:
        question = render("reason", example, student.labels)
        reasoning = f"It reasons in five fields when asked:\n\n{fence}text\n{question}\n{fence}\n\n"
    text = f"""# {name}

A student that classifies the sentiment of posts with text and images{" and can reason about them" if reasons else ""},
made with `distill` (MulCoT-RD, arXiv 2508.05234) from {base or "a tiny Qwen2.5-VL built from a config"}.
Labels: {", ".join(student.labels.names)}.

## Asking it

The label is {scored} after the forced prefix `{CLASSIFY_PREFIX}` of the *classify* question, here for
one post (pictures go before it in the message):

{fence}text
{render("classify", example, student.labels)}
{fence}

{values}{reasoning}Pictures are resized to squares of {student.settings.image_size} pixels (0: as the processor does).

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
    """The licence that the base model's card names, where the card can be had; `other` where not.

    A tiny model has no base, and is the user's own.
    """
    if not path:
        return "apache-2.0"
    try:
        source = Path(path) / "README.md" if Path(path).is_dir() else None
        card = ModelCard.load(source if source else path)
        return str(card.data.get("license") or "other")
    except Exception:  # noqa: BLE001 - offline, no card, or one that cannot be read: the licence is simply not known
        return "other"


def _front_matter(header: Mapping[str, str]) -> str:
    return "".join(f"{key}: {value}\n" for key, value in header.items())


def _name_standard_classes(folder: Path) -> None:
    """Name the classes that transformers itself has, and give its processor the video half it looks for."""
    path = folder / "processor_config.json"
    if not path.exists():
        return
    config = read_json(path)
    if config.get("processor_class") != "ImageOnlyProcessor":
        return
    config["processor_class"] = "Qwen2_5_VLProcessor"
    pictures = dict(config["image_processor"])
    pictures.pop("image_processor_type", None)
    config["video_processor"] = pictures | {"video_processor_type": "Qwen2VLVideoProcessor"}
    write_json(path, config)
    words = folder / "tokenizer_config.json"
    settings = read_json(words)
    settings["processor_class"] = "Qwen2_5_VLProcessor"
    write_json(words, settings)

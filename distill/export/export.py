"""Write the student as a transformers folder, and check it in a process that does not import this package."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, hf_hub_download

from distill.errors import RunError
from distill.files import atomic_folder, write_json, write_text
from distill.models.backbone import Backbone, hide_progress_bars
from distill.models.hub import load_from_hub
from distill.settings import Natural, Settings
from distill.task.prompts import CLASSIFY_PREFIX, render
from distill.task.sample import Sample

TOLERANCE = 1e-4
"""Maximum difference of logits, in float32, between the student and the reloaded export."""

_BATCH = 8


@dataclass
class ExportSettings(Settings):
    """Export of the student."""

    check_samples: Natural = 32
    """Number of test posts on which the reloaded export must give the student's logits and labels."""


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

    The folder is checked before it replaces an earlier export.

    Args:
        samples: the first `settings.check_samples` are used for the check.
        adapter: folder of the adapter; copied if it holds one.
        card: text of the model card.
        keep: files of an earlier folder, relative to it, that stay.

    Returns:
        The result of `check`.

    Raises:
        RunError: the reloaded model gives other results, or does not load.
    """
    dtype = student.model.dtype
    model = student.merged().eval()
    with atomic_folder(folder, keep) as new:
        with hide_progress_bars():
            model.save_pretrained(new)  # type: ignore[operator]
            student.processor.save_pretrained(new)
        if (adapter / "adapter_config.json").exists():
            shutil.copytree(adapter, new / "adapter")
        result = check(new, model.float(), student, samples[: settings.check_samples])
        model.to(dtype)  # type: ignore[arg-type]
        write_text(new / "README.md", card)
        write_json(new / "export.json", result)
    return result


@torch.inference_mode()
def check(folder: Path, model: torch.nn.Module, student: Backbone, samples: Sequence[Sample]) -> dict[str, Any]:
    """Reload `folder` in a new process and compare the logits and labels of the *classify* prompt.

    Returns:
        `samples`, `labels_equal`, and `difference`, the maximum absolute difference of logits in float32.

    Raises:
        RunError: logits or labels differ, or the folder does not load.
    """
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
        process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines()
        raise RunError(f"export: {folder} does not load with transformers alone: {lines[-1] if lines else 'no output'}")
    result: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    if result["difference"] > TOLERANCE or result["labels_equal"] < result["samples"]:
        raise RunError(
            f"export: after reloading, {result['labels_equal']} of {result['samples']} labels agree and logits differ "
            f"by {result['difference']:.1e}; the limit is {TOLERANCE:.0e}"
        )
    return result


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
    header = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "license": licence}
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
    values = reasoning = ""
    if (scale := student.labels.scale) is not None:
        centres = ", ".join(f"{centre:g}" for centre in scale.centres)
        values = f"The value is the sum of the bin centres ({centres}), weighted by the label probabilities.\n\n"
    if reasons:
        prompt = render("reason", example, student.labels)
        reasoning = f"The *reason* prompt generates a rationale of five fields:\n\n{fence}text\n{prompt}\n{fence}\n\n"
    text = f"""# {name}

A student model that classifies the sentiment of posts with text and images{" and explains it" if reasons else ""},
trained with `distill` (MulCoT-RD, arXiv 2508.05234) from {base or "a tiny Qwen2.5-VL with random weights"}.
Labels: {", ".join(student.labels.names)}.

## Usage

The label is {rule} after the *classify* prompt and the forced prefix `{CLASSIFY_PREFIX}`. The
prompt for one post, whose images go before the text in the message:

{fence}text
{render("classify", example, student.labels)}
{fence}

{values}{reasoning}Images are resized to squares of {student.settings.image_size} pixels (0: resized by the processor).

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

"""Write the student as a transformers folder with merged weights and a model card."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from distill.export.card import scoring
from distill.export.check import Check
from distill.export.reload import digests
from distill.files import atomic_folder, write_json, write_text
from distill.models.backbone import Backbone, hide_progress_bars, load
from distill.models.lora import merged_weights
from distill.settings import Natural, Settings
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
    """Write `folder` atomically: merged weights as safetensors, processor, chat template, model card,
    `scoring.json` (`card.scoring`) and `adapter/`.

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
        student = load(unquantised, student.labels, adapter, clips=student.encoder.media.clips)
    check.record(student, changed=quantised)
    if rounded:
        student = _in_float32(student, adapter)
    check.record(student, changed=rounded)
    expected = digests(merged_weights(student.model))
    student.model = model = student.merged().eval()
    check.compare("merging", expected, digests(model.named_parameters(remove_duplicate=False)))
    check.record(student, changed=adapted)
    _cast(model, dtype, torch.float32)
    check.record(student, changed=adapted and rounded)  # weights without an adapter are in the dtype already
    _cast(model, dtype)
    check.weights = digests(model.named_parameters(remove_duplicate=False))
    with atomic_folder(folder, keep) as new:
        with hide_progress_bars():
            model.save_pretrained(new)  # type: ignore[operator]
            student.processor.save_pretrained(new)
        if (adapter / "adapter_config.json").exists() and student.settings.keep_layers is None:  # peft loads all layers
            shutil.copytree(adapter, new / "adapter")
        check.reload(new)
        result = check.result()
        write_text(new / "README.md", card)
        write_json(new / "scoring.json", scoring(student))
        write_json(new / "export.json", result)
    return result


def _in_float32(student: Backbone, adapter: Path) -> Backbone:
    """The student with its weights, computed in float32. It is loaded again, since buffers that are not stored, such as
    the scale of Gemma's embeddings, depend on the dtype in which a model is loaded."""
    again = load(replace(student.settings, dtype="float32"), student.labels, adapter, clips=student.encoder.media.clips)
    dtypes = {name: weights.dtype for name, weights in student.model.named_parameters()}
    for name, weights in again.model.named_parameters():
        weights.data = weights.data.to(dtypes[name]).float()
    return again


def _cast(model: torch.nn.Module, *dtypes: torch.dtype) -> None:
    """Convert the weights of a model, not its buffers, to dtypes, one after the other."""
    for weights in model.parameters():
        for dtype in dtypes:
            weights.data = weights.data.to(dtype)

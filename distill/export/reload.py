"""Script run by `check.py`: load an exported folder with transformers alone, and compute its logits.

    python reload.py FOLDER BATCHES.pt LOGITS.pt [WEIGHTS.json]

BATCHES.pt holds batches of right-padded model inputs. Writes the logits [N, V] at the last tokens of all N samples,
computed in float32 from the weights of the folder, so that only its content counts, and the digests of the weights.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def digests(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """SHA-256 of each tensor in float32, by its name."""
    return {
        name: hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().data).hexdigest()
        for name, tensor in weights
    }


def main(folder: str, batches: str, logits: str, weights: str = "") -> None:
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        auto = AutoModelForImageTextToText
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.inference_mode():
        for inputs in torch.load(batches, weights_only=True):
            last = inputs["attention_mask"].sum(1) - 1
            found.append(model(**inputs).logits[torch.arange(len(last)), last])
    assert "distill" not in sys.modules
    torch.save(torch.cat(found) if found else torch.zeros(0, 1), logits)
    if weights:
        Path(weights).write_text(json.dumps(digests(model.named_parameters(remove_duplicate=False))))


if __name__ == "__main__":
    main(*sys.argv[1:])

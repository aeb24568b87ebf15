"""Script run by `export.py`: load an exported folder with transformers alone, and compare its logits.

    python reload.py FOLDER EXPECTED.pt

EXPECTED.pt holds the label token ids, and batches of model inputs with the logits [B, V] at their last tokens. Prints
one JSON object: `difference`, the maximum absolute difference of logits in float32; `labels_equal`, the number of
samples whose most probable label token agrees; and `samples`, the number of samples.
"""

import json
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def main(folder: str, expected: str) -> None:
    with_images = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = AutoModelForImageTextToText if with_images else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    stored = torch.load(expected, weights_only=True)
    difference, equal, count = 0.0, 0, 0
    with torch.inference_mode():
        for batch in stored["batches"]:
            last = batch["inputs"]["attention_mask"].sum(1) - 1
            logits = model(**batch["inputs"]).logits[torch.arange(len(last)), last]
            delta = (logits - batch["logits"]).abs().nan_to_num(nan=torch.inf)  # Python's `max` ignores NaN
            difference = max(difference, float(delta.max()))
            ids = stored["label_ids"]
            equal += int((logits[:, ids].argmax(-1) == batch["logits"][:, ids].argmax(-1)).sum())
            count += len(last)
    assert "distill" not in sys.modules
    print(json.dumps({"difference": difference, "labels_equal": equal, "samples": count}))


if __name__ == "__main__":
    main(*sys.argv[1:])

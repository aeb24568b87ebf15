"""Run as a script by `export.py`: load an exported folder with transformers alone, and say what it answers.

    python reload.py FOLDER EXPECTED.pt

EXPECTED.pt holds batches of model inputs with the logits [B, V] at their last tokens. Prints one JSON object:
`difference`, the largest absolute difference of logits in float32, and `labels_equal`, of the label tokens' argmax.
"""

import json
import sys

import torch
from transformers import AutoModelForImageTextToText


def main(folder: str, expected: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    stored = torch.load(expected, weights_only=True)
    difference, equal, count = 0.0, 0, 0
    with torch.inference_mode():
        for batch in stored["batches"]:
            last = batch["inputs"]["attention_mask"].sum(1) - 1
            logits = model(**batch["inputs"]).logits[torch.arange(len(last)), last]
            off = (logits - batch["logits"]).abs().nan_to_num(nan=torch.inf)  # which `max` would pass over
            difference = max(difference, float(off.max()))
            ids = stored["label_ids"]
            equal += int((logits[:, ids].argmax(-1) == batch["logits"][:, ids].argmax(-1)).sum())
            count += len(last)
    assert "distill" not in sys.modules
    print(json.dumps({"difference": difference, "labels_equal": equal, "samples": count}))


if __name__ == "__main__":
    main(*sys.argv[1:])

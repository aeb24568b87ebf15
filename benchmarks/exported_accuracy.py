"""Evaluate an exported student with transformers alone, beside the figures of the stage *evaluate*.

    python benchmarks/exported_accuracy.py runs/quickstart [--posts 200] [--json FILE]

Reads the test posts and the predictions of the run from `evaluate/predictions.jsonl`, images from `data.root`, and how
a label is read from `export/scoring.json`. Nothing of `distill` is imported. Prints the metrics of both, the number of
equal labels and the largest difference of the probabilities. The model is computed in the dtype of its weights, or in
that of --dtype: rounding to bfloat16 moves probabilities by some hundredths.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageOps
from sklearn.metrics import f1_score
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import is_torchvision_available

Post = Mapping[str, Any]
"""A row of `predictions.jsonl`."""


class Student:
    """An exported folder, loaded with transformers."""

    def __init__(self, folder: Path, dtype: str = "auto") -> None:
        self.scoring = json.loads((folder / "scoring.json").read_text(encoding="utf-8"))
        multimodal = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        loader = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        self.model = loader.from_pretrained(folder, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_processor = self.processor = None
        if multimodal and (is_torchvision_available() or not self.model.config.model_type.startswith("qwen2")):
            self.processor = AutoProcessor.from_pretrained(folder)
        elif multimodal:
            self.image_processor = AutoImageProcessor.from_pretrained(folder)
        marked = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self._control = re.compile(
            "|".join(re.escape(token) for token in sorted(marked, key=len, reverse=True)) or "(?!)"
        )

    @torch.inference_mode()
    def probabilities(self, post: Post, images: Sequence[Image.Image] = ()) -> np.ndarray:
        """Label probabilities [K] of a post."""
        prompt, scores = self._prompt(post, len(images)), []
        for tokens in self.scoring["label_tokens"]:
            if len(tokens) > 1 or not scores:
                inputs = self._encode(prompt + self.tokenizer.decode(tokens[:-1]), images)
                logprobs = self.model(**inputs, logits_to_keep=len(tokens)).logits[0].float().log_softmax(-1)
            scores.append(logprobs[range(len(tokens)), tokens].sum())
        return torch.stack(scores).double().softmax(0).numpy()

    def _prompt(self, post: Post, images: int) -> str:
        """The message in the chat template, with the forced prefix."""
        template = self.scoring["prompt" if post["aspect"] is None else "prompt_with_aspect"]
        values = {"{text}": post["text"], "{aspect}": post["aspect"]}
        lines = re.sub(r"\{text\}|\{aspect\}", lambda match: " ".join(values[match[0]].split()), template)
        text = self._control.sub(lambda token: f"{token[0][0]} {token[0][1:]}", lines)
        content: Any = text
        renderer = self.processor or self.tokenizer
        if self.processor or self.image_processor:
            content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
        options = {"add_generation_prompt": True, "tokenize": False, **self.scoring["template_variables"]}
        return renderer.apply_chat_template([{"role": "user", "content": content}], **options) + self.scoring["prefix"]

    def _encode(self, text: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        options = {"add_special_tokens": self.scoring["add_special_tokens"], "return_tensors": "pt"}
        if self.processor:
            return dict(self.processor(text=[text], images=[list(images)] if images else None, **options))
        pixels: dict[str, Any] = {}
        if self.image_processor and images:  # what the processor of Qwen2-VL and Qwen2.5-VL does
            pixels = dict(self.image_processor(images=list(images), return_tensors="pt"))
            sizes = (pixels["image_grid_thw"].prod(1) // self.image_processor.merge_size**2).tolist()
            first, *rest = text.split("<|image_pad|>")
            text = first + "".join("<|image_pad|>" * size + part for size, part in zip(sizes, rest, strict=True))
        inputs = dict(self.tokenizer([text], return_token_type_ids=False, **options))
        if self.image_processor:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.image_token_id).int()
        return inputs | pixels


def evaluate(run: Path, posts: int | None = None, dtype: str = "auto") -> dict[str, Any]:
    """Evaluate the export of a run on its first test posts.

    Returns:
        `n`; `transformers` and `distill`: metrics by name, of the same posts; `labels_equal`; `difference`: the largest
        one of the probabilities; `metrics_json`: the metrics of `evaluate/metrics.json`, of all test posts.
    """
    rows = [json.loads(line) for line in (run / "evaluate" / "predictions.jsonl").read_text("utf-8").splitlines()]
    rows = rows[:posts]
    root = Path(yaml.safe_load((run / "recipe.yaml").read_text("utf-8"))["data"]["root"] or ".")
    student = Student(run / "export", dtype)
    size, found = student.scoring["image_size"], []
    for row in rows:
        paths = [root / path for path in row["images"] if size is not None]
        images = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in paths]
        found.append(student.probabilities(row, [image.resize((size, size)) if size else image for image in images]))
    ours = np.array([row["roles"]["student"]["probabilities"] for row in rows])
    probabilities = np.array(found)
    return {
        "n": len(rows),
        "transformers": metrics(rows, probabilities, student.scoring),
        "distill": metrics(rows, ours, student.scoring),
        "labels_equal": int((probabilities.argmax(1) == ours.argmax(1)).sum()),
        "difference": float(abs(probabilities - ours).max()),
        "metrics_json": json.loads((run / "evaluate" / "metrics.json").read_text("utf-8"))["student"],
    }


def metrics(rows: Sequence[Post], probabilities: np.ndarray, scoring: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy and macro F1 of the labels; on a scale also the mean absolute error and Pearson's correlation."""
    gold, labels = [row["gold"] for row in rows], [scoring["labels"][index] for index in probabilities.argmax(1)]
    found = {"accuracy": float(np.mean([label == name for label, name in zip(labels, gold, strict=True)]))}
    found["macro_f1"] = float(f1_score(gold, labels, labels=scoring["labels"], average="macro", zero_division=0))
    if scoring["values"] is not None:
        truth, values = np.array([row["value"] for row in rows]), probabilities @ np.array(scoring["values"])
        found["mae"] = float(abs(truth - values).mean())
        found["correlation"] = float(np.corrcoef(truth, values)[0, 1])
        signed = truth != 0
        found["acc2_without_zero"] = float(((values > 0) == (truth > 0))[signed].mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run with evaluate/ and export/")
    parser.add_argument("--posts", type=int, help="only the first test posts")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the computation")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    result = evaluate(arguments.run, arguments.posts, arguments.dtype)
    assert "distill" not in sys.modules
    print("| metric | transformers | predictions.jsonl | metrics.json |\n| --- | --- | --- | --- |")
    for name, value in result["transformers"].items():
        whole = result["metrics_json"].get(name)
        print(f"| {name} | {value:.6f} | {result['distill'][name]:.6f} | {'' if whole is None else f'{whole:.6f}'} |")
    print(f"{result['labels_equal']} of {result['n']} labels equal; probabilities differ by {result['difference']:.1e}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

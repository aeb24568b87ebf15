"""Conversion of stored reasoning data to trl's conversational prompt-completion format with images.

The stages store reasoning data as jsonl, which `datasets.load_dataset("json", data_files=...)` reads directly. With the
function below, trl's `SFTTrainer` trains on the same prompts and answers as the assistant and the student:

    dataset = to_prompt_completion("runs/twitter15/augment/rationales.jsonl", "data/twitter15", LabelSpace())
    SFTTrainer(model, SFTConfig(max_length=None), train_dataset=dataset, processing_class=processor)
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, Features, Image, List, Value

from distill.data import jsonl
from distill.errors import SettingsError
from distill.models.encoding import USUAL_CONTROL_TOKENS, control_tokens, escape
from distill.task.labels import LabelSpace
from distill.task.prompts import render
from distill.task.sample import Sample

Task = Literal["reason", "classify"]

_MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
FEATURES = Features({"prompt": _MESSAGES, "completion": _MESSAGES, "images": List(Image(mode="RGB"))})


def to_prompt_completion(
    path: Path | str,
    root: Path | str,
    labels: LabelSpace,
    tasks: Sequence[Task] = ("reason", "classify"),
    processor: Any = None,
) -> Dataset:
    """Convert stored reasoning data to trl's prompt-completion format for vision-language models.

    Each row of the file yields one conversation per task for which it has an answer: the stored rationale for *reason*,
    `"Prediction": <label>` for *classify*. Images precede the prompt text and are decoded on access. Control tokens in
    posts and rationales, such as `<|im_end|>`, are escaped by a space.

    Args:
        path: jsonl file with rows `{id, text, aspect, label, images, rationale, ...}`, as written by the stages.
        root: folder to which the image paths of the rows are relative.
        labels: label space of the rows.
        tasks: tasks to include, from reason and classify.
        processor: processor of the model to train; its own control tokens are escaped, too. Without it, those of common
            model families.

    Returns:
        Dataset with the columns `prompt` and `completion`, lists of messages with structured content, and `images`.

    Raises:
        SettingsError: the file is missing or has no answer to any of the tasks, or a row is not valid JSON, has no id,
            neither text nor image, an unknown label, or an image that is missing or outside the root.
    """
    if not tasks or not set(tasks) <= {"reason", "classify"}:
        raise SettingsError(f"tasks must be reason, classify or both, not {', '.join(tasks) or 'empty'}")
    if not Path(path).is_file():
        raise SettingsError(f"{path} is missing")
    patterns = [USUAL_CONTROL_TOKENS] if processor is None else [USUAL_CONTROL_TOKENS, control_tokens(processor)]
    conversations = [
        conversation
        for row in jsonl.read(Path(path))
        for conversation in _conversations(row, Path(root), labels, tasks, patterns, Path(path))
    ]
    if not conversations:
        raise SettingsError(f"{path} has no answers to {' or '.join(tasks)}")
    return Dataset.from_list(conversations, features=FEATURES)


def _conversations(
    row: jsonl.Row,
    root: Path,
    labels: LabelSpace,
    tasks: Sequence[Task],
    patterns: Sequence[re.Pattern[str]],
    path: Path,
) -> Iterator[dict[str, Any]]:
    sample = _sample(row, root, labels, f"{path} row {row.number}")

    def escaped(text: str) -> str:
        for pattern in patterns:
            text = escape(text, pattern)
        return text

    answers = {
        "reason": sample.rationale,
        "classify": None if sample.label is None else f"{labels.wording.prefix} {sample.label}",
    }
    for task in tasks:
        if answer := answers[task]:
            content = [{"type": "image", "text": None}] * len(sample.images)
            content.append({"type": "text", "text": escaped(render(task, sample, labels))})
            yield {
                "prompt": [{"role": "user", "content": content}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": escaped(answer)}]}],
                "images": [str(image) for image in sample.images],
            }


def _sample(row: jsonl.Row, root: Path, labels: LabelSpace, where: str) -> Sample:
    """The sample of a row. Raises SettingsError if the row cannot be used."""
    if row.problem is not None:
        raise SettingsError(f"{where} {row.problem}")
    try:
        sample = jsonl.to_sample(row.fields, root)
        if sample.label is not None:
            sample = replace(sample, label=labels.from_data(sample.label))  # type: ignore[arg-type]
            labels.index(sample.label)
    except ValueError as error:
        raise SettingsError(f"{where}: {error}") from None
    for image in sample.images:
        if not image.is_file():
            raise SettingsError(f"{where}: image {os.path.relpath(image, root.resolve())} is missing in {root}")
    return sample

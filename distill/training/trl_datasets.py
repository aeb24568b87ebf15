"""Conversion of stored reasoning data to trl's conversational prompt-completion format with images.

The stages store reasoning data as jsonl, which `datasets.load_dataset("json", data_files=...)` reads directly. With the
function below, trl's `SFTTrainer` trains on the same prompts and answers as the assistant and the student:

    dataset = to_prompt_completion("runs/twitter15/augment/rationales.jsonl", "data/twitter15", LabelSpace())
    SFTTrainer(model, SFTConfig(max_length=None), train_dataset=dataset, processing_class=processor)
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, Features, Image, List, Value, load_dataset

from distill.data.images import ImageError, resolve
from distill.errors import SettingsError
from distill.task.labels import LabelSpace
from distill.task.prompts import CLASSIFY_PREFIX, render
from distill.task.sample import Sample

Task = Literal["reason", "classify"]

_MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
FEATURES = Features({"prompt": _MESSAGES, "completion": _MESSAGES, "images": List(Image(mode="RGB"))})


def to_prompt_completion(
    path: Path | str, root: Path | str, labels: LabelSpace, tasks: Sequence[Task] = ("reason", "classify")
) -> Dataset:
    """Convert stored reasoning data to trl's prompt-completion format for vision-language models.

    Each row of the file yields one conversation per task for which it has an answer: the stored rationale for *reason*,
    `"Prediction": <label>` for *classify*. Images precede the prompt text and are decoded on access.

    Args:
        path: jsonl file with rows `{id, text, aspect, label, images, rationale, ...}`, as written by the stages.
        root: folder to which the image paths of the rows are relative.
        labels: label space of the rows.
        tasks: tasks to include, from reason and classify.

    Returns:
        Dataset with the columns `prompt` and `completion`, lists of messages with structured content, and `images`.

    Raises:
        SettingsError: the file cannot be read or has no answer to any of the tasks, or a row has no id or text, an
            unknown label, or an image that is missing or outside the root.
    """
    if not tasks or not set(tasks) <= {"reason", "classify"}:
        raise SettingsError(f"tasks must be reason, classify or both, not {', '.join(tasks) or 'empty'}")
    if not Path(path).is_file():
        raise SettingsError(f"{path} is missing")
    try:
        rows = load_dataset("json", data_files=str(path), split="train")
    except Exception as error:  # datasets wraps errors of pyarrow and json in its own classes
        raise SettingsError(f"{path} cannot be read as jsonl: {str(error).strip().splitlines()[0]}") from error
    conversations = [
        conversation
        for number, row in enumerate(rows, start=1)
        for conversation in _conversations(row, Path(root), labels, tasks, f"{path} row {number}")
    ]
    if not conversations:
        raise SettingsError(f"{path} has no answers to {' or '.join(tasks)}")
    return Dataset.from_list(conversations, features=FEATURES)


def _conversations(
    row: Mapping[str, Any], root: Path, labels: LabelSpace, tasks: Sequence[Task], where: str
) -> Iterator[dict[str, Any]]:
    sample = Sample(str(row.get("id")), row.get("text") or "", aspect=row.get("aspect"), label=row.get("label"))
    if row.get("id") is None or not sample.text:
        raise SettingsError(f"{where} has no {'id' if row.get('id') is None else 'text'}")
    images = [str(_resolve_image(root, image, where)) for image in row.get("images") or ()]
    if sample.label is not None and sample.label not in labels.names:
        raise SettingsError(f"{where}: unknown label {sample.label!r}; the labels are {', '.join(labels.names)}")
    answers = {
        "reason": row.get("rationale"),
        "classify": None if sample.label is None else f"{CLASSIFY_PREFIX} {sample.label}",
    }
    for task in tasks:
        if answers[task]:
            content = [{"type": "image", "text": None}] * len(images)
            content.append({"type": "text", "text": render(task, sample, labels)})
            yield {
                "prompt": [{"role": "user", "content": content}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": answers[task]}]}],
                "images": images,
            }


def _resolve_image(root: Path, image: str, where: str) -> Path:
    try:
        path = resolve(root, image)
    except ImageError as error:
        raise SettingsError(f"{where}: image {error}") from None
    if not path.is_file():
        raise SettingsError(f"{where}: image {image!r} is missing in {root}")
    return path

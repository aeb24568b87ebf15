"""The door to trl: reasoning data as conversational prompt-completion rows with images.

The stages store reasoning data as jsonl that `datasets.load_dataset("json", data_files=...)` reads as it is. One call
more and trl's `SFTTrainer` trains on the very questions and answers that the assistant and the student learn from:

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
    """Stored reasoning data in trl's prompt-completion format for vision-language models.

    Each row of the file gives one conversation for each task that it has an answer to: the rationale as stored for
    *reason*, `"Prediction": <label>` for *classify*. Images go before the question and are decoded when they are read.

    Args:
        path: a jsonl file of rows `{id, text, aspect, label, images, rationale, ...}`, as the stages write it.
        root: folder that the image paths of the rows are relative to.

    Returns:
        Columns `prompt` and `completion`, lists of messages with structured content, and `images`.

    Raises:
        SettingsError: the file cannot be read, holds no answer to any of the tasks, or has a row without id or text,
            with an unknown label, or with an image that is missing or outside the root.
    """
    if not tasks or not set(tasks) <= {"reason", "classify"}:
        raise SettingsError(f"tasks must be of reason and classify, not {', '.join(tasks) or 'empty'}")
    if not Path(path).is_file():
        raise SettingsError(f"{path} is missing")
    try:
        rows = load_dataset("json", data_files=str(path), split="train")
    except Exception as error:  # datasets wraps what pyarrow and json raise in classes of its own
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
    images = [str(_inside(root, image, where)) for image in row.get("images") or ()]
    if sample.label is not None and sample.label not in labels.names:
        raise SettingsError(f"{where}: unknown label {sample.label!r}; the labels are {', '.join(labels.names)}")
    answers = {
        "reason": row.get("rationale"),
        "classify": None if sample.label is None else f"{CLASSIFY_PREFIX} {sample.label}",
    }
    for task in tasks:
        if answers[task]:
            question = [{"type": "image", "text": None}] * len(images)
            question.append({"type": "text", "text": render(task, sample, labels)})
            yield {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": answers[task]}]}],
                "images": images,
            }


def _inside(root: Path, image: str, where: str) -> Path:
    try:
        path = resolve(root, image)
    except ImageError as error:
        raise SettingsError(f"{where}: image {error}") from None
    if not path.is_file():
        raise SettingsError(f"{where}: image {image!r} is missing in {root}")
    return path

"""Conversion of stored reasoning data to trl's conversational formats with images.

The stages store reasoning data as jsonl, which `datasets.load_dataset("json", data_files=...)` reads directly. With the
functions below, trl trains on the same prompts and answers as the assistant and the student:

    dataset = to_prompt_completion("runs/twitter15/augment/rationales.jsonl", "data/twitter15", LabelSpace())
    SFTTrainer(model, SFTConfig(max_length=None), train_dataset=dataset, processing_class=processor)

`to_prompts` is for trainers that generate the answers themselves (GRPOTrainer, DistillationTrainer), `to_preferences`
for those that compare two answers (DPOTrainer).
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from datasets import Dataset, Features, Image, List, Value

from distill.data import jsonl
from distill.data.images import resized
from distill.data.text import clean
from distill.errors import SettingsError
from distill.models.encoding import USUAL_CONTROL_TOKENS, control_tokens, escape
from distill.task.labels import LabelSpace
from distill.task.prompts import render
from distill.task.rationale import InvalidRationale, check
from distill.task.sample import Sample

Task = Literal["reason", "classify"]

_MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
FEATURES = Features({"prompt": _MESSAGES, "completion": _MESSAGES, "images": List(Image(mode="RGB"))})
_TEXTS = List({"role": Value("string"), "content": Value("string")})
_POST = {"prompt": _TEXTS, "images": List(Value("string")), "id": Value("string"), "label": Value("string")}


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
            no text, image, video or audio, an unknown label, or an image that is missing or outside the root.
    """
    if not tasks or not set(tasks) <= {"reason", "classify"}:
        raise SettingsError(f"tasks must be reason, classify or both, not {', '.join(tasks) or 'empty'}")
    _check_file(path)
    patterns = [USUAL_CONTROL_TOKENS] if processor is None else [USUAL_CONTROL_TOKENS, control_tokens(processor)]
    conversations = [
        conversation
        for row in jsonl.read(Path(path))
        for conversation in _conversations(row, Path(root), labels, tasks, patterns, Path(path))
    ]
    if not conversations:
        raise SettingsError(f"{path} has no answers to {' or '.join(tasks)}")
    return Dataset.from_list(conversations, features=FEATURES)


def to_prompts(
    path: Path | str, root: Path | str, labels: LabelSpace, processor: Any = None, image_size: int = 0
) -> Dataset:
    """Convert stored reasoning data to trl's prompt-only format: the *reason* prompt of each post, once.

    Args:
        path: jsonl file, as for `to_prompt_completion`.
        root: folder to which the image paths of the rows are relative.
        labels: label space of the rows.
        processor: processor of the model to train: its prompts are then token for token those of assistant and student.
            Without it, the control tokens of common model families are escaped.
        image_size: pixels a side to which images are resized on access, as `model.image_size`; 0: as they are.

    Returns:
        Dataset with the columns `prompt`, `images`, `id` and `label`.

    Raises:
        SettingsError: the file is missing or empty, or a row cannot be used, as for `to_prompt_completion`.
    """
    samples = {sample.id: sample for sample in _samples(path, Path(root), labels)}
    if not samples:
        raise SettingsError(f"{path} has no rows")
    return prompt_dataset(list(samples.values()), labels, escaping(processor), image_size)


def to_preferences(
    path: Path | str,
    ledgers: Sequence[Path | str],
    root: Path | str,
    labels: LabelSpace,
    processor: Any = None,
    image_size: int = 0,
) -> Dataset:
    """Convert stored reasoning data to trl's preference format, for posts that a model has also answered wrongly.

    `chosen` is the stored rationale. `rejected` is the first answer to *predict* or *reason* in the ledgers that is no
    valid rationale or predicts another label than the row's. Posts without such an answer are left out.

    Args:
        path: jsonl file, as for `to_prompt_completion`; rows without a rationale or a label are left out.
        ledgers: ledgers of a run: `annotate/ledger.jsonl` with the teacher's answers, `augment/ledger.jsonl` with the
            assistant's.
        root: folder to which the image paths of the rows are relative.
        labels: label space of the rows.
        processor: as for `to_prompts`.
        image_size: as for `to_prompts`.

    Returns:
        Dataset with the columns `prompt`, `chosen`, `rejected`, `images`, `id` and `label`.

    Raises:
        SettingsError: a file is missing, a row cannot be used, or no post has a wrong answer.
    """
    samples = {s.id: s for s in _samples(path, Path(root), labels) if s.rationale is not None and s.label is not None}
    rejected: dict[str, str] = {}
    for ledger in ledgers:
        _check_file(ledger)
        for row in jsonl.read(Path(ledger)):
            answer, sample = row.fields.get("answer") or {}, samples.get(str(row.fields.get("id")))
            if sample is None or sample.id in rejected or row.fields.get("template") not in ("predict", "reason"):
                continue
            text = answer.get("text") or ""
            try:
                check(text, labels, sample.label, finished=answer.get("finished", True), post=sample.text)
            except InvalidRationale:
                if text.strip():
                    rejected[sample.id] = text
    if not rejected:
        raise SettingsError(f"the ledgers have no wrong answer about a post of {path}")
    escaped, kept = escaping(processor), [sample for sample in samples.values() if sample.id in rejected]

    def message(text: str | None) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": escaped(text or "")}]

    columns = {
        "chosen": [message(sample.rationale) for sample in kept],
        "rejected": [message(rejected[sample.id]) for sample in kept],
    }
    return prompt_dataset(kept, labels, escaped, image_size, columns)


def prompt_dataset(
    samples: Sequence[Sample],
    labels: LabelSpace,
    escaped: Callable[[str], str],
    image_size: int,
    columns: Mapping[str, Sequence[Any]] = MappingProxyType({}),
) -> Dataset:
    """The *reason* prompts of samples as a dataset of trl, whose images are decoded and resized on access.

    The text of a message is a string, which trl puts after the images.

    Args:
        escaped: inserts spaces into control tokens.
        image_size: as for `to_prompts`.
        columns: further columns of messages, by name.
    """
    rows = {
        "prompt": [[{"role": "user", "content": escaped(render("reason", sample, labels))}] for sample in samples],
        "images": [[str(image) for image in sample.images] for sample in samples],
        "id": [sample.id for sample in samples],
        "label": [sample.label for sample in samples],
    }

    def decoded(batch: dict[str, Any]) -> dict[str, Any]:
        images = [[resized(Path(path), image_size) for path in paths] for paths in batch.get("images", ())]
        return batch | ({"images": images} if "images" in batch else {})

    features = Features(_POST | dict.fromkeys(columns, _TEXTS))
    return Dataset.from_dict(rows | dict(columns), features=features).with_transform(decoded)


def escaping(processor: Any = None) -> Callable[[str], str]:
    """The function that escapes control tokens as the encoding of a model's prompts does.

    Args:
        processor: of the model; None: the control tokens of common model families.
    """
    pattern = USUAL_CONTROL_TOKENS if processor is None else control_tokens(processor)
    return lambda text: escape(clean(text), pattern)


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


def _check_file(path: Path | str) -> None:
    if not Path(path).is_file():
        raise SettingsError(f"{path} is missing")


def _samples(path: Path | str, root: Path, labels: LabelSpace) -> Iterator[Sample]:
    _check_file(path)
    return (_sample(row, root, labels, f"{path} row {row.number}") for row in jsonl.read(Path(path)))


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

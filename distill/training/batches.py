"""From samples to the batches of multitask training: one packed sequence per sample, with all its tasks."""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from random import Random
from typing import NamedTuple, get_args

import torch

from distill.errors import SettingsError
from distill.models.backbone import Backbone, Features
from distill.models.encoding import Question
from distill.models.packing import Packed
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.prompts import CLASSIFY_PREFIX, SCORED, EarlierAnswers, Template
from distill.task.sample import Sample


class Batch(NamedTuple):
    """B samples with their tasks, and the N answer tokens to learn.

    Attributes:
        inputs: what the model takes (`Packed.inputs`).
        columns, tokens: [N], where each answer token is predicted, and which it is.
        shares: [N], what each weighs in the loss.
        tasks: [N], which task each belongs to, counted in the order of the settings.
        sizes: [B], how many of the N belong to each sample, in their order.
        soft: cached soft targets of the N tokens, by name; empty where the assistant is asked while training.
    """

    inputs: Features
    columns: torch.Tensor
    tokens: torch.Tensor
    shares: torch.Tensor
    tasks: torch.Tensor
    sizes: torch.Tensor
    soft: Features


READER_ACCURACY = 0.6
"""How often each of the made-up earlier readers of a *review* is right."""


def answer(template: Template, sample: Sample, labels: LabelSpace) -> str | None:
    """What the model should answer: the rationale, or where a label alone is asked for its name; None: nobody knows."""
    if template in SCORED:
        return None if sample.label is None else f"{CLASSIFY_PREFIX} {labels.name(sample.label)}"
    return sample.rationale


def encode(samples: Sequence[Sample], backbone: Backbone, tasks: Mapping[Template, float], packing: bool) -> Batch:
    """B samples with the tasks whose answer is known; at least one sample has one.

    An answer's tokens share the weight of its task equally, and so do the samples. Where the labels' scale spreads its
    targets, *classify* and *review* have every label for an answer, each with its target's share of the weight.

    Args:
        packing: one sequence for all tasks of a sample; otherwise each has one of its own, with the same picture.
    """
    rows: list[list[Question]] = []
    weights: list[tuple[int, float]] = []  # task and weight of a token of each answer
    sizes = []
    for sample in samples:
        questions = []
        for index, (template, weight) in enumerate(tasks.items()):
            if (asked := _question(template, sample, backbone)) is None:
                continue
            question, targets = asked
            questions.append(question)
            for answer_tokens, target in zip(question.answers, targets, strict=True):
                length = 1 if len(targets) > 1 else len(answer_tokens)
                weights.append((index, weight * target / length / len(samples)))
        sizes.append(sum(len(tokens) for question in questions for tokens in question.answers))
        rows += [questions] if packing and questions else [[question] for question in questions]
    packed = backbone.pack(rows)
    indices, shares = zip(*weights, strict=True)
    return Batch(
        packed.inputs,
        packed.columns,
        packed.tokens,
        torch.tensor(shares)[packed.answers],
        torch.tensor(indices)[packed.answers],
        torch.tensor(sizes),
        {},
    )


def questions(sample: Sample, labels: LabelSpace, tasks: Iterable[Template]) -> list[tuple[str, str]]:
    """What a sample is asked in the tasks whose answer is known: pairs of question and answer."""
    found = []
    for template in tasks:
        if (text := answer(template, sample, labels)) is not None:
            found.append((_render(template, sample, labels), text))
    return found


def _render(template: Template, sample: Sample, labels: LabelSpace) -> str:
    earlier = synthetic_answers(sample, labels) if template == "review" else None
    return prompts.render(template, sample, labels, earlier)


def _question(template: Template, sample: Sample, backbone: Backbone) -> tuple[Question, Sequence[float]] | None:
    """One task as a question with its answers, and what each answer weighs; None: nobody knows an answer."""
    labels = backbone.labels
    if (text := answer(template, sample, labels)) is None:
        return None
    prompt = (_render(template, sample, labels), sample.images)
    if template in SCORED and labels.scale is not None and labels.scale.spread > 0:
        closing = backbone.encoder.tokens(CLASSIFY_PREFIX)
        return Question(prompt, closing, backbone.label_tokens), labels.scale.targets([float(sample.label)])[0].tolist()  # type: ignore[arg-type]
    return Question(prompt, [], [backbone.answer_tokens(text)]), [1.0]


def encode_tasks(samples: Sequence[Sample], backbone: Backbone, tasks: Mapping[Template, float]) -> dict[str, Features]:
    """The published layout: for each task the padded sequences [B, T] of the samples whose answer is known."""
    batch: dict[str, Features] = {}
    labels = backbone.labels
    for template in tasks:
        pairs = [(sample, text) for sample in samples if (text := answer(template, sample, labels)) is not None]
        if pairs:
            answered, answers = zip(*pairs, strict=True)
            batch[template] = backbone.encode(answered, template, answers)
    return batch


def check_exact(backbone: Backbone, samples: Iterable[Sample], tasks: Sequence[Template], packing: bool) -> None:
    """Hold the packed sequence and its loss against the model's own logits of every task alone, on the sample that has
    the most answers and pictures; and see that no answer there hears of another one.

    Raises:
        SettingsError: this architecture sees more than the mask shows it, or does more to its hidden states than its
            output head does.
    """
    labels = backbone.labels
    sample = max(samples, key=lambda one: (sum(answer(t, one, labels) is not None for t in tasks), len(one.images)))
    found = [asked[0] for task in tasks if (asked := _question(task, sample, backbone)) is not None]
    alone = backbone.pack([[question._replace(answers=[answer])] for question in found for answer in question.answers])
    whole = backbone.pack([found] if packing else [[question] for question in found])
    training = backbone.model.training
    backbone.model.eval()
    with torch.no_grad():
        inputs = {name: value.to(backbone.device) for name, value in alone.inputs.items()}
        expected = _of_tokens(backbone.model(**inputs).logits.flatten(0, 1)[alone.columns], alone.tokens)
        by_head, packed = (_log_probabilities(backbone, rows) for rows in (alone, whole))
        heard = _hears_of_others(backbone, whole)
    backbone.model.train(training)
    tolerance = 0.01 if backbone.settings.dtype == "float32" else 0.3  # nats a token; a wrong mask costs whole ones

    def differ(said: torch.Tensor) -> bool:
        """By answer, lest a short one vanish beside a long one."""
        gaps = (said - expected).abs().split(whole.answers.bincount().tolist())
        return max(float(gap.mean()) for gap in gaps) > tolerance

    if differ(by_head):
        raise SettingsError(
            "model: its logits are more than its output head makes of its hidden states; it cannot train"
        )
    if heard or differ(packed):
        raise SettingsError("packing: this model sees more of a packed sequence than its mask shows; take false")


def _hears_of_others(backbone: Backbone, packed: Packed) -> bool:
    """Whether what predicts an answer changes with the tokens of the other answers."""
    if "ends" not in packed.inputs:
        return False
    inputs = {name: value.to(backbone.device) for name, value in packed.inputs.items()}
    states = backbone.hidden_states(inputs).flatten(0, 1)
    first = packed.answers.diff(prepend=packed.answers[:1] - 1) != 0  # predicted by the question, not by the answer
    for answer in packed.answers.unique():
        own = packed.columns[packed.answers == answer]
        changed = inputs["input_ids"].flatten().clone()
        changed[packed.columns[(packed.answers != answer) & ~first]] = backbone.processor.tokenizer.eos_token_id
        other = backbone.hidden_states(inputs | {"input_ids": changed.view_as(inputs["input_ids"])}).flatten(0, 1)
        if float((other[own] - states[own]).abs().max()) > 1e-3 * float(states[own].abs().max()):
            return True
    return False


def _log_probabilities(backbone: Backbone, packed: Packed) -> torch.Tensor:
    inputs = {name: value.to(backbone.device) for name, value in packed.inputs.items()}
    return _of_tokens(backbone.hidden_states(inputs).flatten(0, 1)[packed.columns] @ backbone.head.T, packed.tokens)


def _of_tokens(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1).cpu()[torch.arange(len(tokens)), tokens]


def synthetic_answers(sample: Sample, labels: LabelSpace) -> EarlierAnswers:
    """EarlierAnswers answers for training on *review*, so that a teacher learns to weigh and not to trust them.

    Each of the two readers is right with probability READER_ACCURACY and else says any other label; confidences are
    uniform between chance and certainty. They follow from the sample's id alone.
    """
    draw = Random(sha256(sample.id.encode()).digest())
    gold = labels.name(sample.label)
    others = [name for name in labels.names if name != gold]

    def reader() -> tuple[str, float]:
        said = gold if draw.random() < READER_ACCURACY else draw.choice(others)
        return said, draw.uniform(1 / len(labels), 1)

    return EarlierAnswers(*reader(), *reader())


def check_tasks(tasks: Mapping[str, float], field: str) -> None:
    """Raises SettingsError for an unknown task or a weight that is not positive."""
    for name, weight in tasks.items():
        if name not in get_args(Template) or weight <= 0:
            known = ", ".join(get_args(Template))
            raise SettingsError(f"{field}.{name}: {weight} is not a task with a positive weight; the tasks are {known}")
    if not tasks:
        raise SettingsError(f"{field}: at least one task is needed")

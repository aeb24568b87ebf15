"""Encoding of samples into multitask training batches: one packed sequence per sample with all its tasks."""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from random import Random
from types import MappingProxyType
from typing import NamedTuple, get_args

import torch

from distill.errors import SettingsError
from distill.models.backbone import Backbone, Features
from distill.models.encoding import PromptWithAnswers
from distill.models.packing import Packed
from distill.models.scoring import label_prompt
from distill.settings import Range
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.prompts import SCORED, EarlierAnswers, Template
from distill.task.sample import Sample


class LabelBatch(NamedTuple):
    """The samples of a batch with a label distribution to learn, M of B.

    Attributes:
        positions: [M, N], positions whose hidden states `label_scores` takes, as indices into the flattened rows.
        log_q: [M, K], log-probabilities of the labels to the teacher; -inf is a probability of zero.
    """

    positions: torch.Tensor
    log_q: torch.Tensor


class Batch(NamedTuple):
    """The model inputs of B samples with all their tasks, and the N answer tokens that the model learns to predict.

    Attributes:
        inputs: model inputs (`Packed.inputs`).
        positions: [N], position that predicts each answer token, as an index into the flattened rows.
        tokens: [N], ids of the answer tokens.
        loss_weights: [N], weight of each token in the loss.
        tasks: [N], index of each token's task in the order of the settings.
        sizes: [B], number of answer tokens of each sample; the tokens are in the order of the samples.
        soft_targets: cached soft targets of the N tokens by name; empty if the assistant runs during training.
        ids: ids of the B samples.
        labels: None if no sample has a label distribution to learn.
    """

    inputs: Features
    positions: torch.Tensor
    tokens: torch.Tensor
    loss_weights: torch.Tensor
    tasks: torch.Tensor
    sizes: torch.Tensor
    soft_targets: Features
    ids: tuple[str, ...] = ()
    labels: LabelBatch | None = None


def row_lengths(batch: Batch | Mapping[str, Features]) -> torch.Tensor:
    """Number of tokens of each row of a batch, without its padding."""
    parts = [batch.inputs] if isinstance(batch, Batch) else list(batch.values())
    # all tokens of a packed row follow its first one
    return torch.cat([part["ends"][:, 0] if "ends" in part else part["attention_mask"].sum(1) for part in parts])


LabelTargets = Mapping[str, Sequence[float]]
"""The teacher's label probabilities [K] by the id of the sample."""

_NO_TASK = -1  # in place of a task's index: the tokens of `label_prompt`

JOINED_TOKENS = 256
"""Tokens up to which the sequences of posts without media are joined, so that they share the beginning of their
prompts. Attention costs more than that saves in longer ones."""

SYNTHETIC_ACCURACY = 0.6
"""Accuracy of each of the two synthetic earlier answers in a *review* prompt."""


def target_answer(template: Template, sample: Sample, labels: LabelSpace) -> str | None:
    """Return the answer to learn: the rationale, or the prediction line if the task has only the label as its answer.

    None if the sample has no rationale or no label for the task.
    """
    if template in SCORED:
        return None if sample.label is None else f"{labels.wording.prefix} {labels.name(sample.label)}"
    return sample.rationale


def encode(
    samples: Sequence[Sample],
    backbone: Backbone,
    tasks: Mapping[Template, float],
    packing: bool,
    label_targets: LabelTargets = MappingProxyType({}),
) -> Batch:
    """Encode B samples with the tasks for which they have an answer; at least one must have one, or a label target.

    The weight of a task is divided equally among the samples, and within a sample among the answer tokens. If the label
    scale has soft targets (`spread` > 0), *classify* and *review* have every label as an answer, weighted by its target
    probability.

    Args:
        packing: True puts all tasks of a sample into one sequence, which short posts without media share; False gives
            each task its own sequence and media. If the model does not pack (`Backbone.packs`), each answer has its
            own sequence.
        label_targets: the label distributions to learn; they are read from a further prompt, `label_prompt`.
    """
    rows: list[list[PromptWithAnswers]] = []
    weights: list[tuple[int, float]] = []  # of each answer: index of its task, loss weight of one token
    sizes, targets_of_labels = [], []
    for sample in samples:
        task_prompts = []
        for index, (template, weight) in enumerate(tasks.items()):
            if (encoded := _task_prompt(template, sample, backbone)) is None:
                continue
            prompt, targets = encoded
            task_prompts.append(prompt)
            for answer_tokens, target in zip(prompt.answers, targets, strict=True):
                length = 1 if len(targets) > 1 else len(answer_tokens)
                weights.append((index, weight * target / length / len(samples)))
        sizes.append(sum(len(tokens) for prompt in task_prompts for tokens in prompt.answers))
        if sample.id in label_targets:
            task_prompts.append(prompt := label_prompt(backbone, sample))
            weights += [(_NO_TASK, 0.0)] * len(prompt.answers)
            targets_of_labels.append(label_targets[sample.id])
        rows += _rows(task_prompts, backbone, packing)
    packed = backbone.pack(rows, JOINED_TOKENS if packing and backbone.packs else 0)
    indices, token_weights = (torch.tensor(column)[packed.answers] for column in zip(*weights, strict=True))
    learned = indices != _NO_TASK
    labels = None
    if targets_of_labels:
        log_q = torch.tensor(targets_of_labels, dtype=torch.float64).log().float()
        labels = LabelBatch(packed.columns[~learned].view(len(log_q), -1), log_q)
    return Batch(
        packed.inputs,
        packed.columns[learned],
        packed.tokens[learned],
        token_weights[learned],
        indices[learned],
        torch.tensor(sizes),
        {},
        tuple(sample.id for sample in samples),
        labels,
    )


def _rows(
    task_prompts: Sequence[PromptWithAnswers], backbone: Backbone, packing: bool
) -> list[list[PromptWithAnswers]]:
    """The sequences of a sample."""
    if not backbone.packs:
        return [[prompt._replace(answers=[answer])] for prompt in task_prompts for answer in prompt.answers]
    return [[*task_prompts]] if packing and task_prompts else [[prompt] for prompt in task_prompts]


def prompts_and_answers(sample: Sample, labels: LabelSpace, tasks: Iterable[Template]) -> list[tuple[str, str]]:
    """Return (prompt, answer) of each task for which the sample has an answer."""
    pairs = []
    for template in tasks:
        if (text := target_answer(template, sample, labels)) is not None:
            pairs.append((_render(template, sample, labels), text))
    return pairs


def _render(template: Template, sample: Sample, labels: LabelSpace) -> str:
    earlier = synthetic_answers(sample, labels) if template == "review" else None
    return prompts.render(template, sample, labels, earlier)


def _task_prompt(
    template: Template, sample: Sample, backbone: Backbone
) -> tuple[PromptWithAnswers, Sequence[float]] | None:
    """Return the prompt of a task with its answers and their weights; None if the sample has no answer."""
    labels = backbone.labels
    if (text := target_answer(template, sample, labels)) is None:
        return None
    prompt = (_render(template, sample, labels), sample.media)
    if template in SCORED and labels.scale is not None and labels.scale.spread > 0:
        closing = backbone.encoder.tokens(labels.wording.prefix)
        targets = labels.scale.targets([float(sample.label)])[0].tolist()  # type: ignore[arg-type]
        return PromptWithAnswers(prompt, closing, backbone.label_tokens), targets
    return PromptWithAnswers(prompt, [], [backbone.answer_tokens(text)]), [1.0]


def encode_tasks(samples: Sequence[Sample], backbone: Backbone, tasks: Mapping[Template, float]) -> dict[str, Features]:
    """Encode as the published code does: for each task the padded sequences [B, T] of the samples with an answer."""
    batch: dict[str, Features] = {}
    labels = backbone.labels
    for template in tasks:
        pairs = [(sample, text) for sample in samples if (text := target_answer(template, sample, labels)) is not None]
        if pairs:
            answered, answers = zip(*pairs, strict=True)
            batch[template] = backbone.encode(answered, template, answers)
    return batch


NOT_PACKED = "packing: %s cannot keep the answers in one sequence apart; each answer has its own sequence"
"""Warning about a model that does not pack."""


class PackingError(SettingsError):
    """The model cannot keep the answers in a packed sequence apart."""


def check_compatibility(
    backbone: Backbone,
    samples: Iterable[Sample],
    tasks: Sequence[Template],
    packing: bool,
    *,
    label_targets: bool = False,
) -> None:
    """Check on one sample that the model supports the training layout.

    The log-probabilities of the answer tokens, computed from hidden states and output head, alone and packed, are
    compared with the model's own logits for each answer in a separate sequence, and the packed hidden states with the
    separate ones. No token may depend on later tokens of its answer, or on other answers in a packed sequence. The
    sample is the one with the most answers, then with the most media.

    Args:
        label_targets: whether a sample has the prompt of a label distribution as well.

    Raises:
        SettingsError: the logits are not the output head applied to the last hidden states, or the model sees the
            tokens that it learns to predict.
        PackingError: the model attends to tokens of a packed sequence that its mask hides.
    """
    labels = backbone.labels
    sample = max(
        samples, key=lambda one: (sum(target_answer(t, one, labels) is not None for t in tasks), one.media.extent)
    )
    task_prompts = [encoded[0] for task in tasks if (encoded := _task_prompt(task, sample, backbone)) is not None]
    task_prompts += [label_prompt(backbone, sample)] if label_targets else []
    separate = backbone.pack([[p._replace(answers=[answer])] for p in task_prompts for answer in p.answers])
    packed = backbone.pack(_rows(task_prompts, backbone, packing))
    exact, training = backbone.settings.dtype == "float32", backbone.model.training
    backbone.model.eval()
    with torch.no_grad():
        inputs = {name: value.to(backbone.device) for name, value in separate.inputs.items()}
        logits = backbone.model(**inputs).logits.flatten(0, 1)[separate.columns]
        expected = _token_log_probs(logits, separate.tokens)
        states, in_rows = (_answer_states(backbone, rows) for rows in (separate, packed))
        from_head, from_packed = (_token_log_probs(backbone.logits(h), separate.tokens) for h in (states, in_rows))
        ahead = _sees_later_tokens(backbone, separate)
        leaks = _leaks_between_branches(backbone, packed)
    backbone.model.train(training)
    moved = float((in_rows - states).abs().max()) > (5e-3 if exact else 0.2) * float(states.abs().max())

    def differs(found: torch.Tensor) -> bool:
        """Compare per answer, so that a long answer does not hide the error of a short one."""
        errors = (found - expected).abs().split(sizes := packed.answers.bincount().tolist())
        pairs = zip(errors, expected.abs().split(sizes), strict=True)
        # nats per token; a wrong mask costs whole nats, and so does rounding to 16 bits where they are dozens
        return any(float(e.mean()) > (0.01 if exact else max(0.3, 0.05 * float(size.mean()))) for e, size in pairs)

    if differs(from_head):
        raise SettingsError(
            "model: its logits are not the output head applied to its last hidden states (they are scaled or capped); "
            "such a model cannot be trained"
        )
    if ahead:
        raise SettingsError(
            "model: it attends to later tokens of an answer, so that it sees what it learns to predict; "
            "such a model cannot be trained"
        )
    if leaks or moved or differs(from_packed):
        raise PackingError("packing: the model attends to tokens of a packed sequence that its mask hides")


def _sees_later_tokens(backbone: Backbone, separate: Packed) -> bool:
    """Whether a hidden state that predicts an answer token changes with later tokens of the answer.

    Args:
        separate: one answer per row.
    """
    inputs = {name: value.to(backbone.device) for name, value in separate.inputs.items()}
    changed = inputs["input_ids"].flatten().clone()
    kept = []
    for answer in separate.answers.unique():
        own = separate.columns[separate.answers == answer]  # the first of them is the last token of the prompt
        middle = max(1, len(own) // 2)
        kept.append(own[:middle])
        changed[own[middle:]] = backbone.processor.tokenizer.eos_token_id
    return _changes(backbone, inputs, changed, torch.cat(kept))


def _changes(backbone: Backbone, inputs: Features, ids: torch.Tensor, columns: torch.Tensor) -> bool:
    """Whether other token ids [B · T] change the hidden states at some columns by more than rounding."""
    before, after = (
        backbone.hidden_states(inputs | {"input_ids": tokens.view_as(inputs["input_ids"])}).flatten(0, 1)[columns]
        for tokens in (inputs["input_ids"], ids)
    )
    return float((after - before).abs().max()) > 1e-3 * float(before.abs().max())


def _leaks_between_branches(backbone: Backbone, packed: Packed) -> bool:
    """Whether the hidden states that predict an answer change with the tokens of the other answers."""
    if "ends" not in packed.inputs:
        return False
    inputs = {name: value.to(backbone.device) for name, value in packed.inputs.items()}
    # the position that predicts an answer's first token holds a prompt token, which stays
    first = packed.answers.diff(prepend=packed.answers[:1] - 1) != 0
    for answer in packed.answers.unique():
        changed = inputs["input_ids"].flatten().clone()
        own = packed.columns[packed.answers == answer]
        others = packed.columns[(packed.answers != answer) & ~first]
        changed[others[~torch.isin(others, own)]] = backbone.processor.tokenizer.eos_token_id
        if _changes(backbone, inputs, changed, own):
            return True
    return False


def _answer_states(backbone: Backbone, packed: Packed) -> torch.Tensor:
    """Return the hidden states [N, D] that predict the answer tokens."""
    inputs = {name: value.to(backbone.device) for name, value in packed.inputs.items()}
    return backbone.hidden_states(inputs).flatten(0, 1)[packed.columns]


def _token_log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1).cpu()[torch.arange(len(tokens)), tokens]


def synthetic_answers(sample: Sample, labels: LabelSpace) -> EarlierAnswers:
    """Return synthetic student and teacher answers for a *review* prompt, so that a teacher learns not to copy them.

    Each answer is correct with probability SYNTHETIC_ACCURACY and otherwise a uniformly drawn wrong label; confidences
    are uniform between 1 / K and 1. The random generator is seeded with the sample's id alone.
    """
    random = Random(sha256(sample.id.encode()).digest())
    gold = labels.name(sample.label)
    wrong = [name for name in labels.names if name != gold]

    def draw_answer() -> tuple[str, float]:
        name = gold if random.random() < SYNTHETIC_ACCURACY else random.choice(wrong)
        return name, random.uniform(1 / len(labels), 1)

    return EarlierAnswers(*draw_answer(), *draw_answer())


def check_tasks(tasks: Mapping[str, float], field: str) -> None:
    """Raise SettingsError if a task is unknown, a weight is not positive or too large, or there is no task."""
    for name, weight in tasks.items():
        if name not in get_args(Template):
            raise SettingsError(f"{field}.{name} is not a task; the tasks are {', '.join(get_args(Template))}")
        if problem := Range(0, above=True).problem(weight):
            raise SettingsError(f"{field}.{name} {problem}")
    if not tasks:
        raise SettingsError(f"{field}: at least one task is needed")

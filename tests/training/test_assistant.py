"""Multitask fine-tuning: loss of a step, accumulation, learning-rate schedule, and learning from images."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill.data.corpus import Corpus, DataSettings, read_corpus
from distill.data.postcards import PostcardSettings
from distill.models.backbone import IGNORE, Backbone, ModelSettings, create
from distill.models.local import Local
from distill.models.reasoner import Sampling
from distill.models.tiny import TinySettings, train_tokenizer
from distill.task.labels import LabelSpace, Scale
from distill.task.prompts import Template, render
from distill.task.rationale import InvalidRationale, check
from distill.task.sample import Sample
from distill.training import assistant
from distill.training.assistant import AssistantModule, TrainSettings
from distill.training.batches import encode_tasks
from distill.training.datamodule import ReasoningDataModule

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False,
}  # fmt: skip


def learn(
    backbone: Backbone, corpus: Corpus, samples: Sequence[Sample], settings: TrainSettings, **trainer: Any
) -> tuple[AssistantModule, L.Trainer]:
    module = AssistantModule(backbone, settings)
    data = ReasoningDataModule(
        backbone, samples, corpus.validation[:9], settings.tasks, module.encode, batch_size=settings.batch_size
    )
    runner = L.Trainer(**QUIET | trainer)
    runner.fit(module, data)
    return module, runner


# ---- one step ----


def plain_loss(backbone: Backbone, samples: Sequence[Sample], task: Template) -> torch.Tensor:
    """Cross-entropy of a task with each answer in a separate padded sequence: mean per sample, then over samples."""
    features = encode_tasks(samples, backbone, {task: 1.0})[task]
    logits = backbone.model(**{name: value for name, value in features.items() if name != "labels"}).logits
    rows = zip(logits, features["labels"], strict=True)
    return torch.stack([F.cross_entropy(row[:-1], labels[1:], ignore_index=IGNORE) for row, labels in rows]).mean()


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_of_a_step_is_the_weighted_sum_of_the_separate_tasks(
    make_backbone: Any, postcards: Corpus, packing: bool
) -> None:
    """In value and gradient, including the head that is tied to the embeddings."""
    backbone = make_backbone(1)
    tasks = {"reason": 2.0, "classify": 0.5}
    module = without_logging(AssistantModule(backbone, TrainSettings(tasks=tasks, packing=packing)))
    samples = postcards.train[:3]
    loss = module.training_step(module.encode(samples), 0)
    loss.backward()
    found = [weights.grad.clone() for weights in backbone.model.parameters()]
    backbone.model.zero_grad()
    expected = 2.0 * plain_loss(backbone, samples, "reason") + 0.5 * plain_loss(backbone, samples, "classify")
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    for gradient, weights in zip(found, backbone.model.parameters(), strict=True):
        torch.testing.assert_close(gradient, weights.grad, atol=2e-5, rtol=1e-3)


def test_each_task_is_logged_by_its_name(backbone: Backbone, postcards: Corpus) -> None:
    module = AssistantModule(backbone, TrainSettings(tasks={"reason": 2.0, "classify": 0.5}))
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})  # type: ignore[method-assign]
    samples = [postcards.train[0], replace(postcards.train[1], rationale=None)]
    with torch.no_grad():
        module.training_step(module.encode(samples), 0)
        reason, classify = plain_loss(backbone, samples, "reason"), plain_loss(backbone, samples, "classify")
    assert logged["train/reason_loss"] == pytest.approx(float(reason), abs=1e-5)
    assert logged["train/classify_loss"] == pytest.approx(float(classify), abs=1e-5)
    assert logged["train/loss"] == pytest.approx(2.0 * float(reason) / 2 + 0.5 * float(classify), abs=1e-5)
    logged.clear()
    module.training_step(module.encode(samples[1:]), 0)
    assert "train/reason_loss" not in logged and logged["train/loss"] > 0


def without_logging(module: AssistantModule) -> AssistantModule:
    module.log = lambda *args, **options: None  # type: ignore[method-assign]
    return module


def test_the_weight_of_a_sample_does_not_depend_on_its_batch(backbone: Backbone, postcards: Corpus) -> None:
    """One of four samples has a rationale: the mean of two batches of two must equal one batch of four."""
    tasks = {"reason": 1.0, "classify": 1.0}
    samples = [postcards.train[0], *(replace(sample, rationale=None) for sample in postcards.train[1:4])]
    module = without_logging(AssistantModule(backbone, TrainSettings(tasks=tasks)))
    whole, one, two = (
        module.training_step(module.encode(part), 0).detach() for part in (samples, samples[:2], samples[2:])
    )
    torch.testing.assert_close((one + two) / 2, whole, atol=1e-5, rtol=0)


# ---- training runs ----


def test_accumulated_steps_equal_steps_of_the_larger_batch(make_backbone: Any, postcards: Corpus) -> None:
    """With the real Trainer, answers of very different lengths and one sample without a rationale."""
    samples = list(postcards.train[:16])
    samples[3] = replace(samples[3], rationale='"Prediction": positive')
    samples[5] = replace(samples[5], rationale=None)
    weights = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        backbone = make_backbone(1)
        settings = TrainSettings(batch_size=batch_size, learning_rate=1e-3)
        _, runner = learn(backbone, postcards, samples, settings, max_epochs=2, accumulate_grad_batches=accumulate)
        assert runner.global_step == 4
        weights.append(torch.cat([w.detach().flatten() for w in backbone.model.parameters()]))
    start = torch.cat([w.detach().flatten() for w in make_backbone(1).model.parameters()])
    assert float((weights[0] - start).abs().max()) > 1e-3
    # AdamW divides by the gradient's magnitude, which amplifies rounding errors of gradients near zero
    assert float((weights[0] - weights[1]).abs().mean()) < 1e-6
    assert float((weights[0] - weights[1]).norm() / (weights[0] - start).norm()) < 1e-2


def test_the_learning_rate_rises_during_warm_up(make_backbone: Any, postcards: Corpus) -> None:
    rates = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    settings = TrainSettings(batch_size=4, learning_rate=4e-3, warmup_steps=4, tasks={"classify": 1.0})
    learn(make_backbone(), postcards, postcards.train[:24], settings, max_epochs=1, callbacks=[Watch()])
    np.testing.assert_allclose(rates, [1e-3, 2e-3, 3e-3, 4e-3, 4e-3, 4e-3])


def test_the_learning_rate_falls_when_accuracy_does_not_improve(
    make_backbone: Any, postcards: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience 1: the rate halves at the second validation without improvement, down to its lower bound."""
    script = iter([0, 3, 3, 1, 3, 3, 3])  # correct predictions of nine
    monkeypatch.setattr(assistant, "score_labels", lambda backbone, features: scripted_scores(next(script), postcards))
    rates = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    settings = TrainSettings(
        batch_size=8, learning_rate=8e-3, tasks={"classify": 1.0}, patience=1, min_learning_rate=3e-3
    )
    learn(make_backbone(), postcards, postcards.train[:8], settings, max_epochs=7, callbacks=[Watch()])
    np.testing.assert_allclose(rates, [8e-3, 8e-3, 8e-3, 4e-3, 4e-3, 3e-3, 3e-3])


def scripted_scores(correct: int, corpus: Corpus) -> tuple[torch.Tensor, torch.Tensor]:
    labels = LabelSpace()
    gold = torch.tensor([labels.index(sample.label) for sample in corpus.validation[:9]])
    predicted = torch.where(torch.arange(9) < correct, gold, (gold + 1) % 3)
    return F.one_hot(predicted, 3).float(), torch.ones(9)


def test_validation_metrics_equal_those_of_sklearn(
    make_backbone: Any, postcards: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    backbone = make_backbone()
    _, runner = learn(
        backbone, postcards, postcards.train[:8], TrainSettings(batch_size=8, tasks={"classify": 1.0}), max_epochs=1
    )
    predicted = Local(backbone, "").classify(postcards.validation[:9]).probabilities.argmax(1)
    gold = [backbone.labels.index(sample.label) for sample in postcards.validation[:9]]
    metrics = {name: float(value) for name, value in runner.callback_metrics.items()}
    assert metrics["val/accuracy"] == pytest.approx(accuracy_score(gold, predicted))
    assert metrics["val/macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro", zero_division=0))
    assert metrics["train/loss"] == pytest.approx(metrics["train/classify_loss"])


def test_the_trainer_sets_half_precision(make_backbone: Any, postcards: Corpus) -> None:
    backbone = make_backbone()
    before = [weights.detach().clone() for weights in backbone.model.parameters()]
    _, runner = learn(
        backbone, postcards, postcards.train[:8], TrainSettings(batch_size=4), max_epochs=1, precision="bf16-mixed"
    )
    assert torch.isfinite(runner.callback_metrics["train/loss"])
    assert {weights.dtype for weights in backbone.model.parameters()} == {torch.float32}
    assert any(not torch.equal(one, two) for one, two in zip(before, backbone.model.parameters(), strict=True))


# ---- images ----


@pytest.mark.slow
def test_a_tiny_model_learns_from_the_images(tmp_path: Path) -> None:
    """With the images shuffled between posts, accuracy falls to what the text alone allows: 5/9."""
    labels = LabelSpace()
    cards = PostcardSettings(labelled=630, unlabelled=0, validation=9, test=180)
    corpus = read_corpus(DataSettings(source="postcards", root=str(tmp_path / "data"), postcards=cards), labels)
    tasks = {"reason": 1.0, "classify": 1.0}
    texts = [render(task, sample, labels) for sample in corpus.train[:100] for task in tasks]  # type: ignore[arg-type]
    texts += [str(sample.rationale) for sample in corpus.train]
    train_tokenizer(texts, 768).save_pretrained(tmp_path / "tokenizer")
    L.seed_everything(1, verbose=False)
    size = TinySettings(hidden=128, layers=2, vision_hidden=64, vision_depth=1)
    backbone = create(ModelSettings(tiny=size, image_size=56, batch_size=32), labels, tmp_path / "tokenizer")
    settings = TrainSettings(batch_size=16, learning_rate=1e-3, warmup_steps=20, tasks=tasks)
    learn(
        backbone,
        corpus,
        corpus.train,
        settings,
        max_steps=220,
        max_epochs=-1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
    )
    reasoner = Local(backbone, "student")

    shuffled_images = [sample.images for sample in corpus.test]
    random.Random(0).shuffle(shuffled_images)
    shuffled = [replace(sample, images=images) for sample, images in zip(corpus.test, shuffled_images, strict=True)]
    matched, mismatched = (accuracy(reasoner, samples) for samples in (corpus.test, shuffled))
    found = f"{matched:.3f} with matching images, {mismatched:.3f} with shuffled images"
    assert matched > 0.85, found
    assert 0.35 < mismatched < 5 / 9 + 0.1, found

    # label scoring gives the label that the model would generate
    scored = reasoner.classify(corpus.test)
    generated = [
        answer.text.strip() for _, answer in reasoner.reason(corpus.test, "classify", Sampling(max_new_tokens=4))
    ]
    names = [labels.names[index] for index in scored.probabilities.argmax(1)]
    assert np.mean([one == two for one, two in zip(names, generated, strict=True)]) >= 0.99
    assert scored.label_mass.min() > 0.9

    # the rationales describe the image
    sample = corpus.test[:32]
    grounded = 0
    for index, answer in reasoner.reason(sample, "reason", Sampling(max_new_tokens=128)):
        try:
            rationale = check(answer.text, labels, finished=answer.finished)
        except InvalidRationale:
            continue
        grounded += sample[index].attributes["face"] in rationale.texts[1]
    assert grounded >= 0.75 * len(sample)


def accuracy(reasoner: Local, samples: Sequence[Sample]) -> float:
    predicted = reasoner.classify(samples).probabilities.argmax(1)
    gold = [reasoner.backbone.labels.index(sample.label) for sample in samples]
    return float(np.mean(predicted == np.array(gold)))


# ---- labels on a scale ----


def graded(backbone: Backbone, spread: float = 0.75, names: Sequence[str] | None = None) -> Backbone:
    """Return the same model with the bins of a scale as labels, by default -3 to 3; three begin with the same token."""
    return Backbone(
        backbone.model, backbone.processor, LabelSpace.from_scale(Scale(spread=spread), names), backbone.settings
    )


def test_the_loss_on_a_scale_is_the_cross_entropy_over_complete_labels(make_backbone: Any, postcards: Corpus) -> None:
    """Each label is encoded after its prompt, one at a time; one sample has an image, the others have none."""
    backbone = graded(make_backbone(2))
    samples = [replace(postcards.train[0], label=1.2), Sample("b", "so so", label=-0.4), Sample("c", "bad", label=-3.0)]
    module = AssistantModule(backbone, TrainSettings(tasks={"classify": 1.0}))
    loss = module.loss(module.encode(samples))
    expected = 0.0
    prefix = len(backbone.processor.tokenizer('"Prediction":')["input_ids"])
    for sample in samples:
        scale = backbone.labels.scale
        assert scale is not None
        for weight, name in zip(scale.targets([float(sample.label)])[0], backbone.labels.names, strict=True):  # type: ignore[arg-type]
            whole = backbone.encode([sample], "classify", [f'"Prediction": {name}'])
            answer = whole.pop("labels")[0]
            with torch.no_grad():
                log_p = torch.log_softmax(backbone.model(**whole).logits[0], -1)
            at = (answer != IGNORE).nonzero()[prefix:, 0]  # the part of the answer after the forced prefix
            expected -= weight * float(log_p[at - 1, answer[at]].sum()) / len(samples)
    assert float(loss.total.detach()) == pytest.approx(expected, abs=1e-4)
    assert not loss.soft.any()
    loss.total.backward()
    assert all(torch.isfinite(w.grad).all() for w in backbone.model.parameters() if w.grad is not None)


def test_on_a_scale_the_best_epoch_has_the_lowest_mean_absolute_error(make_backbone: Any, postcards: Corpus) -> None:
    backbone = graded(make_backbone())
    corpus = replace(postcards, validation=[Sample(f"v{n}", "x" * n, label=n / 3 - 1.6) for n in range(1, 10)])
    train = [Sample(f"t{n}", "good" if n % 2 else "bad", label=2.0 if n % 2 else -2.0) for n in range(8)]
    settings = TrainSettings(batch_size=8, tasks={"classify": 1.0, "review": 0.5})
    _, runner = learn(backbone, corpus, train, settings, max_epochs=1)
    probabilities = Local(backbone, "").classify(corpus.validation).probabilities
    values = probabilities @ np.arange(-3, 4)
    gold = np.array([sample.label for sample in corpus.validation], dtype=float)
    metrics = {name: float(value) for name, value in runner.callback_metrics.items()}
    assert metrics["val/mae"] == pytest.approx(np.abs(values - gold).mean(), abs=1e-5)
    assert metrics["val/selection"] == pytest.approx(-metrics["val/mae"])
    assert metrics["val/accuracy"] == pytest.approx((probabilities.argmax(1) == np.round(gold) + 3).mean())
    assert metrics["train/review_loss"] > 0


def test_the_learning_rate_falls_when_the_error_does_not_improve(
    make_backbone: Any, postcards: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience 0: an error that is equal or larger, by any amount, halves the rate."""
    errors = iter([1.0, 1.00001, 0.9, 0.9])  # of values with gold 0
    backbone = graded(make_backbone())
    corpus = replace(postcards, validation=[Sample(f"v{n}", "x", label=0.0) for n in range(9)])

    def scripted_bins(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        error = next(errors)
        row = torch.tensor([0, 0, 0, 1 - error / 3, 0, 0, error / 3])
        return row.expand(9, 7), torch.ones(9)

    monkeypatch.setattr(assistant, "score_labels", scripted_bins)
    rates = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    settings = TrainSettings(batch_size=2, learning_rate=8e-3, tasks={"classify": 1.0}, patience=0)
    learn(backbone, corpus, [Sample("t", "x", label=1.0)], settings, max_epochs=4, callbacks=[Watch()])
    np.testing.assert_allclose(rates, [8e-3, 4e-3, 4e-3, 2e-3])


@pytest.mark.parametrize("spread", [0.75, 0.0])
def test_a_tiny_model_learns_values_from_words(make_backbone: Any, postcards: Corpus, spread: float) -> None:
    """Text only, with soft and hard targets: five words, each with its own value."""
    backbone = graded(make_backbone(4), spread, None if spread else list("abcdefg"))
    words = {"awful": -2.6, "weak": -1.2, "plain": 0.0, "nice": 1.4, "great": 2.8}
    train = [Sample(f"t{n}", f"{n} {word} {n}", label=value) for n in range(12) for word, value in words.items()]
    corpus = replace(postcards, validation=[Sample(w, f"it is {w} now", label=value) for w, value in words.items()])
    settings = TrainSettings(batch_size=6, learning_rate=3e-3, tasks={"classify": 1.0}, warmup_steps=10)
    _, runner = learn(backbone, corpus, train, settings, max_epochs=12)
    assert float(runner.callback_metrics["val/mae"]) < 0.5

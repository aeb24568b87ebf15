"""Distillation with the real modules: both losses, the frozen assistant, the shared vocabulary."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from distill.data.corpus import Corpus
from distill.models.backbone import Backbone, Features
from distill.task.sample import Sample
from distill.training.batches import encode_tasks
from distill.training.datamodule import ReasoningDataModule
from distill.training.fit import fit
from distill.training.soft_targets import OnlineTargets
from distill.training.student import DistillationSettings, StudentModule, StudentSettings
from tests.training.loss_cases import plain_divergence

Make = Any


def settings(tasks: dict[str, float] | None = None, **distillation: Any) -> StudentSettings:
    tasks = tasks or {"reason": 1.0, "classify": 1.0}
    distilled = DistillationSettings(**distillation)
    return StudentSettings(batch_size=4, learning_rate=1e-3, tasks=tasks, distillation=distilled)


def student_of(student: Backbone, assistant: Backbone, **distillation: Any) -> StudentModule:
    return StudentModule(student, settings(**distillation), OnlineTargets(assistant, student))


@pytest.fixture
def samples(postcards: Corpus) -> list[Sample]:
    """A long post, a short one, and one without an image."""
    long, short, bare = postcards.train[:3]
    return [replace(long, text=long.text * 3), short, replace(bare, images=())]


@pytest.fixture
def features(backbone: Backbone, samples: list[Sample]) -> Features:
    """The same as a padded batch of one task."""
    return encode_tasks(samples, backbone, {"reason": 1.0})["reason"]


def full_logits(backbone: Backbone, features: Features) -> torch.Tensor:
    with torch.no_grad():
        return backbone.model(**{name: value for name, value in features.items() if name != "labels"}).logits


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 2.0), (0.8, 1.0)])
def test_positions_all_is_the_published_formula(
    make_backbone: Make, features: Features, weight: float, temperature: float
) -> None:
    """transformers' own loss for the labels, and torch's KL over all positions of the padded sequences."""
    student, assistant = make_backbone(1), make_backbone(2, hidden=128)
    module = student_of(student, assistant, weight=weight, temperature=temperature, positions="all")
    loss = module.published_loss(features)
    hard = student.model(**features).loss  # labels included: the model computes it itself
    z_s, z_a = full_logits(student, features).flatten(0, 1), full_logits(assistant, features).flatten(0, 1)
    assert len(z_s) == features["input_ids"].numel()
    soft = F.kl_div(F.log_softmax(z_s / temperature, -1), F.softmax(z_a / temperature, -1), reduction="batchmean")
    torch.testing.assert_close(loss.total, (1 - weight) * hard + weight * soft, atol=1e-5, rtol=0)


def test_response_positions_are_those_that_predict_the_answer(
    make_backbone: Make, features: Features, samples: list[Sample]
) -> None:
    student, assistant = make_backbone(1), make_backbone(2)
    module = student_of(student, assistant, tasks={"reason": 1.0}, weight=0.4, temperature=3.0)
    loss = module.loss(module.encode(samples))
    z_s, z_a = full_logits(student, features), full_logits(assistant, features)
    expected = []
    for row, labels in enumerate(features["labels"]):
        at = (labels != -100).nonzero()[:, 0] - 1
        hard = F.cross_entropy(z_s[row, at], labels[at + 1])
        log_p, q = F.log_softmax(z_s[row, at] / 3, -1), F.softmax(z_a[row, at] / 3, -1)
        expected.append(0.6 * hard + 0.4 * (q * (q.log() - log_p)).sum(-1).mean())
    torch.testing.assert_close(loss.total.detach(), torch.stack(expected).mean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [{"divergence": "jsd", "beta": 0.2}, {"divergence": "skew_kl", "skew": 0.3}], ids=str
)
def test_the_chosen_divergence_takes_the_place_of_the_kl(
    make_backbone: Make, features: Features, samples: list[Sample], options: dict[str, Any]
) -> None:
    student, assistant = make_backbone(1), make_backbone(2)
    module = student_of(student, assistant, weight=0.4, temperature=3.0, **options)
    module.settings.tasks.pop("classify")
    z_s, z_a = full_logits(student, features), full_logits(assistant, features)
    expected = []
    for row, labels in enumerate(features["labels"]):
        at = (labels != -100).nonzero()[:, 0] - 1
        log_p, log_q = ((z[row, at] / 3).log_softmax(-1) for z in (z_s, z_a))
        expected.append(plain_divergence(module.divergence, log_p, log_q))
    torch.testing.assert_close(module.loss(module.encode(samples)).soft, torch.cat(expected), atol=1e-5, rtol=0)


def test_a_student_equal_to_its_assistant_has_no_divergence(
    make_backbone: Make, features: Features, samples: list[Sample]
) -> None:
    published = student_of(make_backbone(1), make_backbone(1), positions="all").published_loss(features)
    assert abs(float(published.soft.detach())) < 1e-7 and float(published.hard.detach()) > 1
    module = student_of(make_backbone(1), make_backbone(1))
    loss = module.loss(module.encode(samples))
    assert float(loss.soft.abs().max()) < 1e-5 and float(loss.hard.min()) > 0.1


def test_without_soft_targets_the_loss_is_the_cross_entropy(
    make_backbone: Make, features: Features, samples: list[Sample]
) -> None:
    student = make_backbone(1)
    plain, distilled = StudentModule(student, settings()), student_of(student, make_backbone(2), weight=0.0)
    losses = [module.loss(module.encode(samples)) for module in (plain, distilled)]
    torch.testing.assert_close(losses[0].total, losses[1].total, atol=1e-6, rtol=0)
    assert not losses[0].soft.any()
    alone = StudentModule(student, settings(positions="all")).published_loss(features)
    assert alone.total == alone.hard and float(alone.soft) == 0


@pytest.mark.parametrize("positions", ["response", "all"])
@pytest.mark.parametrize("padded", ["student", "assistant"])
def test_a_padded_vocabulary_does_not_change_the_loss(
    make_backbone: Make, samples: list[Sample], padded: str, positions: Any
) -> None:
    def total(module: StudentModule) -> float:
        batch = module.encode(samples)
        if positions == "all":
            return float(sum(module.published_loss(features).total for features in batch.values()))
        return float(module.loss(batch).total)

    expected = total(student_of(make_backbone(1), make_backbone(2), positions=positions))
    models = {"student": make_backbone(1), "assistant": make_backbone(2)}
    models[padded].model.resize_token_embeddings(832)
    found = total(student_of(models["student"], models["assistant"], positions=positions))
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_published_step_is_the_weighted_sum_of_the_tasks(make_backbone: Make, samples: list[Sample]) -> None:
    module = student_of(make_backbone(1), make_backbone(2), tasks={"reason": 2.0, "classify": 0.5}, positions="all")
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})  # type: ignore[method-assign]
    samples[1] = replace(samples[1], rationale=None)
    batch = module.encode(samples)
    loss = module.training_step(batch, 0)
    reason, classify = (module.published_loss(batch[task]) for task in ("reason", "classify"))
    torch.testing.assert_close(loss, 2.0 * reason.total * 2 / 3 + 0.5 * classify.total)
    assert logged["train/reason_kl"] == pytest.approx(float(reason.soft)) and logged["train/loss"] == float(loss)


def test_the_assistant_is_not_part_of_the_module_and_does_not_change(
    make_backbone: Make, postcards: Corpus, tmp_path: Path
) -> None:
    student, assistant = make_backbone(1), make_backbone(2)
    module = student_of(student, assistant)
    assistant_ids = {id(weights) for weights in assistant.model.parameters()}
    assert not assistant_ids & {id(weights) for weights in module.parameters()}
    assert len(module.state_dict()) == len(student.model.state_dict())
    before = {name: weights.clone() for name, weights in assistant.model.state_dict().items()}
    own = [weights.detach().clone() for weights in student.model.parameters()]
    data = ReasoningDataModule(
        student, postcards.train[:8], postcards.validation[:6], module.settings.tasks, module.encode, batch_size=4
    )
    options = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False}
    trainer = fit(module, data, tmp_path, options)
    assert float(trainer.callback_metrics["train/reason_kl"]) > 0
    assert float(trainer.callback_metrics["train/classify_kl"]) > 0
    after = assistant.model.state_dict()
    assert all(torch.equal(weights, after[name]) for name, weights in before.items())
    assert not assistant.model.training and all(weights.grad is None for weights in assistant.model.parameters())
    assert any(not torch.equal(one, two) for one, two in zip(own, student.model.parameters(), strict=True))
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    trained = {name for name, weights in module.named_parameters() if weights.requires_grad}
    assert set(saved["state_dict"]) == trained
    sizes = [weights.numel() for weights in saved["state_dict"].values()]
    assert sum(sizes) == sum(weights.numel() for weights in student.model.parameters())


def test_training_reduces_the_divergence_from_the_assistant(make_backbone: Make, postcards: Corpus) -> None:
    student, assistant = make_backbone(1), make_backbone(2)
    module = student_of(student, assistant, weight=1.0)
    divergences = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            divergences.append(float(trainer.callback_metrics["train/reason_kl"]))

    data = ReasoningDataModule(
        student, postcards.train[:16], postcards.validation[:6], module.settings.tasks, module.encode, batch_size=8
    )
    trainer = L.Trainer(
        max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False, callbacks=[Watch()],
    )  # fmt: skip
    trainer.fit(module, data)
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] < 0.8 * divergences[0]

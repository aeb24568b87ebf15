"""A loss, gradient or probability that is not finite ends the training with the step and the posts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.data.corpus import Corpus
from distill.errors import NonFiniteError, RunError
from distill.models.local import Local
from distill.models.reasoner import Sampling
from distill.training import soft_target_cache
from distill.training.assistant import AssistantModule
from distill.training.batches import encode
from distill.training.datamodule import ReasoningDataModule
from distill.training.fit import fit
from distill.training.fused_loss import AnswerLoss
from distill.training.soft_targets import OnlineTargets
from distill.training.student import DistillationSettings, StudentModule, StudentSettings
from tests.training.training_runs import QUIET, Runs


@pytest.fixture(scope="module")
def runs(model_folder: Path, postcards: Corpus) -> Runs:
    return Runs(model_folder, postcards)


def broken(backbone: Any) -> Any:
    """The model with NaN in one weight matrix of its last layer."""
    with torch.no_grad():
        next(p for name, p in reversed(list(backbone.model.named_parameters())) if "mlp" in name).fill_(torch.nan)
    return backbone


def message(error: pytest.ExceptionInfo[NonFiniteError]) -> str:
    assert isinstance(error.value, RunError) and "\n" not in str(error.value)
    return str(error.value)


def test_a_loss_that_is_not_finite_names_the_step_and_the_posts(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    loss, encode_batch = AssistantModule.loss, AssistantModule.encode

    def encoded(self: AssistantModule, samples: Any) -> Any:
        seen.append([sample.id for sample in samples])
        return encode_batch(self, samples)

    def lost(self: AssistantModule, batch: Any) -> AnswerLoss:
        found = loss(self, batch)
        return found._replace(total=found.total * torch.nan) if self.trainer.global_step == 8 else found

    monkeypatch.setattr(AssistantModule, "encode", encoded)
    monkeypatch.setattr(AssistantModule, "loss", lost)
    with pytest.raises(NonFiniteError) as error:
        runs.run(tmp_path)
    assert message(error).startswith("step 8: the loss is not finite (NaN or infinite); posts ")
    assert any(", ".join(ids) in message(error) for ids in (seen[-1], seen[-2])), "a batch may be prefetched"


def test_a_gradient_that_is_not_finite_names_the_accumulated_posts(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backward(self: AssistantModule, loss: torch.Tensor, *_: Any) -> None:
        (loss * torch.inf).backward()

    monkeypatch.setattr(AssistantModule, "backward", backward)
    with pytest.raises(NonFiniteError) as error:
        runs.run(tmp_path, accumulate_grad_batches=2)
    assert message(error).startswith("step 0: the gradient is not finite")
    assert "and 3 more" in message(error), "two batches of four posts"


def test_half_precision_of_all_weights_is_refused_while_training(
    make_backbone: Any, postcards: Corpus, tmp_path: Path
) -> None:
    """AdamW's epsilon is 0 in float16: the first step gives weights that are not finite."""
    backbone = make_backbone(1)
    module = AssistantModule(backbone, StudentSettings(learning_rate=1e-3))
    data = ReasoningDataModule(
        backbone, postcards.train[:8], postcards.validation[:4], module.settings.tasks, module.encode, batch_size=4
    )
    with pytest.raises(NonFiniteError, match="not finite"):
        fit(module, data, tmp_path, QUIET | {"precision": "16-true", "max_epochs": 1})


def test_weights_that_are_not_finite_after_the_last_step(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(self: AssistantModule) -> None:
        with torch.no_grad():
            next(p for p in self.parameters() if p.requires_grad).fill_(torch.nan)

    monkeypatch.setattr(AssistantModule, "on_train_end", end)
    with pytest.raises(NonFiniteError, match=r"after the last step, the weights \S+ are not finite"):
        runs.run(tmp_path, limit_train_batches=1, max_epochs=1, limit_val_batches=0)


def test_validation_probabilities_that_are_not_finite_name_the_posts(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.training import assistant

    monkeypatch.setattr(assistant, "score_labels", lambda *_: (torch.full((12, 3), torch.nan), torch.ones(12)))
    with pytest.raises(NonFiniteError, match=runs.corpus.validation[0].id) as error:
        runs.run(tmp_path)
    assert "the label probabilities in validation are not finite" in message(error)


def test_soft_targets_of_a_broken_assistant(make_backbone: Any, postcards: Corpus, tmp_path: Path) -> None:
    student, assistant = make_backbone(1), broken(make_backbone(2))
    tasks: Any = {"reason": 1.0, "classify": 1.0}
    rows = postcards.train[:5]
    key = soft_target_cache.key_function(student, list(tasks), "assistant", 0, 2.0)
    with pytest.raises(NonFiniteError, match="the assistant's soft targets are") as error:
        soft_target_cache.write(
            tmp_path, rows, key, lambda samples: encode(samples, student, tasks, True),
            lambda: OnlineTargets(assistant, student),
        )  # fmt: skip
    assert all(row.id in message(error) for row in rows)
    assert not soft_target_cache._shards(tmp_path)


@pytest.mark.parametrize("positions", ["response", "all"])
def test_online_soft_targets_of_a_broken_assistant(make_backbone: Any, postcards: Corpus, positions: Any) -> None:
    student, assistant = make_backbone(1), broken(make_backbone(2))
    settings = StudentSettings(distillation=DistillationSettings(positions=positions))
    module = StudentModule(student, settings, OnlineTargets(assistant, student))
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="the loss on the assistant's soft targets is not finite"):
        module.training_step(module.encode(postcards.train[:2]), 0)


def test_a_broken_model_neither_classifies_nor_generates(make_backbone: Any, postcards: Corpus) -> None:
    model, posts = Local(broken(make_backbone(1)), "student-1"), postcards.test[:2]
    for temperature in (0.0, 0.7):
        with pytest.raises(NonFiniteError, match=f"the probabilities of student-1 are .*{posts[1].id}"):
            list(model.reason(posts, "reason", Sampling(temperature, 4)))
    with pytest.raises(NonFiniteError, match=posts[0].id):
        model.classify(posts)
    with pytest.raises(NonFiniteError, match=posts[0].id):
        list(model.classify_and_reason(posts, "reason", Sampling(0.0, 4)))

"""The label distributions that a student learns: scores from packed rows, the loss, posts without answers, resuming."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from distill.data.corpus import Corpus
from distill.errors import SettingsError
from distill.models import tiny
from distill.models.backbone import Backbone, ModelSettings, create
from distill.models.scoring import label_scores, score_labels
from distill.task.labels import LabelSpace, Scale
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.training.batches import LabelTargets, check_compatibility, encode
from distill.training.datamodule import ReasoningDataModule
from distill.training.fit import fit
from distill.training.losses import label_divergence
from distill.training.soft_targets import OnlineTargets
from distill.training.student import DistillationSettings, StudentModule, StudentSettings
from tests.models.test_backbone import build_idefics3
from tests.training.loss_cases import plain_divergence
from tests.training.training_runs import QUIET, Killed, is_equal, state

TASKS: dict[Template, float] = {"reason": 1.0, "classify": 1.0}
SCALE = LabelSpace.from_scale(Scale())
NAMES = LabelSpace()


def settings(tasks: dict[str, float] | None = None, packing: bool = True, **distillation: Any) -> StudentSettings:
    options = DistillationSettings(**({"weight": 0.0, "label_weight": 1.0} | distillation))
    return StudentSettings(
        batch_size=4, learning_rate=1e-3, packing=packing, tasks=tasks or dict(TASKS), distillation=options
    )


def targets_of(samples: list[Sample], labels: int = 3) -> LabelTargets:
    g = torch.Generator().manual_seed(5)
    return {sample.id: torch.rand(labels, generator=g).softmax(-1).tolist() for sample in samples}


@pytest.fixture
def samples(postcards: Corpus) -> list[Sample]:
    """A long post, one without an image, one without an answer, and one without a rationale."""
    long, bare, unlabelled, short = postcards.train[:4]
    return [
        replace(long, text=long.text * 3),
        replace(bare, images=()),
        replace(unlabelled, label=None, rationale=None),
        replace(short, rationale=None),
    ]


@pytest.fixture(scope="module", params=["qwen", "idefics3"])
def model(request: pytest.FixtureRequest, make_backbone: Any, tokenizer_folder: Path, tmp_path_factory: Any) -> Any:
    """A factory of one tiny model with other labels."""
    backbone = make_backbone(4)
    if request.param == "idefics3":
        torch.manual_seed(0)
        build_idefics3(folder := tmp_path_factory.mktemp("idefics3"), tiny.load_tokenizer(tokenizer_folder))
        backbone = create(ModelSettings(str(folder), image_size=56), NAMES, Path("unused"))
        backbone.model.eval()
    return lambda labels: Backbone(backbone.model, backbone.processor, labels, backbone.settings)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("space", [NAMES, SCALE], ids=["first tokens", "whole labels"])
def test_the_scores_in_a_training_batch_are_those_of_label_scoring(
    model: Any, samples: list[Sample], space: LabelSpace, packing: bool
) -> None:
    backbone = model(space)
    assert backbone.labels_share_tokens == (space is SCALE)
    if space is SCALE:
        samples = [replace(sample, label=sample.label and 0.7, rationale=None) for sample in samples]
    chosen = [samples[0], *samples[2:]]
    batch = encode(samples, backbone, TASKS, packing, targets_of(chosen, len(space)))
    with torch.no_grad():
        states = backbone.hidden_states(batch.inputs).flatten(0, 1)
        found = label_scores(backbone, states[batch.labels.positions]).softmax(-1)
        expected = torch.cat([score_labels(backbone, backbone.encode([sample], "classify"))[0] for sample in chosen])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        batch.labels.log_q.exp(), torch.tensor(list(targets_of(chosen, len(space)).values())), atol=1e-6, rtol=0
    )


def test_label_targets_change_nothing_else_in_the_batch(backbone: Backbone, samples: list[Sample]) -> None:
    answered = [sample for sample in samples if sample.label is not None]
    plain, distilled = (encode(answered, backbone, TASKS, True, t) for t in ({}, targets_of(answered)))
    for field in ("tokens", "loss_weights", "tasks", "sizes"):
        assert torch.equal(getattr(plain, field), getattr(distilled, field))
    assert plain.labels is None
    with torch.no_grad():
        one, other = (backbone.hidden_states(b.inputs).flatten(0, 1)[b.positions] for b in (plain, distilled))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv"])
def test_the_loss_is_the_cross_entropy_and_the_weighted_mean_divergence(
    make_backbone: Any, samples: list[Sample], divergence: Any
) -> None:
    """Against each post alone, with the plain formula and autograd."""
    backbone, targets = make_backbone(1), targets_of(samples[1:])
    options = {"label_weight": 0.7, "temperature": 1.5, "divergence": divergence, "beta": 0.3, "skew": 0.2}
    module = StudentModule(backbone, settings(**options), None, targets)
    found = module.loss(module.encode(samples)).total
    plain = StudentModule(backbone, settings())
    hard = plain.loss(plain.encode([sample for sample in samples if sample.label is not None])).total * 3 / 4
    total = torch.zeros(())
    for sample in samples[1:]:
        p = score_labels(backbone, backbone.encode([sample], "classify"))[0][0]
        log_p, log_q = ((x.log() / 1.5).log_softmax(-1) for x in (p, torch.tensor(targets[sample.id])))
        total = total + plain_divergence(module.divergence, log_p, log_q)
    torch.testing.assert_close(found, hard + 0.7 * total / 4, atol=1e-5, rtol=0)
    weights = [w for w in backbone.model.parameters() if w.requires_grad]
    gradients = (torch.autograd.grad(x, weights, allow_unused=True) for x in (found, hard + 0.7 * total / 4))
    for one, other in zip(*gradients, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_the_label_divergence_has_the_gradient_of_the_formula_also_for_impossible_labels() -> None:
    scores = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64).log()
    for name in ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv"):
        chosen = DistillationSettings(divergence=name).chosen_divergence  # type: ignore[arg-type]
        values = label_divergence(scores, log_q, 2.0, chosen)
        (found,) = torch.autograd.grad(values.sum(), scores)
        expected = chosen.of_events((scores / 2).log_softmax(-1), (log_q / 2).log_softmax(-1))[1] / 2
        assert torch.isfinite(values).all()
        torch.testing.assert_close(found, expected.detach(), atol=1e-12, rtol=0)


def test_a_batch_without_answers_or_without_targets_is_trained(make_backbone: Any, samples: list[Sample]) -> None:
    student, unlabelled = make_backbone(1), samples[2:3]
    for soft in (None, OnlineTargets(make_backbone(2), student)):
        module = StudentModule(student, settings(weight=0.3), soft, targets_of(unlabelled))
        loss = module.loss(module.encode(unlabelled))
        assert float(loss.total.detach()) > 0 and loss.hard.shape == (0,)
        loss.total.backward()
        assert all(torch.isfinite(w.grad).all() for w in student.model.parameters() if w.grad is not None)
        plain = StudentModule(student, settings(weight=0.3), soft)
        values = [one.loss(one.encode(samples[:2])).total.detach() for one in (module, plain)]
        torch.testing.assert_close(*values)


def test_another_number_of_labels_is_refused(make_backbone: Any, samples: list[Sample]) -> None:
    with pytest.raises(SettingsError, match=f"post {samples[0].id} has 2 labels; the student has 3"):
        StudentModule(make_backbone(1), settings(), None, targets_of(samples, 2))


def test_posts_without_an_answer_are_trained_on_if_they_have_a_target(
    make_backbone: Any, samples: list[Sample], postcards: Corpus
) -> None:
    module = StudentModule(make_backbone(1), settings(), None, targets_of(samples))
    options: dict[str, Any] = {"batch_size": 4}
    arguments = (module.backbone, samples, postcards.validation, TASKS, module.encode)
    assert len(ReasoningDataModule(*arguments, **options).train) == 3
    assert len(ReasoningDataModule(*arguments, **options, label_targets=module.label_targets).train) == 4


def test_the_layout_of_the_label_prompt_is_checked_as_well(make_backbone: Any, postcards: Corpus) -> None:
    backbone = make_backbone(1)
    check_compatibility(backbone, postcards.train[:2], ["reason"], True, label_targets=True)
    states = type(backbone).hidden_states

    def leaking(inputs: Any, *rest: Any) -> torch.Tensor:
        return states(backbone, {k: v for k, v in inputs.items() if k != "ends"}, *rest)

    backbone.hidden_states = leaking
    check_compatibility(backbone, postcards.train[:2], ["reason"], True)
    with pytest.raises(SettingsError, match="tokens of a packed sequence that its mask hides"):
        check_compatibility(backbone, postcards.train[:2], ["reason"], True, label_targets=True)


def run(folder: Path, model_folder: Path, corpus: Corpus, kill: Any = None, **arguments: Any) -> StudentModule:
    L.seed_everything(0, verbose=False)
    model = ModelSettings(str(model_folder), image_size=56, batch_size=16)
    options = replace(settings(), model=model)
    student = create(model, NAMES, Path("unused"))
    rows = [replace(row, label=None, rationale=None) if n % 3 == 0 else row for n, row in enumerate(corpus.train[:24])]
    module = StudentModule(student, options, None, targets_of(rows))
    if kill is not None:
        module.on_train_batch_end = lambda *_: kill(module.trainer.global_step)  # type: ignore[method-assign]
    data = ReasoningDataModule(
        student, rows, corpus.validation[:12], TASKS, module.encode, batch_size=4, label_targets=module.label_targets
    )
    fit(module, data, folder, QUIET | arguments)
    return module


def test_a_killed_training_is_resumed_as_if_it_had_not_been(
    model_folder: Path, postcards: Corpus, tmp_path: Path
) -> None:
    run(tmp_path / "whole", model_folder, postcards)

    def kill(step: int) -> None:
        if step == 9:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "killed", model_folder, postcards, kill, val_check_interval=3)
    run(tmp_path / "reference", model_folder, postcards, val_check_interval=3)
    run(tmp_path / "killed", model_folder, postcards, val_check_interval=3)
    assert is_equal(state(tmp_path / "reference"), state(tmp_path / "killed"))


def test_training_brings_the_label_distribution_to_the_teachers(make_backbone: Any, postcards: Corpus) -> None:
    """A student with no labels at all, from the distributions alone."""
    student = make_backbone(1)
    rows = [replace(row, label=None, rationale=None) for row in postcards.train[:8]]
    module = StudentModule(student, settings(), None, targets_of(rows))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = module.loss(module.encode(rows)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]

"""Two gloo processes, with DDP and FSDP2, beside one process: losses, checkpoints, what a process holds, the model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import parallel_losses
from distill.models.backbone import load
from distill.models.scoring import next_token_logits
from distill.training.sharding import units

KINDS = parallel_losses.KINDS
pytestmark = pytest.mark.slow


class Trained:
    """The folder of all runs, and what they wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found = parallel_losses.results(folder)

    def losses(self, name: str) -> list[float]:
        return self.found[name]["losses"]

    def checkpoint(self, name: str) -> dict[str, Any]:
        return torch.load(self.folder / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Runs in one process, then in two, then again in one."""
    folder = tmp_path_factory.mktemp("parallel")
    parallel_losses.prepare(folder)
    parallel_losses.work(folder, "first")
    parallel_losses.start(folder, "second")
    parallel_losses.work(folder, "third")
    return Trained(folder)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_of_20_steps_are_those_of_one_process(trained: Trained, strategy: str, kind: str) -> None:
    """All weights, LoRA on a frozen base, a student with online and with cached soft targets, posts without images."""
    expected = trained.losses(f"one {kind}")
    assert len(expected) == 20 * parallel_losses.accumulated(kind)
    assert trained.losses(f"{strategy} {kind}") == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1, "the training changes the losses"


RESUMED = ["1 to 2 full", "1 to 2 lora", "2 to 1 full", "2 to 1 lora", "2 to 2 ddp mixed", "2 to 2 fsdp2 mixed"]


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_is_resumed_on_another_number_of_processes(trained: Trained, name: str) -> None:
    """Between two epochs on another number; on the same number within one, between two accumulated batches."""
    assert trained.losses(name) == pytest.approx(trained.losses(f"one {name.split()[-1]}"), abs=1e-5)


def test_each_of_two_processes_holds_half_of_weights_and_optimizer_state(trained: Trained) -> None:
    for kind in KINDS:
        whole, half = (trained.found[f"{name} {kind}"]["held"] for name in ("one", "fsdp2"))
        for what in ("weights", "optimizer state"):  # the steps of AdamW and odd sizes are not divided
            assert half[what] == pytest.approx(whole[what] / 2, rel=0.01)
        assert trained.found[f"ddp {kind}"]["held"] == whole


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_holds_what_that_of_one_process_holds(trained: Trained, kind: str) -> None:
    one, two = (trained.checkpoint(f"{name} {kind}") for name in ("one", "fsdp2"))
    assert one.keys() == two.keys() and two["processes"] == 2
    assert all("lora_" in name for name in two["state_dict"]) == (kind == "lora"), "frozen weights are left out"
    assert {name: w.shape for name, w in one["state_dict"].items()} == {
        n: w.shape for n, w in two["state_dict"].items()
    }
    states = [checkpoint["optimizer_states"][0] for checkpoint in (one, two)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for number, moments in states[0]["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(states[1]["state"][number][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_saved_model_answers_as_that_of_one_process(trained: Trained, kind: str) -> None:
    settings = parallel_losses.settings(trained.folder, kind, 1).model
    posts = parallel_losses.corpus(trained.folder).test[:6]
    logits = []
    for name in ("one", "fsdp2"):
        backbone = load(settings, parallel_losses.LABELS, trained.folder / "saved" / f"{name} {kind}")
        with torch.no_grad():
            logits.append(next_token_logits(backbone, backbone.encode(posts, "classify")))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-2)
    scores = [logit[:, backbone.label_ids].argmax(-1).tolist() for logit in logits]
    assert scores[0] == scores[1]


def test_a_layer_that_some_posts_skip_is_no_unit_of_its_own(make_backbone: Any) -> None:
    model: Any = make_backbone().model
    decoder = len(model.get_decoder().layers)
    assert len(units(model, all_used=False)) == decoder
    assert len(units(model, all_used=True)) == decoder + len(model.model.visual.blocks)


def test_the_table_shows_the_largest_difference(trained: Trained) -> None:
    lines = list(parallel_losses.tables(trained.found))
    assert lines.count("\nfull") == 1 and sum(line.startswith("  max") for line in lines) == len(KINDS)

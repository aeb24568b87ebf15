"""The inputs of TRL's trainers and the ratios of `student_step.py --model`; the answer lengths of `generation.py`."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

PAIRS = [([1, 2, 3], [7, 8]), ([4], [5, 6, 9])]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module as the scripts do."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module


def test_the_sft_loss_is_on_the_answers_only(script: Any) -> None:
    assert script("pretrained_step").sft_rows(PAIRS) == [
        {"input_ids": [1, 2, 3, 7, 8], "labels": [-100, -100, -100, 7, 8]},
        {"input_ids": [4, 5, 6, 9], "labels": [-100, 5, 6, 9]},
    ]


def test_prompts_are_padded_on_the_left_and_answers_on_the_right(script: Any) -> None:
    inputs = script("pretrained_step").distillation_inputs(PAIRS, padding=0)
    assert inputs["prompt_ids"].tolist() == [[1, 2, 3], [0, 0, 4]]
    assert inputs["prompt_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert inputs["completion_ids"].tolist() == [[7, 8, 0], [5, 6, 9]]
    assert inputs["completion_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert inputs["num_items_in_batch"] == 5


def test_a_baseline_is_compared_with_our_step_that_does_its_work(script: Any) -> None:
    usage, module = script("measuring").Usage, script("pretrained_step")
    runs = {"published": [usage(9, 8, 600)], "online": [usage(3, 2, 100), usage(1, 2, 300), usage(2, 4, 200)]}
    baseline, ours = module.summarize(runs, 4)
    assert (baseline["ours"], baseline["rate"]) == ("online", 4 / 9)
    ratios = [baseline[f"{field}_ratio"] for field in usage._fields]
    assert ratios == pytest.approx([4.5, 4, 3])
    assert (ours["seconds"], ours["rate"], ours["cpu_seconds_ratio"]) == (2, 2, 1)


def test_a_row_ends_after_its_number_of_tokens_and_not_before(script: Any) -> None:
    """Also when the rows above it have left the batch."""
    prompts = torch.tensor([[0, 5], [6, 7]])
    ends = script("generation").EndsAt(prompts, [1, 3], end=2)
    scores = torch.zeros(2, 4)
    first = ends(prompts, scores.clone())
    assert first.argmax(-1).tolist() == [2, 0] and first[1, 2] == -torch.inf
    assert first[0].isneginf().tolist() == [True, True, False, True]
    second = ends(torch.tensor([[6, 7, 1]]), scores[:1].clone())
    assert second[0].isneginf().tolist() == [False, False, True, False]
    third = ends(torch.tensor([[6, 7, 1, 1]]), scores[:1].clone())
    assert third[0].isneginf().tolist() == [True, True, False, True]

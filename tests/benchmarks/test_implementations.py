"""The checks of `student_step.py` pass for correct implementations and fail for wrong ones."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import published, workload

TASKS: Any = ["reason", "classify"]


@pytest.fixture
def implementations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as the script imports it, with small vocabularies."""
    monkeypatch.syspath_prepend(str(Path(workload.__file__).parent))
    module = importlib.import_module("implementations")
    for name, ids in (("tiny-64", 1024), ("tiny-128", 1088)):
        monkeypatch.setitem(module.workload.MODELS[name]["text"], "vocab_size", ids)
    return module


@pytest.fixture
def case(implementations: ModuleType, tmp_path: Path) -> Any:
    tokenizer = workload.train_tokenizer(1024)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    samples = workload.synthetic_posts(tmp_path, 4, tokenizer, 56, 0.25)
    student = workload.build_model("tiny-64", tokenizer, "meta", image_size=56, vocabulary=1024)
    lengths = published.padded_lengths(samples, student, TASKS)
    return implementations.Case("tiny", "cpu", False, 56, 2, 1, samples, lengths, tmp_path)


def test_wrong_implementations_fail_the_checks(
    implementations: ModuleType, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert implementations.write_targets(case) > 0
    differences = implementations.check_ours(case)
    assert differences.pop("gradient of the KL from cached targets") < 1e-2  # cached targets are bfloat16
    assert len(differences) == 4 and max(differences.values()) < 1e-4
    assert max(implementations.check_baseline(case).values()) < 1e-4

    read = implementations.CachedTargets.read
    monkeypatch.setattr(
        implementations.CachedTargets,
        "read",
        lambda *arguments: {name: rows.flip(0) for name, rows in read(*arguments).items()},
    )
    assert implementations.check_ours(case)["gradient of the KL from cached targets"] > 0.1
    loss = implementations.published.loss
    # another temperature changes only the KL term
    monkeypatch.setattr(implementations.published, "loss", lambda *arguments: loss(*arguments[:4], 1.1 * arguments[4]))
    differences = implementations.check_baseline(case)
    assert differences["published cross-entropy"] < 1e-4 and differences["published KL"] > 1e-2

"""What the benchmark of the student step checks before it times anything: right sides pass, wrong ones do not."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import published, workload

TASKS: Any = ["reason", "classify"]


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As the script imports it, with vocabularies of a test's size."""
    monkeypatch.syspath_prepend(str(Path(workload.__file__).parent))
    module = importlib.import_module("sides")
    for name, ids in (("tiny-64", 1024), ("tiny-128", 1088)):
        monkeypatch.setitem(module.workload.MODELS[name]["text"], "vocab_size", ids)
    return module


@pytest.fixture
def case(sides: ModuleType, tmp_path: Path) -> Any:
    tokenizer = workload.train_tokenizer(1024)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    samples = workload.make_rows(tmp_path, 4, tokenizer, 56, 0.25)
    student = workload.build("tiny-64", tokenizer, "meta", image_size=56, vocabulary=1024)
    widths = published.longest(samples, student, TASKS)
    return sides.Case("tiny", "cpu", False, 56, 2, 1, samples, widths, tmp_path)


def test_a_side_that_is_wrong_is_not_timed(sides: ModuleType, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sides.write_targets(case) > 0
    found = sides.check_ours(case)
    assert found.pop("gradient of the KL from cached targets") < 1e-2  # they are bfloat16
    assert len(found) == 4 and max(found.values()) < 1e-4
    assert max(sides.check_baseline(case).values()) < 1e-4

    read = sides.CachedTargets.read
    monkeypatch.setattr(
        sides.CachedTargets, "read", lambda *given: {name: rows.flip(0) for name, rows in read(*given).items()}
    )
    assert sides.check_ours(case)["gradient of the KL from cached targets"] > 0.1
    loss = sides.published.loss
    # another temperature moves the KL alone
    monkeypatch.setattr(sides.published, "loss", lambda *given: loss(*given[:4], 1.1 * given[4]))
    wrong = sides.check_baseline(case)
    assert wrong["published cross-entropy"] < 1e-4 and wrong["published KL"] > 1e-2

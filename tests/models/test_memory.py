"""Memory: its peak, what is returned to the system, and errors that name the posts and the settings that help."""

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.data.corpus import Corpus
from distill.errors import RunError
from distill.models import local
from distill.models.local import Local
from distill.models.memory import memory_errors, peak_mb, reset_peak, return_freed
from distill.training.assistant import AssistantModule, TrainSettings
from distill.training.datamodule import ReasoningDataModule
from distill.training.fit import fit

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS)
def test_posts_and_remedy_are_named(error: BaseException) -> None:
    with (
        pytest.raises(RunError, match=r"^out of memory with the posts a, b; reduce x$"),
        memory_errors("ab", "reduce x"),
    ):
        raise error
    with pytest.raises(RunError, match=r"h, \.\.\.; reduce"), memory_errors(lambda: "abcdefghi", "reduce x"):
        raise error


def test_other_errors_are_unchanged() -> None:
    for error in (RuntimeError("shapes differ"), RunError("the GPU is out of memory"), ValueError("x")):
        with pytest.raises(type(error), match=str(error)), memory_errors("a", "reduce x"):
            raise error


def test_scoring_names_the_posts(make_backbone: Any, postcards: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    posts = postcards.test[:2]

    def full(*_: Any) -> None:
        raise ERRORS[0]

    monkeypatch.setattr(local, "score_labels", full)
    names = ", ".join(post.id for post in posts)
    with pytest.raises(RunError, match=f"with the posts {names}; reduce model.batch_size, data.max_tokens"):
        Local(make_backbone(), "").classify(posts)


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_training_names_the_posts(
    make_backbone: Any, postcards: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    backbone = make_backbone()
    module = AssistantModule(backbone, TrainSettings(batch_size=2))
    data = ReasoningDataModule(
        backbone, postcards.train[:2], postcards.validation[:2], ["classify"], module.encode, batch_size=2
    )
    name = "loss" if step == "training_step" else "_expected_values"

    def full(*_: Any) -> None:
        raise ERRORS[1]

    monkeypatch.setattr(module, name, full)
    split = postcards.train if step == "training_step" else postcards.validation
    arguments = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    with pytest.raises(RunError, match=r"out of memory with the posts .*; reduce the stage's batch_size") as caught:
        fit(module, data, tmp_path, arguments)
    assert all(post.id in str(caught.value) for post in split[:2])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_memory_is_returned_to_the_system() -> None:
    def used_mb() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

    torch.ones(4_000_000)  # freed at once: from now on, glibc takes blocks of up to 16 MB from its heap
    blocks = [torch.ones(500_000) for _ in range(150)]
    last = blocks.pop()  # above the others: they cannot be cut off the heap's end
    blocks.clear()
    before = used_mb()
    return_freed()
    assert before - used_mb() > 150 and last.sum() == 500_000


def test_the_peak_begins_anew() -> None:
    reset_peak()
    start = peak_mb()["host"]
    block = torch.ones(50_000_000)
    assert peak_mb()["host"] - start > 150 and block.any()
    del block
    return_freed()
    reset_peak()
    assert peak_mb()["host"] - start < 100

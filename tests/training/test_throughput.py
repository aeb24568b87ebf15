"""Tokens per second of a training."""

import pytest

from distill.training import throughput
from distill.training.throughput import Throughput


def test_pauses_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 100.0, 101.0, 111.0])
    monkeypatch.setattr(throughput.time, "monotonic", lambda: next(clock))
    speed = Throughput()
    assert speed.take() is None
    speed.start()
    speed.add(30)  # in 2 s
    speed.start()  # after 98 s of validation
    speed.add(60)  # in 1 s
    assert speed.take() == 30
    assert speed.take() is None
    speed.add(50)  # in 10 s
    assert speed.take() == 5

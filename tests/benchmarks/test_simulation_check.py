"""The comparison of the simulation with the gateway: what it takes from the metrics, and its table."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import simulation_check
from benchmarks.simulation_check import figures, simulated, table
from distill.planning import measured
from distill.planning.service import Service, batch_times
from distill.serving.metrics import Metrics
from distill.serving.settings import ServeSettings


def test_the_batches_since_an_earlier_page_are_read(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.batch_seconds("classify", 1, 9.0)
    metrics.batch_seconds("classify", 2, 9.0)
    before = metrics.text().decode()
    metrics.batch_seconds("classify", 1, 0.5)
    metrics.batch_seconds("reason", 4, 2.0)
    page = tmp_path / "metrics.txt"
    page.write_text(simulation_check._batches_since(before, metrics.text().decode()))
    assert measured.batch_seconds(page) == {"classify": {1: 0.5}, "reason": {4: 2.0}}


def test_the_figures_of_both_sides_are_compared_by_their_medians() -> None:
    def side(p50: float, degraded: float) -> dict[str, float]:
        return {"p50 s": p50, "degraded": degraded}

    rounds = [[side(1.0, 0.0), side(1.1, 0.001), side(1.0, 0.0)], [side(1.2, 0.0), side(1.1, 0.0), side(1.3, 0.0)],
              [side(9.0, 0.0), side(1.2, 0.0), side(1.2, 0.0)]]  # fmt: skip
    text, worst = table({"low": rounds})
    assert worst == pytest.approx(1 - 1.1 / 1.2)
    assert text.splitlines()[1].split() == ["low", "p50", "s", "1.2", "1.1", "-8.3%", "1.2", "+0.0%"]
    assert text.splitlines()[2].split() == ["low", "degraded", "0", "0", "–", "0", "–"]


def test_the_simulation_gets_the_arrivals_of_the_load() -> None:
    service = Service(ServeSettings(batch_size=1, batch_wait_ms=0.0, queue=2), {"classify": batch_times({1: 1.0})})
    found = simulated(service, np.array([0.0, 0.5, 0.6, 5.0]), 8.0, False, 0)
    assert found == {"p50 s": 1.0, "p99 s": pytest.approx(1.49), "degraded": 0.0, "refused": 0.25, "answers/s": 3 / 8}
    none = figures(np.array([0.0]), np.array([True]), np.array([False]), 2.0)
    assert none["refused"] == 1.0 and none["answers/s"] == 0.0

"""Charts: points agree with the axes, and series without data are left out."""

import math
from pathlib import Path

import pytest

from distill.evaluation.charts import cascade_charts, chart, training_charts


def value_at(found: dict, y: float) -> float:
    """The value of an SVG y coordinate according to the y axis."""
    (y0, low), (y1, high) = ((place, float(text)) for place, text in (found["y_ticks"][0], found["y_ticks"][-1]))
    return low + (y0 - y) / (y0 - y1) * (high - low)


def test_points_agree_with_the_axes() -> None:
    found = chart({"a": [(0.0, 0.91), (0.5, 0.97), (1.0, 0.95)]}, bottom=None, markers={"here": (0.3, 0.96)})
    low, high = (float(found["y_ticks"][end][1]) for end in (0, -1))
    assert 0.88 <= low <= 0.91 and 0.97 <= high <= 1.0, "the axis starts near the lowest point"
    for (_, y), expected in zip(found["lines"]["a"], (0.91, 0.97, 0.95), strict=True):
        assert value_at(found, y) == pytest.approx(expected, abs=0.002)
    assert value_at(found, found["markers"]["here"][1]) == pytest.approx(0.96, abs=0.002)
    left, right = found["lines"]["a"][0][0], found["lines"]["a"][-1][0]
    assert (found["x_ticks"][0][0], found["x_ticks"][-1][0]) == (left, right)


def test_negative_values_and_flat_curves_are_drawn() -> None:
    found = chart({"minus MAE": [(0.0, -1.4), (1.0, -1.2)]}, bottom=None)
    assert [value_at(found, y) for _, y in found["lines"]["minus MAE"]] == pytest.approx([-1.4, -1.2], abs=0.01)
    flat = chart({"flat": [(0.0, 1.0), (1.0, 1.0)]}, bottom=None)
    assert all(math.isfinite(y) for _, y in flat["lines"]["flat"])
    assert chart({}) == {}


def test_a_band_is_a_closed_polygon() -> None:
    band = [(0.0, 0.4, 0.6), (1.0, 0.5, 0.9)]
    found = chart({"a": [(0.0, 0.5), (1.0, 0.7)]}, band=band)
    heights = [value_at(found, y) for _, y in found["band"]]
    assert heights == pytest.approx([0.4, 0.5, 0.9, 0.6], abs=0.01)


def test_a_cascade_has_five_charts() -> None:
    curve = {"coverage": [0.5, 1.0], "risk": [0.0, 0.1]}
    bins = {"confidence": [None, 0.6, 0.9], "accuracy": [None, 0.5, 1.0], "count": [0, 4, 6]}
    model = {when: {"risk_coverage": curve, "reliability": bins} for when in ("before", "after")}
    rows = [
        {
            "policy": policy,
            "deferred": deferred,
            "quality": 0.9,
            "low": 0.8,
            "high": 1.0,
            "seconds": deferred,
            "currency": "",
        }  # as strings, as csv reads them
        for policy in ("entropy", "random")
        for deferred in ("0.0", "1.0")
    ]
    metrics = {
        "measure": "entropy", "accuracy": 0.9, "n": 10, "cost_ratio": {"currency": None}, "deferral": rows,
        "stages": {"teacher_first": {"asked": 3, "cost": {"seconds": 5.0, "currency": None}}},
        "selective": {"student": model, "teacher": model},
    }  # fmt: skip
    charts = cascade_charts(metrics)
    assert list(charts) == [
        "accuracy by share of posts deferred", "accuracy by seconds per post", "risk by coverage",
        "accuracy of the student by its confidence", "accuracy of the teacher by its confidence",
    ]  # fmt: skip
    assert len(charts["accuracy by share of posts deferred"]["band"]) == 4
    assert len(charts["accuracy of the student by its confidence"]["lines"]["after calibration"]) == 2, (
        "empty bins are left out"
    )
    on_a_scale = cascade_charts(metrics | {"mae": 1.1})
    assert next(iter(on_a_scale)) == "minus MAE by share of posts deferred"
    assert len(cascade_charts(metrics | {"deferral": []})) == 3


def test_training_charts_are_read_from_lightnings_csv(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert training_charts(path) == {}
    path.write_text("step,train/loss,val/accuracy,val/selection\n1,2.0,,\n2,1.0,,\n2,,0.5,0.6\n3,nan,,\n")
    found = training_charts(path)
    assert list(found) == ["loss by step", "validation by step"]
    assert (
        list(found["loss by step"]["lines"]) == ["train/loss"]
        and len(found["loss by step"]["lines"]["train/loss"]) == 2
    )
    assert list(found["validation by step"]["lines"]) == ["val/accuracy"]

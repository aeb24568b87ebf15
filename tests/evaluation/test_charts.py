"""Charts: points agree with the axes, and series without data are left out."""

import math
from pathlib import Path

import pytest

from distill.evaluation.charts import cascade_charts, chart, deferral, training_charts
from tests.report_pages import cascade, deferral_rows


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


def test_the_deferral_curves_have_a_chart_for_each_known_cost() -> None:
    curves = deferral(cascade())
    assert curves is not None
    assert (curves["quality"], list(curves["policies"]), curves["in_use"]) == ("accuracy", ["entropy", "random"], 0)
    assert list(curves["charts"]) == ["accuracy by share of posts deferred", "accuracy by seconds per post"]
    by_share = curves["charts"]["accuracy by share of posts deferred"]
    assert len(by_share["band"]) == 6
    assert curves["policies"]["random"][1] == [0.5, 0.9, 0.7, 1.0, 0.51, None]
    for name, rows in curves["policies"].items():
        assert [value_at(by_share, y) for _, y in by_share["lines"][name]] == pytest.approx(
            [r[1] for r in rows], abs=0.01
        )
    assert curves["cascade"] == [0.3, 0.95, None, None, pytest.approx(0.41), None]
    priced = deferral(cascade(currency=2.0))
    assert priced is not None and list(priced["charts"])[2] == "accuracy by currency per post"
    assert priced["cascade"][5] == pytest.approx(0.8)  # 4 calls for 10 posts
    on_a_scale = deferral(cascade(mae=1.1))
    assert on_a_scale is not None and next(iter(on_a_scale["charts"])) == "minus MAE by share of posts deferred"


def test_curves_without_rows_and_damaged_rows_are_left_out() -> None:
    assert deferral(cascade(deferral=[])) is None
    rows = deferral_rows()
    rows[0]["quality"], rows[1]["low"], rows[2]["seconds"] = "nan", "", "x"
    curves = deferral(cascade(deferral=rows, measure="margin"))
    assert curves is not None and curves["in_use"] == -1
    assert curves["policies"]["entropy"] == [[0.5, 0.9, None, 1.0, 0.51, None], [1.0, 1.0, 0.7, 1.0, None, None]]
    assert list(curves["charts"]) == ["accuracy by share of posts deferred"]
    assert not curves["charts"]["accuracy by share of posts deferred"]["band"]


def test_a_cascade_has_three_charts_of_its_models() -> None:
    charts = cascade_charts(cascade())
    assert list(charts) == [
        "risk by coverage", "accuracy of the student by its confidence", "accuracy of the teacher by its confidence",
    ]  # fmt: skip
    assert len(charts["accuracy of the student by its confidence"]["lines"]["after calibration"]) == 2, (
        "empty bins are left out"
    )


def test_training_charts_are_read_from_lightnings_csv(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert training_charts(path) == {}
    path.write_text(
        "step,train/loss,val/accuracy,val/selection,train/tokens_per_second\n1,2.0,,,9000\n2,1.0,,,9000\n"
        "2,,0.5,0.6,\n3,nan,,,\n"
    )
    found = training_charts(path)
    assert list(found) == ["loss by step", "validation by step"]
    assert (
        list(found["loss by step"]["lines"]) == ["train/loss"]
        and len(found["loss by step"]["lines"]["train/loss"]) == 2
    )
    assert list(found["validation by step"]["lines"]) == ["val/accuracy"]

"""The table of a comparison: what is not known is a dash, and names of runs are text."""

import pandas as pd

from distill.evaluation.comparison_page import METRICS, page, text_table


def row(variant: str, **fields: object) -> dict[str, object]:
    known = {"role": "student", "variant": variant, "runs": 1, "posts": 9, "metric": "accuracy", "value": 0.5}
    return known | dict.fromkeys(("difference", "low", "high", "p", *METRICS)) | fields


FRAME = pd.DataFrame([
    row("first", macro_f1=0.4),
    row("<b>other</b>", value=0.75, difference=0.25, low=-0.05, high=0.5, p=0.0002),
])  # fmt: skip


def test_unknown_values_are_dashes_and_unused_metrics_are_left_out() -> None:
    header, _, first, other = text_table(FRAME).splitlines()
    assert header.split() == ["student", "runs", "accuracy", "difference", "95%", "interval", "p", "macro", "F1"]
    assert first.split() == ["first", "1", "0.500", "–", "–", "–", "0.400"]
    assert other.split() == ["<b>other</b>", "1", "0.750", "+0.250", "-0.050", "to", "+0.500", "<", ".001", "–"]


def test_the_page_shows_names_as_text_and_draws_the_interval_around_the_difference() -> None:
    html = page(FRAME)
    assert "&lt;b&gt;other&lt;/b&gt;" in html and "<b>" not in html and "<script" not in html
    assert html.count("<svg") == 1
    places = (("x1", 2), ("x2", 2), ("cx", 1))  # the first line is that of zero
    low, high, middle = (float(html.split(f'{name}="')[at].split('"')[0]) for name, at in places)
    assert low < middle < high

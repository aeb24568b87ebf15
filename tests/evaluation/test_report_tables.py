"""The tables of the report, and the one at the end of a chain."""

import re

from distill.evaluation.report_tables import format_table
from tests.report_pages import MAJORITY, metrics


def test_the_table_of_a_chain() -> None:
    roles = {
        "student_hard_labels": metrics(0.7),
        "student": metrics(0.93, reasoned_accuracy=0.92, parse_rate=1.0, rouge_l=0.8, consistency=0.99, meteor=0.5),
        "teacher": metrics(0.98, parse_rate=0.97),
    }
    lines = format_table(roles, {"majority class (neutral)": MAJORITY}).splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == [
        "accuracy",
        "weighted F1",
        "macro F1",
        "ECE",
        "AURC",
        "reasoned",
        "parse rate",
        "ROUGE-L",
        "consistency",
    ]
    assert [re.split(r"\s{2,}", line)[0] for line in lines[2:]] == [
        "majority class (neutral)",
        "teacher",
        "student",
        "student, hard labels",
    ]
    assert re.split(r"\s{2,}", lines[2])[1:] == ["0.500", "0.333", "0.222"] + ["–"] * 6
    assert re.split(r"\s{2,}", lines[4])[1:] == [
        *("0.930", "0.800", "0.700", "0.050", "0.100"),
        *("0.920", "1.000", "0.800", "0.990"),
    ]
    assert len({len(line) for line in lines}) == 1
    assert "ROUGE" not in format_table({"student": metrics(0.9)})

"""Reports with little content, parsed: for the tests of the page."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from distill.evaluation.report import Report, write_report
from distill.task.labels import LabelSpace

LABELS = LabelSpace()
HOSTILE = '</style><script>alert("x")</script><img src=https://evil.example/x.png onerror=alert(1)>{{ 7 * 7 }}'
MAJORITY = {"label": "neutral", "n": 6, "accuracy": 0.5, "weighted_f1": 0.333, "macro_f1": 0.222}
CHAIN = """"Text_analysis": "Glad words."
"Image_analysis": "A frown."
"Conflict_resolution": "Sarcasm."
"Final_conclusion": "Mockery."
"Prediction": negative"""


def metrics(accuracy: float, **more: Any) -> dict[str, Any]:
    confusion = [[2, 0, 0], [1, 1, 0], [0, 0, 2]]
    figures = {"n": 6, "accuracy": accuracy, "weighted_f1": 0.8, "macro_f1": 0.7, "confusion": confusion}
    return {**figures, "ece": 0.05, "aurc": 0.1, **more}


def post(**changes: Any) -> dict[str, Any]:
    answers = {"student": {"label": "negative", "probability": 0.91}}
    fields = {"index": 0, "id": "t1", "text": "what a day", "aspect": None, "image": None, "gold": "negative"}
    found = {"rationales": {"student": CHAIN}, "reference": None, "attributes": {}, "decision": None}
    return {**fields, "answers": answers, **found, **changes}


def deferral_rows(policies: tuple[str, ...] = ("entropy", "random"), currency: str = "") -> list[dict[str, str]]:
    """Rows of `deferral_curve.csv` as csv reads them: 0, 50 and 100% deferred, at .8, .9 and 1.0 accuracy."""
    return [
        {"policy": policy, "deferred": str(share), "quality": str(0.8 + 0.2 * share), "low": "0.7", "high": "1.0",
         "seconds": str(0.01 + share), "currency": currency and str(float(currency) * share)}
        for policy in policies
        for share in (0.0, 0.5, 1.0)
    ]  # fmt: skip


def cascade(currency: float | None = None, **changes: Any) -> dict[str, Any]:
    """Metrics of a cascade on 10 posts, 3 of which were deferred and one reviewed.

    Args:
        currency: price of one call of the teacher.
    """
    bins = {"confidence": [None, 0.6, 0.9], "accuracy": [None, 0.5, 1.0], "count": [0, 4, 6]}
    figures = {"ece": 0.1, "aurc": 0.1, "augrc": 0.1, "reliability": bins}
    model = {
        when: {**figures, "risk_coverage": {"coverage": [0.5, 1.0], "risk": [0.0, 0.1]}} for when in ("before", "after")
    }

    def stage(n: int, asked: int, seconds: float, paid: float | None) -> dict[str, Any]:
        cost = {
            "calls": asked,
            "prompt_tokens": 50 * asked,
            "completion_tokens": 0,
            "seconds": seconds,
            "currency": paid,
        }
        return {"n": n, "asked": asked, "accuracy": 0.9, "cost": cost}

    def paid(calls: int) -> float | None:
        return None if currency is None else currency * calls

    stages = {
        "student": stage(7, 10, 0.1, None),
        "teacher_first": stage(2, 3, 3.0, paid(3)),
        "teacher_review": stage(1, 1, 1.0, paid(1)),
    }
    metrics = {
        "n": 10, "accuracy": 0.95, "measure": "entropy", "stages": stages, "promise": "0.3 calls expected.",
        "stage_fractions": {"student": 0.7, "teacher_first": 0.2, "teacher_review": 0.1},
        "cost_ratio": {"seconds": 0.4, "currency": None if currency is None else 0.4},
        "teacher_calls_per_sample": 0.4, "student_accuracy": 0.8, "teacher_accuracy": 1.0,
        "review_flips": {"reviewed": 1, "wrong_to_right": 1, "right_to_wrong": 0, "still_right": 0, "still_wrong": 0},
        "selective": {"student": model, "teacher": model},
        "deferral": deferral_rows(currency="" if currency is None else str(currency)),
    }  # fmt: skip
    return metrics | changes


def decision(index: int | None, **changes: Any) -> dict[str, Any]:
    """A wrong decision of the student alone."""
    student = {"label": "positive", "right": False, "uncertainty": 0.12}
    fields = {"index": index, "id": f"t{index}", "stage": "student", "reason": "the student is certain"}
    found = {
        "gold": "negative",
        "label": "positive",
        "right": False,
        "student": student,
        "teacher": None,
        "review": None,
    }
    return fields | found | changes


class Page(HTMLParser):
    """A parsed page: elements with their attributes, and the text between them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.words = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data
        self.words = f"{self.words} {data}" if data.split() else self.words

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page(tmp_path: Path, **changes: Any) -> Page:
    fields = {"name": "quickstart", "labels": LABELS, "roles": {"student": metrics(0.83)}, **changes}
    write_report(tmp_path / "report.html", Report(**fields))
    return Page(tmp_path / "report.html")


def curve(folder: Path, rows: str) -> Path:
    path = folder / "metrics.csv"
    path.write_text(rows)
    return path

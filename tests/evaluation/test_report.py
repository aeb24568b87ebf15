"""The HTML report: complete, self-contained and safe with hostile texts; and the table at the end of a chain."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.errors import RunError
from distill.evaluation.report import Report, format_table, write_report
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
    fields = {"id": "t1", "text": "what a day", "aspect": None, "image": None, "gold": "negative"}
    return {**fields, "answers": answers, "rationale": CHAIN, "reference": None, **changes}


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


def test_the_page_shows_all_content(tmp_path: Path) -> None:
    rows = "epoch,step,train/loss,val/accuracy,val/selection\n0,9,,0.5,0.5\n0,9,3.0,,\n1,19,,0.75,0.75\n1,19,1.0,,\n"
    Image.new("RGB", (640, 480), "navy").save(tmp_path / "big.png")
    shown = page(
        tmp_path,
        roles={"student": metrics(0.83, rouge_l=0.61), "teacher": metrics(0.98)},
        baselines={"majority class (neutral)": MAJORITY},
        curves={"student": curve(tmp_path, rows), "teacher": tmp_path / "none.csv"},
        annotation={"n": 900, "teacher_accuracy": 0.9512, "quarantined": {"total": 4}, "cost": None},
        gallery=[post(image=tmp_path / "big.png", aspect="the mayor", reference="no fields")],
        settings="seed: 42",
        dates={"started": "2026-01-02"},
        versions={"torch": "2.13"},
    )
    words = " ".join(shown.words.split())
    for word in (
        "quickstart started 2026-01-02 torch 2.13",
        "majority class (neutral) 0.500 0.333 0.222 – –",
        "teacher 0.980 0.800 0.700 0.050 0.100 student 0.830",
        "student 0.610",
        "samples 900 teacher accuracy 0.951 quarantined: total 4",
        "target “the mayor”",
        "✓ negative 0.91",
        "Image analysis A frown.",
        "not a rationale (malformed) no fields",
        "seed: 42",
        "negative 2 0 0 neutral 1 1 0 positive 0 0 2",
    ):
        assert word in words, word
    assert "cost" not in words
    lines = [line["points"] for line in shown.all("polyline")]
    assert len(lines) == 2  # a loss and an accuracy; val/selection is not shown
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in (lines[0] or "").split())
    assert x1 < x2 and y1 < y2  # the loss falls: SVG y coordinates grow downwards
    (image,) = shown.all("img")
    assert (image["src"] or "").startswith("data:image/jpeg;base64,")
    assert len(image["src"] or "") < 40_000


def test_optional_sections_are_left_out(tmp_path: Path) -> None:
    shown = page(tmp_path)
    headings = re.findall(r"<h2>(.*?)</h2>", shown.source)
    assert headings == ["Classification", "Confusion"]


def test_the_page_loads_no_external_resources(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    shown = page(tmp_path, gallery=[post(image=tmp_path / "a.png")])
    policy = next(meta["content"] for meta in shown.all("meta") if meta.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not {"script", "link", "iframe", "object", "a"} & {tag for tag, _ in shown.elements}
    sources = [a[name] or "" for _, a in shown.elements for name in ("src", "href", "xlink:href") if name in a]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "url(" not in shown.source and "@import" not in shown.source


def test_hostile_text_is_escaped_everywhere(tmp_path: Path) -> None:
    role = f"role {HOSTILE}"
    hostile = post(
        id=HOSTILE,
        text=HOSTILE,
        aspect=HOSTILE,
        gold=HOSTILE,
        answers={role: {"label": HOSTILE, "probability": 0.5}},
        rationale=CHAIN.replace("Glad words.", HOSTILE.replace('"', "'")),
        reference=HOSTILE,
        image=tmp_path / "<script>.png",
    )
    shown = page(
        tmp_path,
        name=HOSTILE,
        labels=LabelSpace.from_names([HOSTILE, "neutral", "positive"]),
        roles={role: metrics(0.5)},
        baselines={HOSTILE: MAJORITY},
        curves={role: curve(tmp_path, f'step,"train/{HOSTILE.replace(chr(34), "")}"\n1,2\n2,1\n')},
        annotation={HOSTILE: HOSTILE},
        gallery=[hostile],
        settings=HOSTILE,
        dates={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
    )
    assert "<script" not in shown.source
    assert not shown.all("script") and not shown.all("img")
    assert not [a for _, a in shown.elements for name in a if name.startswith("on")]
    assert shown.text.count(HOSTILE) >= 15
    assert "49" not in shown.text  # a template in a post is not evaluated


@pytest.mark.parametrize(
    ("text", "expected"),
    [("half \ud83d a pair", "half ? a pair"), ("zero \x00 byte", "zero \x00 byte"), ("\u202eleft", "\u202eleft")],
)
def test_unusual_characters_do_not_break_the_page(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in page(tmp_path, gallery=[post(text=text)]).text


def test_unreadable_images_are_reported(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG truncated")
    shown = page(tmp_path, gallery=[post(), post(image=tmp_path / "gone.png"), post(image=tmp_path / "broken.png")])
    assert "no image" in shown.text
    assert "gone.png is missing" in shown.text and "broken.png" in shown.text
    assert not shown.all("img")


@pytest.mark.parametrize(
    "rows",
    ["", "epoch,step\n", "step,train/loss\n,\n1,nan\n2,inf\nx,1\n", "step,train/loss\n1,2,3,4\n\n2\n", "\x00\xff"],
)
def test_damaged_training_logs_are_ignored(rows: str, tmp_path: Path) -> None:
    shown = page(tmp_path, curves={"student": curve(tmp_path, rows)})
    assert len(shown.all("polyline")) == 0
    assert "0.830" in shown.text


def test_long_curves_are_downsampled(tmp_path: Path) -> None:
    rows = "step,train/loss\n" + "".join(f"{i},{100 / (i + 1)}\n" for i in range(20_000))
    shown = page(tmp_path, curves={"student": curve(tmp_path, rows)})
    (line,) = shown.all("polyline")
    assert 200 < len((line["points"] or "").split()) <= 300


def test_several_seeds_give_mean_and_standard_deviation(tmp_path: Path) -> None:
    roles = {"student": [metrics(0.8), metrics(0.9), metrics(1.0)], "student_hard_labels": metrics(0.6)}
    shown = page(tmp_path, roles=roles)
    assert "0.900 ± 0.100" in " ".join(shown.words.split())
    assert "over up to 3 seeds" in shown.text
    assert "6 0 0" in " ".join(shown.words.split())  # the sum of their confusion matrices
    assert "0.900 ± 0.100" in format_table(roles)


def test_a_failed_write_keeps_the_earlier_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"report\.html: No space left on device"):
        page(tmp_path, name="second")
    assert "quickstart" in (tmp_path / "report.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


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

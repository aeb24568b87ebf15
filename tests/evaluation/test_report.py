"""The HTML report: complete, self-contained and safe with hostile texts."""

import base64
import re
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from distill.errors import RunError
from distill.evaluation.report_tables import format_table
from distill.task.labels import LabelSpace
from tests.report_pages import CHAIN, HOSTILE, MAJORITY, cascade, curve, decision, deferral_rows, metrics, page, post


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
    script = shown.source.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    assert not {"link", "iframe", "object"} & {tag for tag, _ in shown.elements}
    sources = [a[name] or "" for _, a in shown.elements for name in ("src", "href", "xlink:href") if name in a]
    assert sources and all(source.startswith(("data:image/", "#")) for source in sources)
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval|fetch", script)
    assert "url(" not in shown.source and "@import" not in shown.source


def test_hostile_text_is_escaped_everywhere(tmp_path: Path) -> None:
    role = f"role {HOSTILE}"
    hostile = post(
        id=HOSTILE,
        text=HOSTILE,
        aspect=HOSTILE,
        gold=HOSTILE,
        answers={role: {"label": HOSTILE, "probability": 0.5}},
        rationales={role: CHAIN.replace("Glad words.", HOSTILE.replace('"', "'"))},
        reference=HOSTILE,
        attributes={HOSTILE: HOSTILE},
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
        cascade=cascade(promise=HOSTILE, deferral=deferral_rows((HOSTILE, "entropy"))),
        stages={HOSTILE: {}},
        gallery=[hostile],
        decisions=[{"title": HOSTILE, "total": 1, "rows": [decision(0, id=HOSTILE, gold=HOSTILE, label=HOSTILE)]}],
        settings=HOSTILE,
        dates={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
    )
    assert shown.source.count("<script") == len(shown.all("script")) == 1
    assert not shown.all("img")
    assert {a["id"] for _, a in shown.elements if "id" in a} == {"post-0", "decision-0"}
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


def test_rationales_are_marked_by_the_attributes_that_they_name(tmp_path: Path) -> None:
    grounded = {"tone": "Glad", "face": "frown"}
    posts = [
        post(attributes=grounded, rationales={"student": CHAIN, "student_refined": "no fields"}),
        post(index=1, attributes=grounded | {"sky": "blue"}),
        post(index=2),
    ]
    words = " ".join(page(tmp_path, gallery=posts).words.split())
    for mark in (
        "rationale: student grounded Text analysis",
        "rationale: student, refined not grounded does not name Glad, frown not a rationale (malformed)",
        "rationale: student not grounded does not name blue Text analysis",
        "rationale: student grounding unknown Text analysis",
    ):
        assert mark in words, mark


def test_a_refined_student_is_shown_in_tables_charts_and_gallery(tmp_path: Path) -> None:
    answers = {"student_refined": {"label": "negative", "probability": 0.97}}
    shown = page(
        tmp_path,
        roles={"student": metrics(0.8, grounded=0.9), "student_refined": metrics(0.9), "teacher": metrics(0.98)},
        curves={"student_refined": curve(tmp_path, "step,train/loss\n1,2\n2,1\n")},
        cascade=cascade(),
        gallery=[post(answers=answers)],
    )
    words = " ".join(shown.words.split())
    assert "student 0.800 0.800 0.700 0.050 0.100 student, refined 0.900" in words
    assert "grounded teacher – student 0.900 student, refined –" in words
    assert "Training student, refined" in words and "student, refined ✓ negative 0.97" in words
    # the cascade's student is the refined one
    assert "teacher 1 – student – – student, refined 0.01 – cascade 0.41 –" in words


def test_costs_and_curation_are_shown_where_they_are_known(tmp_path: Path) -> None:
    stages = {
        "teacher": {"seconds": 146.3, "peak_memory_mb": {"host": 762, "gpu": 11_000}},
        "annotate": {"seconds": 17.0},
    }
    paid = {"answers": 1903, "prompt_tokens": 221_440, "completion_tokens": 70_207, "cost": 1.25}
    annotation = {"n": 9, "paid": paid, "curated": {"edited": 3, "dropped": 1, "relabelled": 0}}
    roles = {"student": metrics(0.8), "teacher": metrics(0.9)}
    shown = page(tmp_path, roles=roles, stages=stages, annotation=annotation, cascade=cascade(currency=2.0))
    words = " ".join(shown.words.split())
    for text in (
        "teacher 1 2 student 0.01 – cascade 0.41 0.8",
        "teacher 2 min 26 s 762 MiB 10.7 GiB annotate 17.0 s – – total 2 min 43 s 762 MiB 10.7 GiB",
        "1903 answers of the teacher, 221440 prompt tokens, 70207 completion tokens, price 1.25",
        "Curated by a person: edited 3, dropped 1, relabelled 0.",
    ):
        assert text in words, text


def test_files_of_earlier_versions_give_dashes(tmp_path: Path) -> None:
    stages = {"teacher": {"status": "done"}, "student": {"seconds": 20.0}}
    old = cascade(deferral=[{"policy": "entropy", "deferred": "0.0", "quality": "0.8"}])
    shown = page(tmp_path, stages=stages, annotation={"n": 9, "paid": {"answers": 3}}, cascade=old, gallery=[post()])
    words = " ".join(shown.words.split())
    assert "teacher – – student 20.0 s – total – –" in words
    assert "3 answers of the teacher, – prompt tokens, – completion tokens, price –" in words
    assert "Curated" not in words and "grounding unknown" in words
    assert "accuracy by share of posts deferred" in words and "accuracy by seconds per post" not in words


def test_decisions_and_posts_link_to_each_other(tmp_path: Path) -> None:
    shown_decision = decision(7, review={"label": None, "right": False, "uncertainty": None})
    rows = [shown_decision, decision(None, id="elsewhere"), decision(9)]
    group = {"title": "Wrong answers of the cascade", "total": 40, "rows": rows}
    posts = [post(index=7, decision=shown_decision), post(index=8, decision=decision(8))]
    shown = page(tmp_path, gallery=posts, decisions=[group])
    ids = [attributes["id"] for _, attributes in shown.elements if "id" in attributes]
    assert ids == ["decision-7", "post-7", "post-8"]
    assert [link["href"] for link in shown.all("a")] == ["#post-7", "#decision-7"]
    words = " ".join(shown.words.split())
    assert "Wrong answers of the cascade: 40 the first 3 are shown" in words
    assert "negative ✗ positive 0.12 – – no answer ✗ positive student: the student is certain" in words

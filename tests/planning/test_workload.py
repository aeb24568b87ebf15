"""What a chain meets before it runs: rows that are written, rows that are assumed, and who is asked."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.errors import SettingsError
from distill.models.backbone import ModelSettings
from distill.models.endpoint import EndpointSettings
from distill.planning.workload import SAMPLE, ChainForecast, spread
from distill.task.prompts import CLASSIFY_PREFIX, render
from distill.task.sample import Sample
from tests import micro

TAUGHT: dict[str, Any] = micro.TAUGHT | {"evaluate": {"max_new_tokens": 100}}


def forecast(folder: Path, content: dict[str, Any], **changes: Any) -> ChainForecast:
    (scratch := folder / "scratch").mkdir()
    return ChainForecast(micro.read(micro.write(folder, content, **changes)), scratch)


def test_of_a_recording_the_rows_are_known_and_valid(tmp_path: Path) -> None:
    found = forecast(tmp_path, micro.RECORDED)
    taught = found.annotated()
    assert taught.known and len(taught.samples) == 27 and all(row.rationale and row.label for row in taught.samples)
    student = found.student_rows()
    assert not student.known and len(student.samples) == 27 + 27
    assert list(found.questions()) == []


def test_what_a_teacher_has_not_written_is_assumed_for_every_post(tmp_path: Path) -> None:
    found = forecast(tmp_path, TAUGHT)
    assert len(found.teacher_rows(["predict"]).samples) == 27 and found.teacher_rows(["predict"]).known
    taught = found.annotated()
    assert not taught.known and len(taught.samples) == 27 + 9
    written = {post.rationale for post in found.corpus.train if post.rationale}
    assert all(row.rationale in written | {p.rationale for p in found.corpus.test + found.corpus.validation}
               and row.label in found.labels.names for row in taught.samples)  # fmt: skip
    skipping = tmp_path / "skip"
    skipping.mkdir()
    assert len(forecast(skipping, TAUGHT, annotate__unlabelled="skip").annotated().samples) == 27


def test_rationales_have_a_length_where_the_data_has_none(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"id": f"p{n}", "text": f"post {n}", "label": ["negative", "positive"][n % 2]} for n in range(20)]
    (data / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"source": "jsonl", "train": ["all.jsonl"], "test": []}
    server = {"annotate": {"endpoint": {"base_url": "http://127.0.0.1:9/v1", "model": "big"}}}
    found = forecast(tmp_path, micro.RECORDED | {"data": files} | server)
    taught = found.annotated()
    assert len(taught.samples) == len(found.corpus.train) == 16
    assert all(150 < len((row.rationale or "").split()) < 250 for row in taught.samples)


def test_every_question_to_a_teacher_is_counted(tmp_path: Path) -> None:
    found = forecast(tmp_path, TAUGHT)
    asked = {(q.stage, q.about): (q.least, q.most) for q, _ in found.questions()}
    assert asked == {
        ("annotate", "labels"): (9, 9),
        ("annotate", "rationales"): (27, 27 * 4 + 9 * 2),  # predict and explain, each with one retry
        ("evaluate", "labels"): (9, 9),
        ("evaluate", "rationales"): (9, 9),
        ("calibrate", "labels"): (9, 9),
        ("cascade", "second looks"): (0, 9),
    }
    assert all(isinstance(teacher, ModelSettings) for _, teacher in found.questions())


def test_a_teacher_that_may_have_to_vote_is_asked_more_often(tmp_path: Path) -> None:
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "big", "agreement_samples": 3}
    content = TAUGHT | {"calibrate": TAUGHT["calibrate"] | {"endpoint": endpoint}}
    content = {name: section for name, section in content.items() if name != "evaluate"}
    found = forecast(tmp_path, content, cascade__deferral_curve=False)
    teachers = {(q.stage, q.about): teacher for q, teacher in found.questions()}
    assert isinstance(teachers["annotate", "labels"], ModelSettings)
    assert isinstance(teachers["calibrate", "labels"], EndpointSettings)
    asked = {(q.stage, q.about): (q.least, q.most) for q, _ in found.questions()}
    assert asked["calibrate", "labels"] == (9, 27)
    assert asked["cascade", "labels"] == asked["cascade", "second looks"] == (0, 27)


def test_prompts_are_counted_by_the_teachers_own_tokenizer(tmp_path: Path) -> None:
    found = forecast(tmp_path, TAUGHT)
    assert found.recipe.teacher is not None
    model = found.model(found.recipe.teacher.model)
    told = {(q.stage, q.about): q for q, _ in found.questions()}["calibrate", "labels"].prompt_tokens
    inputs = model.encode(found.corpus.validation, "classify")
    closing = len(model.encoder.tokens(CLASSIFY_PREFIX))
    real = inputs["attention_mask"].sum().item() / len(found.corpus.validation)
    assert told == pytest.approx(real - closing)


def test_without_a_tokenizer_prompts_are_estimated_from_letters_and_pixels(tmp_path: Path) -> None:
    server = {"endpoint": {"base_url": "http://127.0.0.1:9/v1", "model": "big", "max_image_side": 56}}
    found = forecast(tmp_path, micro.RECORDED | {"annotate": server})
    (question, teacher), *_ = found.questions()
    assert found.tokenizer(teacher) is None and question.about == "rationales"
    with Image.open(found.corpus.train[0].images[0]) as picture:
        assert picture.size == (28, 28)  # which becomes four tokens
    letters = [len(render("predict", post, found.labels)) for post in found.corpus.train]
    assert question.prompt_tokens == pytest.approx(4 + sum(letters) / len(letters) / 4)


def test_a_model_that_cannot_be_had_is_asked_for_once(tmp_path: Path) -> None:
    found = forecast(tmp_path, micro.RECORDED)
    for _ in range(2):
        with pytest.raises(SettingsError, match="no/such-model cannot be loaded"):
            found.model(ModelSettings(path="no/such-model"))


def test_the_posts_that_are_encoded_are_spread_over_all_lengths() -> None:
    rows = [Sample(str(n), "x" * n) for n in range(1000)]
    some = spread(rows)
    assert len(some) == SAMPLE and (some[0], some[-1]) == (rows[0], rows[-1])
    assert sum(len(row.text) for row in some) / SAMPLE == pytest.approx(499.5, rel=0.01)
    assert spread(rows[:SAMPLE]) == rows[:SAMPLE]

"""Forecast of a chain: rows that exist, rows that are assumed, and teacher requests."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.errors import SettingsError
from distill.models.backbone import ModelSettings
from distill.models.endpoint import EndpointSettings
from distill.planning.workload import SAMPLE_SIZE, ChainForecast, sample_by_length
from distill.task.prompts import render
from distill.task.sample import Sample
from tests import micro
from tests.clip_files import write_clip

PREFIX = '"Prediction":'

TAUGHT: dict[str, Any] = micro.WITH_TEACHER | {"evaluate": {"max_new_tokens": 100}}


def forecast(folder: Path, content: dict[str, Any], **changes: Any) -> ChainForecast:
    (scratch := folder / "scratch").mkdir()
    return ChainForecast(micro.read(micro.write(folder, content, **changes)), scratch)


def test_rows_with_recorded_rationales_are_exact_and_valid(tmp_path: Path) -> None:
    found = forecast(tmp_path, micro.RECORDED)
    annotated = found.annotated_rows()
    assert (
        annotated.exact
        and len(annotated.samples) == 27
        and all(row.rationale and row.label for row in annotated.samples)
    )
    student = found.student_rows()
    assert not student.exact and len(student.samples) == 27 + 27
    assert list(found.teacher_requests()) == []


def test_missing_rationales_are_assumed_for_every_post(tmp_path: Path) -> None:
    found = forecast(tmp_path, TAUGHT)
    assert len(found.teacher_rows().samples) == 27 and found.teacher_rows().exact
    annotated = found.annotated_rows()
    assert not annotated.exact and len(annotated.samples) == 27 + 9
    written = {post.rationale for post in found.corpus.train if post.rationale}
    assert all(row.rationale in written | {p.rationale for p in found.corpus.test + found.corpus.validation}
               and row.label in found.labels.names for row in annotated.samples)  # fmt: skip
    skipping = tmp_path / "skip"
    skipping.mkdir()
    assert len(forecast(skipping, TAUGHT, annotate__unlabelled="skip").annotated_rows().samples) == 27


@pytest.mark.parametrize(("unlabelled", "asked"), [("skip", 27 + 9), ("keep_confident", 27)])
def test_the_teacher_is_asked_once_about_each_post_of_the_student(tmp_path: Path, unlabelled: str, asked: int) -> None:
    """With keep_confident, `annotate` has asked about the unlabelled posts."""
    content = {key: value for key, value in micro.RECORDED.items() if key not in ("assistant", "augment", "evaluate")}
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "big"}
    content |= {"annotate": {"endpoint": endpoint, "unlabelled": unlabelled}}
    options = {"weight": 0.0, "label_weight": 1.0, "label_teacher": "teacher"}
    found = forecast(tmp_path, content, student__distillation=options)
    assert len(found.student_rows().samples) == 27 + 9
    requests = [request for request, _ in found.teacher_requests() if request.stage == "student"]
    assert [(request.purpose, request.minimum, request.maximum) for request in requests] == [("labels", asked, asked)]


def test_without_rationales_in_the_data_a_filler_text_is_assumed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"id": f"p{n}", "text": f"post {n}", "label": ["negative", "positive"][n % 2]} for n in range(20)]
    (data / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"source": "jsonl", "train": ["all.jsonl"], "test": []}
    server = {"annotate": {"endpoint": {"base_url": "http://127.0.0.1:9/v1", "model": "big"}}}
    found = forecast(tmp_path, micro.RECORDED | {"data": files} | server)
    annotated = found.annotated_rows()
    assert len(annotated.samples) == len(found.corpus.train) == 16
    assert all(150 < len((row.rationale or "").split()) < 250 for row in annotated.samples)


def test_every_teacher_request_is_counted(tmp_path: Path) -> None:
    found = forecast(tmp_path, TAUGHT)
    bounds = {(q.stage, q.purpose): (q.minimum, q.maximum) for q, _ in found.teacher_requests()}
    assert bounds == {
        ("annotate", "labels"): (9, 9),
        ("annotate", "rationales"): (27, 27 * 4 + 9 * 2),  # predict and explain, each with one retry
        ("evaluate", "labels"): (9, 9),
        ("evaluate", "rationales"): (9, 9),
        ("calibrate", "labels"): (9, 9),
    }
    assert all(isinstance(teacher, ModelSettings) for _, teacher in found.teacher_requests())


def test_reviews_are_counted_for_a_teacher_that_was_trained_to_review(tmp_path: Path) -> None:
    tasks = {"predict": 1.0, "explain": 1.0, "classify": 1.0, "review": 1.0}
    found = forecast(tmp_path, TAUGHT, teacher__tasks=tasks)
    bounds = {(q.stage, q.purpose): (q.minimum, q.maximum) for q, _ in found.teacher_requests()}
    assert bounds["cascade", "reviews"] == (0, 9)


def test_agreement_samples_raise_the_maximum_of_label_requests(tmp_path: Path) -> None:
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "big", "agreement_samples": 3}
    content = TAUGHT | {"calibrate": TAUGHT["calibrate"] | {"endpoint": endpoint}}
    content = {name: section for name, section in content.items() if name != "evaluate"}
    found = forecast(tmp_path, content, cascade__deferral_curve=False)
    teachers = {(q.stage, q.purpose): teacher for q, teacher in found.teacher_requests()}
    assert isinstance(teachers["annotate", "labels"], ModelSettings)
    assert isinstance(teachers["calibrate", "labels"], EndpointSettings)
    bounds = {(q.stage, q.purpose): (q.minimum, q.maximum) for q, _ in found.teacher_requests()}
    assert bounds["calibrate", "labels"] == (9, 27)
    assert bounds["cascade", "labels"] == bounds["cascade", "reviews"] == (0, 27)


def test_prompt_tokens_are_counted_with_the_teachers_tokenizer(tmp_path: Path) -> None:
    found = forecast(tmp_path, TAUGHT)
    assert found.recipe.teacher is not None
    model = found.model(found.recipe.teacher.model)
    forecast_tokens = {(q.stage, q.purpose): q for q, _ in found.teacher_requests()}[
        "calibrate", "labels"
    ].prompt_tokens
    inputs = model.encode(found.corpus.validation, "classify")
    closing = len(model.encoder.tokens(PREFIX))
    encoded_tokens = inputs["attention_mask"].sum().item() / len(found.corpus.validation)
    assert forecast_tokens == pytest.approx(encoded_tokens - closing)


def test_without_a_tokenizer_tokens_are_estimated_from_characters_and_pixels(tmp_path: Path) -> None:
    server = {"endpoint": {"base_url": "http://127.0.0.1:9/v1", "model": "big", "max_image_side": 56}}
    found = forecast(tmp_path, micro.RECORDED | {"annotate": server})
    (request, teacher), *_ = found.teacher_requests()
    assert found.tokenizer(teacher) is None and request.purpose == "rationales"
    with Image.open(found.corpus.train[0].images[0]) as image:
        assert image.size == (28, 28)  # four tokens
    characters = [len(render("predict", post, found.labels)) for post in found.corpus.train]
    assert request.prompt_tokens == pytest.approx(4 + sum(characters) / len(characters) / 4)


def test_every_request_for_a_missing_model_raises_its_error(tmp_path: Path) -> None:
    found = forecast(tmp_path, micro.RECORDED)
    for _ in range(2):
        with pytest.raises(SettingsError, match="no/such-model cannot be loaded"):
            found.model(ModelSettings(path="no/such-model"))


def test_sampled_posts_cover_all_lengths() -> None:
    rows = [Sample(str(n), "x" * n) for n in range(1000)]
    sampled = sample_by_length(rows)
    assert len(sampled) == SAMPLE_SIZE and (sampled[0], sampled[-1]) == (rows[0], rows[-1])
    assert sum(len(row.text) for row in sampled) / SAMPLE_SIZE == pytest.approx(499.5, rel=0.01)
    assert sample_by_length(rows[:SAMPLE_SIZE]) == rows[:SAMPLE_SIZE]


def test_the_frames_and_the_sound_of_a_clip_are_prompt_tokens(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_clip(data / "a.mp4", [(200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 9, 9)], 440, seconds=2.0, size=(112, 56))
    rows = [
        {"id": f"p{n}", "text": f"post {n}", "label": ["negative", "positive"][n % 2], "video": "a.mp4"}
        for n in range(20)
    ]
    (data / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = micro.RECORDED | {"data": {"source": "jsonl", "train": ["all.jsonl"], "test": []}}

    def tokens(name: str, **endpoint: Any) -> float:
        server = {"base_url": "http://127.0.0.1:9/v1", "model": "big"} | endpoint
        (folder := tmp_path / name).mkdir()
        shutil.copytree(data, folder / "data")
        found = forecast(folder, content | {"annotate": {"endpoint": server}})
        return next(request.prompt_tokens for request, _ in found.teacher_requests())

    text = tokens("text", video="ignore", audio="ignore")
    frame = 4 * 2  # tokens of 28 x 28 pixels
    assert tokens("frames", audio="ignore") - text == 4 * frame
    assert tokens("fewer", audio="ignore", frames=2) - text == 2 * frame
    assert tokens("sound", video="ignore") - text == pytest.approx(2 * 25, abs=3)  # the encoder adds some silence

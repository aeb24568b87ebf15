"""The plan for N posts: figures against sums by hand, measured and stated rates, and what is not known."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill import chain
from distill.planning import scale
from distill.planning.scale import StageScale, forecast_scale
from distill.planning.scale_tables import duration, scale_text
from distill.planning.workload import ChainForecast
from distill.recipe import Recipe
from tests import micro
from tests.planning.test_plan import ALONE, SERVER

PRICED = SERVER | {"prompt_price": 2.0, "completion_price": 10.0, "concurrency": 20}
RATES = {
    "devices": 10, "device_price": 3.0, "flops_per_second": 1e12, "posts_per_second": 50.0,
    "tokens_per_second": {"annotate": 1000.0, "augment": 2000.0},
}  # fmt: skip
CASCADE: dict[str, Any] = ALONE | {
    "annotate": {"endpoint": PRICED, "retries": 0}, "calibrate": {"budget": 0.25}, "cascade": {},
}  # fmt: skip


def rows(recipe: Recipe, posts: int, folder: Path) -> dict[str, StageScale]:
    (folder / "scratch").mkdir(exist_ok=True)
    problems: list[str] = []
    found = forecast_scale(ChainForecast(recipe, folder / "scratch"), posts, problems)
    assert not problems
    return {row.name: row for row in found}


def recipe_of(folder: Path, content: dict[str, Any], **changes: Any) -> Recipe:
    return micro.read(micro.write(folder, content, **changes))


def test_what_is_not_known_is_a_dash_with_what_would_fill_it(tmp_path: Path) -> None:
    content = CASCADE | {"annotate": {"endpoint": SERVER}}
    text = scale_text(recipe_of(tmp_path, content), 100_000_000)
    assert text.startswith("micro for 100,000,000 posts, scaled from the 9 training posts of its data. Nothing is run.")
    lines = {line.split("  ")[0]: line.split()[-3:] for line in text.splitlines() if "  " in line}
    assert lines["annotate"] == lines["student"] == lines["service, student"] == lines["service, teacher"] == ["–"] * 3
    assert "  device hours of annotate: scale.tokens_per_second.annotate" in text
    assert "  wall time of annotate; service, teacher: a first run, whose answers are not from batches" in text
    assert "  money of student; service, student: scale.device_price" in text
    assert max(map(len, text.splitlines())) < 150


def test_figures_of_requests_and_prices_equal_sums_by_hand(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, CASCADE)
    row = rows(recipe, 9_000_000, tmp_path)["annotate"]
    ((request, _),) = ChainForecast(recipe, tmp_path / "scratch").annotate_requests()
    low, high = request.answer_tokens
    assert (request.minimum, request.maximum) == (9, 18) and row.requests == (9e6, 18e6)
    assert row.prompt_tokens == (9e6 * request.prompt_tokens, 18e6 * request.prompt_tokens)
    assert row.completion_tokens == (9e6 * low, 18e6 * high)
    money = [n * (2 * request.prompt_tokens + 10 * answer) / 1e6 for n, answer in ((9e6, low), (18e6, high))]
    assert row.money == pytest.approx(money) and row.device_hours == (0, 0) and row.hours is None
    teacher = rows(recipe, 9_000_000, tmp_path)["service, teacher"]
    assert teacher.requests == (2_250_000, 2_250_000)
    label = ChainForecast(recipe, tmp_path / "scratch").service_request()
    assert teacher.money == pytest.approx([2.25 * (2 * label.prompt_tokens + 10 * label.answer_tokens[0])] * 2)


def test_stated_rates_give_hours_and_money(tmp_path: Path) -> None:
    content = micro.RECORDED | {"annotate": {"endpoint": SERVER}, "scale": RATES, "calibrate": {}, "cascade": {}}
    found = rows(recipe_of(tmp_path, content), 36_000, tmp_path)
    assert list(found) == [
        "annotate", "assistant", "augment", "student", "hard labels", "service, student", "service, teacher",
    ]  # fmt: skip
    annotate, augment, serve = found["annotate"], found["augment"], found["service, student"]
    assert annotate.completion_tokens and augment.completion_tokens and annotate.device_hours and augment.hours
    assert annotate.device_hours == pytest.approx([tokens / 1000 / 3600 for tokens in annotate.completion_tokens])
    assert annotate.money == pytest.approx([hours * 3 for hours in annotate.device_hours])
    assert annotate.hours == pytest.approx([hours / 10 for hours in annotate.device_hours])
    assert augment.hours[0] == pytest.approx(augment.completion_tokens[0] / 2000 / 3600 / 10)
    assert augment.requests == (27_000, 27_000), "27 of 36 training posts have a label"
    assert serve.requests == (36_000, 36_000) and serve.device_hours == pytest.approx([36_000 / 50 / 3600] * 2)
    assert found["service, teacher"].money is None and scale.total(list(found.values()), "money") is None
    assert scale.total(list(found.values())[:6], "money") is not None


def test_a_training_grows_with_the_posts_unless_its_steps_are_limited(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, ALONE | {"scale": RATES})
    one, many = (rows(recipe, posts, tmp_path)["student"] for posts in (9, 9_000_000))
    assert one.prompt_tokens and many.prompt_tokens and many.device_hours
    assert many.prompt_tokens[0] == pytest.approx(1e6 * one.prompt_tokens[0])
    forecast = ChainForecast(recipe, tmp_path / "scratch")
    (training,) = scale.forecast_trainings(forecast, [])
    assert training.total_flops and training.tokens
    assert many.device_hours[0] == pytest.approx(1e6 * training.total_flops[1] / 1e12 / 3600)
    assert one.prompt_tokens[0] == 9 * 2 * training.tokens[1].tokens
    limited = recipe_of(tmp_path, ALONE, student__trainer={"max_steps": 4})
    few, more = (rows(limited, posts, tmp_path)["student"].prompt_tokens for posts in (9_000, 9_000_000))
    assert few and few == pytest.approx(more, rel=1e-3) and few[0] == pytest.approx(4 * 8 * training.tokens[1].tokens)


@pytest.fixture
def measured_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe whose stages have run: what they measured, with round numbers."""
    content = CASCADE | {"assistant": micro.LEARNER, "augment": {"max_new_tokens": 100}, "serve": {"rationale": False}}
    recipe = recipe_of(tmp_path, content, scale=RATES | {"tokens_per_second": {}, "posts_per_second": None})
    recipe.scale.flops_per_second = None
    monkeypatch.setattr(chain, "up_to_date", lambda recipe: dict.fromkeys(chain.stages_of(recipe), True))
    monkeypatch.setattr(ChainForecast, "annotated_rows", ChainForecast.gold_rows)
    monkeypatch.setattr(ChainForecast, "student_rows", ChainForecast.gold_rows)
    paid = {"answers": 12, "prompt_tokens": 6000, "completion_tokens": 2400, "cost": 0.036}
    stage = {"prompt_tokens": 400, "completion_tokens": 20, "seconds": 3.0, "currency": 0.001}
    write(recipe, "annotate/summary.json", {"n": 9, "paid": paid})
    write(recipe, "annotate/ledger.jsonl", answer(0.5), answer(1.5), answer(None))
    write(recipe, "augment/summary.json", {"n": 6, "kept": 5})
    write(recipe, "augment/ledger.jsonl", answer(0.25), answer(0.35))
    for name in ("assistant", "student"):
        speeds = "".join(f"{n},{speed}\n" for n, speed in enumerate(["", 900, "", 1000, 5000]))
        (recipe.folder / name).mkdir(parents=True)
        (recipe.folder / name / "metrics.csv").write_text(f"step,train/tokens_per_second\n{speeds}")
    student = {"asked": 10, "cost": stage | {"seconds": 0.2}}
    metrics = {"n": 10, "teacher_calls_per_sample": 0.4, "stages": {
        "student": student, "teacher_first": {"asked": 3, "cost": stage}, "teacher_review": {"asked": 1, "cost": stage},
    }}  # fmt: skip
    write(recipe, "cascade/metrics.json", metrics)
    return recipe


def answer(seconds: float | None) -> dict[str, Any]:
    return {"template": "predict", "answer": {"prompt_tokens": 500, "completion_tokens": 100, "seconds": seconds}}


def write(recipe: Recipe, name: str, *rows: Any) -> None:
    path = recipe.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_measured_rates_are_those_of_the_run(measured_run: Recipe, tmp_path: Path) -> None:
    found = rows(measured_run, 900, tmp_path)
    annotate = found["annotate"]
    assert annotate.requests == (1200, 1200) and annotate.prompt_tokens == (600_000, 600_000)
    assert annotate.money == pytest.approx([3.6, 3.6]), "0.6 M prompt tokens at 2, 0.24 M at 10"
    assert annotate.hours == pytest.approx([1200 * 1.0 / 20 / 3600] * 2), "1 s an answer, 20 at once"
    augment = found["augment"]
    assert augment.requests == (600, 600) and augment.completion_tokens == (60_000, 60_000)
    assert augment.device_hours == pytest.approx([600 * 0.3 / 3600] * 2)
    student = found["student"]
    assert student.prompt_tokens and student.device_hours == pytest.approx([student.prompt_tokens[0] / 1000 / 3600] * 2)
    serve, teacher = found["service, student"], found["service, teacher"]
    assert serve.device_hours == pytest.approx([900 * 0.02 / 3600] * 2)
    assert teacher.requests == (360, 360) and teacher.prompt_tokens == (360 * 200, 360 * 200)
    assert teacher.money == pytest.approx([360 * (200 * 2 + 10 * 10) / 1e6] * 2)
    assert teacher.hours == pytest.approx([360 * 1.5 / (8 * 10) / 3600] * 2), "8 at once to each of 10 replicas"
    text = scale_text(measured_run, 900)
    assert "–" not in text.split("where the figures")[0] and "not known" not in text
    assert "annotate: tokens measured on 9 posts of" in text and "0.02 s a label measured in" in text


def test_measurements_of_another_recipe_do_not_count(
    measured_run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "up_to_date", lambda recipe: dict.fromkeys(chain.stages_of(recipe), False))
    found = rows(measured_run, 900, tmp_path)
    assert found["annotate"].hours is None and found["student"].device_hours is None
    assert found["service, teacher"].requests == (225, 225), "calibrate.budget"


def test_a_finished_run_fills_what_it_has_measured(finished: Recipe) -> None:
    text = scale_text(finished, 1_000_000)
    table = text.split("\n\n")[1]
    hours = {line.split("  ")[0]: line.split()[-3] for line in table.splitlines()[1:-1]}
    assert hours.pop("service, student") == "–", "rationales are served, and their time was not measured"
    assert set(hours) >= {"teacher", "annotate", "assistant", "augment", "student", "service, teacher"}
    assert "–" not in hours.values() and f"measured in {finished.folder}" in text


def test_ten_million_times_the_posts_take_no_longer_to_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, CASCADE)
    calls = 0
    render = scale.ChainForecast._prompt_tokens

    def counted(*arguments: Any) -> float:
        nonlocal calls
        calls += 1
        return render(*arguments)

    monkeypatch.setattr(ChainForecast, "_prompt_tokens", counted)
    rows(recipe, 10, tmp_path)
    few, calls = calls, 0
    rows(recipe, 10**15, tmp_path)
    assert calls == few


def test_durations_are_read_at_a_glance() -> None:
    hours = (0.005, 0.5, 31.0, 24 * 12.0, 24 * 365 * 3.4)
    assert [duration(value) for value in hours] == ["18 s", "30 min", "31 h", "12 days", "3.4 years"]

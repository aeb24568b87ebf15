"""The plan as text: with prices, ledgers of earlier runs, missing models, and no limit of epochs."""

from dataclasses import replace
from pathlib import Path

from distill.planning import tables
from distill.planning.text import si_prefix
from distill.planning.workload import ChainForecast
from tests import micro
from tests.planning.test_plan import ALONE, SERVER


def test_a_training_without_an_epoch_limit_is_planned(tmp_path: Path) -> None:
    content = micro.RECORDED | {"data": ALONE["data"]}
    content["student"] = content["student"] | {"trainer": {"max_epochs": -1}}
    text = tables.plan_text(micro.read(micro.write(tmp_path, content)))
    row = next(line for line in text.splitlines() if line.startswith("epochs"))
    assert row.split()[2] == "?"


def test_figures_have_three_digits_and_an_si_prefix() -> None:
    found = [si_prefix(value) for value in (0, 999.4, 999_499, 999_600, 9.996e11, 3.2e21)]
    assert found == ["0", "999", "999 k", "1 M", "1 T", "3.2e+03 E"]


def test_the_plan_writes_nothing(tmp_path: Path) -> None:
    path = micro.write(tmp_path, micro.RECORDED)
    text = tables.plan_text(micro.read(path))
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]
    assert "would run   annotate, assistant, augment, student, evaluate, export" in text
    assert "No teacher requests." in text and "up to date" not in text
    assert "train        36        27              27" in text
    table = [line for line in text.splitlines()[1:] if " is left out: " not in line]  # of metrics, on some machines
    assert max(map(len, table)) < 121


def test_prices_give_a_range_of_costs(tmp_path: Path) -> None:
    content = ALONE | {"annotate": {"endpoint": SERVER | {"prompt_price": 1.0, "completion_price": 10.0}}}
    recipe = micro.read(micro.write(tmp_path, content, annotate__retries=0))
    (tmp_path / "scratch").mkdir()
    (request, _), *_ = ChainForecast(recipe, tmp_path / "scratch").teacher_requests()
    low, high = request.answer_tokens
    assert (request.minimum, request.maximum, high) == (9, 18, 1024)
    costs = [n * (request.prompt_tokens + 10 * tokens) / 1e6 for n, tokens in ((9, low), (18, high))]
    line = next(line for line in tables.plan_text(recipe).splitlines() if line.startswith("annotate"))
    assert line.endswith(f"{costs[0]:,.2f} to {costs[1]:,.2f}")
    unpriced = replace(recipe, annotate=replace(recipe.annotate, endpoint=None, recorded=True))  # type: ignore[type-var]
    assert "cost" not in tables.plan_text(unpriced)


def test_answers_in_the_ledgers_are_counted(tmp_path: Path) -> None:
    recipe = micro.read(micro.write(tmp_path, ALONE | {"annotate": {"endpoint": SERVER}}))
    (recipe.folder / "annotate").mkdir(parents=True)
    (recipe.folder / "annotate" / "ledger.jsonl").write_text("{}\n{}\n{}\n")
    assert "3 answers are in the ledgers of earlier runs" in tables.plan_text(recipe)


def test_figures_of_a_model_that_cannot_be_loaded_are_unknown(tmp_path: Path) -> None:
    model = {"path": "no/such-model", "lora": {}, "image_size": 28}
    learner = {"model": model, "batch_size": 8, "trainer": {"max_epochs": 2}}
    text = tables.plan_text(
        micro.read(micro.write(tmp_path, micro.RECORDED | {"data": ALONE["data"], "assistant": learner}))
    )
    lines = text.splitlines()
    assert sum(line.startswith("assistant.model.path: no/such-model cannot be loaded") for line in lines) == 1
    cells = {line.split("  ")[0]: line.split()[3:] for line in lines}
    assert cells["tokens per post"][0] == "?" and "?" not in cells["tokens per post"][1:]
    assert cells["FLOP per post"][:2] == ["?", "?"], "the student's FLOP include the assistant's"
    assert any(line.startswith("hard labels  tiny 64 x 1") for line in lines)


def test_the_plan_says_that_the_third_stage_is_skipped(tmp_path: Path) -> None:
    note = "cascade: stage 3 is skipped, because teacher.tasks has no review."
    assert note in tables.plan_text(micro.read(micro.write(tmp_path, micro.WITH_TEACHER))).splitlines()
    tasks = {"predict": 1.0, "classify": 1.0, "review": 1.0}
    text = tables.plan_text(micro.read(micro.write(tmp_path, micro.WITH_TEACHER, teacher__tasks=tasks)))
    assert note not in text and "reviews" in text

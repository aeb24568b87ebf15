"""README and docs are true: their commands parse, their recipes load, and what they name exists. Nothing is trained."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from distill import chain, cli, logs, recipe, review, settings_reference
from distill.data import jsonl
from distill.data.postcards import RARE_WORDS
from distill.evaluation.comparison_page import METRICS
from distill.planning import scale_tables, simulate, tables
from distill.predict import Prediction
from distill.recipe import Recipe
from distill.runs import load_recipe
from distill.stages import batches, report, serve
from distill.tracking.sync import Sent
from tests.documents import GENERATED, PAGES, README, RECIPES, ROOT, blocks, commands, named_files, text

CALLS = [(page.name, call) for page in PAGES for call in commands("distill", page)] + [
    (path.name, shlex.split(text(path).splitlines()[0].removeprefix("#"))[1:]) for path in RECIPES
]
DISTILL = list({tuple(call): (page, call) for page, call in CALLS}.values())  # each of them once
YAML = [(page.name, block) for page in PAGES for block in blocks("yaml", page)]
ALSO_CHECKED = sorted({ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "benchmarks").glob("*.md")})


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, str | None]]:
    """What a command would run, with the stage that it names; the command line is real up to there."""
    seen: list[tuple[Recipe, str | None]] = []

    def run(settings: Recipe, until: str | None = None, only: str | None = None) -> list[str]:
        seen.append((settings, until or only))
        return []

    monkeypatch.setattr(chain, "run", run)
    monkeypatch.setattr(report, "run", lambda settings: seen.append((settings, None)))
    monkeypatch.setattr(report, "summary", lambda settings: "")
    for module, name in ((tables, "plan_text"), (scale_tables, "scale_text"), (simulate, "simulation_text")):
        monkeypatch.setattr(module, name, lambda settings, *_, **__: seen.append((settings, None)))
    monkeypatch.setattr(chain, "input_fingerprints", lambda settings, command, reads: {})
    monkeypatch.setattr(serve, "run", lambda settings, fingerprints: seen.append((settings, None)))
    monkeypatch.setattr(batches, "listing", lambda settings, **_: [str(seen.append((settings, None)))])
    monkeypatch.setattr(review, "run", lambda settings, host, port: seen.append((settings, None)))
    monkeypatch.setattr(logs, "configure", lambda *_, **__: None)
    monkeypatch.chdir(ROOT)
    return seen


def test_the_readme_is_short() -> None:
    assert len(text(README).splitlines()) <= 200


def test_readme_and_docs_show_the_commands_they_promise() -> None:
    assert {"run", "plan", "serve"} <= {call[0] for call in commands("distill", README)}
    shown = {call[0] for page in PAGES for call in commands("distill", page)}
    assert {"run", "plan", "report", "serve", "student"} <= shown
    assert sum(len(commands("distill", page)) for page in PAGES) >= 15


COMPARED = pd.DataFrame([
    {"role": "student", "variant": "mine", "runs": 1, "posts": 9, "metric": "accuracy", "value": 0.5,
     "difference": None, "low": None, "high": None, "p": None} | dict.fromkeys(METRICS)
])  # fmt: skip
"""What a comparison of one run would give."""


@pytest.mark.parametrize(("page", "arguments"), DISTILL, ids=[f"{page}: {' '.join(call)}" for page, call in DISTILL])
def test_every_distill_command_parses(
    page: str,
    arguments: list[str],
    ran: list[tuple[Recipe, str | None]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if arguments[0].isupper():  # `distill COMMAND --help`
        arguments = ["run", *arguments[1:]]
    named = named_files(tmp_path)
    arguments = [named.get(argument, argument) for argument in arguments]
    if any(argument.endswith(("--help", ".help", "--print_config", "--version")) for argument in arguments):
        status = _exit_status(arguments)
        printed = capsys.readouterr().out
        assert status == 0 and len(printed.splitlines()) > 5 and not ran
        return
    if len(arguments) == 1 and arguments[0] in cli.COMMANDS | cli.OTHERS:  # a command named in running text
        return
    if arguments[0] in cli.OTHERS:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("distill.predict.predict", lambda *_, **__: Prediction(tmp_path / "out.csv", 1, 0))
        monkeypatch.setattr("distill.comparison.compare", lambda folders: COMPARED)
        monkeypatch.setattr("distill.variants.run_variants", lambda *_: [])
        for name in ("push_student", "push_data"):
            monkeypatch.setattr(f"distill.push.{name}", lambda *_: "https://hub.example/user/name")
        monkeypatch.setattr("distill.copying.copy", lambda source, target: 3)
        monkeypatch.setattr("distill.tracking.sync.sync", lambda folder: Sent(9, 20))
        if arguments[0] == "sync":
            (tmp_path / arguments[1]).mkdir(parents=True)
            (tmp_path / arguments[1] / "recipe.yaml").touch()
        assert cli.main(arguments) == 0
        return
    assert cli.main(arguments) == 0, capsys.readouterr().err
    (settings, stage) = ran[0]
    assert stage is None or stage in chain.stages_of(settings)


def test_a_wrong_flag_would_not_pass(ran: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--config", "recipes/quickstart.yaml", "--student.distilation.weight", "0.5"]) == 2
    assert "distilation" in capsys.readouterr().err and not ran


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_begins_with_the_command_that_runs_it(path: Path) -> None:
    first = text(path).splitlines()[0]
    assert first == f"# distill run --config recipes/{path.name}" or first.startswith(
        f"# distill run --config recipes/{path.name} --data.root "
    )
    assert f"recipes/{path.name}" in text(ROOT / "docs" / "recipes.md")


@pytest.mark.parametrize(
    ("page", "block"), YAML, ids=[f"{page}: {' '.join(block.split()[:4])}" for page, block in YAML]
)
def test_a_fragment_of_a_recipe_fits_over_a_shipped_one(page: str, block: str, tmp_path: Path) -> None:
    fragment = tmp_path / "fragment.yaml"
    fragment.write_text(block, encoding="utf-8")
    content = yaml.safe_load(block)
    if "name" in content:  # a whole recipe
        alone, _ = recipe.load(recipe.parser("run"), ["--config", str(fragment)])
        assert alone.name == content["name"] and chain.stages_of(alone)
        return
    scale = "scale" in (content.get("task") or {})
    base = str(ROOT / "recipes" / ("mosi-cpu.yaml" if scale else "twitter15.yaml"))
    plain, _ = recipe.load(recipe.parser("run"), ["--config", base])
    laid_over, _ = recipe.load(recipe.parser("run"), ["--config", base, "--config", str(fragment)])
    assert asdict(laid_over) != asdict(plain)


def test_every_field_they_name_is_one() -> None:
    named = {
        flag.removesuffix(".help")
        for page in [*PAGES, *RECIPES]
        for flag in re.findall(r"--([a-z]\w*(?:\.\w+)+)", text(page))
    }
    settings, _ = recipe.load(recipe.parser("run"), ["--config", str(ROOT / "recipes" / "twitter15.yaml")])
    fields: Any = asdict(settings)
    inline = {name for page in PAGES for name in re.findall(r"`([a-z]\w*(?:\.\w+)+)[`:]", text(page))}
    files = (".py", ".json", ".jsonl", ".yaml", ".csv", ".html", ".md")
    named |= {name for name in inline if name.split(".")[0] in fields and not name.endswith(files)}
    assert {"student.distillation.weight", "annotate.confidence", "data.root", "trainer.precision"} <= named
    every = {entry.name for section in settings_reference.sections(Recipe) for entry in section.fields}
    for name in named:
        known = name in every or bool(re.match(r"(\w+\.)?trainer\.\w+$", name))  # arguments of lightning.Trainer
        assert known, f"{name} is no field of a recipe"


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", text(ROOT / "Makefile"), re.MULTILINE))
    calls = [call for page in PAGES for call in commands("make", page)]
    shown = {argument for call in calls for argument in call if "=" not in argument}
    assert {"quickstart", "test", "docs"} <= shown <= targets


@pytest.mark.parametrize("page", [*PAGES, *ALSO_CHECKED], ids=lambda path: path.name)
def test_every_path_and_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", text(page))
    missing = [link for link in links if (page.parent / link).resolve() != GENERATED]
    missing = [link for link in missing if not (page.parent / link).exists()]
    paths = re.findall(r"(?<![\w./-])((?:recipes|distill|docs|benchmarks|tests|\.ci)/[\w./-]*\w)", text(page))
    assert not missing + [path for path in paths if not (ROOT / path).exists()]


def test_every_page_is_in_the_navigation_and_the_readme() -> None:
    navigation = text(ROOT / "mkdocs.yml").partition("\nnav:")[2]
    for page in PAGES[1:]:
        assert f": {page.name}\n" in navigation, page.name
        assert page.name == "index.md" or f"(docs/{page.name})" in text(README), page.name


def test_every_page_begins_with_one_sentence() -> None:
    for page in PAGES[1:]:
        title, opening = text(page).split("\n\n")[:2]
        assert title.startswith("# ") and "\n" not in title, page.name
        assert opening.endswith(".") and not opening.startswith(("#", "|", "!", "`" * 3)), page.name


def test_the_extras_they_install_exist() -> None:
    project = text(ROOT / "pyproject.toml")
    for page in PAGES:
        for extra in re.findall(r"(?:-e \"\.|'?distill)\[(\w+)\]", text(page)):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_the_corpus_is_what_the_docs_say() -> None:
    cards = load_recipe(ROOT / "recipes" / "quickstart.yaml").data.postcards
    words = " ".join(text(ROOT / "docs" / "getting-started.md").split())
    assert f"{cards.labelled} labelled posts with gold rationales and {cards.unlabelled:,} unlabelled ones" in words
    assert f"{cards.validation} posts validate, {cards.test} test" in words
    assert f"{cards.teacher:,} further posts" in words
    assert f"one of {sum(map(len, RARE_WORDS.values()))} rare words" in words


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "data.md"], ids=lambda path: path.name)
def test_a_row_of_ones_own_data_can_be_read(page: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(blocks("json", page)[0], encoding="utf-8")
    (row,) = jsonl.read(path)
    assert row.problem is None
    assert jsonl.to_sample(row.fields, tmp_path).label == "negative"


def _exit_status(arguments: list[str]) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)

"""The README tells the truth: its commands parse, its files exist, its Python runs. Nothing is trained here."""

import ast
import importlib
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available

from distill import chain, cli, plan, recipe
from distill.data import jsonl
from distill.data.corpus import Corpus
from distill.data.postcards import PostcardSettings
from distill.export.export import ExportSettings, export
from distill.models.backbone import Backbone
from distill.models.tiny import ImageOnlyProcessor
from distill.recipe import Recipe
from distill.stages import report, serve

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.md"))}
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of one language, without the indent of a list they may stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return ["".join(line.removeprefix(indent) for line in block.splitlines(True)) for indent, block in found]


def commands(program: str) -> list[list[str]]:
    """The arguments of every call of a program in the README, in fenced blocks and in running text."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", README)
    calls = [shlex.split(line, comments=True) for line in lines if line.split()[:1] == [program]]
    return [call[1:] for call in calls if call[1:]]


DISTILL = commands("distill") + [
    shlex.split(path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#"))[1:] for path in RECIPES
]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Recipe, str | None]]:
    """What a command would run, with the stage that it names; the command line is real up to there."""
    seen: list[tuple[Recipe, str | None]] = []

    def run(settings: Recipe, until: str | None = None, only: str | None = None) -> list[str]:
        seen.append((settings, until or only))
        return []

    monkeypatch.setattr(chain, "run", run)
    monkeypatch.setattr(report, "run", lambda settings: seen.append((settings, None)))
    monkeypatch.setattr(report, "summary", lambda settings: "")
    monkeypatch.setattr(plan, "text", lambda settings: seen.append((settings, None)))
    monkeypatch.setattr(chain, "ready", lambda settings, command, reads: {})
    monkeypatch.setattr(serve, "run", lambda settings, fingerprints: seen.append((settings, None)))
    monkeypatch.setattr(cli, "_quieten", lambda: None)
    monkeypatch.chdir(ROOT)
    return seen


def test_the_readme_shows_every_subcommand_form_it_promises() -> None:
    shown = {call[0] for call in commands("distill")}
    assert {"run", "report", "student"} <= shown
    assert len(commands("distill")) >= 15


@pytest.mark.parametrize("arguments", DISTILL, ids=" ".join)
def test_every_distill_command_parses(
    arguments: list[str], ran: list[tuple[Recipe, str | None]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(next(block for block in blocks("yaml") if block.startswith("# mine.yaml")), encoding="utf-8")
    arguments = [str(mine) if argument == "mine.yaml" else argument for argument in arguments]
    if any(argument.endswith(("--help", ".help", "--print_config")) for argument in arguments):
        status = _exit_status(arguments)
        printed = capsys.readouterr().out
        assert status == 0 and len(printed.splitlines()) > 5 and not ran
        return
    assert cli.main(arguments) == 0, capsys.readouterr().err
    (settings, stage) = ran[0]
    assert stage is None or stage in chain.stages_of(settings)


def test_a_wrong_flag_would_not_pass(ran: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--config", "recipes/quickstart.yaml", "--student.distilation.weight", "0.5"]) == 2
    assert "distilation" in capsys.readouterr().err and not ran


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_begins_with_the_command_that_runs_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# distill run --config recipes/{path.name}" or first.startswith(
        f"# distill run --config recipes/{path.name} --data.root "
    )
    assert f"recipes/{path.name}" in README


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: " ".join(block.split()[:4]))
def test_a_fragment_of_a_recipe_fits_over_one_of_the_papers(block: str, tmp_path: Path) -> None:
    fragment = tmp_path / "fragment.yaml"
    fragment.write_text(block, encoding="utf-8")
    base = str(ROOT / "recipes" / "twitter15.yaml")
    plain, _ = recipe.load(recipe.parser("run"), ["--config", base])
    laid_over, _ = recipe.load(recipe.parser("run"), ["--config", base, "--config", str(fragment)])
    assert asdict(laid_over) != asdict(plain)


def test_every_field_it_names_is_one() -> None:
    texts = [README, *(path.read_text(encoding="utf-8") for path in RECIPES)]
    named = {flag for text in texts for flag in re.findall(r"--([a-z]\w*(?:\.\w+)+)", text)}
    inline = re.findall(r"`([a-z]\w*(?:\.\w+)+)[`:]", README)
    settings, _ = recipe.load(recipe.parser("run"), ["--config", str(ROOT / "recipes" / "twitter15.yaml")])
    fields: Any = asdict(settings)
    named |= {name for name in inline if name.split(".")[0] in fields}
    assert {"student.distillation.weight", "annotate.confidence", "data.root", "trainer.precision"} <= named
    for name in named - {"student.help"}:
        here = fields
        for part in name.split("."):
            if part == "trainer":  # arguments of lightning.Trainer
                break
            assert part in here, f"{name}: {part} is none of {', '.join(here)}"
            here = here[part]


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = [argument for call in commands("make") for argument in call if "=" not in argument]
    assert {"quickstart", "test"} <= set(shown) <= targets


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_and_link_leads_somewhere(name: str) -> None:
    text = DOCUMENTS[name]
    paths = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    paths += re.findall(r"(?<![\w./-])((?:recipes|distill|docs|benchmarks|tests|\.ci)/[\w./-]*\w)", text)
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_extras_it_installs_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r'-e "\.\[(\w+)\]"', README):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_the_corpus_is_what_the_readme_says() -> None:
    cards = PostcardSettings()
    words = " ".join(README.split())
    assert f"{cards.labelled} labelled posts with gold rationales and {cards.unlabelled:,} unlabelled ones" in words
    assert f"{cards.validation} posts validate, {cards.test} test" in words


def test_a_row_of_ones_own_data_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(blocks("json")[0], encoding="utf-8")
    (row,) = jsonl.read(path)
    assert row.problem is None
    assert jsonl.sample(row.fields, tmp_path).label == "negative"


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.split("\n")[0])
def test_python_imports_what_exists(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


@pytest.mark.parametrize("way", ["AutoProcessor", "AutoTokenizer"])
def test_the_exported_student_answers_as_shown(
    way: str,
    exported: Path,
    postcards: Corpus,
    backbone: Backbone,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not is_torchvision_available():  # the house's processor stands in for transformers' own
        monkeypatch.setattr(AutoProcessor, "from_pretrained", ImageOnlyProcessor.from_pretrained)
    sample = postcards.test[0]
    shown, without_torchvision = (block for block in blocks("python") if "from_pretrained" in block)
    loading, asking = shown.split("labels = ", 1)
    code = loading + (without_torchvision if way == "AutoTokenizer" else "") + "labels = " + asking
    code = code.replace("runs/quickstart/export", str(exported))
    code = code.replace("data/postcards/images/test-0000.png", str(sample.images[0]))
    code = code.replace("Greetings from the dreary theatre in Evora.", sample.text)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    features = backbone.encode([sample], "classify")
    with torch.inference_mode():
        expected = backbone.model(**features).logits[0, -1, backbone.label_ids].softmax(-1)
    assert list(names["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-4)
    assert names["rationale"] in capsys.readouterr().out
    assert ("pictures" in names) == (way == "AutoTokenizer")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone, postcards: Corpus) -> Path:
    """An untrained student, exported as the stage does it."""
    folder = tmp_path_factory.mktemp("export")
    settings = ExportSettings(check_samples=2)
    export(backbone, postcards.test, folder / "student", folder / "adapter", "# untrained", settings)
    return folder / "student"


def test_reasoning_data_reads_as_shown(postcards: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rationales.jsonl"
    jsonl.write_rows(path, [jsonl.row(sample, postcards.root) for sample in postcards.train[:3]])
    (block,) = (block for block in blocks("python") if "to_prompt_completion" in block)
    block = block.replace("runs/quickstart/annotate/rationales.jsonl", str(path))
    names: dict[str, Any] = {}
    exec(compile(block.replace("data/postcards", str(postcards.root)), "README.md", "exec"), names)
    assert len(names["rows"]) == 3
    assert names["conversations"].column_names == ["prompt", "completion", "images"]
    assert len(names["conversations"]) == 6


def _exit_status(arguments: list[str]) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)

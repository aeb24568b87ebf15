"""The Python blocks of README and docs: what they import exists, and the ones about the export run as shown."""

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, Qwen2_5_VLProcessor
from transformers.utils import is_torchvision_available

from distill.data import jsonl
from distill.data.corpus import Corpus
from distill.export.export import ExportSettings, export
from distill.models.backbone import Backbone
from distill.models.processors import image_only
from distill.task.labels import LabelSpace
from distill.task.rationale import check
from tests.documents import PAGES, ROOT, blocks, text

EXPORT = ROOT / "docs" / "export.md"
PYTHON = [(page.name, block) for page in PAGES for block in blocks("python", page)]


@pytest.mark.parametrize(
    ("page", "block"), PYTHON, ids=[f"{page}: {block.split(chr(10))[0]}" for page, block in PYTHON]
)
def test_python_imports_what_exists(page: str, block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


def test_the_reference_names_what_exists() -> None:
    lines = text(ROOT / "docs" / "reference.md").splitlines()
    blocks_of = {line.removeprefix("::: "): index for index, line in enumerate(lines) if line.startswith("::: ")}
    assert len(blocks_of) >= 10
    for name, index in blocks_of.items():
        parent, _, last = name.rpartition(".")
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError:
            found = getattr(importlib.import_module(parent), last)
        following = "\n".join(lines[index + 1 : index + 3])
        if "members: [" in following:
            for member in following.partition("members: [")[2].partition("]")[0].split(", "):
                assert hasattr(found, member), f"{name}.{member}"


def test_the_rationale_shown_is_a_valid_one() -> None:
    shown = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition('```\n"Text_analysis"')[2]
    rationale = check('"Text_analysis"' + shown.partition("```")[0], LabelSpace(), "negative")
    assert rationale.prediction == "negative"


@pytest.mark.parametrize("way", ["AutoProcessor", "AutoTokenizer"])
def test_the_exported_student_answers_as_shown(
    way: str,
    exported: Path,
    postcards: Corpus,
    backbone: Backbone,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not is_torchvision_available():  # the project's processor replaces transformers' own
        monkeypatch.setattr(AutoProcessor, "from_pretrained", image_only(Qwen2_5_VLProcessor).from_pretrained)
    sample = postcards.test[0]
    shown, without_torchvision = (block for block in blocks("python", EXPORT) if "from_pretrained" in block)
    loading, asking = shown.split("labels = ", 1)
    code = loading + (without_torchvision if way == "AutoTokenizer" else "") + "labels = " + asking
    code = code.replace("runs/quickstart/export", str(exported))
    code = code.replace("data/postcards/images/test-0000.png", str(sample.images[0]))
    code = code.replace("Greetings from the dreary theatre in Evora.", sample.text)
    names: dict[str, Any] = {}
    exec(compile(code, "export.md", "exec"), names)
    features = backbone.encode([sample], "classify")
    with torch.inference_mode():
        expected = backbone.model(**features).logits[0, -1, backbone.label_ids].softmax(-1)
    assert list(names["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-4)
    assert names["rationale"] in capsys.readouterr().out
    assert ("image_processor" in names) == (way == "AutoTokenizer")


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
    jsonl.write_rows(path, [jsonl.to_row(sample, postcards.root) for sample in postcards.train[:3]])
    (block,) = (block for block in blocks("python", EXPORT) if "to_prompt_completion" in block)
    block = block.replace("runs/quickstart/annotate/rationales.jsonl", str(path))
    names: dict[str, Any] = {}
    exec(compile(block.replace("data/postcards", str(postcards.root)), "export.md", "exec"), names)
    assert len(names["rows"]) == 3
    assert names["conversations"].column_names == ["prompt", "completion", "images"]
    assert len(names["conversations"]) == 6

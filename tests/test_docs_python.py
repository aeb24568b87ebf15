"""The Python blocks of README and docs: what they import exists, and the one about reasoning data runs as shown."""

import ast
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from distill.data import jsonl
from distill.data.corpus import Corpus
from distill.task.labels import LabelSpace
from distill.task.rationale import check
from tests.documents import PAGES, ROOT, blocks, text

EXPORT = ROOT / "docs" / "export.md"
ENGINES = {"onnxruntime", "xllamacpp"}
"""Packages of docs/use-elsewhere.md that need not be installed."""
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
                if alias.name not in ENGINES or importlib.util.find_spec(alias.name):
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
    (block,) = (block for block in blocks("python", EXPORT) if "to_preferences" in block)
    answers = [{"id": sample.id, "template": "reason", "answer": {"text": "no"}} for sample in postcards.train[:2]]
    jsonl.write_rows(tmp_path / "ledger.jsonl", answers)
    for stage in ("annotate", "augment"):
        block = block.replace(f"runs/quickstart/{stage}/ledger.jsonl", str(tmp_path / "ledger.jsonl"))
    exec(compile(block.replace("data/postcards", str(postcards.root)), "export.md", "exec"), names)
    assert (len(names["prompts"]), len(names["pairs"])) == (3, 2)

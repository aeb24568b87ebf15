"""Files of weights that are missing, damaged or in several parts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distill.models.hub import missing_weights

INDEX = "model.safetensors.index.json"


def test_weights_in_several_files(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    assert missing_weights(str(tmp_path), "main") == (
        "1 of its 2 files of weights are missing, such as model-2.safetensors"
    )
    save_file({"b": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    assert missing_weights(str(tmp_path), "main") is None
    content = (tmp_path / "model-2.safetensors").read_bytes()
    (tmp_path / "model-2.safetensors").write_bytes(content[:-1])
    assert (missing_weights(str(tmp_path), "main") or "").startswith("model-2.safetensors is damaged: ")


@pytest.mark.parametrize("content", [[], {}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 5}}])
def test_an_index_that_names_no_files(content: Any, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"^{INDEX} has no weight_map$"):
        missing_weights(str(tmp_path), "main")


def test_a_model_without_weights() -> None:
    assert "it has no weights" in (missing_weights("nobody/has-this-model", "main") or "")

"""Stage `export`: the exported folder and its model card."""

import json
from pathlib import Path

from huggingface_hub import ModelCard

from distill.recipe import Recipe, to_yaml


def test_the_card_contains_licence_metrics_recipe_data_and_labels(finished: Recipe, folder: Path) -> None:
    card = ModelCard.load(folder / "export" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "image-text-to-text", "license": "apache-2.0",
    }  # fmt: skip
    metrics = json.loads((folder / "evaluate" / "metrics.json").read_text())["student"]
    for name in ("accuracy", "macro_f1", "weighted_f1", "ece"):
        assert f"| {name} | {metrics[name]:.4g} |" in card.text
    assert to_yaml(finished).strip() in card.text
    assert "`postcards`: 36 training, 9 validation and 9 test posts; 0 rows were left out" in card.text
    assert '"Prediction":' in card.text and "negative, neutral, positive" in card.text


def test_the_result_of_the_check_is_in_the_folder(folder: Path) -> None:
    result = json.loads((folder / "export" / "export.json").read_text())
    assert result["samples"] == result["labels_equal"] == 4
    assert result["difference"] <= 1e-4
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".export")]

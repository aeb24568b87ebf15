"""The model card of an export, and the licence that it names."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from distill.data.corpus import Corpus
from distill.export.card import base_licence, model_card
from distill.models.backbone import Backbone, ModelSettings, load
from distill.task.labels import LabelSpace


@pytest.fixture
def student(model_folder: Path) -> Backbone:
    return load(ModelSettings(image_size=56), LabelSpace(), model_folder)


def test_a_card_contains_base_licence_data_recipe_and_metrics(student: Backbone, postcards: Corpus) -> None:
    metrics = {"n": 45, "accuracy": 0.912345, "macro_f1": 0.5, "confusion": [[1]], "parse_rate": 1.0}
    text = model_card(
        "mine", "Qwen/Qwen2.5-VL-3B-Instruct", "other", "my data", "name: mine", metrics, postcards.test[0], student
    )
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "image-text-to-text", "license": "other",
        "base_model": "Qwen/Qwen2.5-VL-3B-Instruct",
    }  # fmt: skip
    for part in ("# mine", "| accuracy | 0.9123 |", "| parse_rate | 1 |", "my data", "```yaml\nname: mine\n```"):
        assert part in card.text
    assert "The weights are in float32; `export.json` compares them" in card.text
    assert "confusion" not in card.text and "Labels: negative, neutral, positive." in card.text
    assert f'Post: "{postcards.test[0].text}"' in card.text
    request = json.loads(card.text.partition("<<'JSON'\n")[2].partition("\nJSON\n")[0])
    (image, prompt), prefix = request["messages"][0]["content"], request["messages"][1]["content"]
    assert image["type"] == "image_url" and prompt["text"].endswith('Answer: "Prediction": <label>')
    assert prefix == '"Prediction":' and request["logprob_token_ids"] == student.label_ids.tolist()
    assert "llama-server --model student.gguf --mmproj mmproj.gguf" in card.text
    assert "Resize images to 56 × 56 pixels before they are sent." in card.text


def test_the_licence_is_read_from_the_card_of_the_base_model(tmp_path: Path) -> None:
    assert base_licence("", "main") == "apache-2.0"
    assert base_licence(str(tmp_path), "main") == "other"
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# base\n")
    assert base_licence(str(tmp_path), "main") == "mit"
    (tmp_path / "README.md").write_text("# a card without a header\n")
    assert base_licence(str(tmp_path), "main") == "other"
    assert base_licence("no/such-model-anywhere", "main") == "other"

"""Adapters of a pretrained model with tied embeddings.

`DISTILL_PRETRAINED` names the folder of a model of text, or of images and text, such as Gemma 3; its weights are not in
the repository.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.data.corpus import Corpus
from distill.errors import RunError
from distill.export.export import ExportSettings, export
from distill.models.backbone import Backbone, LoraSettings, ModelSettings, create, load
from distill.models.local import Local
from distill.task.labels import LabelSpace
from distill.training.assistant import AssistantModule, TrainSettings
from tests.models.foreign_adapters import lora, write

FOLDER = os.environ.get("DISTILL_PRETRAINED", "")
LABELS = LabelSpace()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(FOLDER, "config.json").exists(), reason="DISTILL_PRETRAINED names no model"),
]


def step(backbone: Backbone, corpus: Corpus) -> None:
    """One step of training on four posts without images."""
    module = AssistantModule(backbone, TrainSettings(tasks={"classify": 1.0}))
    posts = [replace(post, images=()) for post in corpus.train[:4]]
    weights = [weights for weights in backbone.model.parameters() if weights.requires_grad]
    optimizer = torch.optim.SGD(weights, 0.05)
    module.loss(module.encode(posts)).total.backward()
    optimizer.step()
    backbone.model.eval()


@pytest.mark.parametrize("choice", [LoraSettings(r=4, dropout=0.0), None])
def test_an_adapter_is_trained_further_and_exported(
    choice: LoraSettings | None, postcards: Corpus, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    write(adapter, Path(FOLDER), lora(target_modules=["q_proj", "lm_head"]))
    settings = ModelSettings(str(adapter), lora=choice, image_size=56, batch_size=4)
    posts = [replace(post, images=()) for post in postcards.test[:4]]
    start = Local(create(settings, LABELS, tmp_path, train=False), "").classify(posts).probabilities
    backbone = create(settings, LABELS, tmp_path)
    assert abs(Local(backbone, "").classify(posts).probabilities - start).max() < 1e-4
    backbone.model.train()
    step(backbone, postcards)
    trained = Local(backbone, "").classify(posts).probabilities
    assert abs(trained - start).max() > 1e-4
    backbone.save(tmp_path / "trained")
    again = load(settings, LABELS, tmp_path / "trained")
    assert abs(Local(again, "").classify(posts).probabilities - trained).max() < 1e-4
    result = export(again, posts, tmp_path / "export", tmp_path / "trained", "card", ExportSettings(check_samples=4))
    assert result["labels_equal"] == 4 and result["difference"] < 5e-4  # logits are up to 154
    exported = create(ModelSettings(str(tmp_path / "export"), image_size=56), LABELS, tmp_path, train=False)
    assert abs(Local(exported, "").classify(posts).probabilities - trained).max() < 1e-4


def test_a_new_adapter_of_tied_embeddings(postcards: Corpus, tmp_path: Path) -> None:
    choice = LoraSettings(r=4, dropout=0.0, targets=r".*(lm_head|embed_tokens|q_proj)")
    backbone = create(ModelSettings(FOLDER, lora=choice, image_size=56), LABELS, tmp_path)
    step(backbone, postcards)
    features = backbone.encode([replace(post, images=()) for post in postcards.test[:4]], "classify")
    with torch.no_grad():
        logits = backbone.model(**features).logits
        torch.testing.assert_close(backbone.hidden_states(features) @ backbone.head.T, logits, atol=1e-3, rtol=1e-4)
        merged = backbone.merged()
        torch.testing.assert_close(merged(**features).logits, logits, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "name"), [("float32", "layers.2.self_attn.q_proj"), ("bfloat16", "embed_tokens")])
def test_one_wrong_weight_is_refused(
    dtype: str, name: str, postcards: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a model that has norms after its projections, a factor of most projections changes no logit."""
    choice = LoraSettings(r=4, dropout=0.0, targets=r".*(lm_head|embed_tokens|q_proj|down_proj)")
    backbone = create(ModelSettings(FOLDER, lora=choice, image_size=56, dtype=dtype), LABELS, tmp_path)
    step(backbone, postcards)
    backbone.save(tmp_path / "trained")
    posts = [replace(post, images=()) for post in postcards.test[:4]]

    student = load(backbone.settings, LABELS, tmp_path / "trained")

    def written() -> dict[str, Any]:
        return export(
            student, posts, tmp_path / "export", tmp_path / "trained", "card", ExportSettings(check_samples=4)
        )

    result = written()
    assert result["difference"] <= result["tolerance"]
    merged = Backbone.merged

    def wrong(student: Backbone) -> torch.nn.Module:
        model = merged(student)
        next(weights for key, weights in model.named_parameters() if name in key).data.mul_(1.1)
        return model

    monkeypatch.setattr(Backbone, "merged", wrong)
    with pytest.raises(RunError, match=r"; merging changes "):
        written()

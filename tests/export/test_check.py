"""The check of an export: it compares the folder with the student as evaluated, and finds every wrong weight."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from distill.data.corpus import Corpus
from distill.errors import RunError
from distill.export.check import LIMIT, Check
from distill.export.export import ExportSettings, export
from distill.models.backbone import Backbone, LoraSettings, ModelSettings, create, load
from distill.models.scoring import next_token_logits
from distill.models.tiny import TinySettings
from distill.task.labels import LabelSpace

LABELS = LabelSpace()
MOST = LoraSettings(r=4, dropout=0.0)
TIED = LoraSettings(r=4, dropout=0.0, targets=r".*(lm_head|embed_tokens|q_proj)")
SETTINGS = ExportSettings(check_samples=12)


def train(settings: ModelSettings, folder: Path) -> Path:
    """A student whose weights differ from those of its base; returns the folder that the stage would write."""
    backbone = create(settings, LABELS, Path(settings.path))
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in backbone.model.parameters():
            if weights.requires_grad:
                weights.add_(torch.randn_like(weights) * 0.05)
    backbone.save(folder)
    return folder


@pytest.fixture(params=["float32", "bfloat16"])
def settings(request: pytest.FixtureRequest, model_folder: Path) -> ModelSettings:
    return ModelSettings(str(model_folder), lora=MOST, image_size=56, dtype=request.param)


@pytest.mark.parametrize("lora", [MOST, TIED, None], ids=["adapter", "adapter of tied embeddings", "all weights"])
def test_an_export_passes_with_its_figures(
    lora: LoraSettings | None, settings: ModelSettings, postcards: Corpus, tmp_path: Path
) -> None:
    settings = replace(settings, lora=lora)
    trained = train(settings, tmp_path / "student")
    posts = postcards.validation[:12]
    student = load(settings, LABELS, trained)
    with torch.inference_mode():
        evaluated = next_token_logits(student, student.encode(posts, "classify")).float()
    result = export(student, postcards.validation, tmp_path / "export", trained, "card", SETTINGS)

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "export", dtype=torch.float32)
    inputs = student.encode(posts, "classify")
    with torch.inference_mode():
        logits = model(**inputs).logits[torch.arange(12), inputs["attention_mask"].sum(1) - 1]
    rounding = 0.02 if settings.dtype == "bfloat16" else 1e-5  # batches of other sizes
    assert result["difference"] == pytest.approx(float((logits - evaluated).abs().max()), abs=rounding)
    assert result["difference"] <= result["tolerance"]
    assert result["labels_equal"] + len(result["disagreements"]) == result["samples"] == 12
    steps = result["steps"]
    assert steps["merging"] <= LIMIT and steps["saving"] <= LIMIT
    assert result["tolerance"] == result["float32_limit"] + steps["rounding"] + steps["casting"]
    assert steps["quantisation"] == 0
    if settings.dtype == "float32":
        assert result["tolerance"] == LIMIT and not result["disagreements"]
    else:
        assert LIMIT < steps["rounding"] < 0.3 and (steps["casting"] > 0) == (lora is not None)
    written = json.loads((tmp_path / "export" / "export.json").read_text())
    assert written == result and written["dtype"] == settings.dtype
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["dtype"] == settings.dtype
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert {str(weights.dtype) for weights in stored.values()} == {f"torch.{settings.dtype}"}


def test_the_adapter_is_merged_in_float32_and_rounded_once(
    model_folder: Path, postcards: Corpus, tmp_path: Path
) -> None:
    """The stored weights are W + B A alpha / r of the bfloat16 base, computed in float64 and rounded."""
    settings = ModelSettings(str(model_folder), lora=MOST, image_size=56, dtype="bfloat16")
    trained = train(settings, tmp_path / "student")
    export(load(settings, LABELS, trained), postcards.validation, tmp_path / "export", trained, "card", SETTINGS)
    base, stored = (load_file(folder / "model.safetensors") for folder in (model_folder, tmp_path / "export"))
    adapter = load_file(trained / "adapter_model.safetensors")
    checked = 0
    for name, weights in adapter.items():
        if "lora_B" in name:
            delta = weights.double() @ adapter[name.replace("lora_B", "lora_A")].double() * MOST.alpha / MOST.r
            (target,) = (key for key in base if key.split("layers.")[-1] == name.split("layers.")[-1].replace(
                ".lora_B", "") and "visual" not in key)  # fmt: skip
            exact = (base[target].bfloat16().double() + delta).bfloat16()
            differing = (stored[target] != exact).float().mean()
            assert differing < 1e-3, "a float32 sum is on the other side of a rounding boundary only rarely"
            checked += 1
    assert checked == 14


def as_in_four_bits(weights: torch.Tensor) -> torch.Tensor:
    """Weights rounded to 16 levels of the largest in each block of 32, as a 4-bit base holds them."""
    blocks = weights.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-9) / 7
    return ((blocks / scale).round() * scale).reshape(weights.shape)


def test_a_student_with_a_quantised_base_is_merged_into_the_original_one(
    model_folder: Path, postcards: Corpus, tmp_path: Path
) -> None:
    """The quantised base is stood in for by a model whose weights have 16 levels."""
    settings = ModelSettings(str(model_folder), lora=MOST, image_size=56, dtype="bfloat16")
    trained = train(settings, tmp_path / "student")
    plain, student = load(settings, LABELS, trained), load(settings, LABELS, trained)
    for name, weights in student.model.named_parameters():
        if "base_layer" in name:
            weights.data = as_in_four_bits(weights.data)
    student.settings = replace(settings, lora=replace(MOST, quantize=True))
    result = export(student, postcards.validation, tmp_path / "export", trained, "card", SETTINGS)
    export(plain, postcards.validation, tmp_path / "plain", trained, "card", SETTINGS)
    stored, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("export", "plain"))
    assert all(torch.equal(stored[key], expected[key]) for key in expected)
    steps = result["steps"]
    assert steps["quantisation"] > 2 * steps["rounding"] > 0, "4 bits cost more than bfloat16"
    assert result["difference"] > steps["rounding"] + steps["casting"], "it is the evaluated student that is compared"
    assert result["tolerance"] == pytest.approx(
        result["float32_limit"] + steps["quantisation"] + steps["rounding"] + steps["casting"]
    )


def test_a_student_of_bitsandbytes_is_exported_with_its_figures(
    tokenizer_folder: Path, postcards: Corpus, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    size = TinySettings(hidden=128, layers=2, vision_hidden=64, vision_depth=1)  # blocks of 64 weights
    create(ModelSettings(tiny=size, image_size=56), LABELS, tokenizer_folder).save(tmp_path / "base")
    lora = replace(MOST, quantize=True)
    settings = ModelSettings(str(tmp_path / "base"), lora=lora, image_size=56, dtype="bfloat16")
    trained = train(settings, tmp_path / "student")
    student = load(settings, LABELS, trained)
    result = export(student, postcards.validation, tmp_path / "export", trained, "card", SETTINGS)
    assert result["steps"]["quantisation"] > result["steps"]["rounding"] > 0
    assert result["steps"]["merging"] <= LIMIT and result["steps"]["saving"] <= LIMIT
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"


# ---- wrong weights ----


def scaled(name: str) -> Callable[[Path], None]:
    """Change the values of the first tensor with this name by 10%."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        key = next(key for key in weights if name in key)
        weights[key] = weights[key] * 1.1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return change


def change_smallest(weights: torch.Tensor) -> None:
    """Change the smallest value that is not 0 by 10%."""
    values = weights.view(-1)
    values[values.abs().where(values != 0, torch.inf).argmin()] *= 1.1


def one_value(folder: Path) -> None:
    """Change a small value of one tensor by 10%, too little to be seen in the logits."""
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if "layers.0.mlp.up_proj" in key)
    change_smallest(weights[key])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def swap_layers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    swapped = {
        key.translate(str.maketrans("01", "10")) if ".layers." in key else key: value for key, value in weights.items()
    }
    assert swapped.keys() == weights.keys() and any(".layers." in key for key in weights)
    save_file(swapped, folder / "model.safetensors", {"format": "pt"})


def not_a_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if "down_proj" in key)
    weights[key] = torch.full_like(weights[key], torch.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 500.0
    (folder / "config.json").write_text(json.dumps(config))


def stale(folder: Path) -> None:
    """Layer 1 of the student is that of its base."""
    weights = load_file(folder / "model.safetensors")
    base = load_file(folder / "base.safetensors")
    save_file(weights | {key: base[key].to(value.dtype) for key, value in weights.items() if ".layers.1." in key},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip


WRONG = {
    "a projection": scaled("layers.0.mlp.down_proj"),
    "a norm": scaled("layers.1.input_layernorm"),
    "the vision tower": scaled("visual.merger"),
    "swapped layers": swap_layers,
    "not a number": not_a_number,
    "the config": other_config,
    "an earlier file": stale,
}


@pytest.mark.parametrize("settings", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_refused(
    wrong: str, settings: ModelSettings, postcards: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(settings, tmp_path / "student")
    reload = Check.reload

    def change(check: Check, folder: Path) -> None:
        shutil.copy(Path(settings.path) / "model.safetensors", folder / "base.safetensors")
        WRONG[wrong](folder)
        (folder / "base.safetensors").unlink()
        reload(check, folder)

    monkeypatch.setattr(Check, "reload", change)
    message = (
        r"^export: after reloading, \d+ of 12 labels agree and logits differ by .*; the limit is .*; "
        r"saving changes them by .*, more than 1\.0e-04$"
    )
    with pytest.raises(RunError, match=message):
        export(load(settings, LABELS, trained), postcards.validation, tmp_path / "export", trained, "card", SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize("name", ["k_proj", "post_attention_layernorm"])
def test_a_wrong_merge_is_refused(
    name: str, settings: ModelSettings, postcards: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor of the merged model in memory is changed by 10%: the folder has it, too, but not the student."""
    trained = train(settings, tmp_path / "student")
    merged = Backbone.merged

    def wrong(student: Backbone) -> torch.nn.Module:
        model = merged(student)
        weights = next(
            value for key, value in model.named_parameters() if "language_model.layers.1" in key and name in key
        )
        weights.data *= 1.1
        return model

    monkeypatch.setattr(Backbone, "merged", wrong)
    with pytest.raises(RunError, match=r"; merging changes them by .*, more than 1\.0e-04$"):
        export(load(settings, LABELS, trained), postcards.validation, tmp_path / "export", trained, "card", SETTINGS)


@pytest.mark.parametrize("settings", ["bfloat16"], indirect=True)
def test_one_wrong_value_is_refused(
    settings: ModelSettings, postcards: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes the logits by less than the limit, with and without posts to compare them on."""
    trained = train(settings, tmp_path / "student")
    reload = Check.reload
    monkeypatch.setattr(Check, "reload", lambda check, folder: (one_value(folder), reload(check, folder)))
    for posts in (postcards.validation, []):
        with pytest.raises(RunError, match=r"^export: .*saving changes .*layers\.0\.mlp\.up_proj\.weight$"):
            export(load(settings, LABELS, trained), posts, tmp_path / "export", trained, "card", SETTINGS)


def test_a_merge_that_leaves_the_logits_alone_is_refused(
    settings: ModelSettings, postcards: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(settings, tmp_path / "student")
    merged = Backbone.merged

    def wrong(student: Backbone) -> torch.nn.Module:
        model = merged(student)
        weights = dict(model.named_parameters())
        change_smallest(weights["model.language_model.layers.1.mlp.gate_proj.weight"].data)
        return model

    monkeypatch.setattr(Backbone, "merged", wrong)
    with pytest.raises(RunError, match=r"; merging changes model\.language_model\.layers\.1\.mlp\.gate_proj\.weight$"):
        export(load(settings, LABELS, trained), postcards.validation, tmp_path / "export", trained, "card", SETTINGS)


# ---- the verdict, from given logits ----


def check_of(*stages: torch.Tensor, dtype: str = "bfloat16") -> Any:
    posts = [type("Post", (), {"id": f"post-{index}"}) for index in range(len(stages[0]))]
    return Check(posts, LABELS.names, torch.tensor([0, 1, 2]), dtype, [], [stages[0], *stages])  # type: ignore[arg-type]


def logits(count: int) -> torch.Tensor:
    """Logits [count, 5] whose first label leads by 2, and whose last row has its first two labels 0.05 apart."""
    found = torch.tensor([3.0, 1.0, 0.0, -1.0, -2.0]).repeat(count, 1)
    found[-1, 1] = 2.95
    return found


def test_a_label_may_differ_at_a_tie_and_only_there() -> None:
    student = logits(20)
    exact = student.clone()
    exact[-1, :2] += torch.tensor([-0.06, 0.06])
    result = check_of(student, exact, exact, exact, exact).result()
    assert result["labels_equal"] == 19 and result["difference"] == pytest.approx(0.06)
    (only,) = result["disagreements"]
    assert (only["id"], only["student"], only["export"]) == ("post-19", "negative", "neutral")
    assert only["margin"] == pytest.approx(0.05) and result["tolerance"] == pytest.approx(0.0601)
    exact[-1, :2] = student[-1, :2] + torch.tensor([-0.04, 0.04])
    with pytest.raises(RunError, match=r"the label of post-19 differs, which has a margin of 5\.0e-02$"):
        check_of(student, exact, exact, exact, exact).result()


def test_more_than_one_label_in_a_hundred_is_refused() -> None:
    for count, ties, passes in ((100, 1, True), (100, 2, False), (200, 2, True), (200, 3, False), (3, 1, True)):
        student = logits(count)
        student[-ties:] = student[-1].clone()
        exact = student.clone()
        exact[-ties:, :2] += torch.tensor([-0.06, 0.06])
        check = check_of(student, exact, exact, exact, exact)
        if passes:
            assert check.result()["labels_equal"] == count - ties
        else:
            with pytest.raises(RunError, match=rf"{count - ties} of {count} labels agree .*; at most {count // 100}"):
                check.result()


def test_an_overflow_of_float16_is_refused() -> None:
    student = logits(4)
    infinite = student.clone()
    infinite[0, 4] = torch.inf
    with pytest.raises(RunError, match="differ by inf"):
        check_of(student, student, student, infinite, infinite, dtype="float16").result()


def test_without_samples_nothing_is_known() -> None:
    result = check_of(*[torch.zeros(0, 1)] * 5).result()
    assert result["samples"] == 0 and result["difference"] is result["tolerance"] is None

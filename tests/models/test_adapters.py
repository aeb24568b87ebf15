"""`model.path` is an adapter that peft wrote: inference, further training, full training, plans and errors."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig
from transformers import AutoModelForImageTextToText

from distill.digests import Digests
from distill.errors import SettingsError
from distill.models import text_limit
from distill.models.adapters import find_source
from distill.models.backbone import Backbone, LoraSettings, ModelSettings, create, load
from distill.task.labels import LabelSpace
from tests.models.foreign_adapters import ia3, inputs, logits, lora, write

LABELS = LabelSpace()


def settings(path: Path | str, lora: LoraSettings | None = None, **options: Any) -> ModelSettings:
    return ModelSettings(str(path), lora=lora, image_size=56, **options)


def head_logits(backbone: Backbone) -> torch.Tensor:
    """The logits that label scoring and the training loss compute."""
    training = backbone.model.training
    backbone.model.eval()
    with torch.no_grad():
        found = backbone.hidden_states(inputs()) @ backbone.head.T
    backbone.model.train(training)
    return found


def close(left: torch.Tensor, right: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(left, right, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def untied_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an output head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(model_folder, folder)
    model = AutoModelForImageTextToText.from_pretrained(model_folder, tie_word_embeddings=False)
    torch.nn.init.normal_(model.lm_head.weight, 0, 0.1)
    model.save_pretrained(folder)
    return folder


ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "rank-stabilised": lambda: lora(use_rslora=True, rank_pattern={"q_proj": 2}, exclude_modules=r".*layers\.0.*"),
    "bias": lambda: lora(bias="all"),
    "head": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "embeddings": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "saved-head": lambda: lora(modules_to_save=["lm_head"]),
    "saved-both": lambda: lora(modules_to_save=["lm_head", "embed_tokens"]),
    "ia3": ia3,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_use_of_an_adapter_starts_from_its_function_and_the_merged_model_keeps_it(
    kind: str, tied: bool, model_folder: Path, untied_folder: Path, tmp_path: Path
) -> None:
    base = model_folder if tied else untied_folder
    expected = logits(write(tmp_path / "adapter", base, ADAPTERS[kind]()))
    plain = logits(AutoModelForImageTextToText.from_pretrained(base))
    assert (expected - plain).abs().max() > 1e-2

    answering = create(settings(tmp_path / "adapter"), LABELS, tmp_path, train=False)
    full = create(settings(tmp_path / "adapter"), LABELS, tmp_path)
    further = create(settings(tmp_path / "adapter", LoraSettings()), LABELS, tmp_path)
    for backbone in (answering, full, further):
        close(logits(backbone.model), expected)
        close(head_logits(backbone), expected)
    assert not isinstance(full.model, PeftModel)
    assert all(weights.requires_grad for weights in full.model.parameters())
    assert isinstance(further.model, PeftModel)

    optimizer = torch.optim.SGD([weights for weights in further.model.parameters() if weights.requires_grad], 0.1)
    loss = torch.log_softmax(further.hidden_states(inputs()) @ further.head.T, -1)[..., 3].mean()
    loss.backward()
    optimizer.step()
    trained = logits(further.model)
    assert (trained - expected).abs().max() > 1e-4
    further.save(tmp_path / "trained")
    again = load(further.settings, LABELS, tmp_path / "trained")
    close(logits(again.model), trained)
    again.merged().save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    close(logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")), trained)


def test_a_new_adapter_of_the_output_head_is_trained_and_exported(
    model_folder: Path, untied_folder: Path, tmp_path: Path
) -> None:
    for base in (model_folder, untied_folder):
        targets = LoraSettings(r=4, targets=r".*(lm_head|embed_tokens|q_proj)")
        backbone = create(settings(base, targets), LABELS, tmp_path)
        close(logits(backbone.model), logits(AutoModelForImageTextToText.from_pretrained(base)), 1e-5)
        torch.manual_seed(0)
        names = [name for name, weights in backbone.model.named_parameters() if weights.requires_grad]
        assert any("lm_head" in name for name in names) and any("embed_tokens" in name for name in names)
        for weights in backbone.model.parameters():
            if weights.requires_grad:
                torch.nn.init.normal_(weights, 0, 0.1)
        expected = logits(backbone.model)
        (backbone.hidden_states(inputs()) @ backbone.head.T).logsumexp(-1).mean().backward()
        head = backbone.model.get_base_model().get_output_embeddings()  # type: ignore[operator]
        assert head.lora_A["default"].weight.grad.abs().max() > 0
        close(head_logits(backbone), expected)
        backbone.merged().save_pretrained(tmp_path / "merged")  # type: ignore[operator]
        close(logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")), expected)


def test_an_adapter_of_an_adapter_trained_further_names_its_base_wherever_it_is(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The base is beside the adapter, and named relative to its folder, and then relative to the working directory."""
    shutil.copytree(model_folder, tmp_path / "base")
    expected = logits(write(tmp_path / "adapter", tmp_path / "base", lora()))
    for name, folder in (("../base", "/"), ("base", tmp_path)):
        rename_base(tmp_path / "adapter", name)
        monkeypatch.chdir(folder)
        caplog.clear()
        further = create(settings(tmp_path / "adapter", LoraSettings(r=16)), LABELS, tmp_path)
        assert "with its own settings (r 4, alpha 8, dropout 0.0) instead of model.lora" in caplog.text
        further.save(tmp_path / "elsewhere" / "trained")
        answering = create(settings(tmp_path / "elsewhere" / "trained"), LABELS, tmp_path, train=False)
        close(logits(answering.model), expected)
        assert text_limit.default_limit(answering.settings, 10_000) == 2048
        assert text_limit.tokenizer(settings(tmp_path / "adapter"), tmp_path) is not None


def test_the_processor_is_the_adapters_or_else_that_of_the_base(model_folder: Path, tmp_path: Path) -> None:
    write(tmp_path, model_folder, lora())
    base = create(settings(tmp_path), LABELS, tmp_path, train=False).processor
    template = base.chat_template + "{# of the adapter #}"
    base.tokenizer.chat_template = template
    base.tokenizer.save_pretrained(tmp_path)
    own = create(settings(tmp_path), LABELS, tmp_path, train=False).processor
    assert own.chat_template == own.tokenizer.chat_template == template
    assert find_source(str(tmp_path)).processor[0] == str(model_folder)
    base.image_processor.max_pixels = 1234
    base.save_pretrained(tmp_path)
    assert find_source(str(tmp_path)).processor[0] == str(tmp_path)


def test_a_plan_needs_no_weights(model_folder: Path, tmp_path: Path) -> None:
    for config in ADAPTERS.values():
        write(tmp_path, model_folder, config())
        (tmp_path / "adapter_model.safetensors").unlink()
        for choice in (LoraSettings(), None):
            model = create(settings(tmp_path, choice), LABELS, tmp_path, weights=False).model
            assert {weights.device.type for weights in model.parameters()} == {"meta"}
            trained = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
            everything = sum(weights.numel() for weights in model.parameters())
            assert trained == everything if choice is None else 0 < trained < everything


def test_the_digest_of_an_adapter_covers_its_base(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "base")
    write(tmp_path / "adapter", tmp_path / "base", lora())
    before = Digests(tmp_path / "digests.json").model(str(tmp_path / "adapter"))
    (tmp_path / "base" / "chat_template.jinja").write_text("another")
    after = Digests(tmp_path / "digests.json").model(str(tmp_path / "adapter"))
    assert before != after
    rename_base(tmp_path / "adapter", "")
    assert Digests(tmp_path / "digests.json").model(str(tmp_path / "adapter")) not in (None, before, after)


FROM_HUB = """
import sys, torch
from pathlib import Path
from distill.digests import Digests
from distill.models.backbone import LoraSettings, ModelSettings, create
from distill.task.labels import LabelSpace
from tests.models.foreign_adapters import logits

for lora, train in ((None, False), (LoraSettings(), True)):
    model = create(ModelSettings("some/adapter", lora=lora, image_size=56), LabelSpace(), Path("unused"), train=train)
    torch.save(logits(model.model), sys.argv[1])
print(Digests(Path("unused")).model("some/adapter"))
"""


def test_adapter_and_base_may_be_in_the_cache_of_the_hub(model_folder: Path, tmp_path: Path) -> None:
    def cache(name: str, source: Path, commit: str) -> None:
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(source, folder / "snapshots" / commit)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)

    expected = logits(write(tmp_path / "adapter", model_folder, lora()))
    rename_base(tmp_path / "adapter", "some/base")
    cache("some/adapter", tmp_path / "adapter", "a" * 40)
    digests = []
    for commit in ("b" * 40, "c" * 40):
        shutil.rmtree(tmp_path / "hub" / "models--some--base", ignore_errors=True)
        cache("some/base", model_folder, commit)
        script = [sys.executable, "-W", "ignore", "-c", FROM_HUB, str(tmp_path / "logits.pt")]
        environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        close(torch.load(tmp_path / "logits.pt"), expected)
        digests.append(done.stdout.splitlines()[-1])
    assert digests[0] != digests[1] and "None" not in digests


# ---- errors ----


def rename_base(adapter: Path, base: str) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))


def refusal(path: Path, choice: LoraSettings | None = None) -> str:
    """The message of the refusal, which is the same for a plan as before a training."""
    messages = []
    for options in ({"weights": False}, {}, {"train": False}):
        with pytest.raises(SettingsError) as error:
            create(settings(path, choice), LABELS, path, **options)
        messages.append(str(error.value))
    assert len(set(messages)) == 1 and "\n" not in messages[0] and str(path) in messages[0]
    return messages[0]


def test_a_missing_base_is_one_sentence_that_names_adapter_and_base(model_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "adapter", model_folder, lora())
    for base in ("/nowhere/base", "nobody/has-this"):
        rename_base(tmp_path / "adapter", base)
        message = refusal(tmp_path / "adapter")
        assert f"the base model {base} of the adapter in {tmp_path / 'adapter'} cannot be loaded: " in message
    rename_base(tmp_path / "adapter", "")
    assert refusal(tmp_path / "adapter").endswith("names no base model in adapter_config.json")
    rename_base(tmp_path / "adapter", str(tmp_path / "adapter"))
    assert "is an adapter itself; merge it" in refusal(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "is of the type PREFIX_TUNING; only"),
        (lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "is of the type PROMPT_TUNING; only"),
        (lambda: lora(trainable_token_indices=[5]), "has trainable_token_indices, which is not supported"),
        (lambda: lora(use_dora=True, target_modules=["lm_head"]), "the output head can only have a plain LoRA adapter"),
        (lambda: lora(lora_bias=True), "has lora_bias, which is not supported"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(
    kind: Any, message: str, model_folder: Path, tmp_path: Path
) -> None:
    if "TUNING" in message:
        kind().save_pretrained(tmp_path)
        rename_base(tmp_path, str(model_folder))
    else:
        write(tmp_path, model_folder, kind())
    for choice in (None, LoraSettings()):
        assert message in refusal(tmp_path, choice)


def test_a_damaged_adapter_and_one_of_another_model_are_one_sentence(model_folder: Path, tmp_path: Path) -> None:
    write(tmp_path, model_folder, lora())
    weights = tmp_path / "adapter_model.safetensors"
    stored = weights.read_bytes()

    def message() -> str:
        with pytest.raises(SettingsError, match=r"adapter in .* cannot be loaded: ") as error:
            create(settings(tmp_path, LoraSettings()), LABELS, tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    weights.write_bytes(stored[:500])
    message()
    weights.write_bytes(stored.replace(b"language_model", b"lung_age_model"))
    assert "it was made for other module names" in message()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
    weights.write_bytes(stored)
    message()


def test_the_weights_may_be_a_bin_file(model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = write(tmp_path, model_folder, lora(lora_dropout=0.05, r=16, lora_alpha=32))
    model.save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "adapter_model.safetensors").unlink(missing_ok=True)
    assert (tmp_path / "adapter_model.bin").exists()
    with caplog.at_level(logging.WARNING):
        close(logits(create(settings(tmp_path, LoraSettings()), LABELS, tmp_path).model), logits(model))
    assert "own settings" not in caplog.text

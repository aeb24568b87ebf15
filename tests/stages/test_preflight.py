"""What a later stage would refuse stops a run before its first question, and `distill plan` says the same."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from distill import chain
from distill.models.backbone import LoraSettings, ModelSettings, create
from distill.models.hub import missing_weights
from distill.models.pretrained import check_weights
from distill.task.labels import LabelSpace
from tests import micro
from tests.commands import Command
from tests.fake_stages import Fakes
from tests.models.openai_server import Server
from tests.models.text_folders import write as write_text_model
from tests.stages.preflight_runs import pretrained, refused, write

__all__ = ["refused"]

METADATA = {"format": "pt"}


def folder_of(model_folder: Path, copy: Path, without: str = "") -> str:
    """A copy of a model's folder without one file."""
    shutil.copytree(model_folder, copy)
    if without:
        (copy / without).unlink()
    return str(copy)


def test_a_model_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    message = refused(student__model=pretrained(gone))
    assert message == f"student.model.path: {gone} cannot be loaded: there is no such folder"


def test_all_problems_are_counted(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused(
        assistant__model=pretrained(str(tmp_path / "one")), student__model=pretrained(str(tmp_path / "two"))
    ).startswith("assistant.model.path")


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("model.safetensors", "cannot be loaded: it has no weights, such as model.safetensors"),
        ("config.json", "cannot be loaded: "),
        ("tokenizer.json", "cannot be loaded: "),
        ("chat_template.jinja", "has no chat template"),
    ],
)
def test_a_model_with_a_missing_file(
    refused: Callable[..., str], model_folder: Path, tmp_path: Path, file: str, problem: str
) -> None:
    path = folder_of(model_folder, tmp_path / "model", file)
    message = refused(assistant__model=pretrained(path))
    assert message.startswith("assistant.model.path: ") and problem in message and path in message


def without_a_layer(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    lost = [name for name in weights if ".layers.1." in name]
    save_file({name: weights[name] for name in weights if name not in lost}, folder / "model.safetensors", METADATA)
    return f"its files lack {len(lost)} of its weights, such as "


def with_another_shape(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file(weights | {name: weights[name][:, :-1].contiguous()}, folder / "model.safetensors", METADATA)
    return ""


def half(folder: Path) -> str:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    return "model.safetensors is damaged: "


def a_pointer(folder: Path) -> str:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    return "model.safetensors is damaged: "


def an_index_of(content: Any) -> Callable[[Path], str]:
    def change(folder: Path) -> str:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        return "model.safetensors.index.json has no weight_map"

    return change


def config_with(**values: Any) -> Callable[[Path], str]:
    def change(folder: Path) -> str:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= values
        (folder / "config.json").write_text(json.dumps(config))
        return ""

    return change


@pytest.mark.parametrize(
    "damage",
    [without_a_layer, with_another_shape, half, a_pointer, an_index_of({"weight_map": []}),
     an_index_of({"weight_map": {"a": 5}}), an_index_of([]), config_with(hidden_size="x"),
     config_with(num_attention_heads=0), lambda folder: (folder / "config.json").write_text("null") and ""],
)  # fmt: skip
def test_a_folder_whose_weights_or_config_are_broken(
    refused: Callable[..., str], model_folder: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    path = folder_of(model_folder, tmp_path / "model")
    expected = damage(Path(path))
    message = refused(assistant__model=pretrained(path))
    assert message.startswith("assistant.model.path: ") and expected in message and path in message
    assert "unexpected" not in message


def test_targets_of_an_adapter_that_match_nothing(refused: Callable[..., str], model_folder: Path) -> None:
    for targets in ("nothing_like_it", "(unclosed", r".*norm", ".*", r".*(mlp|self_attn)"):
        message = refused(student__model=pretrained(str(model_folder), lora={"targets": targets}))
        assert message.startswith("student.model.lora.targets") and message[-1] not in "(:"


def test_different_tokenizers(refused: Callable[..., str]) -> None:
    tiny = micro.MODEL["tiny"]
    message = refused(student__model=micro.MODEL | {"tiny": tiny | {"vocabulary": 500}})
    assert message == (
        "student.distillation: student and assistant have different tokenizers; set its weight to 0, and its "
        "label_weight above 0 to learn from label distributions"
    )


def test_different_image_processors(refused: Callable[..., str], model_folder: Path, tmp_path: Path) -> None:
    other = folder_of(model_folder, tmp_path / "other")
    config = json.loads((Path(other) / "processor_config.json").read_text())
    config["image_processor"]["image_mean"] = [0.1, 0.1, 0.1]
    (Path(other) / "processor_config.json").write_text(json.dumps(config))
    models = {"assistant__model": pretrained(str(model_folder)), "student__model": pretrained(other)}
    assert "process images differently" in refused(**models)


def test_a_text_only_model_on_posts_with_images(
    refused: Callable[..., str], tokenizer_folder: Path, tmp_path: Path
) -> None:
    path = write_text_model(tmp_path / "llama", "llama", tokenizer_folder)
    student = {"student__model": pretrained(str(path)), "student__distillation__weight": 0}
    message = refused(assistant=None, augment=None, **student)
    expected = "model.images must be false: the model reads text only, and posts have images, which are then left out"
    assert message == f"student.{expected}"
    annotating = {"annotate": {"model": pretrained(str(path))}, "evaluate__teacher": False}
    assert refused(**annotating) == f"annotate.{expected}"


def test_images_of_an_assistant_and_not_of_the_student(refused: Callable[..., str]) -> None:
    message = refused(student__model=micro.MODEL | {"images": False})
    assert message == "student.distillation: student and assistant process images differently; set its weight to 0"


def test_a_processor_that_refuses_the_images(refused: Callable[..., str], model_folder: Path, tmp_path: Path) -> None:
    path = folder_of(model_folder, tmp_path / "model")
    template = (Path(path) / "chat_template.jinja").read_text()
    (Path(path) / "chat_template.jinja").write_text(template.replace("<|image_pad|>", ""))
    message = refused(student__model=pretrained(path))
    assert message.startswith("student.model.path: the processor does not take posts with 1 images and image_size 28: ")


def test_a_chat_template_that_cannot_be_packed(refused: Callable[..., str], model_folder: Path, tmp_path: Path) -> None:
    path = folder_of(model_folder, tmp_path / "model")
    template = (
        "{% for message in messages %}<|im_start|>user\n{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    (Path(path) / "chat_template.jinja").write_text(template)
    message = refused(assistant__model=pretrained(path))
    assert message == ("assistant.packing: the chat template places images after the text; set packing to false")


def test_labels_that_the_tokenizer_encodes_alike(
    refused: Callable[..., str], model_folder: Path, tmp_path: Path
) -> None:
    """A normalizer that removes accents makes two labels one."""
    path = Path(folder_of(model_folder, tmp_path / "model"))
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"id": str(n), "text": f"post {n}", "label": ("cafe", "café")[n % 2]} for n in range(12)]
    for split in ("train", "validation", "test"):
        named = [row | {"id": split + str(row["id"]), "text": f"{split} {row['text']}"} for row in rows]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    files = {split: [f"{split}.jsonl"] for split in ("train", "validation", "test")}
    message = refused(
        task={"labels": ["cafe", "café"]},
        data={"source": "jsonl", "root": str(data)} | files,
        student__model=pretrained(str(path)),
    )
    assert message == "task.labels: the tokenizer encodes 'cafe' and 'café' as the same tokens; rename one"


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_library_that_is_not_installed(refused: Callable[..., str], model_folder: Path) -> None:
    message = refused(student__model=pretrained(str(model_folder), lora={"quantize": True}))
    assert message == "student.model.lora.quantize needs bitsandbytes: pip install bitsandbytes"


@pytest.mark.skipif(any(map(find_spec, ("flash_attn", "kernels"))), reason="flash attention is installed")
def test_flash_attention_that_is_not_installed(refused: Callable[..., str]) -> None:
    model = micro.MODEL | {"attention": "flash_attention_2"}
    message = refused(student__model=model, student__packing=False)
    assert message == "student.model.attention: flash_attention_2 needs flash-attn: pip install flash-attn"


def test_a_key_of_a_later_stage(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTHER_KEY", raising=False)
    other = {"endpoint": {"base_url": "http://127.0.0.1:9/v1", "model": "other", "api_key_env": "OTHER_KEY"}}
    message = refused(calibrate={}, cascade={"teacher": other})
    assert message == "cascade.teacher.endpoint.api_key_env: the environment variable OTHER_KEY is not set"


def test_a_risk_that_the_validation_posts_cannot_support(refused: Callable[..., str]) -> None:
    message = refused(calibrate={"by": "risk", "risk": 0.01})
    assert message.startswith("calibrate.risk: 9 validation samples cannot support a risk of 0.01 ")


def test_a_quality_that_the_validation_posts_cannot_support(refused: Callable[..., str]) -> None:
    message = refused(calibrate={"by": "quality", "quality": 0.99})
    assert message.startswith("calibrate.quality: 9 validation posts cannot support 0.99 at a confidence of 0.9")


def test_a_quality_of_averages(refused: Callable[..., str]) -> None:
    message = refused(calibrate={"by": "quality", "quality": 0.5}, cascade={"on_agreement": "average"})
    assert message == "calibrate.by: quality needs cascade.on_agreement: teacher"


def test_a_quality_out_of_range(refused: Callable[..., str]) -> None:
    message = refused(calibrate={"by": "quality", "quality": 1.5})
    assert message == "calibrate.quality is 1.5; it takes a number above 0 and below 1"


def test_a_baseline_without_labels(distill: Command, tmp_path: Path) -> None:
    with Server() as server:
        path = write(tmp_path, server.url, annotate__unlabelled="keep_confident")
        content = yaml.safe_load(path.read_text())
        data = tmp_path / "rows"
        data.mkdir()
        for split, label in (("train", None), ("validation", "neutral"), ("test", "neutral")):
            rows = [{"id": f"{split}{n}", "text": f"{split} post {n}", "label": label} for n in range(6)]
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {split: [f"{split}.jsonl"] for split in ("train", "validation", "test")}
        content["data"] = {"source": "jsonl", "root": str(data)} | files
        path.write_text(yaml.safe_dump(content))
        result = distill("run", "--config", path)
    assert (result.status, server.requests) == (2, 0)
    assert result.error == "student.hard_labels_baseline must be false: no training post has a label"


def test_a_stage_alone_and_stages_that_do_not_run_are_not_checked(distill: Command, tmp_path: Path) -> None:
    with Server() as server:
        path = write(tmp_path, server.url, student__model=pretrained(str(tmp_path / "gone")))
        assert distill("annotate", "--config", path).status == 0
        paid = server.requests
        assert distill("run", "--config", path, "--until", "annotate").status == 0
        assert distill("student", "--config", path).status == 2
    assert server.requests == paid


def test_missing_libraries_of_metrics_are_a_notice(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The metrics are left out, and the run goes on; it says so before the first stage."""
    missing = [name for name in ("sacrebleu", "sentence_transformers") if find_spec(name) is None]
    with Server() as server:
        path = write(tmp_path, server.url, evaluate__similarity_model="no/such-model")
        plan = distill("plan", "--config", path).stdout
    assert "evaluate: similarity is left out: " in plan
    assert all(f"is left out: {name} is not installed (pip install 'distill[metrics]')" in plan for name in missing)
    assert "Problems that stop" not in plan
    Fakes(monkeypatch)
    chain.run(micro.read(path))
    messages = [message for message in caplog.messages if " is left out: " in message or message.startswith("stage ")]
    assert messages[0] in plan and ": export done, " in messages[-1]


def test_weights_of_adapters(model_folder: Path, tmp_path: Path) -> None:
    settings = ModelSettings(path=str(model_folder), lora=LoraSettings(), image_size=28)
    create(settings, LabelSpace(), Path("unused")).save(tmp_path / "adapter")
    adapter = ModelSettings(path=str(tmp_path / "adapter"), image_size=28)
    check_weights(adapter)
    without = create(adapter, LabelSpace(), Path("unused"), train=False, weights=False)
    loaded = create(adapter, LabelSpace(), Path("unused"), train=False)
    assert without.label_tokens == loaded.label_tokens
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    assert missing_weights(adapter.path, "main", adapter=True) == "it has no weights, such as adapter_model.safetensors"

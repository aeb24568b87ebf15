"""The programs of docs/use-elsewhere.md and docs/serve-elsewhere.md give the labels and rationales of `Local`."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, Qwen2_5_VLProcessor
from transformers.utils import is_torchvision_available

from distill.data.corpus import Corpus
from distill.export.card import model_card, scoring
from distill.files import write_json
from distill.models.backbone import Backbone, LoraSettings, ModelSettings, create
from distill.models.local import Local
from distill.models.processors import image_only
from distill.models.reasoner import Sampling
from distill.task.labels import LabelSpace, Scale
from distill.task.sample import Sample
from tests import engines
from tests.documents import ROOT, blocks
from tests.models import text_folders

BLOCKS = [block for page in ("use", "serve") for block in blocks("python", ROOT / "docs" / f"{page}-elsewhere.md")]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACES = {"first tokens": LabelSpace(), "whole labels": LabelSpace.from_scale(Scale())}
"""Labels that differ in their first token, and labels that share it."""
POST = Sample("one", "the film is a delight")


def block(*parts: str) -> str:
    """The program that contains all of these parts."""
    (found,) = (block for block in BLOCKS if all(part in block for part in parts))
    return found


def run(code: str) -> dict[str, Any]:
    """Run a program. Returns its names."""
    names: dict[str, Any] = {}
    exec(compile(code, "use-elsewhere.md", "exec"), names)
    return names


def publish(student: Backbone, folder: Path) -> Path:
    """What the programs read of an export, without its check."""
    student.merged().save_pretrained(folder)  # type: ignore[operator]
    student.processor.save_pretrained(folder)
    write_json(folder / "scoring.json", scoring(student))
    return folder


def probabilities(student: Backbone, post: Sample = POST) -> dict[str, Any]:
    """Of `Local`, by label."""
    found = Local(student, "").classify([post]).probabilities[0]
    return dict(zip(student.labels.names, found.tolist(), strict=True))


@pytest.fixture(params=SPACES, scope="module")
def text_student(request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path_factory: Any) -> Backbone:
    folder = tmp_path_factory.mktemp("text")
    text_folders.write(folder, "llama", tokenizer_folder, TEMPLATE)
    student = create(ModelSettings(str(folder)), SPACES[request.param], folder, train=False)
    assert student.labels_share_tokens == (request.param == "whole labels")
    return student


@pytest.fixture(scope="module")
def text_folder(text_student: Backbone, tmp_path_factory: Any) -> Path:
    return publish(text_student, tmp_path_factory.mktemp("export"))


def test_transformers_scores_texts(text_student: Backbone, text_folder: Path) -> None:
    code = block("AutoModelForCausalLM", "def classify").replace("runs/mosi/export", str(text_folder))
    assert run(code)["classify"](POST.text) == pytest.approx(probabilities(text_student), abs=1e-5)


@pytest.mark.parametrize("engine", ["localhost:8000", "localhost:8080"], ids=["vLLM", "llama.cpp"])
def test_requests_to_servers_score_texts(engine: str, text_student: Backbone, text_folder: Path) -> None:
    code = block(engine).replace("runs/mosi/export", str(text_folder)).replace("n_probs=100", "n_probs=10**6")
    with engines.serve(text_folder) as address:
        names = run(code.replace(f"http://{engine}", address))
        assert names["classify"](POST.text) == pytest.approx(probabilities(text_student), abs=1e-5)


def test_the_requests_in_the_model_card_give_the_label(text_student: Backbone, text_folder: Path) -> None:
    card = model_card("mine", "", "mit", "posts", "", {}, POST, text_student)
    vllm, llama = (json.loads(body) for body in re.findall(r"<<'JSON'\n(.*?)\nJSON\n", card, re.DOTALL))
    engine, names, expected = engines.Engine(text_folder), text_student.labels.names, probabilities(text_student)
    vllm |= {"add_special_tokens": False, "chat_template_kwargs": {}}
    if text_student.labels_share_tokens:
        assert "Labels share their first token" in card
        scores = []
        for name, tokens in zip(names, text_student.label_tokens, strict=True):
            vllm["messages"][1]["content"] = f'"Prediction": {name}'
            reply = engine.reply("/v1/chat/completions", vllm)
            (top,) = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            ends = zip(reply["prompt_logprobs"][1 - len(tokens) :], tokens, strict=False)
            scores.append(top["logprob"] + sum(entry[str(token)]["logprob"] for entry, token in ends))
    else:
        reply = engine.reply("/v1/chat/completions", vllm | {"prompt_logprobs": None})
        scores = [top["logprob"] for top in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]]
    assert torch.tensor(scores).softmax(0).tolist() == pytest.approx(list(expected.values()), abs=1e-5)
    assert llama["messages"][1]["content"] == '"Prediction":' and llama["top_logprobs"] == 100
    assert all(f"| {name} | {tokens[0]}" in card for name, tokens in zip(names, text_student.label_tokens, strict=True))


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's processor in place of transformers' own, which needs torchvision."""
    if not is_torchvision_available():
        monkeypatch.setattr(AutoProcessor, "from_pretrained", image_only(Qwen2_5_VLProcessor).from_pretrained)


def image_program(way: str, folder: Path, post: Sample) -> str:
    """The program that scores a post with an image."""
    code, without_torchvision = block("AutoProcessor", "def classify"), block("AutoImageProcessor")
    if way == "AutoTokenizer":
        loading, rest = code.split("\n\n\n@torch", 1)
        code = f"{loading}\n{without_torchvision}\n\n@torch{rest}"
    code = code.replace("runs/quickstart/export", str(folder))
    code = code.replace("data/postcards/images/test-0000.png", str(post.images[0]))
    return code.replace("Greetings from the dreary theatre in Evora.", post.text)


@pytest.mark.usefixtures("processors")
@pytest.mark.parametrize(
    ("space", "way"), [*((space, "AutoProcessor") for space in SPACES), ("first tokens", "AutoTokenizer")]
)
def test_transformers_scores_images(
    space: str, way: str, model_folder: Path, postcards: Corpus, tmp_path: Path
) -> None:  # fmt: skip
    settings = ModelSettings(str(model_folder), image_size=56)
    student = create(settings, SPACES[space], tmp_path, train=False)
    post = postcards.test[0]
    names = run(image_program(way, publish(student, tmp_path), post))
    assert names["classify"](post.text, names["image"]) == pytest.approx(probabilities(student, post), abs=1e-4)
    assert ("image_processor" in names) == (way == "AutoTokenizer")


@pytest.mark.parametrize("class_name", ["text-generation", "image-text-to-text"])
@pytest.mark.usefixtures("processors")
def test_pipeline_generates_the_rationale(
    class_name: str, model_folder: Path, tokenizer_folder: Path, postcards: Corpus, tmp_path: Path
) -> None:
    text_only = class_name == "text-generation"
    base = text_folders.write(tmp_path / "base", "llama", tokenizer_folder, TEMPLATE) if text_only else model_folder
    student = create(ModelSettings(str(base), image_size=56), LabelSpace(), tmp_path, train=False)
    folder, image = publish(student, tmp_path / "export"), str(postcards.test[0].images[0])
    code = block("pipeline(", class_name).replace("512", "8").replace("data/postcards/images/test-0000.png", image)
    for shown in ("runs/mosi/export", "runs/quickstart/export"):
        code = code.replace(shown, str(folder))
    post = Sample("one", "a delight", images=() if text_only else postcards.test[0].images)
    ((_, expected),) = Local(student, "").reason([post], sampling=Sampling(temperature=0.0, max_new_tokens=8))
    answer = run(code)["answer"]
    assert (answer if isinstance(answer, str) else answer[-1]["content"]) == expected.text


def test_peft_loads_the_adapter(tokenizer_folder: Path, tmp_path: Path) -> None:
    base = text_folders.write(tmp_path / "base", "llama", tokenizer_folder, TEMPLATE)
    student = create(ModelSettings(str(base), lora=LoraSettings(r=4, dropout=0.0)), LabelSpace(), tmp_path)
    for name, weights in student.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, 0, 0.2)
    student.save(tmp_path / "adapter")
    student.model.eval()
    code = block("PeftModel").replace("google/gemma-3-270m-it", str(base))
    model = run(code.replace("runs/mosi/export/adapter", str(tmp_path / "adapter")))["model"]
    inputs = student.encode([POST], "classify")
    with torch.inference_mode():
        expected = student.model(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected)
        plain = AutoModelForCausalLM.from_pretrained(base).eval()
        assert not torch.allclose(plain(**inputs).logits, expected, atol=1e-2)


@pytest.mark.parametrize("text_student", ["first tokens"], indirect=True)
def test_onnx_has_the_logits_of_texts(text_student: Backbone, text_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    code = block("onnxruntime", "AutoModelForCausalLM").replace("runs/mosi/export", str(text_folder))
    names = run(code.replace("student.onnx", str(tmp_path / "student.onnx")))
    inputs = text_student.encode([POST], "classify")
    with torch.inference_mode():
        expected = text_student.model(**inputs).logits[0]
    found = names["logits"](inputs["input_ids"][0].tolist())
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("processors")
def test_onnx_has_the_logits_of_another_image_and_a_longer_text(
    model_folder: Path, postcards: Corpus, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    student = create(ModelSettings(str(model_folder), image_size=56), LabelSpace(), tmp_path, train=False)
    first, second = postcards.test[0], postcards.test[1]
    second = replace(second, text=second.text + " and more words")
    code = image_program("AutoProcessor", publish(student, tmp_path), first) + block("onnxruntime", "get_rope_index")
    names = run(code.replace("student.onnx", str(tmp_path / "student.onnx")))
    inputs = student.encode([second], "classify")
    assert inputs["input_ids"].shape[1] > names["inputs"]["input_ids"].shape[1]
    with torch.inference_mode():
        expected = student.model(**inputs).logits[0]
    torch.testing.assert_close(torch.tensor(names["logits"](inputs)), expected, atol=1e-4, rtol=1e-4)

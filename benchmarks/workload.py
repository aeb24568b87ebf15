"""Models and data of the training benchmarks: Qwen2.5-VL with random weights, and posts with rationales."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast, Qwen2_5_VLConfig

from distill.data.postcards import BENDS, FACES, SKIES, TEXTS, THINGS, TOWNS, WORDS, draw_card
from distill.models import tiny
from distill.models.backbone import Backbone, LoraSettings, ModelSettings
from distill.models.lora import add_lora
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.sample import Sample

TASKS: dict[prompts.Template, float] = {"reason": 1.0, "classify": 1.0}
LABELS = LabelSpace()

QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112,
               "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
TINY_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [0]}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
TINY_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}

MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B": {
        "text": {"vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
                 "num_key_value_heads": 2, "intermediate_size": 11_008, "rope_parameters": ROPE},
        "vision": QWEN_VISION, "tied": True,
    },
    "Qwen2.5-VL-7B": {
        "text": {"vocab_size": 152_064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
                 "num_key_value_heads": 4, "intermediate_size": 18_944, "rope_parameters": ROPE},
        "vision": QWEN_VISION, "tied": False,
    },
    "tiny-64": {
        "text": {"vocab_size": 151_936, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "num_key_value_heads": 2, "intermediate_size": 128, "rope_parameters": TINY_ROPE},
        "vision": TINY_VISION, "tied": True,
    },
    "tiny-128": {
        "text": {"vocab_size": 152_064, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 4, "intermediate_size": 256, "rope_parameters": TINY_ROPE},
        "vision": TINY_VISION, "tied": True,
    },
}  # fmt: skip
"""Model configurations: the published ones, and two with the published vocabularies that are small enough for a CPU."""

POST_TOKENS = (3, 12, 15, 18, 20, 22, 24, 26, 29, 32, 60)
RATIONALE_TOKENS = (151, 207, 221, 233, 242, 252, 263, 274, 287, 306, 427)
"""Deciles of the lengths of Twitter-2015's posts and rationales (dev split), in tokens of Qwen2's tokenizer."""


def model_config(name: str, tokenizer: PreTrainedTokenizerFast, vocabulary: int | None = None) -> Qwen2_5_VLConfig:
    """The config of an entry of MODELS with the token ids of a tokenizer. `vocabulary` overrides its size."""
    text, vision = MODELS[name]["text"], MODELS[name]["vision"]
    pad, vision_start, image, video = (
        tokenizer.convert_tokens_to_ids(token)
        for token in ("<|endoftext|>", "<|vision_start|>", "<|image_pad|>", "<|video_pad|>")
    )
    initializer_range = 0.02 if text["hidden_size"] > 1000 else text["hidden_size"] ** -0.5
    special_ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad}
    return Qwen2_5_VLConfig(
        text_config=text
        | {
            "max_position_embeddings": 32_768,
            "initializer_range": initializer_range,
            "vocab_size": vocabulary or text["vocab_size"],
        }
        | special_ids,
        vision_config=vision | {"out_hidden_size": text["hidden_size"], "initializer_range": initializer_range},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=vision_start,
        tie_word_embeddings=MODELS[name]["tied"],
        initializer_range=initializer_range,
        **special_ids,
    )


def build_model(
    name: str, tokenizer: PreTrainedTokenizerFast, device: str = "cpu", *, seed: int = 1,
    lora: LoraSettings | None = None, image_size: int = 280, batch_size: int = 8, vocabulary: int | None = None,
) -> Backbone:  # fmt: skip
    """An entry of MODELS with random weights, created on its device: bfloat16 on a GPU, float32 elsewhere."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    settings = ModelSettings(lora=lora, image_size=image_size, dtype=dtype, batch_size=batch_size)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(
            model_config(name, tokenizer, vocabulary),
            dtype=getattr(torch, dtype),
            attn_implementation=settings.attention,
        )
        if lora is not None:
            model = add_lora(model, lora)
    return Backbone(model, tiny.build_processor(tokenizer), LABELS, settings)


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Read Qwen2's tokenizer from its tokenizer.json."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=tiny.CHAT_TEMPLATE,
        padding_side="left",
    )


def train_tokenizer(vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the prompts and words of the postcards corpus."""
    samples = [Sample(str(number), words) for number, words in enumerate(TEXTS)]
    texts = [prompts.render(template, sample, LABELS) for sample in samples for template in ("predict", *TASKS)]
    return tiny.train_tokenizer([*texts, _random_words(random.Random(0), 5000)], vocabulary)


def read_posts(folder: Path) -> list[Sample]:
    """Read the posts of dev.jsonl that have a rationale."""
    rows = [json.loads(line) for line in (folder / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        Sample(row["id"], row["text"], (folder / row["image"],), row["aspect"], row["label"], row["rationale"])
        for row in rows
        if row["rationale"]
    ]


def synthetic_posts(
    folder: Path, count: int, tokenizer: PreTrainedTokenizerFast, image_size: int = 280, length: float = 1
) -> list[Sample]:
    """Create posts with the length distribution of Twitter-2015, with drawn images.

    Args:
        folder: folder for the images.
        length: factor on the length of the rationales.
    """
    images = []
    for number in range(min(count, 16)):
        generator = random.Random(number)
        images.append(folder / f"{number}.png")
        draw_card(BENDS[generator.choice(FACES)], generator.choice(list(SKIES)), generator, image_size).save(images[-1])
    words = tokenizer(_random_words(random.Random(0), 5000), add_special_tokens=False)["input_ids"]

    def text(deciles: tuple[int, ...], decile: float, factor: float, generator: random.Random) -> str:
        below = min(int(decile), len(deciles) - 2)
        tokens = round(factor * (deciles[below] + (decile - below) * (deciles[below + 1] - deciles[below])))
        first = generator.randrange(len(words) - tokens)
        return str(tokenizer.decode(words[first : first + tokens]))

    posts = []
    for number in range(count):
        generator = random.Random(number)
        label = generator.choice(LABELS.names)
        decile = generator.uniform(0, 10) if number else 10.0  # the first post has the maximum length
        post, rationale = text(POST_TOKENS, decile, 1, generator), text(RATIONALE_TOKENS, decile, length, generator)
        posts.append(Sample(f"row-{number}", post, (images[number % len(images)],), "it", label, rationale))
    return posts


def _random_words(generator: random.Random, count: int) -> str:
    vocabulary = [word for words in WORDS.values() for word in words] + [*THINGS, *TOWNS]
    return " ".join(generator.choice(vocabulary) for _ in range(count))

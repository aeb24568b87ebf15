"""What an exported folder says about its use: the model card, and `scoring.json`, which programs read."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download

from distill.models.backbone import Backbone
from distill.models.hub import is_hub_id, load_from_hub
from distill.models.text_models import TEMPLATE_VARIABLES
from distill.task.prompts import render
from distill.task.sample import Media, Sample

_FENCE = "`" * 3

_METRICS = (
    "n", "accuracy", "weighted_f1", "macro_f1", "ece", "mae", "correlation", "acc2_with_zero", "acc2_without_zero",
    "reasoned_accuracy", "parse_rate", "consistency",
)  # fmt: skip


def scoring(student: Backbone) -> dict[str, Any]:
    """How a label is read from a student, in terms of texts and tokens.

    Returns:
        `prompt`: the *classify* prompt with `{text}` for the text of a post, on one line; `prompt_with_aspect`: that
        for posts with a target, `{aspect}`. `prefix`: the forced prefix of the answer. `labels`: K names,
        and their `polarity`. `label_tokens`: K lists of token ids that follow the prefix; the probability of a label is
        proportional to the product of their probabilities. `values`: the K bin centres of the `scale`, None without
        one. `image_size`: the side of square images in pixels, 0 if the processor resizes them; None if the student
        reads none. `clips`: how it is given videos and sounds, `video`, `audio`, `frames` and `image_size` of
        its settings, and the `sampling` of frames.
        `add_special_tokens`: whether the tokenizer adds the first token, since the chat template does not.
        `template_variables`: of the chat template. `wording`: the texts of the task, from
        which the prompts are made.
    """
    labels, shared = student.labels, student.labels_share_tokens
    return {
        "prompt": render("classify", Sample("", "{text}"), labels),
        "prompt_with_aspect": render("classify", Sample("", "{text}", aspect="{aspect}"), labels),
        "prefix": labels.wording.prefix,
        "labels": list(labels.names),
        "label_tokens": [tokens if shared else tokens[:1] for tokens in student.label_tokens],
        "polarity": list(labels.polarity),
        "values": labels.scale and labels.scale.centres.tolist(),
        "scale": labels.scale and asdict(labels.scale),
        "image_size": student.settings.image_size if student.encoder.reads_images else None,
        "clips": _clips(student),
        "add_special_tokens": not student.encoder.starts_with_bos(student.encoder.render("")),
        "template_variables": _template_variables(student),
        "wording": asdict(labels.wording),
    }


def _clips(student: Backbone) -> dict[str, Any]:
    media = student.encoder.media
    settings = {"frames": student.settings.frames, "image_size": student.settings.image_size}
    return settings | {
        "video": media.video,
        "audio": "auto" if media.audio else "ignore",
        "sampling": media.sampling,
    }


def model_card(
    name: str,
    base: str,
    licence: str,
    data: str,
    recipe: str,
    metrics: Mapping[str, Any],
    example: Sample,
    student: Backbone,
    reasons: bool = True,
) -> str:
    """Text of the model card (README.md): prompts, requests to servers, test metrics, data and recipe.

    Args:
        base: name of the base model, or its folder; empty for a tiny model.
        recipe: the resolved recipe as YAML.
        metrics: test metrics of the student.
        example: sample for which the prompts are shown; of its media only which there are.
        reasons: whether the student was trained to generate rationales.
    """
    task = "text-generation" if student.processor.image_processor is None else "image-text-to-text"
    if student.processor.image_processor is None and student.encoder.media.audio:
        task = "audio-text-to-text"
    header = {"library_name": "transformers", "pipeline_tag": task, "license": licence}
    if is_hub_id(base):
        header["base_model"] = base
    rows = "\n".join(
        f"| {key} | {value:.4g} |" for key in _METRICS if isinstance(value := metrics.get(key), int | float)
    )
    origin = (base if is_hub_id(base) else Path(base).name) or f"a tiny {student.family.name} with random weights"
    if student.settings.keep_layers is not None:
        config: Any = student.model.config
        origin = f"{config.get_text_config().num_hidden_layers} layers of {origin}"
    posts = _posts(example, student)
    aim = f"classifies the sentiment of {posts}" if student.labels.wording.asks_for_sentiment else f"labels {posts}"
    text = f"""# {name}

A student model that {aim}{" and explains it" if reasons else ""},
trained with `distill` (MulCoT-RD, arXiv 2508.05234) from {origin}.
Labels: {", ".join(student.labels.names)}.

## Usage

{_usage(example, student, reasons)}

## Serving

{_serving(example, student)}

## Test metrics

| metric | value |
| --- | --- |
{rows}

## Data

{data}

## Recipe

{_block("yaml", recipe.strip())}
"""
    card = ModelCard(f"---\n{_front_matter(header)}---\n\n{text}")
    return str(card)


def _given(example: Sample, student: Backbone) -> Media:
    """What the student is given of the media of an example. One without media stands for a post with an image."""
    media = student.encoder.media
    images = example.images if example.media else (Path("image"),)
    return Media(
        images if media.images else (),
        example.video if media.takes("video") else None,
        example.audio if media.takes("audio") else None,
    )


def _posts(example: Sample, student: Backbone) -> str:
    media = _given(example, student)
    names = ("text", *(name for name, given in zip(("images", "video", "sound"), media, strict=True) if given))
    return f"posts with {', '.join(names[:-1])} and {names[-1]}" if media else "the texts of posts"


def _usage(example: Sample, student: Backbone, reasons: bool) -> str:
    """The rule by which a label is read, with the prompts for one post."""
    rule = "the most probable label token"
    if student.labels_share_tokens:
        rule = "the label with the highest probability of all its tokens and the end token"
    given, images = _given(example, student), student.encoder.reads_images
    before = ", whose images go before the text in the message" if given.images else ""
    parts = [
        f"The label is {rule} after the *classify* prompt and the forced prefix `{student.labels.wording.prefix}`.\n"
        f"The prompt for one post{before}:",
        _block("text", render("classify", example, student.labels)),
        "`scoring.json` has the prompt, the prefix and the tokens of the labels for programs.",
    ]
    if (scale := student.labels.scale) is not None:
        centres = ", ".join(f"{centre:g}" for centre in scale.centres)
        parts.append(f"The value is the sum of the bin centres ({centres}), weighted by the label probabilities.")
    if reasons:
        parts.append(f"The *reason* prompt generates a rationale of {len(student.labels.wording.fields)} fields:")
        parts.append(_block("text", render("reason", example, student.labels)))
    if images:
        size = f"{student.settings.image_size} pixels"
        parts.append(f"Images are resized to squares of {size} (0: resized by the processor).")
    if given.video and student.encoder.media.video == "frames":
        parts.append("A video is given as its sampled frames, each an image after its time: `0.5 s: ` and the image.")
    if given.audio:
        parts.append("The sound of a post precedes the text, as audio of 16 kHz.")
    if given.video:
        parts.append("`scoring.json` has the sampling of videos under `clips`.")
    if used := _template_variables(student):
        values = ", ".join(f"`{name}={value!r}`" for name, value in used.items())
        parts.append(f"The chat template was applied with {values}.")
    parts.append(
        f"The weights are in {student.settings.dtype}; `export.json` compares them with the\n"
        "student before its adapter was merged."
    )
    return "\n\n".join(parts)


def _serving(example: Sample, student: Backbone) -> str:
    """The commands that serve the student with vLLM and llama.cpp, and the requests for the label of one post."""
    images, shared = student.encoder.reads_images, student.labels_share_tokens
    towers = images or student.encoder.media.audio
    scored = scoring(student)["label_tokens"]
    convert, projector = "python convert_hf_to_gguf.py . --outfile student.gguf", ""
    if towers:
        convert += "\npython convert_hf_to_gguf.py . --outfile mmproj.gguf --mmproj"
        projector = " --mmproj mmproj.gguf"
    serve = f"{convert}\nllama-server --model student.gguf{projector}"
    vllm_note = llama_note = "The label is the one whose token has the highest log-probability in `top_logprobs`."
    if shared:
        first = student.labels.names[0]
        vllm_note = (
            f"Labels share their first token. Send this for each label instead of *{first}*, and add the\n"
            "log-probabilities of its tokens, which are the last in `prompt_logprobs`, and that of the end token in\n"
            "`top_logprobs`."
        )
        llama_note = (
            "Labels share their first token, so that the token after this prefix does not decide between them. Send a\n"
            "request for each beginning of a label, as the program in `docs/serve-elsewhere.md` does."
        )
    rows = [f"| {name} | {', '.join(map(str, ids))} |" for name, ids in zip(student.labels.names, scored, strict=True)]
    parts = [
        "With [vLLM](https://docs.vllm.ai), in this folder:",
        _block("bash", "vllm serve . --served-model-name student\n" + _curl(8000, _vllm_request(example, student))),
        vllm_note,
        "With [llama.cpp](https://github.com/ggml-org/llama.cpp), if its converter knows the model:",
        _block("bash", f"{serve}\n{_curl(8080, _request(example, student) | {'top_logprobs': 100})}"),
        llama_note,
        "\n".join(["| label | token ids |", "| --- | --- |", *rows]),
    ]
    if images and (size := student.settings.image_size):
        parts.append(f"Resize images to {size} × {size} pixels before they are sent.")
    return "\n\n".join([*parts, "`docs/serve-elsewhere.md` of `distill` has programs for both, and for other tools."])


def _parts(media: Media, way: str) -> Iterator[dict[str, Any]]:
    """The parts of a message for these media, with placeholders for their content; of the frames the first."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,(an image)"}}
    if media.images:
        yield image
    if media.video and way == "frames":
        yield from ({"type": "text", "text": "0.5 s: "}, image)
    elif media.video:
        yield {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,(a video)"}}
    if media.audio:
        yield {"type": "input_audio", "input_audio": {"data": "(a sound)", "format": "wav"}}


def _request(example: Sample, student: Backbone, answer: str = "") -> dict[str, Any]:
    """A chat request for the log-probabilities of the token that follows the beginning of an answer."""
    prompt: Any = render("classify", example, student.labels)
    if parts := list(_parts(_given(example, student), student.encoder.media.video)):
        prompt = [*parts, {"type": "text", "text": prompt}]
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer or student.labels.wording.prefix},
    ]
    variables = _template_variables(student)
    request = {"messages": messages, "max_tokens": 1, "temperature": 0, "logprobs": True}
    return request | ({"chat_template_kwargs": variables} if variables else {})


def _vllm_request(example: Sample, student: Backbone) -> dict[str, Any]:
    """The request to vLLM for the label tokens, or for the tokens of the first label if labels share tokens."""
    options = {"model": "student", "add_generation_prompt": False, "continue_final_message": True}
    if not student.labels_share_tokens:
        ids = {"logprob_token_ids": student.label_ids.tolist(), "return_tokens_as_token_ids": True}
        return options | _request(example, student) | ids
    ids = {"prompt_logprobs": 0, "logprob_token_ids": student.label_tokens[0][-1:], "return_tokens_as_token_ids": True}
    return options | _request(example, student, f"{student.labels.wording.prefix} {student.labels.names[0]}") | ids


def base_licence(path: str, revision: str) -> str:
    """The licence in the card of the base model; `other` if the card cannot be read, `apache-2.0` for tiny models."""
    if not path:
        return "apache-2.0"
    try:
        if Path(path).is_dir():
            source: str | Path = Path(path) / "README.md"
        else:
            source = load_from_hub(partial(hf_hub_download, filename="README.md"), path, revision=revision)
        card = ModelCard.load(source)
        return str(card.data.get("license") or "other")
    except Exception:  # noqa: BLE001 - offline, no card, or an invalid card: the licence is unknown
        return "other"


def _template_variables(student: Backbone) -> dict[str, Any]:
    """The variables that the chat template of a text-only student reads, with the values it was trained with."""
    if student.processor.image_processor is not None:
        return {}
    template = student.processor.chat_template
    return {name: value for name, value in TEMPLATE_VARIABLES.items() if name in template}


def _curl(port: int, body: Mapping[str, Any]) -> str:
    """A chat request with curl."""
    content = json.dumps(body, indent=1, ensure_ascii=False)
    url = f"http://localhost:{port}/v1/chat/completions"
    return f"\ncurl {url} -H 'Content-Type: application/json' -d @- <<'JSON'\n{content}\nJSON"


def _block(language: str, content: str) -> str:
    return f"{_FENCE}{language}\n{content}\n{_FENCE}"


def _front_matter(header: Mapping[str, str]) -> str:
    return "".join(f"{key}: {value}\n" for key, value in header.items())

"""What is checked of each model family, on a tiny model of its real classes. Each check raises AssertionError."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig
from transformers.utils import is_torchvision_available

from distill.data.clips import RATE
from distill.errors import SettingsError, first_line
from distill.models import families
from distill.models.adapters import Source
from distill.models.backbone import Backbone, LoraSettings, ModelSettings, create
from distill.models.encoding import save_processor
from distill.models.local import Local
from distill.models.pretrained import load_processor
from distill.models.reasoner import Sampling
from distill.models.scoring import label_log_probabilities, score_labels
from distill.models.text_models import model_class
from distill.task.labels import LabelSpace
from distill.task.prompts import render
from distill.task.sample import Sample
from distill.training.assistant import AssistantModule, TrainSettings
from distill.training.batches import check_compatibility, encode
from tests.models import clips
from tests.models.family_folders import write
from tests.models.family_table import FAMILIES

PREFIX = '"Prediction":'


LABELS = LabelSpace()
TASKS: Any = {"reason": 1.0, "classify": 1.0}
GREEDY = Sampling(temperature=0.0, max_new_tokens=6)


def load(kind: str, folder: Path, lora: LoraSettings | None = None) -> Backbone:
    """The tiny model of a family in a folder, written if it is not there.

    Raises:
        SettingsError: the family needs a library that is not installed.
    """
    family = FAMILIES[kind]
    if not (folder / "config.json").exists():
        try:
            write(family, folder)
        except ImportError as error:
            raise SettingsError(first_line(error)) from error
    settings = ModelSettings(
        str(folder), lora=lora, image_size=family.image_size, attention=family.attention, batch_size=4
    )  # type: ignore[arg-type]
    return create(settings, LABELS, folder, train=lora is not None)


def posts(folder: Path, kind: str = "qwen2_5_vl") -> list[Sample]:
    """Posts with as many pictures as a family takes in one batch, of noise in different sizes; some with a sound."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [folder / f"{index}.png" for index in range(3)]
    for index, path in enumerate(pictures):
        if not path.exists():
            Image.effect_noise((40 + 16 * index, 56), 90).convert("RGB").save(path)
    texts = ("one picture", "a post with two pictures and more words than others", "another post", "the last")
    images = [pictures[index % 2 :][:count] for index, count in enumerate(FAMILIES[kind].pictures)]
    labels = ("positive", "negative", "neutral", "positive")
    sounds: list[Path | None] = [None] * len(texts)
    if FAMILIES[kind].audio:
        sounds[::2] = [clips.write(folder / f"{s}.wav", seconds=s, pitch=900 * s) for s in (0.3, 0.5)]
    return [
        Sample(str(index), text, tuple(paths), label=label, rationale=f"Text_analysis: {text}", audio=sound)
        for index, (text, paths, label, sound) in enumerate(zip(texts, images, labels, sounds, strict=True))
    ]


def trains(backbone: Backbone, samples: Sequence[Sample]) -> None:
    """One step: the loss is finite, and each adapted layer gets a gradient."""
    module = AssistantModule(backbone, TrainSettings(tasks=TASKS))
    loss = module.loss(module.encode(samples)).total
    loss.backward()
    assert loss.isfinite()
    adapted = {name: weights for name, weights in backbone.model.named_parameters() if "lora_B" in name}
    assert adapted
    idle = [name for name, weights in adapted.items() if weights.grad is None or not weights.grad.any()]
    assert not idle, f"no gradient: {idle}"
    assert all(weights.grad.isfinite().all() for weights in adapted.values())  # type: ignore[union-attr]


@torch.no_grad()
def scores_labels(backbone: Backbone, samples: Sequence[Sample]) -> None:
    """Label scores are the log-probabilities of the model's own logits for each answer."""
    found = label_log_probabilities(backbone, backbone.encode(samples, "classify"))
    prefix = len(backbone.encoder.tokens(PREFIX))
    for column, name in enumerate(LABELS.names):
        features = backbone.encode(samples, "classify", [f"{PREFIX} {name}"] * len(samples))
        answers = features.pop("labels")
        logits = backbone.model(**features).logits.log_softmax(-1)
        for row, answer in enumerate(answers):
            places = (answer != -100).nonzero()[prefix:, 0]
            expected = logits[row, places - 1, answer[places]].sum()
            torch.testing.assert_close(found[row, column], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def generates(backbone: Backbone, samples: Sequence[Sample]) -> None:
    """A batch of answers is what `generate` of transformers writes after each prompt alone."""
    answers = [answer.text for _, answer in Local(backbone, "").reason(samples, "reason", GREEDY)]
    for sample, found in zip(samples, answers, strict=True):
        text = backbone.encoder.render(render("reason", sample, LABELS), sample.media)
        media = backbone.encoder.media
        arguments = media.arguments([media.load(sample.media)])
        arguments.get("audio_kwargs", {}).pop("max_length", None)  # padded as the processor does it
        if "pad_to_multiple_of" in arguments.get("audio_kwargs", {}):  # or to the longest sound that the family takes
            arguments["audio_kwargs"]["pad_to_multiple_of"] = backbone.family.audio_seconds * RATE
        special = not text.startswith(backbone.processor.tokenizer.bos_token or " ")
        inputs = media.process(text=[text], return_tensors="pt", add_special_tokens=special, **arguments)
        inputs.pop("labels", None)
        output = backbone.model.generate(**inputs, max_new_tokens=GREEDY.max_new_tokens, do_sample=False)  # type: ignore[operator]
        new = output[0, inputs["input_ids"].shape[1] :]
        assert found == backbone.processor.tokenizer.decode(new, skip_special_tokens=True)


@torch.no_grad()
def answers_jointly(backbone: Backbone, samples: Sequence[Sample]) -> None:
    """Labels and rationales of one pass are those of two, whether or not the family shares its prefill."""
    local = Local(backbone, "")
    joint = list(local.classify_and_reason(samples, "reason", GREEDY))
    alone = local.classify(samples).probabilities
    assert [answer.text for _, _, answer in joint] == [a.text for _, a in local.reason(samples, "reason", GREEDY)]
    found = torch.tensor(np.concatenate([scores.probabilities for _, scores, _ in joint]))
    torch.testing.assert_close(found, torch.tensor(alone), atol=2e-5, rtol=1e-3)


@torch.no_grad()
def mixes_posts(backbone: Backbone, samples: Sequence[Sample]) -> None:
    """A batch gives what its posts give alone."""
    together = score_labels(backbone, backbone.encode(samples, "classify"))
    for row, sample in enumerate(samples):
        alone = score_labels(backbone, backbone.encode([sample], "classify"))
        for one, many in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], many[row], atol=2e-5, rtol=1e-3)


@torch.no_grad()
def reloads(backbone: Backbone, samples: Sequence[Sample], folder: Path) -> None:
    """The saved model and processor load with transformers and compute the same."""
    backbone.merged().save_pretrained(folder)  # type: ignore[operator]
    save_processor(backbone.processor, folder)
    features = backbone.encode(samples, "classify")
    config = AutoConfig.from_pretrained(folder)
    model = model_class(config).from_pretrained(folder, attn_implementation=backbone.settings.attention)
    expected = backbone.merged()(**features).logits
    torch.testing.assert_close(model(**features).logits, expected)
    processor = load_processor(model, Source(str(folder), "main"))
    again = Backbone(model, processor, LABELS, backbone.settings).encode(samples, "classify")
    assert again.keys() == features.keys() and all(torch.equal(again[name], features[name]) for name in features)


@torch.no_grad()
def _tells_videos_apart(model: Backbone, sample: Sample) -> str:
    """Posts with two videos are scored alone as in a batch, and differently. Returns the message of the first."""
    with tempfile.TemporaryDirectory() as folder:
        videos = [clips.write(Path(folder, f"{seed}.mp4"), frames=2 + seed, seed=seed) for seed in (1, 2)]
        shown = [replace(sample, images=(), audio=None, video=video) for video in videos]
        mixes_posts(model, shown)
        scores, _ = score_labels(model, model.encode(shown, "classify"))
        text = model.encoder.render("words", shown[0].media)
    assert not torch.allclose(scores[0], scores[1], atol=1e-6)
    return text


def shows_frames(backbone: Backbone, samples: Sequence[Sample]) -> None:
    """A model tells videos apart by their frames; a model without pictures refuses them."""
    settings = replace(backbone.settings, video="frames", frames=2)
    model = Backbone(backbone.model, backbone.processor, LABELS, settings)
    try:
        assert "0.5 s: " in _tells_videos_apart(model, samples[0])
    except SettingsError as error:
        assert "the model sees no pictures" in str(error) and backbone.processor.image_processor is None


def sees_videos(backbone: Backbone, samples: Sequence[Sample]) -> bool:
    """Whether a model tells videos apart that it is given in the way of its family; other families refuse that."""
    settings = replace(backbone.settings, video="video")
    try:
        _tells_videos_apart(Backbone(backbone.model, backbone.processor, LABELS, settings), samples[0])
    except SettingsError as error:
        if backbone.family.video == "video":
            assert "needs torchvision for videos" in str(error) and not is_torchvision_available()
        else:
            assert str(error).startswith("model.video must be frames: ")
        return False
    assert backbone.family.video == "video"
    return True


def hears(backbone: Backbone, samples: Sequence[Sample]) -> bool:
    """Whether the logits depend on the sound, and are alone what they are in a batch; other families refuse it."""
    with tempfile.TemporaryDirectory() as folder:
        sounds = [clips.write(Path(folder, f"{pitch}.wav"), seconds=0.4, pitch=pitch) for pitch in (300, 2000)]
        heard = [replace(samples[0], audio=sound) for sound in sounds]
        try:
            mixes_posts(backbone, heard)
        except SettingsError as error:
            assert "is no family that hears" in str(error) and not backbone.family.audio
            return False
        features = backbone.encode(heard, "classify")
    spectrogram = features[next(name for name in features if name.endswith("input_features"))].requires_grad_()
    with torch.enable_grad():  # towers with random weights change the logits by little more than rounding
        logits = backbone.model(**features).logits
        (gradient,) = torch.autograd.grad(logits.square().sum(), spectrogram)
    assert gradient.flatten(1).any(1).all()
    return True


def sees_the_past_only(backbone: Backbone, samples: Sequence[Sample]) -> None:
    """No token of an answer changes what is before it; refused where the family's answers had another token type."""
    check_compatibility(backbone, samples, list(TASKS), False)
    if backbone.family.answer_type:
        backbone.encoder.answer_type = 0
        try:
            check_compatibility(backbone, samples, list(TASKS), False)
        except SettingsError as error:
            assert "it attends to later tokens of an answer" in str(error)
        else:
            raise AssertionError("answers of token type 0 are not refused")
        finally:
            backbone.encoder.answer_type = backbone.family.answer_type


def packs(backbone: Backbone, samples: Sequence[Sample]) -> bool:
    """Whether packed rows are exact, measured; if not, training has one row for each answer."""
    expected, backbone.packs = backbone.packs, True
    try:
        check_compatibility(backbone, samples, list(TASKS), True)
        exact = True
    except SettingsError as error:
        assert str(error).startswith("packing: ")
        exact = False
    finally:
        backbone.packs = expected
    assert exact == families.packs(backbone.model.config)  # type: ignore[arg-type]
    rows = [len(encode([sample], backbone, TASKS, True).inputs["input_ids"]) for sample in samples]
    assert rows == [1 if exact else len(TASKS)] * len(samples)
    return exact


CHECKS: dict[str, Callable[[Backbone, Sequence[Sample]], object]] = {
    "scores labels": scores_labels,
    "generates": generates,
    "answers jointly": answers_jointly,
    "mixed posts": mixes_posts,
    "frames": shows_frames,
    "video": sees_videos,
    "audio": hears,
    "sees the past only": sees_the_past_only,
    "packs": packs,
}
"""Checks of one loaded model; `trains` needs one with an adapter, `reloads` a folder."""

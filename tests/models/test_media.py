"""Posts with videos and sounds, on a tiny model that hears: what the model is given, and that it is the same packed,
alone and in batches."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2_5OmniConfig

from distill.errors import SettingsError
from distill.models import tiny
from distill.models.backbone import Backbone, ModelSettings, create, load
from distill.models.scoring import score_labels
from distill.models.tiny import TinySettings
from distill.task.labels import LabelSpace
from distill.task.sample import Media, Sample
from distill.training.soft_targets import different_inputs
from tests.models import clips, family_checks

SIZE = {"hidden": 64, "layers": 2, "vision_hidden": 32}
LABELS = LabelSpace()


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make tiny models of one vocabulary with sounds; `tower` is the size of their audio tower."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.train_tokenizer(["negative neutral positive"], 400, audio=True).save_pretrained(folder)

    def made(tower: int | None = 32, **settings: Any) -> Backbone:
        torch.manual_seed(0)
        size = TinySettings(**SIZE, audio_hidden=tower)
        options = {"image_size": 56, "batch_size": 4} | settings
        return create(ModelSettings(tiny=size, **options), LABELS, folder, train=False)

    return made


@pytest.fixture(scope="module")
def hearing(make: Any) -> Backbone:
    return make()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return clips.posts(tmp_path_factory.mktemp("clips"))


@pytest.mark.parametrize("check", family_checks.CHECKS)
def test_a_tiny_model_that_hears(check: str, hearing: Backbone, posts: list[Sample]) -> None:
    family_checks.CHECKS[check](hearing, posts)


def test_frames_are_pictures_with_their_times_and_all_media_precede_the_text(
    hearing: Backbone, posts: list[Sample]
) -> None:
    picture, sound = "<|vision_start|><|image_pad|><|vision_end|>", "<|audio_bos|><|AUDIO|><|audio_eos|>"
    text = hearing.encoder.render("words", posts[4].media)
    frames = "".join(f"{index / 4:.1f} s: {picture}" for index in range(5))
    assert text == f"<|im_start|>user\n{picture}{picture}{frames}{sound}words<|im_end|>\n<|im_start|>assistant\n"


def test_fewer_frames_are_evenly_spaced(make: Any, posts: list[Sample]) -> None:
    text = make(frames=2).encoder.render("words", Media(video=posts[3].video))
    assert [part for part in ("0.2 s: ", "0.8 s: ") if part in text] == ["0.2 s: ", "0.8 s: "]
    assert text.count("<|image_pad|>") == 2


@torch.no_grad()
def test_positions_are_those_of_the_models_own_forward(hearing: Backbone, posts: list[Sample]) -> None:
    features = hearing.encode(posts, "classify")
    own = hearing.model.model.compute_3d_position_ids(  # type: ignore[union-attr, operator]
        features["input_ids"], features["image_grid_thw"], None, None, features["attention_mask"], None,
        audio_feature_lengths=features["feature_attention_mask"].sum(1),
    )  # fmt: skip
    assert torch.equal(hearing.positions(features), own)


@torch.no_grad()
def test_the_answer_changes_with_the_frames_and_with_the_sound(
    hearing: Backbone, posts: list[Sample], tmp_path: Path
) -> None:
    post = posts[3]
    other = clips.write(tmp_path / "other.mp4", frames=5, pitch=300, seed=9)
    variants = [post, replace(post, video=other), replace(post, audio=other), replace(post, audio=None)]
    found, _ = score_labels(hearing, hearing.encode(variants, "classify"))
    assert all(not torch.allclose(found[0], row, atol=1e-6) for row in found[1:])


def test_what_is_ignored_does_not_reach_the_model(make: Any, posts: list[Sample]) -> None:
    for ignored in ("video", "audio"):
        model = make(**{ignored: "ignore"})
        with_it, without = (
            model.encode([post], "classify") for post in (posts[3], replace(posts[3], **{ignored: None}))
        )
        assert all(torch.equal(value, without[name]) for name, value in with_it.items())


def test_a_short_sound_is_filled_up(hearing: Backbone, tmp_path: Path) -> None:
    short = Sample("1", "words", audio=clips.write(tmp_path / "short.wav", seconds=0.002, pitch=440))
    assert int((hearing.encode([short], "classify")["input_ids"] == hearing.model.config.audio_token_id).sum()) == 2


def test_a_model_that_cannot_hear_says_what_to_set(make: Any, posts: list[Sample]) -> None:
    with pytest.raises(SettingsError) as refused:
        make(tower=None).encode([posts[2]], "classify")
    assert str(refused.value) == (
        "model.audio must be ignore: Qwen2.5-VL is no family that hears, and posts have sound, which is then left out"
    )


def test_a_saved_model_computes_the_same(make: Any, posts: list[Sample], tmp_path: Path) -> None:
    backbone = make()
    backbone.save(tmp_path)
    features = backbone.encode(posts, "classify")
    again = load(backbone.settings, LABELS, tmp_path)
    for name, value in again.encode(posts, "classify").items():  # torchvision rounds otherwise
        torch.testing.assert_close(value, features[name], rtol=0, atol=1e-6)
    with torch.no_grad():
        logits = backbone.model(**features).logits
        standard = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert torch.equal(again.model(**features).logits, logits) and torch.equal(standard(**features).logits, logits)


def test_a_published_folder_is_loaded_without_its_talker(make: Any, tmp_path: Path) -> None:
    """As published: the config of the whole model, and earlier names of the thinker's weights."""
    backbone = make()
    backbone.save(tmp_path)
    weights = {f"thinker.{name}": value for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights | {"talker.thinker_to_talker_proj.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    thinker = json.loads((tmp_path / "config.json").read_text())
    Qwen2_5OmniConfig(thinker_config=thinker).save_pretrained(tmp_path)
    loaded = create(ModelSettings(str(tmp_path), image_size=56), LABELS, tmp_path, train=False)
    expected = backbone.model.state_dict()
    assert loaded.model.state_dict().keys() == expected.keys() and loaded.encoder.media.audio
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())


def test_models_with_other_spectrograms_do_not_have_the_same_inputs(make: Any, hearing: Backbone) -> None:
    other = make()
    assert different_inputs(hearing, other) is None
    other.processor.feature_extractor.hop_length = 80
    assert different_inputs(hearing, other) == "process videos or sounds differently"
    assert different_inputs(make(audio="ignore"), other) == (
        "are given videos and sounds differently (model.video, model.audio, model.frames)"
    )


@pytest.mark.parametrize("tower", [None, 32])
def test_a_tiny_model_has_no_processor_of_videos(make: Any, tower: int | None) -> None:
    with pytest.raises(SettingsError, match="must be frames: a tiny model takes videos as pictures only"):
        make(tower, video="video")

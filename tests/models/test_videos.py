"""Videos as families were trained on them; these need the video processors of transformers, and so torchvision."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.utils import is_torchvision_available

from distill.errors import SettingsError
from distill.models import families
from distill.models.backbone import Backbone
from distill.models.scoring import score_labels
from distill.task.labels import LabelSpace
from distill.task.sample import Sample
from tests.models import clips, family_checks
from tests.models.family_table import FAMILIES

NATIVE = [kind for kind, family in families.FAMILIES.items() if family.video == "video"]
with_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def posts(root: Path) -> list[Sample]:
    """Posts with a picture, with a video, with both and with none."""
    return [replace(post, audio=None) for post in clips.posts(root / "clips") if post.video or not post.audio]


@with_torchvision
@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("check", [name for name in family_checks.CHECKS if name not in ("frames", "video", "audio")])
def test_a_family_that_takes_videos(kind: str, check: str, root: Path, posts: list[Sample]) -> None:
    backbone = family_checks.load(kind, root / kind)
    assert backbone.encoder.media.video == "video"
    family_checks.CHECKS[check](backbone, posts)


@with_torchvision
@pytest.mark.parametrize("kind", NATIVE)
def test_a_video_of_one_frame_is_taken(kind: str, root: Path, posts: list[Sample]) -> None:
    backbone = family_checks.load(kind, root / kind)
    still = replace(posts[1], video=clips.write(root / "still.mp4", frames=1))
    assert torch.isfinite(score_labels(backbone, backbone.encode([still, posts[1]], "classify"))[0]).all()


@with_torchvision
def test_qwen3_vl_is_told_the_times_of_the_sampled_frames(root: Path, posts: list[Sample]) -> None:
    backbone = family_checks.load("qwen3_vl", root / "qwen3_vl")
    text = backbone.processor.tokenizer.decode(backbone.encode(posts[1:2], "classify")["input_ids"][0])
    assert text.count(" seconds>") == 2 and "<0.1 seconds>" in text and "<0.5 seconds>" in text


@with_torchvision
@pytest.mark.parametrize("tiles", [1, 5])
def test_smolvlm_is_given_what_its_processor_makes_of_each_message(tiles: int, root: Path, posts: list[Sample]) -> None:
    """In one batch: a picture, three frames, five frames, two pictures and five frames, and text alone."""
    backbone = family_checks.load("smolvlm", root / "smolvlm")
    encoder, processor = backbone.encoder, backbone.processor
    if tiles > 1:
        processor.image_processor.do_image_splitting, processor.image_processor.size = True, {"longest_edge": 112}
        family_checks.mixes_posts(backbone, posts)
    prompts = [("words " * (index + 1), post.media) for index, post in enumerate(posts)]
    batch = encoder.encode(prompts)
    for row, ((text, media), count) in enumerate(zip(prompts, (tiles, 3, 5, 2 * tiles + 5, 0), strict=True)):
        arguments = encoder.media.arguments([encoder.media.load(media)])
        alone = processor(text=[encoder.render(text, media)], return_tensors="pt", **arguments)
        mask = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][mask], alone["input_ids"][0])
        images = processor.image_processor(arguments["images"], return_tensors="pt") if media.images else {}
        frames = alone if media.video else {}
        for name in ("pixel_values", "pixel_attention_mask"):
            parts = [part[name][0] for part in (images, frames) if part]
            assert not parts or torch.equal(batch[name][row, :count], torch.cat(parts))
            assert not batch[name][row, count:].any()
    words = processor.tokenizer.decode(batch["input_ids"][1])
    assert "series of three frames from a 0:00:00 [H:MM:SS] video" in words and "Frame from 00:00:" in words


@with_torchvision
def test_smolvlm_refuses_frames_that_cannot_stand_beside_its_images(root: Path, posts: list[Sample]) -> None:
    backbone = family_checks.load("smolvlm", root / "smolvlm")
    backbone.processor.video_processor.max_image_size = {"longest_edge": 28}
    backbone.encode(posts[:1], "classify")
    with pytest.raises(SettingsError) as refused:
        backbone.encode(posts, "classify")
    assert str(refused.value) == (
        "model.video must be frames: the processor of this SmolVLM makes images and frames of videos in different sizes"
    )


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_without_torchvision_videos_are_refused_with_what_to_set(root: Path, posts: list[Sample]) -> None:
    backbone = family_checks.load("qwen2_5_vl", root / "qwen2_5_vl")
    with pytest.raises(SettingsError) as refused:
        backbone.encode(posts, "classify")
    assert str(refused.value) == (
        "model.video: Qwen2.5-VL needs torchvision for videos, in the version that belongs to torch "
        f"{torch.__version__}: pip install torchvision; or set it to frames"
    )


def test_a_family_that_takes_pictures_only_refuses_the_way_of_videos(root: Path) -> None:
    backbone = family_checks.load("llava", root / "llava")
    with pytest.raises(SettingsError) as refused:
        Backbone(backbone.model, backbone.processor, LabelSpace(), replace(backbone.settings, video="video"))
    assert str(refused.value) == "model.video must be frames: LLaVA, Pixtral takes videos as pictures only"


def test_each_family_with_videos_or_sound_has_their_markers() -> None:
    assert {kind for kind, family in FAMILIES.items() if family.video} == set(NATIVE)
    hearing = {kind for kind, family in families.FAMILIES.items() if family.audio}
    assert {kind for kind, family in FAMILIES.items() if family.audio} == hearing

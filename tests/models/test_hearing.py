"""Sounds in the families that hear; the checks of `family_checks.py` have short sounds only."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.utils import is_timm_available

from distill.data.clips import ClipReader
from distill.errors import SettingsError
from distill.models import families
from distill.models.backbone import Backbone, ModelSettings
from distill.models.media import MediaReader
from distill.models.pretrained import on_meta
from distill.models.scoring import score_labels
from distill.task.sample import Media, Sample
from tests.models import clips, family_checks
from tests.models.family_table import FAMILIES

HEARING = [kind for kind, family in families.FAMILIES.items() if family.audio]
Load = Callable[[str], Backbone]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    root = tmp_path_factory.mktemp("families")
    models: dict[str, Backbone] = {}

    def loaded(kind: str) -> Backbone:
        try:
            found = models[kind] = models.get(kind) or family_checks.load(kind, root / kind)
        except SettingsError as error:
            pytest.skip(str(error))
        settings = replace(found.settings, images=False, video="ignore")
        return Backbone(found.model, found.processor, family_checks.LABELS, settings)

    return loaded


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Posts with sounds of different lengths, which end anywhere in a token of sound, and one without."""
    folder = tmp_path_factory.mktemp("sounds")
    lengths = (0.02, 0.1, 0.31, 0.5, 0.95, 1.5)
    paths = [clips.write(folder / f"{s}.wav", seconds=s, pitch=300 + round(900 * s)) for s in lengths]
    return [Sample(str(index), "words", audio=path) for index, path in enumerate([*paths, None])]


@pytest.mark.parametrize("kind", HEARING)
def test_a_sound_is_heard_alone_as_beside_longer_ones(kind: str, load: Load, sounds: list[Sample]) -> None:
    family_checks.mixes_posts(load(kind), sounds)


@torch.no_grad()
@pytest.mark.parametrize("kind", HEARING)
def test_the_answer_changes_with_the_sound(kind: str, load: Load, sounds: list[Sample]) -> None:
    backbone = load(kind)
    found, _ = score_labels(backbone, backbone.encode(sounds[-4:], "classify"))
    assert all(not torch.allclose(found[0], other, atol=1e-6) for other in found[1:])


@pytest.mark.parametrize("given", [{}, {"images": False}, {"video": "ignore"}])
def test_phi_4_refuses_sounds_without_pictures_where_posts_could_have_pictures(given: dict[str, Any]) -> None:
    settings = ModelSettings("phi", **given)
    processor = SimpleNamespace(image_processor=object())
    media = MediaReader(processor, settings, families.FAMILIES["phi4_multimodal"], ClipReader())
    sound, video, picture = Path("a.wav"), Path("a.mp4"), (Path("a.png"),)
    media.check(Media(picture if media.images else (), video if media.video != "ignore" else None, sound))
    media.check(Media(picture, video))
    with pytest.raises(SettingsError) as refused:
        media.check(Media((), None, sound))
    assert str(refused.value) == (
        "model.audio must be ignore: Phi-4-multimodal hears sounds beside pictures with other weights, and posts have "
        "sound without a picture or video; or set model.images to false and model.video to ignore"
    )


def test_gemma_3n_hears_the_first_30_seconds(load: Load, tmp_path: Path) -> None:
    backbone = load("gemma3n")
    longer, long = (
        backbone.encode(
            [Sample("1", "words", audio=clips.write(tmp_path / f"{s}.wav", seconds=s, pitch=400))], "classify"
        )
        for s in (32, 30)
    )
    assert longer.keys() == long.keys() and all(torch.equal(longer[name], long[name]) for name in long)
    assert int((long["input_ids"] == backbone.model.config.audio_token_id).sum()) == 188


@pytest.mark.skipif(is_timm_available(), reason="timm is installed")
def test_without_timm_gemma_3n_is_refused_by_its_name(tmp_path: Path) -> None:
    FAMILIES["gemma3n"].config(400, lambda token: 7).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=r"cannot be loaded: .* the timm library .* `pip install timm`"):
        on_meta(ModelSettings(str(tmp_path)))

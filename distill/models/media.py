"""The media of posts as inputs of a model: what stands for them in a message, and the processor's arguments."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.utils import is_torchvision_available

from distill.data.clips import RATE, ClipReader, Frames
from distill.data.images import resized
from distill.errors import SettingsError
from distill.models.families import Family
from distill.models.packing import Features
from distill.models.pretrained import ModelSettings
from distill.task.sample import Media

_CLOCK = 1000
"""Frames a second of the metadata of videos, in which the times of sampled frames are numbers of frames."""

_SHORTEST = RATE // 10
"""Samples to which shorter sounds are filled up: from a few samples, no audio token is made."""

_SILENCE = RATE // 5
"""Samples of silence after the longest sound, so that it ends as in a batch with a longer one."""


class Loaded(NamedTuple):
    """The media of one message.

    Attributes:
        parts: the content of the message before its text.
        pictures: image files, and frames of videos [H, W, 3].
        videos: those that are given as such.
        sounds: [S] each.
    """

    parts: list[dict[str, str]]
    pictures: list[Path | np.ndarray]
    videos: list[Frames]
    sounds: list[np.ndarray]


class MediaReader:
    """Loads what a model is given of the media of posts.

    Attributes:
        clips: decodes videos and sounds.
        images: whether the model is given the images of posts, and can read them.
        video: how it is given their videos.
        audio: whether it is given their sound, and can hear it.
    """

    def __init__(self, processor: Any, settings: ModelSettings, family: Family, clips: ClipReader) -> None:
        self._processor, self._settings, self._family, self.clips = processor, settings, family, clips
        self._sees = processor.image_processor is not None
        self._extractor: Any = getattr(processor, "audio_processor", getattr(processor, "feature_extractor", None))
        if settings.video == "video" and not (settings.path and family.video == "video"):
            name = family.name if settings.path else "a tiny model"
            raise SettingsError(f"model.video must be frames: {name} takes videos as pictures only")
        self.images = settings.images and self._sees
        way = family.video if settings.path else "frames"
        self.video: Literal["frames", "video", "ignore"] = way if settings.video == "auto" else settings.video
        self.audio = settings.audio != "ignore" and family.audio

    @property
    def ways(self) -> tuple[str, bool, int | None]:
        """How the model is given videos, whether it hears, and the number of frames."""
        return self.video, self.audio, self._settings.frames

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of `data.video` that decide which frames of a video are shown, and in which size."""
        settings = asdict(self.clips.settings)
        return {name: settings[name] for name in ("frames", "fps", "max_frames", "max_side")}

    def takes(self, name: str) -> bool:
        """Whether the model is given a modality of posts, one of MODALITIES."""
        return {"images": self.images, "video": self.video != "ignore", "audio": self.audio}.get(name, True)

    def shows(self, media: Media) -> bool:
        """Whether the model is given a picture of a post with these media."""
        return bool(media.images and self.images) or (media.video is not None and self.video == "frames")

    def check(self, media: Media) -> None:
        """Raise SettingsError if a post with these media would reach a model that cannot take them."""
        if media.images and not self._sees and self._settings.images:
            raise SettingsError(
                "model.images must be false: the model reads text only, and posts have images, which are then left out"
            )
        if media.video and not self._sees and self.video != "ignore":
            raise SettingsError(
                "model.video must be ignore: the model sees no pictures, and posts have videos, whose frames are then "
                "left out"
            )
        if media.video and self.video == "video" and not is_torchvision_available():
            raise SettingsError(
                f"model.video: {self._family.name} needs torchvision for videos, in the version that belongs to torch "
                f"{torch.__version__}: pip install torchvision; or set it to frames"
            )
        if media.video and self.video == "video" and self._family.frames_as_images and self._sizes_differ():
            raise SettingsError(
                f"model.video must be frames: the processor of this {self._family.name} makes images and frames of "
                "videos in different sizes"
            )
        if media.audio and not self.audio and self._settings.audio != "ignore":
            raise SettingsError(
                f"model.audio must be ignore: {self._family.name} is no family that hears, and posts have sound, "
                "which is then left out"
            )

        shown = (media.images and self.images) or (media.video and self.video != "ignore")
        sees = self.images or self.video != "ignore"
        if self._family.audio_by_picture and media.audio and self.audio and sees and not shown:
            raise SettingsError(
                f"model.audio must be ignore: {self._family.name} hears sounds beside pictures with other weights, and "
                "posts have sound without a picture or video; or set model.images to false and model.video to ignore"
            )

    def load(self, media: Media) -> Loaded:
        """Decode the video and the sound of a post; its images are decoded by `arguments`.

        Raises:
            ClipError: a video or a sound cannot be decoded.
            SettingsError: as `check`.
        """
        self.check(media)
        loaded = Loaded([], [], [], [])
        if self.images:
            loaded.parts.extend({"type": "image"} for _ in media.images)
            loaded.pictures.extend(media.images)
        if media.video is not None and self.video != "ignore":
            frames = self.clips.frames(media.video, self._settings.frames)
            if self.video == "video":
                loaded.parts.append({"type": "video"})
                loaded.videos.append(self._filled(frames))
            else:
                loaded.pictures.extend(frames.images)
                for time in frames.times:
                    loaded.parts.extend(({"type": "text", "text": f"{time:.1f} s: "}, {"type": "image"}))
        if media.audio is not None and self.audio and (sound := self.clips.sound(media.audio)) is not None:
            loaded.parts.append({"type": "audio"})
            loaded.sounds.append(np.pad(sound, (0, max(0, _SHORTEST - len(sound)))))
        return loaded

    def groups(self, batch: Sequence[Loaded]) -> list[slice]:
        """The parts of B messages that are given to the processor together."""
        if self._family.frames_as_images and any(loaded.videos for loaded in batch):
            return [slice(row, row + 1) for row in range(len(batch))]
        return [slice(None)]

    def process(self, **arguments: Any) -> Features:
        """The tensors of the processor; where it makes frames images, those of the images of the message as well."""
        features: Features = dict(self._processor(**arguments))
        if self._family.frames_as_images and arguments["images"] and "videos" in arguments:
            images = self._processor.image_processor(arguments["images"], return_tensors="pt")
            for name in ("pixel_values", "pixel_attention_mask"):
                features[name] = torch.cat([images[name], features[name]], 1)  # the processor keeps the frames only
        return features

    def arguments(self, batch: Sequence[Loaded]) -> dict[str, Any]:
        """The arguments of the processor for the media of B messages.

        Raises:
            ImageError: an image cannot be read.
        """
        pictures = [[self._picture(picture) for picture in loaded.pictures] for loaded in batch]
        # a flat list would not say which post a picture belongs to
        arguments: dict[str, Any] = {"images": pictures if any(pictures) else None}
        if videos := [video for loaded in batch for video in loaded.videos]:
            arguments["videos"] = [np.stack([np.asarray(self._picture(image)) for image in v.images]) for v in videos]
            arguments["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": [_metadata(v) for v in videos]}
        if sounds := [sound for loaded in batch for sound in loaded.sounds]:
            arguments["audio"] = sounds
            arguments["audio_kwargs"] = {"sampling_rate": RATE} | self._audio_length(max(map(len, sounds)))
        return arguments

    def _sizes_differ(self) -> bool:
        sizes = [getattr(self._processor, f"{name}_processor").max_image_size for name in ("image", "video")]
        return bool(sizes[0]["longest_edge"] != sizes[1]["longest_edge"])

    def _filled(self, frames: Frames) -> Frames:
        """Frames as many as the family needs, at most those that are sampled of a long video; the last is repeated."""
        needed = getattr(self._processor.video_processor, "temporal_patch_size", None) or 1  # Qwen3-VL takes no fewer
        if self._family.same_frames:
            most = self.clips.settings.most_frames
            needed = min(most, self._settings.frames or most)
        missing = needed - len(frames.images)
        return frames._replace(
            images=frames.images + frames.images[-1:] * missing, times=frames.times + frames.times[-1:] * missing
        )

    def _audio_length(self, longest: int) -> dict[str, Any]:
        """The length to which sounds are padded, in place of that of the feature extractor, 30 or 300 seconds.

        One window of silence after the longest sound keeps its spectrogram what it is with the full padding.
        """
        if self._family.audio_window:
            return {}
        if most := (self._family.audio_seconds or 0) * RATE:  # padded to the longest, rounded up to this multiple
            return {"pad_to_multiple_of": min(most, longest + _SILENCE)}
        extractor = self._extractor
        hop, window, limit = (getattr(extractor, name, None) for name in ("hop_length", "n_fft", "n_samples"))
        if not (hop and window and limit):
            return {}
        return {"max_length": min(limit, -(-(longest + window) // hop) * hop)}

    def _picture(self, picture: Path | np.ndarray) -> Image.Image:
        size = self._settings.image_size
        if isinstance(picture, Path):
            return resized(picture, size)
        image = Image.fromarray(picture)
        return image.resize((size, size)) if size and image.size != (size, size) else image

    def fingerprint(self) -> str:
        """The sampling and the preprocessing of videos and sounds."""
        parts = [self.clips.settings.sampling, *self.ways, self._settings.image_size, *self.preprocessing()]
        return json.dumps(parts, sort_keys=True, default=str)

    def preprocessing(self) -> list[dict[str, Any]]:
        """The settings of the processors of pictures, videos and sounds that the model is given."""
        parts = [self._processor.image_processor.to_dict()] if self._sees else []
        if self.video == "video":
            parts.append(self._processor.video_processor.to_dict())
        return [*parts, self._extractor.to_dict()] if self.audio else parts


def _metadata(frames: Frames) -> dict[str, Any]:
    """The times of frames as a video processor takes them."""
    return {
        "total_num_frames": max(1, round(frames.seconds * _CLOCK)),
        "fps": _CLOCK,
        "duration": frames.seconds,
        "frames_indices": [round(time * _CLOCK) for time in frames.times],
    }

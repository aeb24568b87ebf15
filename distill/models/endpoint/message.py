"""A post as the content of user messages: its images, video and sound as parts, then the text."""

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from PIL.Image import Image

from distill.data.clips import ClipError, ClipReader
from distill.data.images import ImageError, jpeg_bytes, resized
from distill.models.endpoint.media import jpeg, mp4, wav
from distill.models.endpoint.settings import EndpointSettings
from distill.task.sample import Sample


class MediaError(ValueError):
    """An image, video or sound of a post that cannot be read. The message names the file."""


class UserMessage:
    """A sample as the content of user messages. Its media are encoded once, at the first use.

    A video is sent as its sampled frames: in one video part, or as images with their times. The sound is a part of its
    own, because most servers leave out the sound of a video.

    Args:
        image_size: send images as PNG files, squares with this side, as a local model is given them; 0: send none.
            None: as JPEG files of at most `max_image_side`.

    Attributes:
        has_video: whether the post has a video that the settings do not leave out.
    """

    def __init__(
        self,
        sample: Sample,
        settings: EndpointSettings,
        max_pixels: int,
        clips: ClipReader,
        image_size: int | None = None,
    ) -> None:
        self.sample, self._image_size = sample, image_size
        self.has_video = sample.video is not None and settings.video != "ignore"
        self._settings, self._max_pixels, self._clips = settings, max_pixels, clips

    @property
    def has_sound(self) -> bool:
        """Whether a sound is sent. Raises MediaError."""
        with _naming_media():
            return bool(self._sound)

    def encode(self, as_frames: bool) -> None:
        """Encode the media if this has not been done. Raises MediaError."""
        self._parts(as_frames)

    def content(self, text: str, as_frames: bool = False) -> list[bytes]:
        """JSON fragments of the message content.

        Args:
            as_frames: send the frames of a video as images, each with its time, instead of a video.

        Raises:
            MediaError: an image, video or sound cannot be read.
        """
        if parts := self._parts(as_frames):
            return [b"[", *parts, _text(text), b"]"]
        return [json.dumps(text).encode()]

    def _parts(self, as_frames: bool) -> list[bytes]:
        with _naming_media():
            video = (self._frames if as_frames else self._video) if self.has_video else ()
            return [*self._images, *video, *self._sound]

    @cached_property
    def _images(self) -> list[bytes]:
        side, size = self._settings.max_image_side, self._image_size
        if size is not None:
            return [_image(_png(resized(path, size, self._max_pixels)), "png") for path in self.sample.images if size]
        return [_image(jpeg_bytes(path, side, self._max_pixels)) for path in self.sample.images]

    @cached_property
    def _video(self) -> list[bytes]:
        assert self.sample.video is not None
        frames = self._clips.frames(self.sample.video, self._settings.frames)
        data = base64.b64encode(mp4(frames, self._settings.max_image_side))
        return [b'{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,%b"}}, ' % data]

    @cached_property
    def _frames(self) -> list[bytes]:
        assert self.sample.video is not None
        frames = self._clips.frames(self.sample.video, self._settings.frames)
        parts = []
        for image, time in zip(frames.images, frames.times, strict=True):
            parts += [_text(f"The video at {time:.1f} s:"), b", ", _image(jpeg(image, self._settings.max_image_side))]
        return parts

    @cached_property
    def _sound(self) -> list[bytes]:
        path = self.sample.audio
        sound = None if path is None or self._settings.audio == "ignore" else self._clips.sound(path)
        if sound is None or not len(sound):
            return []
        data = base64.b64encode(wav(sound))
        return [b'{"type": "input_audio", "input_audio": {"data": "%b", "format": "wav"}}, ' % data]


def _image(data: bytes, kind: str = "jpeg") -> bytes:
    url = b"data:image/%b;base64,%b" % (kind.encode(), base64.b64encode(data))  # base64 needs no JSON escapes
    return b'{"type": "image_url", "image_url": {"url": "%b"}}, ' % url


def _png(image: Image) -> bytes:
    encoded = io.BytesIO()
    image.info.clear()  # otherwise it is written to the new file
    image.save(encoded, "PNG")
    return encoded.getvalue()


def _text(text: str) -> bytes:
    return json.dumps({"type": "text", "text": text}).encode()


@contextmanager
def _naming_media() -> Iterator[None]:
    try:
        yield
    except (ImageError, ClipError, OSError) as error:
        raise MediaError(str(error)) from error

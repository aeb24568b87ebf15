"""Images, frames and sound in the formats that servers take: JPEG, MP4 and WAV, each without metadata."""

import io
import wave
from fractions import Fraction

import numpy as np
from PIL import Image

from distill.data.clips import RATE, Frames

_QUALITY = 95  # of JPEG, as for images
_MAX_RATE = 1000  # frames a second of a video whose length is unknown or wrong


def jpeg(image: np.ndarray, max_side: int) -> bytes:
    """A frame [H, W, 3] as JPEG with a longer side of at most `max_side` pixels."""
    content = io.BytesIO()
    _fitted(image, max_side).save(content, "JPEG", quality=_QUALITY)
    return content.getvalue()


def mp4(frames: Frames, max_side: int) -> bytes:
    """Sampled frames as an H.264 video without sound, as long as the original, on which they are spread evenly.

    Every frame is a key frame, so that a server that samples frames itself finds exactly these.
    """
    import av

    first = _fitted(frames.images[0], max_side)
    width, height = (max(2, side - side % 2) for side in first.size)  # the format has half as many colour samples
    seconds = frames.seconds if frames.seconds > 0 else len(frames.images)
    rate = min(Fraction(len(frames.images) / seconds), Fraction(_MAX_RATE)).limit_denominator(_MAX_RATE)
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=max(rate, Fraction(1, _MAX_RATE)), options={"crf": "18", "preset": "veryfast"}
        )
        stream.width, stream.height = width, height
        stream.pix_fmt, stream.gop_size = "yuv420p", 1
        for image in frames.images:
            shown = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode())
    return content.getvalue()


def wav(sound: np.ndarray) -> bytes:
    """A sound [S] in [-1, 1] at RATE as WAV with 16 bits, mono."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(sound, -1, 1) * 32767).round().astype("<i2").tobytes())
    return content.getvalue()


def _fitted(image: np.ndarray, max_side: int) -> Image.Image:
    fitted = Image.fromarray(image)
    fitted.thumbnail((max_side, max_side))
    return fitted

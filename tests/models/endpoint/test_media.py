"""Frames and sound as JPEG, MP4 and WAV."""

import io
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from distill.data.clips import ClipReader, Frames
from distill.models.endpoint.media import jpeg, mp4, wav
from tests.clip_files import tone


def frames(count: int, width: int = 64, height: int = 48, seconds: float = 2.0) -> Frames:
    """Frames whose brightness rises."""
    images = tuple(np.full((height, width, 3), 20 + 200 * n // count, np.uint8) for n in range(count))
    return Frames(images, tuple((2 * n + 1) / 2 / count * seconds for n in range(count)), seconds)


@pytest.mark.parametrize(("count", "seconds"), [(8, 2.0), (1, 0.0), (3, 3600.0), (64, 0.001), (7, 9.3)])
def test_a_video_has_exactly_the_frames_and_the_length_of_the_original(count: int, seconds: float) -> None:
    given = frames(count, seconds=seconds)
    with av.open(io.BytesIO(mp4(given, 1024))) as container:
        stream = container.streams.video[0]
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert not container.streams.audio
        if 0.1 < seconds < 100:
            assert float(stream.duration * stream.time_base) == pytest.approx(seconds, rel=0.01)
    assert len(found) == count
    for image, expected in zip(found, given.images, strict=True):
        assert np.abs(image.astype(int) - expected).max() <= 6


@pytest.mark.parametrize(
    ("shape", "side", "size"),
    [((64, 48), 32, (32, 24)), ((65, 49), 1024, (64, 48)), ((1, 1), 8, (2, 2)), ((900, 3), 90, (90, 2))],
)
def test_a_video_is_scaled_down_to_even_sides(shape: tuple[int, int], side: int, size: tuple[int, int]) -> None:
    with av.open(io.BytesIO(mp4(frames(2, *shape), side))) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == size


def test_frames_of_another_size_are_scaled_to_the_first() -> None:
    mixed = frames(2)._replace(images=(frames(1).images[0], frames(1, 20, 30).images[0]))
    with av.open(io.BytesIO(mp4(mixed, 1024))) as container:
        assert {(frame.width, frame.height) for frame in container.decode(video=0)} == {(64, 48)}


def test_a_frame_is_a_jpeg_within_the_side() -> None:
    with Image.open(io.BytesIO(jpeg(frames(1).images[0], 32))) as image:
        assert (image.format, image.size, image.info.get("exif")) == ("JPEG", (32, 24), None)
    with Image.open(io.BytesIO(jpeg(frames(1).images[0], 1024))) as image:
        assert image.size == (64, 48)


def test_a_sound_is_a_wav_that_holds_the_same_samples() -> None:
    sound = np.concatenate([tone(440), np.float32([2.0, -2.0])])
    content = wav(sound)
    with wave.open(io.BytesIO(content)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
        found = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    assert np.abs(found - np.clip(sound, -1, 1)).max() < 1e-4


def test_the_reader_of_clips_reads_what_is_sent(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(mp4(frames(8), 1024))
    (tmp_path / "a.wav").write_bytes(wav(tone(440)))
    assert len(ClipReader().frames(tmp_path / "a.mp4").images) == 8
    found = ClipReader().sound(tmp_path / "a.wav")
    assert found is not None and np.abs(found - tone(440)).max() < 1e-4

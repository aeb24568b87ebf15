"""Videos and sounds: which frames are sampled, what the sound is, what the cache keeps."""

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest

from distill.data.clips import RATE, ClipError, ClipReader, Frames, VideoSettings
from distill.errors import SettingsError
from tests.data.clip_files import add_sound, add_video, damaged, grey, save_clip, save_wav, write_tone


def numbers(frames: Frames) -> list[int]:
    """Which frames they are, by their grey."""
    return [round((float(image.mean()) - grey(0)) / (grey(1) - grey(0))) for image in frames.images]


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.mov", "mpeg4"), ("a.avi", "mjpeg")]
)
def test_frames_are_those_shown_in_the_middle_of_equal_parts(tmp_path: Path, name: str, codec: str) -> None:
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = save_clip(tmp_path / name, 40, fps=20, codec=codec, pixels=pixels)
    found = ClipReader(VideoSettings(frames=4)).frames(path)
    assert found.seconds == pytest.approx(2.0, abs=0.06)
    assert numbers(found) == pytest.approx([5, 15, 25, 35], abs=1)  # the codecs change the grey
    assert found.times == pytest.approx([0.25, 0.75, 1.25, 1.75], abs=0.051)
    assert {image.shape for image in found.images} == {(48, 64, 3)}


def test_a_limit_samples_as_a_lower_count_does(tmp_path: Path) -> None:
    reader = ClipReader(VideoSettings(frames=4))
    path = save_clip(tmp_path / "a.mp4", 40, fps=20)
    whole, two = reader.frames(path), reader.frames(path, 2)
    assert numbers(two) == pytest.approx([10, 30], abs=1) and two.seconds == whole.seconds
    assert reader.frames(path, 2) is two and reader.frames(path) is whole
    assert reader.frames(path, 4) is reader.frames(path, 99) is whole
    by_rate = ClipReader(VideoSettings(fps=2, max_frames=3))
    assert [len(by_rate.frames(path, limit).images) for limit in (None, 2, 9)] == [3, 2, 3]


def test_frames_by_rate_have_a_maximum(tmp_path: Path) -> None:
    path = save_clip(tmp_path / "a.mp4", 40, fps=20)
    assert len(ClipReader(VideoSettings(fps=2)).frames(path).images) == 4
    assert len(ClipReader(VideoSettings(fps=0.1)).frames(path).images) == 1
    assert len(ClipReader(VideoSettings(fps=20, max_frames=5)).frames(path).images) == 5


def test_a_short_video_has_fewer_frames(tmp_path: Path) -> None:
    assert numbers(ClipReader().frames(save_clip(tmp_path / "a.mp4", 3))) == [0, 1, 2]
    assert numbers(ClipReader().frames(save_clip(tmp_path / "b.mp4", 1))) == [0]


def test_a_variable_rate_is_sampled_by_time(tmp_path: Path) -> None:
    times = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 50, 60, 75]
    path = save_clip(tmp_path / "a.mkv", times=times, fps=20, tracks=0)
    found = ClipReader(VideoSettings(frames=4)).frames(path)  # the middles are at 9.5, 28.5, 47.5 and 66.5 twentieths
    assert numbers(found) == [9, 10, 12], "frame 10 is shown for two seconds"
    assert found.times == pytest.approx([0.45, 0.5, 3.0], abs=0.01)


def test_long_videos_are_decoded_only_where_frames_are_wanted(tmp_path: Path) -> None:
    path = save_clip(tmp_path / "a.mp4", 59, fps=10, gop=5)
    sparse, dense = ClipReader(VideoSettings(frames=2)), ClipReader(VideoSettings(frames=59))
    all_frames = dense.frames(path)
    assert numbers(all_frames) == list(range(59))
    for image, at in zip(*sparse.frames(path)[:2], strict=True):
        assert np.array_equal(image, all_frames.images[all_frames.times.index(at)])


def test_frames_are_scaled_down_and_upright(tmp_path: Path) -> None:
    path = save_clip(tmp_path / "a.mp4", 2, size=(128, 64))
    content = path.read_bytes()
    assert ClipReader(VideoSettings(max_side=32)).frames(path).images[0].shape == (16, 32, 3)
    assert ClipReader(VideoSettings(max_side=None)).frames(path).images[0].shape == (64, 128, 3)
    upright = b"".join(number.to_bytes(4, "big") for number in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    turned = b"".join(
        number.to_bytes(4, "big", signed=True) for number in (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    )
    at = content.index(upright, content.index(b"tkhd"))
    path.write_bytes(content[:at] + turned + content[at + len(turned) :])
    assert ClipReader(VideoSettings(max_side=32)).frames(path).images[0].shape == (32, 16, 3)


@pytest.mark.parametrize("pixels", ["yuv444p", "yuv422p10le", "gray"])
def test_other_pixel_formats_become_rgb(tmp_path: Path, pixels: str) -> None:
    found = ClipReader().frames(save_clip(tmp_path / "a.mp4", 20, size=(62, 46), pixels=pixels))
    assert found.images[0].shape == (46, 62, 3) and numbers(found)[-1] in (17, 18)


def test_the_sound_is_16_khz_mono(tmp_path: Path) -> None:
    sound = ClipReader().sound(save_clip(tmp_path / "a.mp4", 25))
    assert sound is not None and sound.dtype == np.float32
    assert len(sound) == pytest.approx(RATE, abs=800)
    spectrum = np.abs(np.fft.rfft(sound))
    assert np.argmax(spectrum) * RATE / len(sound) == pytest.approx(440, abs=3)
    assert np.abs(sound[4000:12000]).max() == pytest.approx(0.5, abs=0.05)


def test_sounds_without_a_video(tmp_path: Path) -> None:
    reader = ClipReader()
    wave = np.linspace(-1.5, 1.5, RATE, dtype=np.float32)
    at_rate = reader.sound(save_wav(tmp_path / "a.wav", wave))
    assert at_rate is not None and np.array_equal(at_rate, wave.clip(-1, 1))
    for name in ("a.mp3", "a.flac", "a.ogg", "a.mka"):
        path = tmp_path / name
        codec = {"a.mp3": "libmp3lame", "a.flac": "flac", "a.ogg": "libopus", "a.mka": "aac"}[name]
        save_sound(path, codec)
        sound = reader.sound(path)
        assert sound is not None and len(sound) == pytest.approx(RATE, abs=2000), name
        reader.check(path, video=False)
        with pytest.raises(ClipError, match=rf"^clip {name} has no video$"):
            reader.frames(path)


def save_sound(path: Path, codec: str) -> None:
    with av.open(str(path), "w") as container:
        rate = 48_000 if codec == "libopus" else 44_100
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        if rate == 44_100 and codec != "flac":
            write_tone(container, stream, 1.0)
            return
        shape = (1, 2 * rate)
        frame = av.AudioFrame.from_ndarray(np.zeros(shape, np.int16), "s16", "stereo")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_a_silent_video_and_an_empty_sound_are_no_sound(tmp_path: Path) -> None:
    reader = ClipReader()
    assert reader.sound(save_clip(tmp_path / "a.mp4", 5, tracks=0)) is None
    assert reader._cache.size > 0, "that there is no sound is kept"
    assert reader.sound(tmp_path / "a.mp4") is None
    assert ClipReader().sound(save_wav(tmp_path / "a.wav", np.zeros(0))) is None
    ClipReader().check(tmp_path / "a.mp4")
    with pytest.raises(ClipError, match=r"^clip a.mp4 has no sound$"):
        ClipReader().check(tmp_path / "a.mp4", video=False)


def test_a_file_without_a_sample_or_a_frame_is_found_by_its_check(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match=r"^clip a.wav has no sound$"):
        ClipReader().check(save_wav(tmp_path / "a.wav", np.zeros(0)), video=False)
    for frames, tone, error in ((5, 0, None), (0, 1, "has no frame that can be decoded")):
        path = tmp_path / f"{frames}.mkv"
        with av.open(str(path), "w") as container:
            video, sound = add_video(container, (64, 48), 25, "mjpeg", "yuvj420p"), add_sound(container)
            for _ in range(frames):
                container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
            container.start_encoding()
            write_tone(container, sound, tone)
        if error is None:
            assert not ClipReader().check(path), "a track without a sample is no sound"
        else:
            with pytest.raises(ClipError, match=rf"^clip 0.mkv {error}$"):
                ClipReader().check(path)


@pytest.mark.parametrize("channels", [2, 9, 64])
def test_a_sound_of_many_channels_is_their_mean(tmp_path: Path, channels: int) -> None:
    wave = np.linspace(0, 0.9, 4000)[:, None] * np.arange(channels) / channels
    sound = ClipReader().sound(save_wav(tmp_path / "a.wav", wave))
    assert sound is not None and np.allclose(sound, wave.mean(1), atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "rate", "error"),
    [(65, 16_000, "65 channels, more than 64"), (1, 500_000, "500000 samples a second")],
)
def test_a_sound_that_cannot_be_resampled_is_found_by_its_check(
    tmp_path: Path, channels: int, rate: int, error: str
) -> None:
    path = save_wav(tmp_path / "a.wav", np.zeros((4000, channels)), rate)
    with pytest.raises(ClipError, match=f"^clip a.wav has a sound of {error}$"):
        ClipReader().check(path, video=False)


@pytest.mark.parametrize("name", ["a.wav", "a.avi"])
def test_a_riff_file_that_was_cut_is_found_unless_it_declares_no_length(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.wav":
        save_wav(path, np.zeros(RATE))
    else:
        save_clip(path, 25, codec="mjpeg", pixels="yuvj420p")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ClipError, match=rf"^clip {name} has [\d,]+ of [\d,]+ bytes: it was cut$"):
        ClipReader().check(path)
    path.write_bytes(content[:4] + b"\xff\xff\xff\xff" + content[8:])
    assert ClipReader().sound(path) is not None


def test_an_unfinished_download_is_found_by_its_check(tmp_path: Path) -> None:
    for share in (0.1, 0.3):
        path = damaged(save_clip(tmp_path / "a.mp4", 50, options={"movflags": "faststart"}), share)
        with pytest.raises(ClipError, match=r"^clip a.mp4 is broken: \d+ of its packets cannot be decoded$"):
            ClipReader().check(path)
    silent = save_clip(tmp_path / "b.mp4", 50, tracks=0, gop=50, options={"movflags": "faststart"})
    with pytest.raises(ClipError, match=r"^clip b.mp4 is broken: \d+ of its packets cannot be decoded$"):
        ClipReader().check(damaged(silent, 0.6))  # its key frame is good
    path = damaged(save_clip(tmp_path / "a.mp4", 50, options={"movflags": "faststart"}), 0.8)
    assert ClipReader().check(path) and len(ClipReader().frames(path).images) > 4, "most of it can be decoded"


@pytest.mark.parametrize("late", [0, 50])
def test_a_sound_that_begins_before_its_video_is_whole(tmp_path: Path, late: int) -> None:
    path = save_clip(tmp_path / "a.mp4", 25, times=range(late, late + 25))
    sound = ClipReader().sound(path)
    assert sound is not None and len(sound) == pytest.approx(RATE, abs=800)
    assert np.abs(sound[1000:3000]).max() == pytest.approx(0.5, abs=0.05)
    assert numbers(ClipReader().frames(path))[0] == 1 and ClipReader().check(path)


def test_the_cache_is_bounded_and_forgets_a_changed_file(tmp_path: Path) -> None:
    reader = ClipReader(VideoSettings(cache_mb=1))
    paths = [save_clip(tmp_path / f"{n}.mp4", 8, size=(160, 120)) for n in range(4)]  # 460 kB each, decoded
    first = reader.frames(paths[0])
    assert reader.frames(paths[0]) is first
    for path in paths[1:]:
        reader.frames(path)
    assert reader._cache.size <= 1_000_000
    assert reader.frames(paths[0]) is not first
    sound = reader.sound(paths[3])
    save_clip(paths[3], 16, size=(160, 120))
    again = reader.sound(paths[3])
    assert sound is not None and again is not None and len(again) > len(sound)
    with pytest.raises(ValueError, match="read-only"):
        again[0] = 1


def test_threads_share_a_reader_and_a_copy_begins_empty(tmp_path: Path) -> None:
    reader = ClipReader()
    paths = [save_clip(tmp_path / f"{n}.mp4", 5 + n) for n in range(3)] * 8
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(reader.frames, paths))
    assert [len(frames.images) for frames in found] == [5, 6, 7] * 8
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.settings == reader.settings and copy._cache.size == 0


def test_without_pyav_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_clip(tmp_path / "a.mp4", 2)
    monkeypatch.delitem(sys.modules, "distill.data.decoding", raising=False)
    monkeypatch.delattr("distill.data.decoding", raising=False)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SettingsError, match=r"^videos and sounds need PyAV: pip install 'distill\[media\]'$"):
        ClipReader().frames(path)


def test_the_content_of_a_file_is_limited(tmp_path: Path) -> None:
    path = save_clip(tmp_path / "a.mp4", 2)
    assert ClipReader().content(path) == path.read_bytes()
    with path.open("ab") as file:
        file.truncate(1_100_000)
    for read in (ClipReader(VideoSettings(max_mb=1)).content, ClipReader(VideoSettings(max_mb=1)).frames):
        with pytest.raises(ClipError, match=r"^clip a.mp4 has 1 MB, more than 1 \(data.video.max_mb\)$"):
            read(path)

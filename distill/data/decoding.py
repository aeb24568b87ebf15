"""Decoding of untrusted videos and sounds by PyAV, which is given the bytes of one file and opens nothing else.

The packets of a file are all read before any is decoded: so its length is known, and a file that was cut is found.
"""

import math
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from distill.data import containers
from distill.data.clips import RATE, ClipError, Frames, VideoSettings, open_file
from distill.data.containers import MISSING_SHARE
from distill.data.images import MAX_ASPECT_RATIO

DECODERS = (
    "h264", "hevc", "vp8", "libvpx", "vp9", "libvpx-vp9", "av1", "libdav1d", "mpeg4", "mpeg1video", "mpeg2video",
    "msmpeg4", "msmpeg4v2", "h263", "flv", "mjpeg", "theora", "wmv1", "wmv2", "ffv1", "rawvideo",
    "aac", "aac_latm", "mp3", "mp3float", "mp2", "mp2float", "opus", "libopus", "vorbis", "flac", "alac", "ac3", "eac3",
    "amrnb", "amrwb", "wmav1", "wmav2", "adpcm_ms", "adpcm_ima_wav", "pcm_u8", "pcm_s16le", "pcm_s16be", "pcm_s24le",
    "pcm_s24be", "pcm_s32le", "pcm_s32be", "pcm_f32le", "pcm_f32be", "pcm_f64le", "pcm_f64be", "pcm_alaw", "pcm_mulaw",
)  # fmt: skip
"""The decoders of FFmpeg that may run: for videos, and for sounds."""

_MOST_STREAMS = 100  # FFmpeg allocates no more, unless the user's limit is higher
_MISSING_SECONDS = 0.25  # with MISSING_SHARE: a file may end this much earlier than its header says
_END = 0.5  # seconds before the end of a stream from which it is tried
_SAMPLE_RATES = range(1_000, 400_001)
_MOST_CHANNELS = 64  # FFmpeg resamples no more


@contextmanager
def opened(path: Path, settings: VideoSettings, name: str) -> Iterator["Clip"]:
    """Open a file whose header and packets are within the limits.

    Args:
        name: what messages call the file.

    Raises:
        ClipError: for every error, also within the context.
    """
    try:
        with open_file(path, settings.max_mb, name) as file:
            clip = Clip(file, settings, name)
            try:
                clip.open()
                yield clip
            finally:
                clip.close()
    except ClipError:
        raise
    except av.FFmpegError as error:
        raise ClipError(f"clip {name} is broken: {error.strerror}") from error
    except Exception as error:  # the bindings raise many types on corrupt files
        raise ClipError(f"clip {name} is broken: {error or type(error).__name__}") from error


class _Source:
    """A file for PyAV, which can only be read, and only within the time limit."""

    def __init__(self, file: BinaryIO, clip: "Clip") -> None:
        self.seek, self.tell = file.seek, file.tell
        self._file, self._clip = file, clip

    def read(self, size: int) -> bytes:
        self._clip.check_time()
        return self._file.read(size)


class Clip:
    """An open file. A stream is decoded once, from its start.

    Attributes:
        spans: for each stream with packets, the times at which the first begins and the last ends, in seconds.
    """

    def __init__(self, file: BinaryIO, settings: VideoSettings, name: str) -> None:
        self.settings, self.name = settings, name
        self.spans: dict[int, tuple[float, float]] = {}
        self._keys: list[float] = []  # times of the key frames of the video
        self._starts: dict[int, int] = {}  # first time of each stream with packets, in units of its time base
        self._file = file
        self._container: Any = None
        self._deadline = time.monotonic() + settings.decode_seconds

    def error(self, problem: str) -> ClipError:
        """An error that names the file."""
        return ClipError(f"clip {self.name} {problem}")

    def check_time(self) -> None:
        """Raise ClipError if decoding takes too long."""
        if time.monotonic() > self._deadline:
            raise self.error(f"takes more than {self.settings.decode_seconds:g} s (data.video.decode_seconds)")

    def open(self) -> None:
        """Read the header and all packets. Raises ClipError, FFmpegError."""
        name = containers.format_of(self._file)
        if name is None:
            raise self.error("is none of MP4, MOV, Matroska, WebM, AVI, WAV, MP3, FLAC and Ogg")
        if problem := containers.problem(self._file, name, self.settings.max_seconds, self.check_time):
            raise self.error(problem)
        most = self.settings.max_streams
        self._container = av.open(
            _Source(self._file, self),
            format=name,
            io_open=self._refuse,
            options={
                "protocol_whitelist": "",
                "format_whitelist": av.ContainerFormat(name, "r").name,
                "codec_whitelist": ",".join(DECODERS),
                "max_pixels": str(self.settings.max_pixels),
                "max_streams": str(max(_MOST_STREAMS, most)),
                **({"enable_drefs": "0", "use_absolute_path": "0"} if name == "mov" else {}),
            },
        )
        if (count := len(self._container.streams)) > most:
            raise self.error(f"has {count} streams, more than {most} (data.video.max_streams)")
        seconds = (self._container.duration or 0) / av.time_base if name != "mp3" else 0  # mp3: an estimate
        self._check_seconds(seconds)
        self._scan()
        end = max((end for _, end in self.spans.values()), default=0.0)
        if end < seconds * (1 - MISSING_SHARE) - _MISSING_SECONDS:
            raise self.error(f"ends after {end:.1f} of {seconds:.1f} s: it was cut")

    def close(self) -> None:
        """Free the decoders."""
        if self._container is not None:
            self._container.close()

    def video(self) -> Any:
        """The stream of the video. Raises ClipError if there is none, or its frames exceed the limits."""
        pictures = av.stream.Disposition.attached_pic  # the cover of a sound
        found = [one for one in self._container.streams.video if not one.disposition & pictures]
        if not found:
            raise self.error("has no video")
        self._prepare(found[0])
        self._check_size(found[0].codec_context.width, found[0].codec_context.height)
        return found[0]

    def track(self) -> Any:
        """The stream of the sound; None if there is none."""
        found = self._container.streams.audio
        if found:
            self._prepare(found[0])
            self._check_sound(found[0].sample_rate or RATE, found[0].channels)
        return found[0] if found else None

    def decoded(self, stream: Any, wanted: deque[float] | None = None) -> Iterator[Any]:
        """Yield the frames of a stream in the order of their display. Packets that cannot be decoded are left out.

        Args:
            wanted: the times for which a frame is still wanted. Parts of a video without any are not decoded.

        Raises:
            ClipError: most packets cannot be decoded, or a limit is exceeded.
        """
        good, bad, skipping = 0, 0, False
        if (start := self._starts.get(stream.index)) is not None:  # other streams may begin later
            self._container.seek(start, stream=stream)
        for packet in self._container.demux(stream):
            self.check_time()
            if wanted and packet.is_keyframe and packet.size:
                key = bisect_right(self._keys, _time(packet))
                skipping = key < len(self._keys) and self._keys[key] <= wanted[0]
            if skipping and packet.size:
                continue
            try:
                found = packet.decode()
                good += bool(found)
            except av.FFmpegError:
                found, bad = [], bad + 1
            yield from found
        if bad > good:
            raise self.error(f"is broken: {bad} of its packets cannot be decoded")

    def has_frame(self, stream: Any) -> bool:
        """Whether a stream has a frame. If its end cannot be decoded, as in an unfinished download, all of it is.

        Raises:
            ClipError, FFmpegError: as `decoded`.
        """
        if next(self.decoded(stream), None) is None:
            return False
        if not self._ends_well(stream):
            for _ in self.decoded(stream):
                pass
        return True

    def frames(self, most: int) -> Frames:
        """The sampled frames of the video, at most `most`. Raises ClipError, FFmpegError."""
        stream, settings = self.video(), self.settings
        start, end = self.spans.get(stream.index, (0.0, 0.0))
        seconds = end - start
        count = most if settings.fps is None else min(most, max(1, round(seconds * settings.fps)))
        wanted = deque(start + seconds * (2 * n + 1) / (2 * count) for n in range(count))
        images, times = [], list[float]()
        shown, at = None, start
        for frame in self.decoded(stream, wanted):
            self._check_size(frame.width, frame.height)
            begins = at + 1 / (stream.average_rate or 25) if frame.time is None else frame.time
            if shown is not None and begins <= at:  # its time is wrong
                continue
            if shown is not None and wanted[0] < begins:  # until now, `shown` was
                images.append(self._image(shown))
                times.append(max(0.0, at - start))
                while wanted and wanted[0] < begins:
                    wanted.popleft()
                if not wanted:
                    break
            shown, at = frame, begins
        if shown is None:
            raise self.error("has no frame that can be decoded")
        if wanted:
            images.append(self._image(shown))
            times.append(max(0.0, at - start))
        return Frames(tuple(images), tuple(times), seconds)

    def sound(self) -> np.ndarray | None:
        """The sound [S] as float32 at RATE, mixed to mono; None if it has no sample. Raises ClipError, FFmpegError."""
        if (stream := self.track()) is None:
            return None
        parts, seconds, layout, resampler = list[np.ndarray](), 0.0, None, None
        for frame in self.decoded(stream):
            self._check_sound(frame.sample_rate, frame.layout.nb_channels)
            seconds += frame.samples / frame.sample_rate
            self._check_seconds(seconds)  # before it is resampled, which takes memory
            if layout != (layout := (frame.format.name, frame.layout.name, frame.sample_rate)):
                parts += _resampled(resampler, None)
                resampler = av.AudioResampler(format="flt", rate=RATE)  # PyAV reads planes of 8 channels only
            parts += _resampled(resampler, frame)
        parts += _resampled(resampler, None)
        sound = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        if not np.isfinite(sound).all():
            raise self.error("has a sound with samples that are no numbers")
        sound = sound.clip(-1, 1)
        sound.flags.writeable = False
        return sound if sound.size else None

    def _ends_well(self, stream: Any) -> bool:
        """Whether the last packets of a stream can be decoded. Of those before them only key frames are."""
        _, end = self.spans.get(stream.index, (0.0, 0.0))
        try:
            self._container.seek(int((end - _END) / stream.time_base), stream=stream)
            for packet in self._container.demux(stream):
                self.check_time()
                if not _time(packet) < end - _END or (stream.type == "video" and packet.is_keyframe):
                    packet.decode()
        except av.FFmpegError:
            return False
        return True

    def _refuse(self, address: str, flags: int, options: object) -> None:
        raise self.error("names another file or address, which is not opened")

    def _prepare(self, stream: Any) -> None:
        context = stream.codec_context
        if context is None or context.codec.name not in DECODERS:
            name = "an unknown format" if context is None else context.codec.canonical_name
            raise self.error(f"has {stream.type} in {name}, which is not decoded")
        if not context.is_open:
            context.thread_count = 1  # the callers have a thread for each file
            context.options = {"max_pixels": str(self.settings.max_pixels)}

    def _scan(self) -> None:
        """Read all packets without decoding them. Raises ClipError, FFmpegError."""
        for packet in self._container.demux():
            self.check_time()
            begins, index = _time(packet), packet.stream_index
            if (stamp := packet.pts if packet.dts is None else packet.dts) is not None:
                self._starts[index] = min(self._starts.get(index, stamp), stamp)
            if math.isnan(begins) or packet.is_discard:  # discarded: before the part that is shown
                continue
            ends = begins + float((packet.duration or 0) * packet.time_base)
            start, end = self.spans.get(index, (begins, ends))
            start, end = min(start, begins), max(end, ends)
            self._check_seconds(end - start)
            self.spans[index] = start, end
            if packet.is_keyframe and packet.stream.type == "video":
                self._keys.append(begins)
        self._keys.sort()

    def _check_seconds(self, seconds: float) -> None:
        if seconds > (most := self.settings.max_seconds):
            raise self.error(f"lasts {seconds:,.1f} s, more than {most:,g} (data.video.max_seconds)")

    def _check_sound(self, rate: int, channels: int) -> None:
        if rate not in _SAMPLE_RATES:
            raise self.error(f"has a sound of {rate} samples a second")
        if channels > _MOST_CHANNELS:
            raise self.error(f"has a sound of {channels} channels, more than {_MOST_CHANNELS}")

    def _check_size(self, width: int, height: int) -> None:
        most = self.settings.max_pixels
        if width * height > most:
            raise self.error(f"has {width} x {height} pixels, more than {most:,} (data.video.max_pixels)")
        if not width * height:  # what FFmpeg says of a frame that it refuses
            raise self.error(f"has no frame of at most {most:,} pixels (data.video.max_pixels)")
        if max(width, height) >= MAX_ASPECT_RATIO * min(width, height):
            raise self.error(f"has {width} x {height} pixels, an aspect ratio of {MAX_ASPECT_RATIO} or more")

    def _image(self, frame: Any) -> np.ndarray:
        """A frame as an upright image, scaled down to `max_side`."""
        longest = max(frame.width, frame.height)
        scale = min(1.0, (self.settings.max_side or longest) / longest)
        width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
        rgb = frame.reformat(width, height, "rgb24", interpolation="BICUBIC", threads=1).to_ndarray()
        image = np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))
        image.flags.writeable = False
        return image


def _time(packet: Any) -> float:
    """The time of a packet in seconds; NaN if it has none."""
    stamp = packet.dts if packet.pts is None else packet.pts
    return math.nan if stamp is None else float(stamp * packet.time_base)


def _resampled(resampler: Any, frame: Any) -> list[np.ndarray]:
    """The samples that come out for a frame, or at the end (None): the mean of the channels."""
    found = [] if resampler is None else resampler.resample(frame)
    return [part.to_ndarray().reshape(-1, part.layout.nb_channels).mean(1) for part in found if part is not None]

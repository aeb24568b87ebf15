"""Videos and sounds that nobody should open carelessly, written into a folder.

`main` reads all of a folder in a process of its own, with a limit of memory, and prints what each gave as JSON lines.
"""

import contextlib
import json
import resource
import struct
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.data.clip_files import add_sound, add_video, save_clip, save_wav, write_tone

MEMORY = 3_000_000_000
"""Address space of the process that reads, in bytes."""


def write_all(folder: Path, address: str) -> None:
    """Write the files.

    Args:
        address: of a server that must get no request.
    """
    good = save_clip(folder / "good.mp4", 25)
    start = save_clip(folder / "start.mp4", 25, options={"movflags": "faststart"})
    matroska = save_clip(folder / "good.mkv", 25)
    _write_cut(folder, {"end.mp4": good, "begin.mp4": start, "part.mkv": matroska})
    _write_texts(folder, good, address)
    _write_headers(folder, start)
    _write_streams(folder)


def _write_cut(folder: Path, sources: dict[str, Path]) -> None:
    for name, source in sources.items():
        content = source.read_bytes()
        for share in (0.02, 0.3, 0.6, 0.85):
            (folder / f"cut_{int(share * 100)}_{name}").write_bytes(content[: int(len(content) * share)])
    content = bytearray(sources["begin.mp4"].read_bytes())
    at = content.index(b"mdat") + 4
    noise = np.random.default_rng(0).bytes(len(content) - at)
    (folder / "noise.mp4").write_bytes(bytes(content[:at]) + noise)
    (folder / "garbage.mp4").write_bytes(bytes(content[:40]) + noise)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "eight.mp4").write_bytes(content[:8])


def _write_texts(folder: Path, good: Path, address: str) -> None:
    """Playlists and descriptions that name other files and addresses, under harmless names, too."""
    other, remote = f"file://{good}", f"{address}/a.mp4"
    texts = {
        "list": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{other}\n#EXTINF:9,\n{remote}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{good}'\nfile {remote}\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
        "dash": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f'<Representation id="1" mimeType="video/mp4"><BaseURL>{remote}</BaseURL></Representation></AdaptationSet>'
        "</Period></MPD>",
        "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{other}"/><image href="{remote}"/></svg>',
        "reference": f"[Reference]\nRef1={remote}\n",
    }
    for name, text in texts.items():
        for suffix in {"list": ("m3u8", "mp4"), "concat": ("ffconcat", "mp4"), "dash": ("mpd", "mp4")}.get(
            name, ("mp4",)
        ):
            (folder / f"{name}.{suffix}").write_text(text)
    (folder / "%03d.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "concat:good.mp4|good.mp4").write_text("x")
    wrapped = b"\0\0\0\x14ftypqt  \0\0\0\0qt  " + texts["list"].encode()
    (folder / "wrapped.mov").write_bytes(wrapped)


def _write_headers(folder: Path, start: Path) -> None:
    content = start.read_bytes()
    for name, seconds in (("hours.mp4", 36_000), ("no_duration.mp4", 0)):
        changed = bytearray(content)
        for box in (b"mvhd", b"mdhd"):
            at = content.index(box) + 16
            scale = struct.unpack(">I", content[at : at + 4])[0]
            changed[at + 4 : at + 8] = struct.pack(">I", seconds * scale)
        (folder / name).write_bytes(changed)
    matroska = (folder / "good.mkv").read_bytes()
    at = matroska.index(b"\x44\x89\x88") + 3  # the duration, in milliseconds
    (folder / "hours.mkv").write_bytes(matroska[:at] + struct.pack(">d", 36e6) + matroska[at + 8 :])
    at = content.index(b"avc1") + 28
    (folder / "large_header.mp4").write_bytes(content[:at] + struct.pack(">HH", 30_000, 30_000) + content[at + 4 :])
    # an external data reference: the media would be in another file
    at = content.index(b"dref") + 12
    length = struct.unpack(">I", content[at : at + 4])[0]
    alias = struct.pack(">I4sI", length, b"alis", 0)[:length]
    (folder / "external.mov").write_bytes(content[:at] + alias + content[at + length :])
    # tables of a few bytes that declare more packets than the memory holds
    many = 60_000_000
    changed = bytearray(content)
    for box, fields in ((b"stsz", (1, many)), (b"stsc", (1, 1, many, 1)), (b"stts", (1, many, 1))):
        at = content.index(box) + 8
        changed[at : at + 4 * len(fields)] = struct.pack(f">{len(fields)}I", *fields)
    (folder / "samples.mp4").write_bytes(changed)
    path = save_clip(folder / "fragments.mp4", 25, options={"movflags": "frag_keyframe+empty_moov"})
    changed = bytearray(path.read_bytes())
    at = changed.index(b"trun") + 4
    changed[at : at + 8] = struct.pack(">II", 1, many)
    path.write_bytes(changed)


def _write_streams(folder: Path) -> None:
    save_clip(folder / "tracks.mkv", 5, tracks=64)
    save_clip(folder / "many_tracks.mkv", 3, tracks=120)
    save_clip(folder / "no_frames.mp4", times=[], frames=25)
    save_clip(folder / "long.mkv", times=[0, 1, 36_000], fps=1, tracks=0)
    save_clip(folder / "large.mkv", 2, size=(5000, 4000), codec="mjpeg", pixels="yuvj420p", tracks=0)
    save_clip(folder / "narrow.mkv", 2, size=(2002, 4), codec="mjpeg", pixels="yuvj420p", tracks=0)
    save_clip(folder / "negative.mkv", times=range(-10, 20), tracks=0)
    save_clip(folder / "variable.mkv", times=[0, 1, 2, 50], tracks=0)
    with av.open(str(folder / "grows.mkv"), "w") as container:  # the second half has frames beyond the limit
        stream = add_video(container, (64, 48), 25, "mjpeg", "yuvj420p")
        for number, (width, height) in enumerate([(64, 48)] * 3 + [(5000, 4000)] * 6):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"
            encoder.time_base = Fraction(1, 25)
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 99, np.uint8))
            frame = frame.reformat(format="yuvj420p")
            frame.pts = 0
            for packet in encoder.encode(frame):
                packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 25)
                container.mux(packet)
    wave = np.zeros(16_000)
    save_wav(folder / "nan.wav", wave * np.nan)
    save_wav(folder / "infinite.wav", wave + np.inf)
    save_wav(folder / "slow.wav", wave, rate=1)
    save_wav(folder / "fast.wav", wave, rate=1_000_000_000)
    save_wav(folder / "long.wav", np.zeros(16_000 * 40))
    with av.open(str(folder / "unread.nut"), "w") as container:
        sound = add_sound(container)
        write_tone(container, sound, 1.0)
    with av.open(str(folder / "png.avi"), "w") as container:  # a decoder that does not run
        stream = add_video(container, (64, 48), 25, "png", "rgb24")
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        container.mux(stream.encode())


def main(folder: Path) -> None:
    from distill.data.clips import ClipError, ClipReader, VideoSettings

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    reader = ClipReader(VideoSettings(max_seconds=30, decode_seconds=10, cache_mb=0))
    for name in ("good.mp4", "good.mkv", "long.wav"):  # PyAV imports its modules when they are needed
        for read in (reader.frames, reader.sound):
            with contextlib.suppress(ClipError):
                read(folder / name)
    for path in sorted(folder.iterdir()):
        for kind in ("frames", "sound", "check"):
            began, error, value = time.monotonic(), None, None
            print(json.dumps({"begin": path.name}), file=sys.stderr, flush=True)
            try:
                value = getattr(reader, kind)(path)
            except ClipError as raised:
                error = str(raised)
            shown = getattr(value, "images", value)  # a check has neither frames nor a sound
            count = len(shown) if hasattr(shown, "__len__") else None
            seconds, memory = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
            line = {"name": path.name, "kind": kind, "error": error, "count": count, "s": seconds, "mb": memory}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

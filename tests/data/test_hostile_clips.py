"""Hostile videos and sounds: one sentence or a right result, in bounded time and memory; nothing else is opened."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distill.data.clips import ClipError, ClipReader, VideoSettings
from tests.data.clip_files import save_clip
from tests.data.hostile_clips import write_all

ROOT = Path(__file__).parents[2]


class Reading(NamedTuple):
    """What the files of a folder gave, by name and kind, and the system calls made meanwhile."""

    folder: Path
    results: dict[tuple[str, str], dict[str, Any]]
    calls: list[str]


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Reading:
    folder, trace = tmp_path_factory.mktemp("hostile"), tmp_path_factory.mktemp("trace") / "calls"
    write_all(folder, "http://127.0.0.1:9")
    strace = shutil.which("strace")
    traced = [
        strace,
        "-f",
        "-qq",
        "-s",
        "300",
        "-o",
        str(trace),
        "-e",
        "trace=open,openat,creat,socket,connect,execve,write",
    ]
    command = [sys.executable, "-m", "tests.data.hostile_clips", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        (traced if strace else []) + command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    calls = trace.read_text(errors="replace").splitlines() if strace else []
    return Reading(folder, {(line["name"], line["kind"]): line for line in lines}, calls)


def test_every_file_gives_one_sentence_or_a_result_in_time(reading: Reading) -> None:
    assert len(reading.results) == 3 * len(list(reading.folder.iterdir())) > 150
    for (name, kind), result in reading.results.items():
        if result["error"] is not None:
            assert result["error"].startswith(f"clip {name} ") and "\n" not in result["error"], result
        elif kind == "frames":
            assert 1 <= result["count"] <= 8
        assert result["s"] < 8, result
    assert max(result["mb"] for result in reading.results.values()) < 400


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("concat.mp4", "is none of MP4, MOV, Matroska, WebM, AVI, WAV, MP3, FLAC and Ogg"),
        ("list.mp4", "is none of"),
        ("sdp.mp4", "is none of"),
        ("dash.mp4", "is none of"),
        ("svg.mp4", "is none of"),
        ("wrapped.mov", "is broken: Invalid data found when processing input"),
        ("cut_30_begin.mp4", "ends after 0.3 of 1.0 s: it was cut"),
        ("cut_30_end.mp4", "is broken: "),
        ("cut_30_part.mkv", "ends after 0.3 of 1.0 s: it was cut"),
        ("noise.mp4", "is broken: 25 of its packets cannot be decoded"),
        ("garbage.mp4", "has no video"),
        ("hours.mkv", "lasts 36,000.0 s, more than 30 (data.video.max_seconds)"),
        ("long.mkv", "lasts 36,001.0 s, more than 30 (data.video.max_seconds)"),
        ("large.mkv", "has no frame of at most 10,000,000 pixels (data.video.max_pixels)"),
        ("grows.mkv", "is broken: 6 of its packets cannot be decoded"),
        ("narrow.mkv", "has 2002 x 4 pixels, an aspect ratio of 200 or more"),
        ("tracks.mkv", "has 65 streams, more than 8 (data.video.max_streams)"),
        ("many_tracks.mkv", "has 100 streams, more than 8"),
        ("samples.mp4", "declares 60,000,045 packets, more than its duration may have"),
        ("fragments.mp4", "declares 60,000,060 packets, more than its duration may have"),
        ("no_frames.mp4", "has no video"),
        ("png.avi", "has video in png, which is not decoded"),
    ],
)
def test_a_bad_video_is_named_with_the_reason(reading: Reading, name: str, message: str) -> None:
    assert str(reading.results[name, "frames"]["error"]).startswith(f"clip {name} {message}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan.wav", "has a sound with samples that are no numbers"),
        ("infinite.wav", "has a sound with samples that are no numbers"),
        ("slow.wav", "lasts 16,000.0 s, more than 30 (data.video.max_seconds)"),
        ("fast.wav", "has a sound of 1000000000 samples a second"),
        ("long.wav", "lasts 40.0 s, more than 30 (data.video.max_seconds)"),
        ("noise.mp4", "is broken: "),
    ],
)
def test_a_bad_sound_is_named_with_the_reason(reading: Reading, name: str, message: str) -> None:
    assert str(reading.results[name, "sound"]["error"]).startswith(f"clip {name} {message}")


@pytest.mark.parametrize(
    "name", ["external.mov", "hours.mp4", "no_duration.mp4", "large_header.mp4", "negative.mkv", "variable.mkv"]
)
def test_what_the_bytes_hold_is_read_whatever_the_header_says(reading: Reading, name: str) -> None:
    assert reading.results[name, "frames"]["error"] is None
    expected = 1 if name == "variable.mkv" else 8
    assert reading.results[name, "frames"]["count"] == expected


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_other_file_or_address_is_opened(reading: Reading) -> None:
    current, checked = None, 0
    for call in reading.calls:
        if begin := re.search(r'write\(2, "\{\\"begin\\": \\"(.*?)\\"\}', call):
            current = begin[1]
        elif current is not None and "write(" not in call:
            assert not re.search(r"\b(socket|connect|execve|creat)\(", call), call
            if opened := re.search(r'\bopen(?:at)?\((?:AT_FDCWD, )?"([^"]*)", ([A-Z_|]+)', call):
                assert opened[1] == str(reading.folder / current), call
                assert "O_WRONLY" not in opened[2] and "O_RDWR" not in opened[2], call
                checked += 1
    assert checked >= 150


def test_a_pipe_and_a_folder_are_no_clips(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in ("pipe.mp4", ".", "gone.mp4", "a\0b"):
        with pytest.raises(ClipError, match=r" is missing$|cannot be read"):
            ClipReader().check(tmp_path / name, name)


def test_decoding_ends_at_its_time_limit(tmp_path: Path) -> None:
    path = save_clip(tmp_path / "a.mp4", 50)
    with pytest.raises(ClipError, match=r"^clip a.mp4 takes more than 1e-05 s \(data.video.decode_seconds\)$"):
        ClipReader(VideoSettings(decode_seconds=1e-5)).frames(path)

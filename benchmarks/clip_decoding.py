"""Benchmark of clip decoding: clips a second and peak memory of the reader, against decoding of every frame.

    python benchmarks/clip_decoding.py
    python benchmarks/clip_decoding.py --clips 4 --repeats 3 --json clip_decoding.json

Writes clips of moving noise with a tone, as H.264 and AAC in MP4, in the sizes of the corpora: 4 s of 640 x 360, 8 s of
1280 x 720 (MOSI, MOSEI, MELD) and 20 s of 1280 x 720. For each size:

- all frames: PyAV decodes all frames to RGB and the whole sound, and 8 frames are kept, without any limit;
- cold: `ClipReader.frames` and `.sound` with an empty cache: the limits, a pass over the packets, 8 frames of at most
  640 pixels;
- warm: the same from the cache;
- check: what is done once for every clip when a corpus is read;
- cold, 2 threads: the clips on two threads, as the workers of a training have them.

The implementations take turns; the table has the medians over the repeats, and ratios of the pairs of one repeat.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from measuring import Usage, measure_cpu, write_json

from distill.data.clips import RATE, ClipReader, VideoSettings

SIZES = ((640, 360, 4), (1280, 720, 8), (1280, 720, 20))


def write_clip(path: Path, width: int, height: int, seconds: int, seed: int) -> None:
    """Write a clip of smooth noise that moves, at 25 frames a second, with a tone."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 256, (height // 16 + 40, width // 16 + 40, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"preset": "veryfast"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        sound = container.add_stream("aac", rate=RATE, layout="mono")
        for number in range(25 * seconds):
            at = number * 3 % 600
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(noise[at : at + height, at : at + width]))
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        tone = np.sin(np.arange(RATE * seconds) / 6).astype(np.float32)[None]
        for start in range(0, tone.shape[1], 1024):
            part = av.AudioFrame.from_ndarray(np.ascontiguousarray(tone[:, start : start + 1024]), "fltp", "mono")
            part.sample_rate, part.pts, part.time_base = RATE, start, Fraction(1, RATE)
            container.mux(sound.encode(part))
        container.mux(sound.encode())


def all_frames(path: Path) -> None:
    """Every frame as RGB, of which 8 are kept, and the sound: what a few lines of PyAV do."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        _kept = [frames[(2 * n + 1) * len(frames) // 16] for n in range(8)]
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=RATE)
        parts = [part.to_ndarray() for frame in container.decode(audio=0) for part in resampler.resample(frame) if part]
        np.concatenate(parts, axis=1)


def cold(path: Path) -> None:
    """Frames and sound from the file."""
    read(ClipReader(VideoSettings(cache_mb=0)), path)


def read(reader: ClipReader, path: Path) -> None:
    reader.frames(path)
    reader.sound(path)


def runs(paths: list[Path]) -> dict[str, Callable[[], object]]:
    """What each implementation does with all clips, by its name."""
    warm, pool = ClipReader(VideoSettings(cache_mb=1000)), ThreadPoolExecutor(2)
    for path in paths:
        read(warm, path)
    return {
        "all frames": lambda: [all_frames(path) for path in paths],
        "cold": lambda: [cold(path) for path in paths],
        "warm": lambda: [read(warm, path) for path in paths],
        "check": lambda: [ClipReader().check(path) for path in paths],
        "cold, 2 threads": lambda: list(pool.map(cold, paths)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=4, help="clips of each size")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    print("| clip | implementation | clips/s | CPU ms a clip | to all frames, CPU time | extra MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for width, height, seconds in SIZES:
        count = max(1, args.clips if seconds < 20 else args.clips // 4)
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, f"{number}.mp4") for number in range(count)]
            for number, path in enumerate(paths):
                write_clip(path, width, height, seconds, number)
            implementations = runs(paths)
            usages: dict[str, list[Usage]] = {name: [] for name in implementations}
            for _ in range(args.repeats):
                for name, run in implementations.items():
                    usages[name].append(measure_cpu(run))
        clip = f"{width} x {height}, {seconds} s"
        for name, found in usages.items():
            rate = count / statistics.median(usage.seconds for usage in found)
            pairs = zip(usages["all frames"], found, strict=True)
            ratio = statistics.median(usage.cpu_seconds / plain.cpu_seconds for plain, usage in pairs)
            cpu = statistics.median(usage.cpu_seconds for usage in found) / count
            extra = statistics.median(usage.extra_bytes for usage in found) / 1e6
            cells = [f"{rate:,.3g}", f"{cpu * 1000:,.3g}", f"{ratio:,.2g}", f"{extra:,.0f}"]
            print(f"| {clip} | {name} | {' | '.join(cells)} |", flush=True)
            results.append({"clip": clip, "name": name, "usages": [usage._asdict() for usage in found]})
    write_json(args.json, {"results": results})


if __name__ == "__main__":
    main()

"""Benchmark of annotation: throughput against an endpoint of fixed latency, and memory by number of rows.

    python benchmarks/annotate.py                          # about ten minutes on two cores
    python benchmarks/annotate.py --repeats 1 --memory 1000 10000 --json annotate.json

A server in a separate process answers every request after the same latency, without any limit on concurrency. Only the
client, and the CPU cores that it shares with the server, limit the throughput. The ceiling is concurrency / latency.
Each row is a distinct post with one of a few hundred JPEG images. With `--explained 0` each row takes exactly one
request; otherwise the teacher's first prediction is wrong for that fraction of the rows, and each of them takes two.
The benchmark runs the code of the stage: the endpoint, the ledger with its fsync calls, the annotation protocol.

Memory is the peak (VmHWM) of a fresh process for each number of rows. Rows are generated lazily. The exit status is 1
if throughput at a latency of 200 ms or more is below 95% of the ceiling, or if memory grows by more than 10%.
"""

import argparse
import asyncio
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from measuring import memory_bytes, write_json
from PIL import Image

from distill.annotation.annotate import AnnotateSettings, AnnotationCounts, annotate
from distill.annotation.ledger import Ledger
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.task.labels import LabelSpace
from distill.task.rationale import Rationale, render
from distill.task.sample import Sample

LABELS = LabelSpace()
IMAGES = 300
IMAGE_SIZE = 224
"""Width and height of an image in pixels; a file has about 10 KB."""
_CPU_BOUND_RATE = 400.0  # requests per second assumed for runs that the CPU limits, to choose the number of rows
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"


# ---- the server ----


def label_responses() -> dict[str, bytes]:
    """The HTTP response of the server for each label."""
    fields = (
        "The words are those of an author with a clear opinion.",
        "It shows a scene in soft and even light.",
        "Text and image agree, and neither has to be weighted more.",
        "The post has no second meaning here.",
    )
    responses = {}
    for name in LABELS.names:
        choice = {"message": {"role": "assistant", "content": render(Rationale(fields, name))}}
        usage = {"prompt_tokens": 400, "completion_tokens": 80}
        body = json.dumps({"choices": [choice | {"finish_reason": "stop"}], "usage": usage}).encode()
        responses[name] = HEAD % (len(body), body)
    return responses


class Teacher(asyncio.Protocol):
    """One connection to the server.

    It predicts label n mod 3 for row n, or another label for a fraction `explained` of the rows. An explain prompt gets
    the label that it names.
    """

    def __init__(self, latency_s: float, explained: float) -> None:
        self.latency_s, self.explained = latency_s, explained
        self.responses, self.received, self.expected = label_responses(), bytearray(), 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.expected:
            head = self.received.find(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", self.received[: max(head, 0)], re.IGNORECASE)
            self.expected = head + 4 + int(length[1]) if length else 0
        if self.expected and len(self.received) >= self.expected:
            answer = self.responses[self.label(bytes(self.received[-4000:]))]
            del self.received[: self.expected]
            self.expected = 0
            asyncio.get_running_loop().call_later(self.latency_s, self.transport.write, answer)

    def label(self, request: bytes) -> str:
        if named := re.search(rb"The sentiment is (\w+)", request):
            return named[1].decode()
        row = int(re.search(rb"row number (\d+)", request)[1])  # type: ignore[index]
        wrong = row * 0.6180339887498949 % 1 < self.explained  # evenly distributed
        return LABELS.names[(row + wrong) % 3]


async def serve(latency_s: float, explained: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Teacher(latency_s, explained), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await asyncio.to_thread(sys.stdin.read)  # until the client closes the pipe or is killed


@contextmanager
def running_server(latency_s: float, explained: float) -> Iterator[str]:
    """Run a server in a separate process. Yields its base URL."""
    command = [sys.executable, __file__, "--as-server", str(latency_s), "--explained", str(explained)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdin is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        server.stdin.close()


# ---- the client ----


def draw_images(folder: Path) -> None:
    """Write JPEG images of smooth noise."""
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = Image.fromarray(random.integers(0, 256, (28, 28, 3), dtype=np.uint8))
        coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=85)


def generate_rows(folder: Path) -> Iterator[Sample]:
    """An endless stream of posts."""
    for n in itertools.count():
        text = f"A post of a few words about nothing in particular, row number {n}, and a tag or two. #one #two"
        yield Sample(f"row-{n}", text, (folder / f"{n % IMAGES}.jpg",), label=LABELS.names[n % 3])


def run_annotation(samples: Iterator[Sample], url: str, folder: Path, concurrency: int) -> dict[str, Any]:
    """Annotate all samples with an empty ledger. Returns the counts of `summary.json`."""
    counts = AnnotationCounts()
    teacher = Endpoint(EndpointSettings(url, "teacher", concurrency=concurrency), LABELS)
    path = folder / "ledger.jsonl"
    path.unlink(missing_ok=True)
    with Ledger(path) as ledger:
        for _ in annotate(samples, LABELS, teacher, AnnotateSettings(), ledger, counts):
            pass
    teacher.close()
    return counts.summary


def measure_throughput(latency_s: float, images: Path, options: argparse.Namespace) -> dict[str, float]:
    """One run at one latency: rows and requests per second, and the CPU time of the client.

    The number of rows is a multiple of the concurrency. The time includes opening the first connections and waiting for
    the last answers, so the ceiling is reached if the run takes exactly rows / concurrency times the latency.
    """
    ceiling = options.concurrency / latency_s
    rounds = max(round(options.seconds * min(ceiling, _CPU_BOUND_RATE) / options.concurrency), 8)
    count = rounds * options.concurrency
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, running_server(latency_s, options.explained) as url:
        run_annotation(itertools.islice(generate_rows(images), 1), url, Path(folder), 1)  # load all modules
        cpu, begin = time.process_time(), time.perf_counter()
        summary = run_annotation(itertools.islice(generate_rows(images), count), url, Path(folder), options.concurrency)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    assert summary["predicted"] + summary["explained"] == count, summary
    requests = summary["paid"]["answers"]
    return {
        "latency_s": latency_s, "rows": count, "rows_per_s": count / seconds, "requests_per_s": requests / seconds,
        "ceiling": ceiling, "share": requests / seconds / ceiling, "cpu_ms": 1000 * cpu / requests,
    }  # fmt: skip


def peak_memory_mb() -> float:
    """Peak resident memory of this process (VmHWM), in units of 1000 KiB."""
    return memory_bytes("VmHWM") / 1024 / 1000


def measure_memory(count: int, options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of a fresh process that annotates `count` rows."""
    command = [sys.executable, __file__, "--as-client", str(count), "--explained", str(options.explained)]
    command += ["--concurrency", str(options.concurrency)]
    command += ["--folder", str(options.folder)] if options.folder else []
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def client(count: int, options: argparse.Namespace) -> None:
    """The process that `measure_memory` starts. Prints its results as JSON."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, running_server(0.02, options.explained) as url:
        draw_images(Path(folder))
        begin, before = time.perf_counter(), peak_memory_mb()
        rows = itertools.islice(generate_rows(Path(folder)), count)
        summary = run_annotation(rows, url, Path(folder), options.concurrency)
        seconds = time.perf_counter() - begin
    assert summary["predicted"] + summary["explained"] == count, summary
    print(json.dumps({"rows": count, "peak_mb": peak_memory_mb(), "before_mb": before, "rows_per_s": count / seconds}))


# ---- the tables ----


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure throughput and memory. Prints both tables row by row."""
    print(f"{options.concurrency} concurrent requests; the teacher is wrong on {options.explained:.0%} of the rows")
    print(f"medians of {options.repeats} runs, on {os.cpu_count()} cores; load average {os.getloadavg()[0]:.1f}\n")
    print("latency   requests/s   rows/s   ceiling   ratio   lowest   CPU per request")
    speed, sizes = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        draw_images(Path(folder))
        for latency_s in options.latencies:
            runs = [measure_throughput(latency_s, Path(folder), options) for _ in range(options.repeats)]
            row = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            lowest = min(run["share"] for run in runs)
            speed.append(row | {"lowest_share": lowest, "runs": runs})
            print(
                f"{1000 * latency_s:>5.0f} ms {row['requests_per_s']:>12.1f} {row['rows_per_s']:>8.1f} "
                f"{row['ceiling']:>9.1f} {row['share']:>7.1%} {lowest:>8.1%} {row['cpu_ms']:>14.2f} ms",
                flush=True,
            )
    print("\n   rows   peak memory   before the first row   rows/s")
    for count in options.memory:
        sizes.append(measure_memory(count, options))
        print("{rows:>7} {peak_mb:>10.1f} MB {before_mb:>17.1f} MB {rows_per_s:>8.1f}".format(**sizes[-1]), flush=True)
    growth = sizes[-1]["peak_mb"] / sizes[0]["peak_mb"] - 1 if len(sizes) > 1 else 0.0
    print(f"\nmemory grows by {growth:+.1%}")
    return {"throughput": speed, "memory": sizes, "growth": growth, "explained": options.explained}


def main() -> int:
    parser = argparse.ArgumentParser(description="Annotation against an endpoint of fixed latency.")
    number = {"type": float, "metavar": "S"}
    parser.add_argument(
        "--latencies", nargs="*", default=[0.02, 0.2, 1.0, 2.0], help="of the endpoint, in seconds", **number
    )
    parser.add_argument("--seconds", default=20.0, help="approximate length of a run (default: 20)", **number)
    parser.add_argument("--repeats", type=int, default=3, help="runs at each latency (default: 3)")
    parser.add_argument("--concurrency", type=int, default=64, help="concurrent requests (default: 64)")
    parser.add_argument("--explained", type=float, default=0.0, help="fraction of rows with two requests (default: 0)")
    parser.add_argument("--memory", type=int, nargs="*", default=[1_000, 100_000], help="rows (default: 1000 100000)")
    parser.add_argument("--folder", type=Path, help="for ledgers and images (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--as-server", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--as-client", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_server is not None:
        asyncio.run(serve(options.as_server, options.explained))
        return 0
    if options.as_client is not None:
        client(options.as_client, options)
        return 0
    results = measure(options)
    write_json(options.json, results)
    slow = [row for row in results["throughput"] if row["latency_s"] >= 0.2 and row["share"] < 0.95]
    return 1 if slow or results["growth"] > 0.1 else 0


if __name__ == "__main__":
    sys.exit(main())

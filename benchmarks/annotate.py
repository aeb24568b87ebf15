"""The README's figures of annotation: rows per second against an endpoint of fixed latency, and memory as rows grow.

    python benchmarks/annotate.py                          # about ten minutes on two cores
    python benchmarks/annotate.py --repeats 1 --memory 1000 10000 --json annotate.json

A server in a process of its own answers every question after the same time, as if it had all the accelerators in the
world; nothing but the client and the two cores that it shares with the server can be the limit. The ceiling is
concurrency / latency. Each row is a post of its own, with one of a few hundred JPEG pictures; with `--explained 0` it
is exactly one request, otherwise the teacher is first wrong about that share of the rows, and each of those is two.
What runs is what the stage runs: the endpoint, the ledger with its waits for the disk, the protocol.

Memory is the peak of a fresh process (VmHWM) for each number of rows, which are made up as they are asked for. The
exit status is 1 where throughput at 200 ms and above is below 95% of the ceiling, or memory grows by more than 10%.
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
from PIL import Image

from distill.annotation.annotate import AnnotateSettings, Tally, annotate
from distill.annotation.ledger import Ledger
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.task.labels import LabelSpace
from distill.task.rationale import Rationale, render
from distill.task.sample import Sample

LABELS = LabelSpace()
PICTURES = 300
SIDE = 224
"""Of a picture, in pixels; one has about 10 KB."""
_BEARABLE = 400.0  # requests a second, by which runs are planned that the processor and not the latency bounds
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"


# ---- the server ----


def replies() -> dict[str, bytes]:
    """What the server says for each label, with the header."""
    fields = (
        "The words are those of one who has made up their mind.",
        "It shows a scene in soft and even light.",
        "Words and picture tell the same, and neither has to yield.",
        "The post says what it seems to say.",
    )
    found = {}
    for name in LABELS.names:
        choice = {"message": {"role": "assistant", "content": render(Rationale(*fields, name))}}
        usage = {"prompt_tokens": 400, "completion_tokens": 80}
        body = json.dumps({"choices": [choice | {"finish_reason": "stop"}], "usage": usage}).encode()
        found[name] = HEAD % (len(body), body)
    return found


class Teacher(asyncio.Protocol):
    """One connection: predicts row n as label n mod 3, and `explained` of them wrongly; explains what it is told."""

    def __init__(self, latency_s: float, explained: float) -> None:
        self.latency_s, self.explained = latency_s, explained
        self.replies, self.received, self.expected = replies(), bytearray(), 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.expected:
            head = self.received.find(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", self.received[: max(head, 0)], re.IGNORECASE)
            self.expected = head + 4 + int(length[1]) if length else 0
        if self.expected and len(self.received) >= self.expected:
            answer = self.replies[self.label(bytes(self.received[-4000:]))]
            del self.received[: self.expected]
            self.expected = 0
            asyncio.get_running_loop().call_later(self.latency_s, self.transport.write, answer)

    def label(self, question: bytes) -> str:
        if told := re.search(rb"The sentiment is (\w+)", question):
            return told[1].decode()
        row = int(re.search(rb"row number (\d+)", question)[1])  # type: ignore[index]
        wrong = row * 0.6180339887498949 % 1 < self.explained  # evenly spread
        return LABELS.names[(row + wrong) % 3]


async def serve(latency_s: float, explained: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Teacher(latency_s, explained), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await asyncio.to_thread(sys.stdin.read)  # until the client closes it, were it by being killed


@contextmanager
def served(latency_s: float, explained: float) -> Iterator[str]:
    """A server in a process of its own; its base URL."""
    command = [sys.executable, __file__, "--as-server", str(latency_s), "--explained", str(explained)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdin is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        server.stdin.close()


# ---- the client ----


def draw_pictures(folder: Path) -> None:
    """JPEG pictures of smooth noise."""
    random = np.random.default_rng(0)
    for number in range(PICTURES):
        coarse = Image.fromarray(random.integers(0, 256, (28, 28, 3), dtype=np.uint8))
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=85)


def rows(folder: Path) -> Iterator[Sample]:
    """Posts without end, made up one by one."""
    for n in itertools.count():
        text = f"A post of a few words about nothing in particular, row number {n}, and a tag or two. #one #two"
        yield Sample(f"row-{n}", text, (folder / f"{n % PICTURES}.jpg",), label=LABELS.names[n % 3])


def annotated(samples: Iterator[Sample], url: str, folder: Path, concurrency: int) -> dict[str, Any]:
    """Annotate all samples into a fresh ledger; the counts of `summary.json`."""
    tally = Tally()
    teacher = Endpoint(EndpointSettings(url, "teacher", concurrency=concurrency), LABELS)
    path = folder / "ledger.jsonl"
    path.unlink(missing_ok=True)
    with Ledger(path) as ledger:
        for _ in annotate(samples, LABELS, teacher, AnnotateSettings(), ledger, tally):
            pass
    teacher.close()
    return tally.summary


def throughput(latency_s: float, pictures: Path, options: argparse.Namespace) -> dict[str, float]:
    """One run at one latency: rows and requests a second, and the CPU time of the client.

    The rows fill all slots a whole number of times, and the first connections and the last answers are in the time:
    the ceiling is reached where all of it takes just so many times the latency.
    """
    ceiling = options.concurrency / latency_s
    rounds = max(round(options.seconds * min(ceiling, _BEARABLE) / options.concurrency), 8)
    count = rounds * options.concurrency
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, served(latency_s, options.explained) as url:
        annotated(itertools.islice(rows(pictures), 1), url, Path(folder), 1)  # so that all modules are loaded
        cpu, begin = time.process_time(), time.perf_counter()
        summary = annotated(itertools.islice(rows(pictures), count), url, Path(folder), options.concurrency)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    assert summary["predicted"] + summary["explained"] == count, summary
    requests = summary["paid"]["answers"]
    return {
        "latency_s": latency_s, "rows": count, "rows_per_s": count / seconds, "requests_per_s": requests / seconds,
        "ceiling": ceiling, "share": requests / seconds / ceiling, "cpu_ms": 1000 * cpu / requests,
    }  # fmt: skip


def peak_mb() -> float:
    """Most memory that this process ever had in use (VmHWM), in MB."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000  # type: ignore[index]


def memory(count: int, options: argparse.Namespace) -> dict[str, float]:
    """The peak memory of a fresh process that annotates so many rows."""
    command = [sys.executable, __file__, "--as-client", str(count), "--explained", str(options.explained)]
    command += ["--concurrency", str(options.concurrency)]
    command += ["--folder", str(options.folder)] if options.folder else []
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def client(count: int, options: argparse.Namespace) -> None:
    """What `memory` starts; prints its figures as JSON."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, served(0.02, options.explained) as url:
        draw_pictures(Path(folder))
        begin, before = time.perf_counter(), peak_mb()
        summary = annotated(itertools.islice(rows(Path(folder)), count), url, Path(folder), options.concurrency)
        seconds = time.perf_counter() - begin
    assert summary["predicted"] + summary["explained"] == count, summary
    print(json.dumps({"rows": count, "peak_mb": peak_mb(), "before_mb": before, "rows_per_s": count / seconds}))


# ---- the tables ----


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both tables, printed as they come."""
    print(f"{options.concurrency} questions at once; the teacher is wrong about {options.explained:.0%} of the rows")
    print(f"medians of {options.repeats} runs, on {os.cpu_count()} cores; load average {os.getloadavg()[0]:.1f}\n")
    print("latency   requests/s   rows/s   ceiling   share   lowest   CPU per request")
    speed, sizes = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        draw_pictures(Path(folder))
        for latency_s in options.latencies:
            runs = [throughput(latency_s, Path(folder), options) for _ in range(options.repeats)]
            row = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            lowest = min(run["share"] for run in runs)
            speed.append(row | {"lowest_share": lowest, "runs": runs})
            print(
                f"{1000 * latency_s:>5.0f} ms {row['requests_per_s']:>12.1f} {row['rows_per_s']:>8.1f} "
                f"{row['ceiling']:>9.1f} {row['share']:>7.1%} {lowest:>8.1%} {row['cpu_ms']:>14.2f} ms",
                flush=True,
            )
    print("\n   rows   peak memory   of that before the first   rows/s")
    for count in options.memory:
        sizes.append(memory(count, options))
        print("{rows:>7} {peak_mb:>10.1f} MB {before_mb:>23.1f} MB {rows_per_s:>8.1f}".format(**sizes[-1]), flush=True)
    growth = sizes[-1]["peak_mb"] / sizes[0]["peak_mb"] - 1 if len(sizes) > 1 else 0.0
    print(f"\nmemory grows by {growth:+.1%}")
    return {"throughput": speed, "memory": sizes, "growth": growth, "explained": options.explained}


def main() -> int:
    parser = argparse.ArgumentParser(description="Annotation against an endpoint of fixed latency.")
    number = {"type": float, "metavar": "S"}
    parser.add_argument("--latencies", nargs="*", default=[0.02, 0.2, 1.0, 2.0], help="of the endpoint", **number)
    parser.add_argument("--seconds", default=20.0, help="about how long one run is (default: 20)", **number)
    parser.add_argument("--repeats", type=int, default=3, help="runs at each latency (default: 3)")
    parser.add_argument("--concurrency", type=int, default=64, help="questions at once (default: 64)")
    parser.add_argument("--explained", type=float, default=0.0, help="share of rows with two requests (default: 0)")
    parser.add_argument("--memory", type=int, nargs="*", default=[1_000, 100_000], help="rows (default: 1000 100000)")
    parser.add_argument("--folder", type=Path, help="for ledgers and pictures (default: that for temporary files)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--as-server", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--as-client", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_server is not None:
        asyncio.run(serve(options.as_server, options.explained))
        return 0
    if options.as_client is not None:
        client(options.as_client, options)
        return 0
    figures = measure(options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    slow = [row for row in figures["throughput"] if row["latency_s"] >= 0.2 and row["share"] < 0.95]
    return 1 if slow or figures["growth"] > 0.1 else 0


if __name__ == "__main__":
    sys.exit(main())

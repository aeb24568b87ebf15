"""The README's figures of the gateway under load: 2,000 requests at twice its capacity, its memory, and its end.

    python benchmarks/serve_load.py                                      # starts distill serve on the quickstart
    python benchmarks/serve_load.py --config RECIPE --serve.queue 32     # another recipe, another setting
    python benchmarks/serve_load.py --url http://host:8000 [--pid PID]   # a server that runs; its memory by its pid

Capacity is what the server answers per second while a fixed number of callers wait for their answers (closed loop).
Then requests are sent at twice that rate whatever becomes of them (open loop). Last, SIGTERM with 20 in flight. The
exit status is 1 where an answer is neither 200 nor 429, memory grows by more than 5%, or an answer is lost at the end.
"""

import argparse
import asyncio
import base64
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import psutil

from distill.data.postcards import PostcardSettings, generate

ROOT = Path(__file__).resolve().parents[1]
CALLERS = 32
"""Callers in the closed loop; fewer than the queue holds."""


def posts() -> list[bytes]:
    """Bodies of requests: postcards with their pictures."""
    with tempfile.TemporaryDirectory() as folder:
        cards = Path(folder) / "cards"
        generate(cards, PostcardSettings(labelled=9, unlabelled=0, validation=9, test=198))
        rows = [json.loads(line) for line in (cards / "test.jsonl").read_text().splitlines()]
        pictures = [base64.b64encode((cards / row["image"]).read_bytes()).decode() for row in rows]
    return [
        json.dumps({"text": row["text"], "image": image}).encode() for row, image in zip(rows, pictures, strict=True)
    ]


class Load:
    """Requests to one server, with their statuses and seconds; each on a connection of its own, by hand, for the
    callers must leave the cores to the server."""

    def __init__(self, client: httpx.AsyncClient, pid: int | None) -> None:
        self.client, self.bodies = client, posts()
        self.process = psutil.Process(pid) if pid else None
        self.statuses: Counter[int | str] = Counter()
        self.seconds: dict[int | str, list[float]] = {}

    async def ask(self, number: int) -> int | str:
        """One request; an exception is a status, too."""
        begin = time.perf_counter()
        status: int | str
        try:
            status = await asyncio.wait_for(self._post(self.bodies[number % len(self.bodies)]), 120)
        except (OSError, ValueError, IndexError) as error:
            status = type(error).__name__
        self.statuses[status] += 1
        self.seconds.setdefault(status, []).append(time.perf_counter() - begin)
        return status

    async def _post(self, body: bytes) -> int:
        url = self.client.base_url
        port = url.port or (443 if url.scheme == "https" else 80)
        reader, writer = await asyncio.open_connection(url.host, port, ssl=url.scheme == "https" or None)
        head = f"POST /v1/sentiment HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        reply = await reader.read(-1)
        writer.close()
        json.loads(reply.partition(b"\r\n\r\n")[2])  # whole, or a ValueError
        return int(reply.split(b" ", 2)[1])

    def memory_mb(self) -> float:
        """Resident memory of the server; NaN where its pid is not known."""
        return self.process.memory_info().rss / 1e6 if self.process else float("nan")

    async def capacity(self, seconds: float) -> float:
        """Answers per second in a closed loop."""
        answered, end = 0, time.perf_counter() + seconds

        async def caller(first: int) -> None:
            nonlocal answered
            number = first
            while time.perf_counter() < end:
                status = await self.ask(number)
                answered += status == 200
                number += CALLERS

        begin = time.perf_counter()
        await asyncio.gather(*(caller(number) for number in range(CALLERS)))
        return answered / (time.perf_counter() - begin)

    async def flood(self, count: int, rate: float) -> tuple[float, float, float]:
        """An open loop; the rate that was reached, and memory after the first 200 answers and at the end."""
        self.statuses.clear()
        self.seconds.clear()
        early = float("nan")
        begin = time.perf_counter()
        tasks = set()
        for number in range(count):
            await asyncio.sleep(max(begin + number / rate - time.perf_counter(), 0))
            tasks.add(asyncio.create_task(self.ask(number)))
            if early != early and sum(self.statuses.values()) >= 200:
                early = self.memory_mb()
        reached = count / (time.perf_counter() - begin)
        await asyncio.gather(*tasks)
        return reached, early, self.memory_mb()

    async def end(self, server: subprocess.Popen[bytes], count: int) -> tuple[int, int, int]:
        """SIGTERM with requests in flight: how many those were, how many were answered, and the exit status."""
        asked = [asyncio.create_task(self.ask(number)) for number in range(count)]
        inside = 0
        while inside < count and not any(task.done() for task in asked):
            inside = await self.in_house()
        server.send_signal(signal.SIGTERM)
        answers = Counter(await asyncio.gather(*asked))
        status = await asyncio.to_thread(server.wait, 120)
        return inside, answers[200], status

    async def in_house(self) -> int:
        """How many requests are in the house."""
        lines = (await self.client.get("/metrics")).text.splitlines()
        return int(float(next(line for line in lines if line.startswith("distill_queue_depth ")).split()[1]))

    async def ready(self, server: subprocess.Popen[bytes] | None) -> None:
        """Wait until the server says that it is ready."""
        while True:
            if server is not None and server.poll() is not None:
                raise SystemExit(f"distill serve ended with status {server.returncode}")
            try:
                if (await self.client.get("/health/ready")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)


def report(load: Load, rate: float, reached: float, early: float, late: float) -> bool:
    """Print the figures of the open loop; whether they are as they should be."""
    print(f"capacity                {rate:.1f} answers a second, {CALLERS} callers in a closed loop")
    print(f"open loop               {sum(load.statuses.values())} requests, {reached:.1f} a second")
    for status, count in sorted(load.statuses.items(), key=str):
        points = np.percentile(load.seconds[status], (50, 95, 99, 100))
        shown = ", ".join(f"p{name} {value:.2f} s" for name, value in zip((50, 95, 99, 100), points, strict=True))
        print(f"status {status!s:<16} {count:>5}   {shown}")
    growth = late / early - 1
    print(f"resident memory         {early:.0f} MB after 200 answers, {late:.0f} MB at the end ({growth:+.1%})")
    return set(load.statuses) <= {200, 429} and not growth > 0.05


async def run(url: str, server: subprocess.Popen[bytes] | None, pid: int | None, options: argparse.Namespace) -> bool:
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        load = Load(client, server.pid if server else pid)
        await load.ready(server)
        rate = await load.capacity(options.seconds)
        well = report(load, rate, *await load.flood(options.requests, 2 * rate))
        if server is not None:
            inside, answered, status = await load.end(server, 20)
            print(f"SIGTERM                 {inside} in flight, {answered} answers, exit status {status}")
            well &= (inside, answered, status) == (20, 20, 0)
    return well


def main() -> int:
    parser = argparse.ArgumentParser(description="The gateway under twice the load that it can bear.")
    parser.add_argument("--config", default="recipes/quickstart.yaml", help="recipe to serve (default: the quickstart)")
    parser.add_argument("--url", help="address of a server that runs already")
    parser.add_argument("--pid", type=int, help="its process, whose memory is watched")
    parser.add_argument("--requests", type=int, default=2000, help="requests in the open loop (default: 2000)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the closed loop (default: 20)")
    options, fields = parser.parse_known_args()
    if options.url:
        return 0 if asyncio.run(run(options.url, None, options.pid, options)) else 1
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [str(Path(sys.executable).with_name("distill")), "serve", "--config", options.config]
    command += ["--serve.port", str(port), *fields]
    server = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    try:
        well = asyncio.run(run(f"http://127.0.0.1:{port}", server, None, options))
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

"""Load test of the gateway: 2,000 requests at twice its capacity, its memory, and a shutdown with requests in flight.

    python benchmarks/serve_load.py                                      # starts distill serve on the quickstart
    python benchmarks/serve_load.py --config RECIPE --serve.queue 32     # another recipe and setting
    python benchmarks/serve_load.py --url http://host:8000 [--pid PID]   # a running server; memory needs its pid

Capacity is the number of responses per second in a closed loop: a fixed number of callers, each with one request in
flight. Then requests are sent at twice that rate in an open loop, that is, without waiting for responses. At the end,
the server receives SIGTERM with 20 requests in flight. The exit status is 1 if a status is neither 200 nor 429, if
memory grows by more than 5%, or if a request in flight at shutdown gets no response.
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
"""Callers in the closed loop; below the queue limit of the gateway."""


def request_bodies() -> list[bytes]:
    """Request bodies: postcards with their images."""
    with tempfile.TemporaryDirectory() as folder:
        cards = Path(folder) / "cards"
        generate(cards, PostcardSettings(labelled=9, unlabelled=0, validation=9, test=198))
        rows = [json.loads(line) for line in (cards / "test.jsonl").read_text().splitlines()]
        images = [base64.b64encode((cards / row["image"]).read_bytes()).decode() for row in rows]
    return [json.dumps({"text": row["text"], "image": image}).encode() for row, image in zip(rows, images, strict=True)]


class Load:
    """A client that records the status and time of each request.

    Each request opens its own connection. Requests are written to the socket directly, because an HTTP client would
    take CPU time from the server.
    """

    def __init__(self, client: httpx.AsyncClient, pid: int | None) -> None:
        self.client, self.bodies = client, request_bodies()
        self.process = psutil.Process(pid) if pid else None
        self.statuses: Counter[int | str] = Counter()
        self.seconds: dict[int | str, list[float]] = {}

    async def send(self, number: int) -> int | str:
        """Send one request. Returns its HTTP status or the name of an exception."""
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
        json.loads(reply.partition(b"\r\n\r\n")[2])  # raises ValueError on a truncated body
        return int(reply.split(b" ", 2)[1])

    def memory_mb(self) -> float:
        """Resident memory of the server, or NaN if its pid is unknown."""
        return self.process.memory_info().rss / 1e6 if self.process else float("nan")

    async def capacity(self, seconds: float) -> float:
        """Responses per second in a closed loop."""
        answered, end = 0, time.perf_counter() + seconds

        async def caller(first: int) -> None:
            nonlocal answered
            number = first
            while time.perf_counter() < end:
                status = await self.send(number)
                answered += status == 200
                number += CALLERS

        begin = time.perf_counter()
        await asyncio.gather(*(caller(number) for number in range(CALLERS)))
        return answered / (time.perf_counter() - begin)

    async def open_loop(self, count: int, rate: float) -> tuple[float, float, float]:
        """Send requests at a fixed rate.

        Returns the rate reached, and memory in MB after the first 200 responses and at the end.
        """
        self.statuses.clear()
        self.seconds.clear()
        early = float("nan")
        begin = time.perf_counter()
        tasks = set()
        for number in range(count):
            await asyncio.sleep(max(begin + number / rate - time.perf_counter(), 0))
            tasks.add(asyncio.create_task(self.send(number)))
            if np.isnan(early) and sum(self.statuses.values()) >= 200:
                early = self.memory_mb()
        reached = count / (time.perf_counter() - begin)
        await asyncio.gather(*tasks)
        return reached, early, self.memory_mb()

    async def shut_down(self, server: subprocess.Popen[bytes], count: int) -> tuple[int, int, int]:
        """Send SIGTERM with requests in flight. Returns their number, the number of 200s, and the exit status."""
        requests = [asyncio.create_task(self.send(number)) for number in range(count)]
        in_flight = 0
        while in_flight < count and not any(request.done() for request in requests):
            in_flight = await self.in_flight()
        server.send_signal(signal.SIGTERM)
        statuses = Counter(await asyncio.gather(*requests))
        exit_status = await asyncio.to_thread(server.wait, 120)
        return in_flight, statuses[200], exit_status

    async def in_flight(self) -> int:
        """Number of admitted requests."""
        lines = (await self.client.get("/metrics")).text.splitlines()
        return int(float(next(line for line in lines if line.startswith("distill_queue_depth ")).split()[1]))

    async def ready(self, server: subprocess.Popen[bytes] | None) -> None:
        """Wait until the server reports ready."""
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
    """Print the results of both loops. Returns whether all requirements are met."""
    print(f"capacity                {rate:.1f} responses per second, {CALLERS} callers in a closed loop")
    print(f"open loop               {sum(load.statuses.values())} requests, {reached:.1f} per second")
    for status, count in sorted(load.statuses.items(), key=str):
        points = np.percentile(load.seconds[status], (50, 95, 99, 100))
        shown = ", ".join(f"p{name} {value:.2f} s" for name, value in zip((50, 95, 99, 100), points, strict=True))
        print(f"status {status!s:<16} {count:>5}   {shown}")
    growth = late / early - 1
    print(f"resident memory         {early:.0f} MB after 200 responses, {late:.0f} MB at the end ({growth:+.1%})")
    return set(load.statuses) <= {200, 429} and not growth > 0.05


async def run(url: str, server: subprocess.Popen[bytes] | None, pid: int | None, options: argparse.Namespace) -> bool:
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        load = Load(client, server.pid if server else pid)
        await load.ready(server)
        rate = await load.capacity(options.seconds)
        passed = report(load, rate, *await load.open_loop(options.requests, 2 * rate))
        if server is not None:
            in_flight, answered, status = await load.shut_down(server, 20)
            print(f"SIGTERM                 {in_flight} in flight, {answered} answered, exit status {status}")
            passed &= (in_flight, answered, status) == (20, 20, 0)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description="Load test of the gateway at twice its capacity.")
    parser.add_argument("--config", default="recipes/quickstart.yaml", help="recipe to serve (default: the quickstart)")
    parser.add_argument("--url", help="address of a running server")
    parser.add_argument("--pid", type=int, help="pid of that server, to measure its memory")
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
        passed = asyncio.run(run(f"http://127.0.0.1:{port}", server, None, options))
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

"""The simulation of `distill simulate` beside the real gateway under the same load.

    python -m benchmarks.simulation_check                              # 3 rounds, about 25 minutes
    python -m benchmarks.simulation_check --rounds 1 --seconds 40 --json check.json

The gateway runs in a process of its own with a tiny student whose batches take scripted times, and with a scripted
teacher in another process. Each round first measures service times at low load: groups of simultaneous requests for
the times of batches by size, which the gateway's `/metrics` has, and single requests for the time outside the models
and for the shares of deferred and reviewed posts. Then each scenario puts Poisson arrivals on the gateway in an open
loop, and the simulation gets the arrival times, the times measured at low load and the shares: nothing is fitted to the
load. A figure is the median over the rounds; the simulated one of a round is the mean of 20 simulations. `difference`
is relative to the measured value. The exit status is 1 if a difference is above 15%.

The last two columns are those of a simulation with the times of batches that the gateway measured under this load. On a
busy machine its batches take longer there; what differs in the last column too is not due to that.
"""

import argparse
import asyncio
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.measuring import write_json
from distill.data.postcards import THINGS, WORDS
from distill.planning import measured
from distill.planning.load import Part
from distill.planning.service import Service, batch_times
from distill.planning.simulation import Replica
from distill.planning.text import align
from distill.serving.settings import ServeSettings

ROOT = Path(__file__).resolve().parents[1]
SERVE: dict[str, Any] = {
    "deadline_s": 10.0, "batch_size": 8, "batch_wait_ms": 20.0, "queue": 48, "teacher_concurrency": 8,
    "breaker_failures": 3, "breaker_retry_s": 6.0, "explain": "none", "max_new_tokens": 8,
}  # fmt: skip
CLASSIFY, REASON = (0.16, 0.04), (0.32, 0.04)
"""Seconds of a batch of the student: a constant, and one for each post."""
TEACHER_TIMEOUT_S = 2.5
TOLERANCE = 0.15
SIMULATIONS = 20
POSTS = 100


Results = dict[str, list[list[dict[str, float]]]]
"""Figures of each round by scenario: measured, simulated, and simulated with the times under this load."""


@dataclass(frozen=True)
class Scenario:
    """A load: posts per second in relation to the rate of full batches; the teacher is dead in the middle third."""

    name: str
    load: float
    rationale: bool = False
    dead: bool = False


SCENARIOS = (
    Scenario("low", 0.3),
    Scenario("medium", 0.6),
    Scenario("near saturation", 0.9),
    Scenario("overload", 1.3),
    Scenario("with rationales", 0.7, rationale=True),
    Scenario("dead teacher", 0.5, dead=True),
)


@dataclass
class Reply:
    """One reply: when it was asked for, its time, and what the gateway says about it."""

    sent: float
    seconds: float
    status: int
    degraded: bool = False
    calls: int = 0


@dataclass
class Client:
    """A client that writes each request to a connection of its own, without the cost of an HTTP library."""

    port: int
    posts: Sequence[str]
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    async def ask(self, rationale: bool = False, post: str | None = None) -> Reply:
        """Ask about a random post, or a given one."""
        text = post or self.posts[self.rng.integers(len(self.posts))]
        body = json.dumps({"text": text, "rationale": rationale}).encode()
        sent = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST /v1/sentiment HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        reply = await reader.read(-1)
        seconds = time.perf_counter() - sent
        writer.close()
        content = json.loads(reply.partition(b"\r\n\r\n")[2])
        status = int(reply.split(b" ", 2)[1])
        return Reply(sent, seconds, status, content.get("degraded", False), content.get("teacher_calls", 0))

    async def metrics(self) -> str:
        """The gateway's page of metrics."""
        async with httpx.AsyncClient() as http:
            return (await http.get(f"http://127.0.0.1:{self.port}/metrics")).text

    async def open_loop(self, arrivals: np.ndarray, rationale: bool) -> list[Reply]:
        """Ask at the given times, without waiting for answers."""
        begin, tasks = time.perf_counter(), []
        for arrival in arrivals:
            await asyncio.sleep(max(begin + arrival - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(self.ask(rationale)))
        return await asyncio.gather(*tasks)


async def calibrate(client: Client, page: Path, teacher_seconds: np.ndarray) -> Service:
    """The service as low load shows it."""
    before = await client.metrics()
    singles = [await client.ask(post=post) for post in client.posts]
    for rationale in (False, True):
        for size in (1, 2, 4, 6, 8) * 3:
            await asyncio.gather(*(client.ask(rationale) for _ in range(size)))
    page.write_text(_batches_since(before, await client.metrics()))
    times = measured.batch_seconds(page)
    settings = ServeSettings(**SERVE)
    own = [reply.seconds for reply in singles if reply.calls == 0]
    asked = [reply.seconds for reply in singles if reply.calls == 1]
    calls = [reply.calls for reply in singles]
    classify = batch_times(times["classify"])
    alone = classify(1) + settings.batch_wait_ms / 1000
    # what a call takes besides the scripted seconds, from the posts that have one call
    beside = statistics.mean(asked) - statistics.mean(own) - float(teacher_seconds.mean()) if asked else 0.0
    return Service(
        settings,
        {"classify": classify, "reason": batch_times(times["reason"])},
        teacher_seconds=teacher_seconds + max(beside, 0.0),
        teacher_limit_s=TEACHER_TIMEOUT_S,
        long_s=min(settings.answer_s, TEACHER_TIMEOUT_S) / 2,
        deferred=sum(count > 0 for count in calls) / len(calls),
        reviewed=sum(count > 1 for count in calls) / max(sum(count > 0 for count in calls), 1),
        explained=1.0,
        overhead_s=max(statistics.median(own) - alone, 0.0),
    )


def _batches_since(before: str, after: str) -> str:
    """The times of the student's batches on one page of metrics that are not on an earlier one, as such a page."""

    def values(page: str) -> dict[str, float]:
        lines = [
            line.rpartition(" ") for line in page.splitlines() if re.match(r"distill_student_batch_seconds_[sc]", line)
        ]
        return {name: float(value) for name, _, value in lines}

    earlier = values(before)
    new = {name: value - earlier.get(name, 0.0) for name, value in values(after).items()}
    return "".join(f"{name} {value}\n" for name, value in new.items() if new[name.replace("_sum{", "_count{")])


def figures(seconds: np.ndarray, refused: np.ndarray, degraded: np.ndarray, length: float) -> dict[str, float]:
    """The compared figures of the posts of one scenario."""
    answered = seconds[~refused]
    p50, p99 = np.quantile(answered, (0.5, 0.99)) if len(answered) else (np.nan, np.nan)
    return {"p50 s": float(p50), "p99 s": float(p99), "degraded": float(degraded.mean()),
            "refused": float(refused.mean()), "answers/s": float(len(answered) / length)}  # fmt: skip


def simulated(service: Service, arrivals: np.ndarray, seconds: float, dead: bool, seed: int) -> dict[str, float]:
    """The figures of the simulation with these arrivals: means over several simulations."""
    edges = np.array([0.0, seconds / 3, 2 * seconds / 3, seconds]) if dead else np.array([0.0, seconds])
    parts = [
        Part(n, high - low, 1.0, arrivals[(arrivals >= low) & (arrivals < high)] - low)
        for n, (low, high) in enumerate(itertools.pairwise(edges))
    ]
    found = []
    for run in range(SIMULATIONS):
        records = Replica(service, [False, True, False], np.random.default_rng([seed, run])).run(parts)
        outcome = np.array(records.outcome)
        found.append(figures(np.array(records.seconds), outcome == "refused", outcome == "degraded", seconds))
    return {name: statistics.mean(one[name] for one in found) for name in found[0]}


async def run_round(number: int, client: Client, folder: Path, options: argparse.Namespace, teacher: np.ndarray,
                    results: Results) -> None:  # fmt: skip
    """Calibrate, and measure and simulate each scenario."""
    dead_file = folder / "dead"
    calibrated = await calibrate(client, folder / "metrics.txt", teacher)
    for scenario in SCENARIOS:
        if options.only and scenario.name not in options.only:
            continue
        service = replace(calibrated, rationale=scenario.rationale)
        rng = np.random.default_rng([options.seed, number, SCENARIOS.index(scenario)])
        rate, length = scenario.load / service.student_s, float(options.seconds)
        arrivals = np.sort(rng.uniform(0, length, rng.poisson(rate * length)))
        before = await client.metrics()
        load = asyncio.create_task(client.open_loop(arrivals, scenario.rationale))
        if scenario.dead:
            await asyncio.sleep(length / 3)
            dead_file.touch()
            await asyncio.sleep(length / 3)
            dead_file.unlink()
        replies = await load
        if wrong := {reply.status for reply in replies} - {200, 429}:
            raise SystemExit(f"{scenario.name}: replies with status {wrong}")
        real = figures(
            np.array([reply.seconds for reply in replies]), np.array([reply.status == 429 for reply in replies]),
            np.array([reply.degraded for reply in replies]), length,
        )  # fmt: skip
        (folder / "metrics.txt").write_text(_batches_since(before, await client.metrics()))
        under_load = {kind: batch_times(one) for kind, one in measured.batch_seconds(folder / "metrics.txt").items()}
        slowed = replace(service, students=service.students | under_load)
        sides = [simulated(one, arrivals, length, scenario.dead, number) for one in (service, slowed)]
        results.setdefault(scenario.name, []).append([real, *sides])
        late = max(reply.sent for reply in replies) - min(reply.sent for reply in replies) - np.ptp(arrivals)
        print(
            f"round {number + 1}, {scenario.name}: {len(arrivals)} posts at {rate:.1f} a second (the last one sent "
            f"{1000 * late:+.0f} ms late), batch of 1 {1000 * service.student('classify', 1):.0f} ms, of 8 "
            f"{1000 * service.student('classify', 8):.0f} ms, outside the models {1000 * service.overhead_s:.1f} ms, "
            f"deferred {service.deferred:.0%}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True,
        )  # fmt: skip
        await asyncio.sleep(SERVE["breaker_retry_s"] if scenario.dead else 1.0)
        if scenario.dead:
            for post in client.posts:  # an answer closes the breaker
                await client.ask(post=post)


def table(results: Results) -> tuple[str, float]:
    """The medians as text, and the largest relative difference of the simulation with the times at low load."""
    rows, worst = [["scenario", "figure", "measured", "simulated", "difference", "with its times", "difference"]], 0.0
    for name, rounds in results.items():
        for figure in rounds[0][0]:
            real, *sides = (statistics.median(one[side][figure] for one in rounds) for side in range(3))
            differences = [abs(side / real - 1) if real > 0.005 else float(side > 0.01) for side in sides]
            worst = max(worst, differences[0])
            shown = [f"{side / real - 1:+.1%}" if real > 0.005 else "–" for side in sides]  # not of a few posts
            rows.append([name, figure, f"{real:.3g}", f"{sides[0]:.3g}", shown[0], f"{sides[1]:.3g}", shown[1]])
    return align(rows, left=2), worst


async def compare(options: argparse.Namespace, port: int, posts: Sequence[str], folder: Path, teacher: np.ndarray,
                  servers: Sequence["subprocess.Popen[bytes]"]) -> int:  # fmt: skip
    client = Client(port, posts)
    results: Results = {}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        while True:
            if any(server.poll() is not None for server in servers):
                raise SystemExit("a server has ended")
            try:
                if (await http.get("/health/ready")).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)
    for number in range(options.rounds):
        await run_round(number, client, folder, options, teacher, results)
    text, worst = table(results)
    print(f"{options.rounds} rounds of {options.seconds:g} s each\n\n{text}\n")
    print(f"largest difference: {worst:.1%}; the aim is {TOLERANCE:.0%}")
    write_json(options.json, results)
    return 0 if worst <= TOLERANCE else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="The simulation beside the real gateway.")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of each load (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the arrivals (default: 1)")
    parser.add_argument("--only", nargs="+", help="names of the scenarios (default: all)")
    parser.add_argument("--json", type=Path, help="file for all results")
    options = parser.parse_args()
    ports = []
    for _ in range(2):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            ports.append(unused.getsockname()[1])
    rng = np.random.default_rng(7)
    teacher = rng.permutation(0.4 * np.exp(0.3 * _normal_quantiles(200)))
    things, words = rng.choice(THINGS, POSTS), rng.choice([word for few in WORDS.values() for word in few], POSTS)
    posts = [
        f"Greetings from the {word} {thing}, card {n}."
        for n, (word, thing) in enumerate(zip(words, things, strict=True))
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {
            "teacher_port": ports[0], "teacher_seconds": teacher.tolist(), "dead_file": str(folder / "dead"),
            "teacher_timeout_s": TEACHER_TIMEOUT_S, "classify": CLASSIFY, "reason": REASON, "posts": posts,
            "deferred": 0.35, "serve": SERVE | {"port": ports[1]},
        }  # fmt: skip
        file = folder / "settings.json"
        file.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "benchmarks.simulation_servers"]
        servers = [subprocess.Popen([*command, kind, str(file)], cwd=ROOT) for kind in ("teacher", "gateway")]
        try:
            return asyncio.run(compare(options, ports[1], posts, folder, teacher, servers))
        finally:
            for server in servers:
                server.kill()
                server.wait()


def _normal_quantiles(count: int) -> np.ndarray:
    """Evenly spaced quantiles of the standard normal distribution."""
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((n + 0.5) / count) for n in range(count)])


if __name__ == "__main__":
    sys.exit(main())

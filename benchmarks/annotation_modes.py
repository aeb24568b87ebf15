"""The ways to annotate, each killed twice: what is missing, what was paid for twice, and whether the ledgers agree.

    python -m benchmarks.annotation_modes                       # 2,000 posts, about half a minute on two cores
    python -m benchmarks.annotation_modes --rows 300 --json modes.json

A server on this machine answers chat requests and has the batch API of OpenAI. A client process annotates the posts and
is killed with SIGKILL twice, then runs to its end: with direct calls after a third and two thirds of the answers, with
batches while it polls the first one, and while it writes the answers of that one to the ledger, on Ray after a quarter
and a half of the answers; there a worker is killed as well, after three quarters. The teacher is wrong on
a fifth of the posts, which are explained: the second batch.

`missing` are posts without a rationale. `twice in the ledger` are answers that the ledger has more than once, and
`twice from the server` answers that the server gave to a request that it had answered before: of direct calls and on
Ray, those that were in flight at a kill, at most `concurrency` of each process that asked. The exit status is 1 if
anything is missing, if batches pay for an answer twice, or if the ledgers differ.
"""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measuring import write_json
from distill.annotation.annotate import AnnotateSettings, AnnotationCounts, Kept, annotate
from distill.annotation.batch import Batches
from distill.annotation.cached_teacher import CachedTeacher, Start
from distill.annotation.ledger import Ledger
from distill.models.endpoint import BatchSettings, Endpoint, EndpointSettings
from distill.task.labels import LabelSpace
from distill.task.sample import Sample
from distill.workers.fill import FOLDER, fill
from distill.workers.settings import RaySettings
from tests.models.batch_server import BatchServer
from tests.models.openai_server import COLOURS, write_image

LABELS = LabelSpace()
CONCURRENCY = 16
WRONG = 5  # the teacher is wrong on every fifth post

MODES = ("direct", "batch", "ray")
BATCH = BatchSettings(poll_s=0.5, max_requests=500)
RAY = RaySettings(address="local", workers=2, batch_size=100)


def posts(images: Path, count: int) -> list[Sample]:
    """Posts with one of a few images; every fifth image has the colour of another label."""
    names = list(COLOURS)
    files = [images / f"{name}.png" for name in names]
    return [
        Sample(f"row-{n}", f"post number {n}", (files[(n + (n % WRONG == 0)) % 3],), label=names[n % 3])
        for n in range(count)
    ]


def client(mode: str, url: str, images: Path, folder: Path, count: int) -> None:
    """Annotate the posts, as the stage does; prints the number of posts with a rationale."""
    samples, settings = posts(images, count), BATCH if mode == "batch" else None
    teacher = Endpoint(EndpointSettings(url, "teacher", concurrency=CONCURRENCY), LABELS)

    def prefill(cached: CachedTeacher, start: Start) -> None:
        if mode == "ray":
            fill(cached, folder, RAY, images, samples, [start])
        elif settings is not None:
            Batches(cached, folder, settings, "benchmark", "annotate").fill(samples, [start])

    with Ledger(folder / "ledger.jsonl") as ledger:
        results = annotate(samples, LABELS, teacher, AnnotateSettings(), ledger, AnnotationCounts(), prefill=prefill)
        print(sum(isinstance(result, Kept) for result in results))


def ledger_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a ledger."""
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_bytes().splitlines()]


def kill_worker(driver: int) -> None:
    """Kill a worker of a driver."""
    workers = [item for item in psutil.Process(driver).children(recursive=True) if item.name().startswith("ray::Map")]
    workers[0].kill()


def annotate_with_kills(mode: str, images: Path, folder: Path, count: int) -> dict[str, Any]:
    """Annotate the posts with one mode, killed twice. Returns the counts."""
    expected = count + count // WRONG
    command = [
        sys.executable,
        "-m",
        "benchmarks.annotation_modes",
        "--as-client",
        mode,
        str(images),
        str(folder),
        "--rows",
        str(count),
    ]
    with BatchServer(polls=4) as server:
        server.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # connections of killed clients

        def written() -> int:
            found = set[bytes]()  # keys; during a merge, a shard and the ledger have the same
            for path in [folder / "ledger.jsonl", *(folder / FOLDER).glob("*/*.jsonl")]:
                with contextlib.suppress(FileNotFoundError):
                    found |= {line[:75] for line in path.read_bytes().splitlines()}
            return len(found)

        def polled() -> bool:
            return any(batch["polls"] > 1 for batch in list(server.batches.values()))

        moments: Mapping[str, list[Callable[[], bool]]] = {
            "direct": [lambda: written() > expected / 3, lambda: written() > 2 * expected / 3],
            "batch": [polled, lambda: written() > 10],
            "ray": [lambda: written() > expected / 4, lambda: written() > expected / 2],
        }
        kills, begin = [], time.perf_counter()
        for moment in moments[mode]:
            with subprocess.Popen([*command, "--url", server.url], stdout=subprocess.PIPE) as child:
                while not moment() and child.poll() is None:
                    time.sleep(0.001)
                child.kill()
            kills.append(written())
        with subprocess.Popen([*command, "--url", server.url], stdout=subprocess.PIPE, text=True) as child:
            if mode == "ray":
                while written() < 3 * expected / 4 and child.poll() is None:
                    time.sleep(0.001)
                kill_worker(child.pid)
                kills.append(written())
            kept, _ = child.communicate()  # Ray may print messages before the number
        seconds = time.perf_counter() - begin
        keys = [line["key"] for line in ledger_lines(folder)]
        return {
            "posts": count, "seconds": seconds, "ledger_at_kills": kills, "missing": count - int(kept.split()[-1]),
            "answers": len(keys), "twice_in_ledger": len(keys) - len(set(keys)),
            "twice_from_server": server.paid_twice, "direct_requests": server.requests, "batches": len(server.batches),
        }  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all modes. Prints the table row by row."""
    print(f"{options.rows} posts, {CONCURRENCY} concurrent requests, each mode killed twice\n")
    print("mode     answers   missing   twice in the ledger   twice from the server   batches   seconds   at the kills")
    found: dict[str, Any] = {}
    ledgers = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for name in COLOURS:
            write_image(images / f"{name}.png", name, size=64)
        for mode in MODES:
            run = Path(folder) / mode
            run.mkdir()
            row = found[mode] = annotate_with_kills(mode, images, run, options.rows)
            ledgers.append({line["key"]: line["answer"]["text"] for line in ledger_lines(run)})
            print(
                f"{mode:<8}{row['answers']:>8}{row['missing']:>10}{row['twice_in_ledger']:>22}"
                f"{row['twice_from_server']:>24}{row['batches']:>10}{row['seconds']:>10.1f}   {row['ledger_at_kills']}",
                flush=True,
            )
    same = all(one == other for one, other in itertools.pairwise(ledgers))
    print(f"\nthe ledgers {'agree' if same else 'differ'}")
    return {"modes": found, "same_ledger": same}


def main() -> int:
    parser = argparse.ArgumentParser(description="The ways to annotate, each killed twice.")
    parser.add_argument("--rows", type=int, default=2000, help="posts (default: 2000)")
    parser.add_argument("--folder", type=Path, help="for ledgers and images (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--as-client", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_client:
        mode, images, folder = options.as_client
        client(mode, options.url, Path(images), Path(folder), options.rows)
        return 0
    results = measure(options)
    write_json(options.json, results)
    rows = results["modes"].values()
    bad = (
        any(row["missing"] or row["twice_in_ledger"] for row in rows) or results["modes"]["batch"]["twice_from_server"]
    )
    return 1 if bad or not results["same_ledger"] else 0


if __name__ == "__main__":
    sys.exit(main())

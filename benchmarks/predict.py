"""`distill predict` on many posts: rate, memory, and what is left after two kills.

    python benchmarks/predict.py runs/quickstart [--posts 20000]

The posts are copies of the test posts of the run with new ids. The command is killed (SIGKILL) after a third and after
two thirds of the posts, and started again. Prints the numbers of missing and duplicate rows, the resident memory at the
tenths of the last start, and the rate beside that of `Student.classify` on posts in memory in one process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

import distill
from distill.data import jsonl


def write_posts(run: Path, count: int, path: Path) -> list[dict[str, Any]]:
    """Write `count` posts with paths of their images in the folder of the data; returns the first 2,048 at most."""
    rows = [row.fields for row in jsonl.read(run / "evaluate" / "predictions.jsonl")]
    posts = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            post = {"id": f"{row['id']}-{number}", "text": row["text"], "images": row["images"]}
            file.write(json.dumps(post) + "\n")
            posts += [post] if number < 2048 else []
    return posts


def lines(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def run_until(command: list[str], results: Path, stop: int, total: int) -> list[tuple[int, float]]:
    """Start the command and kill it after `stop` results, or wait for its end. Returns (results, GB) every second."""
    process, seen = subprocess.Popen(command), []
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        done = lines(results)
        seen.append((done, watched.memory_info().rss / 1e9))
        if stop <= done < total:
            process.kill()
        time.sleep(1)
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description="Rate and memory of `distill predict`, with two kills.")
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--posts", type=int, default=20_000, help="default: 20000")
    options = parser.parse_args()
    root = Path(distill.Run(options.run).recipe.data.root)
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch) / "new.jsonl", Path(scratch) / "labels.jsonl"
        posts = write_posts(options.run, options.posts, source)
        command = [str(Path(sys.executable).with_name("distill")), "predict", "--run", str(options.run)]
        command += ["--input", str(source), "--output", str(output), "--images", str(root)]
        results = output.with_name(f".{output.name}.parts") / "results.jsonl"
        for part in (1, 2):
            run_until(command, results, part * options.posts // 3, options.posts)
        done, begin = lines(results), time.perf_counter()
        seen = run_until(command, results, options.posts, options.posts)
        seconds = time.perf_counter() - begin
        with output.open(encoding="utf-8") as file:
            ids = [json.loads(line)["id"] for line in file]
    student = distill.Student.from_run(options.run)
    paths = [{**post, "images": [str(root / name) for name in post["images"]]} for post in posts]
    begin = time.perf_counter()
    student.classify(paths)
    alone = len(paths) / (time.perf_counter() - begin)
    print(f"missing {options.posts - len(set(ids))}, duplicate {len(ids) - len(set(ids))}")
    step = max(1, len(seen) // 10)
    print("memory, GB, by results:", ", ".join(f"{count} {size:.2f}" for count, size in seen[::step]))
    rate = (options.posts - done) / seconds
    print(f"last start: {rate:.1f} posts/s with start and output; in memory {alone:.1f} posts/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

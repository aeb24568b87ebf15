"""Stages on a Ray cluster of two nodes on this machine: the results of one process, whoever is killed."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from distill import chain, predict
from distill.annotation.annotate import AnnotateSettings, Kept
from distill.annotation.ledger import Ledger
from distill.data.corpus import Corpus
from distill.data.jsonl import read
from distill.errors import RunError, SettingsError
from distill.models.backbone import ModelSettings
from distill.models.source import ModelSource
from distill.recipe import Recipe
from distill.workers import fill
from distill.workers.settings import RaySettings
from tests.models.batch_server import BatchServer
from tests.workers.annotating import CONCURRENCY, LABELS, endpoint, on_ray, posts

Answers = dict[str, str]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of the cluster."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        yield nodes.address
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture
def settings(address: str) -> RaySettings:
    return RaySettings(address=address, workers=2, batch_size=10)


def ledger(folder: Path) -> Answers:
    """The texts of a ledger by key; each key is there once."""
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    found = {line["key"]: line["answer"]["text"] for line in lines}
    assert len(found) == len(lines)
    return found


def workers() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if each.name().startswith("ray::MapWorker")]


def kill_a_worker(server: BatchServer, after: int) -> None:
    while server.requests < after:
        time.sleep(0.01)
    workers()[0].kill()


def test_an_endpoint_whose_worker_is_killed(settings: RaySettings, tmp_path: Path) -> None:
    samples = posts(tmp_path / "data", 60)
    for name, kill_after in (("direct", 0), ("ray", 25)):
        with BatchServer(delay_s=0.05) as server:
            killer = threading.Thread(target=kill_a_worker, args=(server, kill_after))
            if kill_after:
                killer.start()
            chosen = settings if kill_after else None
            results = on_ray(tmp_path / name, tmp_path / "data", samples, endpoint(server.url), chosen)
            assert server.paid_twice <= (CONCURRENCY if kill_after else 0)
            if kill_after:
                killer.join()
        assert [item.sample.id for item in results if isinstance(item, Kept)] == [sample.id for sample in samples]
    assert ledger(tmp_path / "ray") == ledger(tmp_path / "direct")
    assert not (tmp_path / "ray" / fill.FOLDER).exists()


def test_a_driver_that_is_killed_and_a_line_that_is_cut(
    address: str, settings: RaySettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, folder = tmp_path / "data", tmp_path / "stage"
    samples = posts(root, 80)
    with BatchServer(delay_s=0.05) as server:
        program = [sys.executable, "-m", "tests.workers.annotating", address, server.url]
        with subprocess.Popen([*program, str(folder), str(root), "80"]) as child:
            while server.requests < 40 and child.poll() is None:
                time.sleep(0.01)
            child.kill()
        assert server.requests < 90, "the driver was killed too late"
        shards = sorted((folder / fill.FOLDER).glob("*/*.jsonl"))
        for shard in shards:
            fill._when_free(partial(Ledger, shard)).close()  # the workers have ended
        asked = server.requests
        with shards[0].open("ab") as file:
            file.write(b'{"key": "cut in the mid')
        kept = sum(shard.read_bytes().count(b"\n") for shard in shards)
        assert kept >= asked - 2 * CONCURRENCY
        results = on_ray(folder, root, samples, endpoint(server.url), settings)
        assert server.paid_twice <= 2 * CONCURRENCY
    assert "truncated line" in caplog.text
    assert [item.sample.id for item in results if isinstance(item, Kept)] == [sample.id for sample in samples]
    assert len(ledger(folder)) == 79 + 16  # the copy is not asked about; every fifth post is explained


def test_a_local_model_writes_the_same_at_temperature_0(
    settings: RaySettings, tmp_path: Path, model_folder: Path, postcards: Corpus
) -> None:
    samples, options = postcards.test[:20], AnnotateSettings(retries=0, max_new_tokens=24, chunk=4)
    source = ModelSource("tiny", ModelSettings(image_size=56, batch_size=4), LABELS, model_folder, "annotate", True)
    here = on_ray(tmp_path / "here", postcards.root, samples, source.load("cpu"), None, options)
    there = on_ray(tmp_path / "there", postcards.root, samples, source, settings, options)
    assert there == here and len(here) == 20
    assert ledger(tmp_path / "there") == ledger(tmp_path / "here")


def test_first_answers_that_are_all_invalid_end_the_stage(settings: RaySettings, tmp_path: Path) -> None:
    samples = posts(tmp_path / "data", 100)
    with BatchServer(answer=lambda request: "I cannot say") as server:
        with pytest.raises(RunError, match=r"^annotate: the first 10 answers are all invalid, such as 'I cannot say'"):
            on_ray(tmp_path, tmp_path / "data", samples, endpoint(server.url), settings, stop_after=10)
        assert server.requests < 400
        assert (
            server.requests - 2 * CONCURRENCY <= len(ledger(tmp_path)) <= server.requests
        )  # what was paid for is kept


@pytest.fixture
def copy(finished: Recipe, settings: RaySettings, tmp_path: Path) -> Recipe:
    """A copy of a finished chain, with the engine of the cluster."""
    shutil.copytree(finished.folder, tmp_path / finished.name)
    return replace(finished, runs=str(tmp_path), engine="ray", ray=settings)


def outputs(folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    rows = [row.fields for row in read(folder / "evaluate/predictions.jsonl")]
    for row in rows:
        for answer in row["roles"].values():
            answer["probabilities"] = [round(value, 4) for value in answer["probabilities"]]
            answer["label_mass"] = round(answer["label_mass"], 4)
    metrics = json.loads((folder / "evaluate/metrics.json").read_text())
    return {role: metrics[role].get("accuracy") for role in metrics}, rows


def test_evaluate_writes_the_results_of_one_process(copy: Recipe, finished: Recipe) -> None:
    assert chain.run(copy) == [], "the engine changes no result"
    for name in ("metrics.json", "predictions.jsonl", "ledger.jsonl"):
        (copy.folder / "evaluate" / name).unlink()
    chain.run(copy, only="evaluate")
    assert outputs(copy.folder) == outputs(finished.folder)
    roles = {json.loads(line)["model"].split("-")[0] for line in (copy.folder / "evaluate/ledger.jsonl").open()}
    assert roles == {"teacher", "assistant", "student", "studenthard_labels"}


def test_augment_writes_the_results_of_one_process_at_temperature_0(copy: Recipe, tmp_path: Path) -> None:
    assert copy.augment is not None
    written = []
    for engine in ("local", "ray"):
        (copy.folder / "augment/ledger.jsonl").unlink(missing_ok=True)
        recipe = replace(copy, engine=engine, augment=replace(copy.augment, temperature=0.0))
        (copy.folder / "augment/summary.json").unlink(missing_ok=True)
        chain.run(recipe, only="augment")
        written.append((ledger(copy.folder / "augment"), (copy.folder / "augment/rationales.jsonl").read_text()))
    assert written[0] == written[1] and len(written[0][0]) > 30


def test_predict_writes_the_results_of_one_process(
    copy: Recipe, settings: RaySettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = [{name: row.fields.get(name) for name in ("id", "text", "images")} for row in
             read(copy.folder / "evaluate/predictions.jsonl")] * 3  # fmt: skip
    given[4] = {"id": "broken", "images": ["nothing.png"]}
    source, root = tmp_path / "new.jsonl", Path(copy.data.root)
    source.write_text("".join(json.dumps(row) + "\n" for row in given))
    found = []
    for engine in ("local", "ray"):
        output = tmp_path / f"{engine}.jsonl"
        small = asdict(settings) | {"batch_size": 4}
        written = predict.predict(
            copy.folder, source, output, images=root, rationales=True, max_new_tokens=100, engine=engine, ray=small
        )  # type: ignore[arg-type]
        assert (written.rows, written.dropped) == (len(given) - 1, 1)
        rows = [row.fields for row in read(output)]
        for row in rows:
            del row["seconds"]
            row |= {name: round(value, 4) for name, value in row.items() if isinstance(value, float)}
        found.append(rows)
    assert found[0] == found[1]
    assert [row["row"] for row in found[1]] == [1, 2, 3, 4, *range(6, len(given) + 1)]
    with pytest.raises(SettingsError, match="--device needs --engine local"):
        predict.predict(copy.folder, source, tmp_path / "x.jsonl", engine="ray", device="cpu")

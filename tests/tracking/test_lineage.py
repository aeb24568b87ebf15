"""The edges of the lineage graph: those that an online chain makes, and their file in the run's folder."""

from dataclasses import replace
from pathlib import Path

import pytest

from distill import chain
from distill.tracking import Tracker, TrackingSettings
from distill.tracking.lineage import OUTPUTS, Edge, Lineage
from tests.wandb_server import WandbServer

EDGE = Edge("uses", "student", "run1", "micro-rationales", "d1", "distill", "", False)


def run_stage(folder: Path, stage: str, content: str, *reads: str, **settings: str) -> None:
    """A stage that only writes its outputs."""
    with Tracker(TrackingSettings(**settings), folder, "micro").stage(stage, {"seed": 1}, reads):  # type: ignore[arg-type]
        (folder / stage).mkdir(exist_ok=True)
        for file in OUTPUTS[stage].files:
            path = folder / stage / file / "model.safetensors" if file == "adapter" else folder / stage / file
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_text(content)


def test_every_stage_of_a_chain_logs_an_artifact() -> None:
    assert set(chain.STAGES) <= set(OUTPUTS)
    assert len({output.name for output in OUTPUTS.values()}) == len(OUTPUTS)


@pytest.mark.usefixtures("login")
def test_online_a_stage_uses_the_version_that_the_chain_logged_last(tmp_path: Path, server: WandbServer) -> None:
    for content in ("first", "second"):
        run_stage(tmp_path, "annotate", content)
    server.artifacts |= {"x": {"name": "micro-rationales", "digest": "x", "aliases": ["latest"]}}  # of another chain
    run_stage(tmp_path, "assistant", "weights", "annotate", "augment")
    assert server.lineage() == [
        ("annotate", "logs", "micro-rationales"), ("assistant", "logs", "micro-assistant"),
        ("assistant", "uses", "micro-rationales"),
    ]  # fmt: skip
    (used,) = [server.artifacts[version] for kind, _, version in server.edges if kind == "uses"]
    assert used["index"] == 1
    assert {path.partition("/")[2] for path in server.files} >= {
        "rationales.jsonl",
        "ledger.jsonl",
        "model.safetensors",
    }
    assert not Lineage(tmp_path).unlinked() and not (tmp_path / "wandb" / "uploads").exists()


@pytest.mark.usefixtures("login")
def test_references_are_not_uploaded(tmp_path: Path, server: WandbServer) -> None:
    run_stage(tmp_path, "annotate", "data", artifacts="reference")
    assert [edge[0] for edge in server.edges] == ["logs"]
    (manifest,) = [content for path, content in server.files.items() if path.endswith("wandb_manifest.json")]
    assert b"file://" in manifest and b"rationales.jsonl" in manifest
    assert not [path for path in server.files if path.endswith("rationales.jsonl")]


def test_a_line_that_a_crash_has_cut_off_is_ignored(tmp_path: Path) -> None:
    lineage = Lineage(tmp_path)
    lineage.add(replace(EDGE, kind="logs"))
    with lineage.path.open("a") as file:
        file.write('{"kind": "uses", "st')
    lineage.add(EDGE)
    lineage.path.open("a").write('[1]\n{"kind": "uses"}\n' + "[" * 100_000 + "\n")
    lineage.add(replace(EDGE, run=["run1"]))  # type: ignore[arg-type]
    assert list(lineage) == [replace(EDGE, kind="logs"), EDGE]
    assert lineage.digest("micro-rationales") == "d1" and lineage.digest("micro-student") is None
    assert lineage.unlinked() == [EDGE]
    lineage.add(replace(EDGE, linked=True))
    assert not lineage.unlinked()

"""`distill push` to a stand-in of the hub: what it receives, and what is refused before anything is sent."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard
from transformers import AutoConfig

import distill as api
from distill.data import jsonl
from tests.commands import Command, Result
from tests.hub_server import Hub

Push = Callable[..., Result]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def push(hub: Hub, tmp_path: Path) -> Push:
    """`distill push` in a process of its own, which reaches the stand-in."""

    def run(*arguments: object, **variables: str) -> Result:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
        } | variables  # fmt: skip
        command = [sys.executable, "-m", "distill", "push", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        return Result(done.returncode, done.stdout, done.stderr)

    return run


def test_the_hub_receives_the_export_with_a_card_that_it_can_read(folder: Path, hub: Hub, push: Push) -> None:
    result = push("--run", folder, "--to", "someone/small", "--private", "--language", "en", "--datasets", "a/b", "c/d")
    assert (result.status, result.stdout) == (0, f"uploaded to {hub.url}/someone/small\n"), result.stderr
    assert hub.repositories["models/someone/small"]["visibility"] == "private"
    assert hub.commits == [{"repository": "models/someone/small", "summary": "Upload by distill"}]
    received, export = hub.folder / "models" / "someone" / "small", folder / "export"
    names = {path.relative_to(export) for path in export.rglob("*") if path.is_file()}
    assert {path.relative_to(received) for path in received.rglob("*") if path.is_file()} == names
    for name in names - {Path("README.md")}:
        assert (received / name).read_bytes() == (export / name).read_bytes(), name
    assert AutoConfig.from_pretrained(received).model_type == "qwen2_5_vl"

    card = ModelCard.load(received / "README.md")
    data, metrics = card.data, api.Run(folder).metrics.loc["student"]
    assert (data.language, data.datasets, data.model_name) == ("en", ["a/b", "c/d"], "small")
    assert "distill" in data.tags and data.base_model is None and data.license == "apache-2.0"
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert results["accuracy"] == round(metrics["accuracy"], 4) and set(results) == {"accuracy", "macro_f1"}
    assert "model-index" in data.to_dict() and "## Serving" in card.text
    recipe = api.Run(folder).recipe
    assert f"root: {Path(recipe.data.root).name}\n" in card.text and str(recipe.data.root) not in card.content
    assert str(recipe.runs) not in card.content


def test_the_hub_receives_the_reasoning_data_with_its_pictures(folder: Path, hub: Hub, push: Push) -> None:
    result = push("--run", folder, "--to", "someone/posts", "--data")
    assert (result.status, result.stdout) == (0, f"uploaded to {hub.url}/datasets/someone/posts\n"), result.stderr
    received = hub.folder / "datasets" / "someone" / "posts"
    rows = load_dataset(str(received), split="train")
    written = [
        row.fields
        for stage in ("annotate", "augment")
        for row in jsonl.read(folder / stage / "rationales.jsonl")
    ]  # fmt: skip
    assert rows["id"] == [row["id"] for row in written] and rows["rationale"] == [row["rationale"] for row in written]
    assert {row["source"] for row in written} == set(rows["source"])
    root = Path(api.Run(folder).recipe.data.root)
    for row, original in zip(rows, written, strict=True):
        assert len(row["images"]) == len(original["images"]) == 1
        assert row["images"][0].size == (28, 28)
        assert (root / original["images"][0]).exists()
    card = DatasetCard.load(received / "README.md")
    assert card.data.size_categories == "n<1K" and f"{len(written)} rows" in card.text
    assert str(root) not in card.content


def test_a_second_upload_replaces_the_first_and_keeps_what_others_wrote(folder: Path, hub: Hub, push: Push) -> None:
    stale, kept = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"], "notes.md"
    assert push("--run", folder, "--to", "someone/small").status == 0
    repository = hub.folder / "models" / "someone" / "small"
    for name in (*stale, kept):
        (repository / name).write_text("{}")
    assert push("--run", folder, "--to", "someone/small").status == 0
    assert len(hub.commits) == 2 and (repository / "model.safetensors").exists() and (repository / kept).exists()
    assert not any((repository / name).exists() for name in stale)


def test_clips_are_uploaded_with_the_rationales_about_them(folder: Path, hub: Hub, push: Push, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    root = Path(api.Run(run).recipe.data.root)
    (root / "tone.wav").write_bytes(b"RIFF of a tone")
    path = run / "annotate" / "rationales.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(row | {"audio": "tone.wav"} if n == 1 else row) + "\n" for n, row in enumerate(rows))
    )
    status = push("--run", run, "--to", "someone/posts", "--data").status
    (root / "tone.wav").unlink()  # other tests share the data
    assert status == 0
    repository = hub.folder / "datasets" / "someone" / "posts"
    found = load_dataset("parquet", data_dir=str(repository / "data"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found["audio"][:2] == [None, {"bytes": b"RIFF of a tone", "path": "tone.wav"}]
    assert "video" not in found.column_names and "| `audio` |" in (repository / "README.md").read_text()


def test_fewer_tables_than_before(folder: Path, hub: Hub, push: Push) -> None:
    assert push("--run", folder, "--to", "someone/posts", "--data").status == 0
    data = hub.folder / "datasets" / "someone" / "posts" / "data"
    whole = data / "train-00000-of-00001.parquet"
    shutil.copy(whole, data / "train-00001-of-00002.parquet")
    assert push("--run", folder, "--to", "someone/posts", "--data").status == 0
    assert list(data.iterdir()) == [whole]


def test_nothing_private_goes_into_a_public_repository(folder: Path, hub: Hub, push: Push) -> None:
    assert push("--run", folder, "--to", "someone/small").status == 0
    result = push("--run", folder, "--to", "someone/small", "--private")
    assert result.status == 2 and result.error == (
        "--private: someone/small exists and is public; make it private on the hub first"
    )
    assert len(hub.commits) == 1


def test_only_what_the_stage_wrote_is_uploaded(folder: Path, hub: Hub, push: Push, tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "run"
    shutil.copytree(folder, run)
    card = run / "export" / "README.md"
    root = f"  root: {api.Run(folder).recipe.data.root}\n"
    assert root in card.read_text()
    card.write_text(
        card.read_text().replace(
            root, "  root: /home/me/my data/of long name/that is so long that YAML breaks its line/posts\n"
        )
    )
    (run / "export" / "notes.txt").write_text("mine")
    (run / "export" / ".env").write_text("SECRET=1")
    assert push("--run", run, "--to", "someone/small").status == 0
    received = hub.folder / "models" / "someone" / "small"
    assert not (received / "notes.txt").exists() and not (received / ".env").exists()
    assert "  root: posts\n" in (received / "README.md").read_text()


def test_an_export_that_is_older_than_its_student(
    folder: Path, tmp_path: Path, distill: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    chain = json.loads((run / "chain.json").read_text())
    chain["stages"]["student"]["identity"] = "another"
    (run / "chain.json").write_text(json.dumps(chain))
    result = distill("push", "--run", run, "--to", "someone/small")
    assert result.status == 2 and "export is older than student, which it reads; run: distill run" in result.error


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (("--to", "someone/small"), {"HF_TOKEN": "wrong"}, "push: the hub refused someone/small: Invalid username"),
        (("--to", "someone/small"), {"HF_TOKEN": ""}, "push needs a token of the hub: set HF_TOKEN"),
        (("--to", "someone/small"), {"HF_HUB_OFFLINE": "1"}, "push needs a connection, and HF_HUB_OFFLINE is set"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    arguments: tuple[str, ...], variables: dict[str, str], message: str, folder: Path, hub: Hub, push: Push
) -> None:
    result = push("--run", folder, *arguments, **variables)
    assert result.error.startswith(message) and result.status in (1, 2)
    assert not hub.commits


def test_a_commit_that_fails_leaves_nothing(folder: Path, hub: Hub, push: Push) -> None:
    hub.broken = 422
    result = push("--run", folder, "--to", "someone/small")
    assert result.status == 1 and "the disk of the hub is full" in result.error
    assert not hub.commits and not hub.folder.exists()


def test_what_cannot_be_uploaded_is_refused_before_anything_is_sent(
    folder: Path, tmp_path: Path, distill: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run = tmp_path / "run"
    shutil.copytree(folder, run, ignore=shutil.ignore_patterns("export"))
    for arguments, message in [
        (("--to", "small"), "--to is 'small'; it takes user/name"),
        (("--to", "a/b/c"), "--to: "),
        (("--to", "some one/small"), "--to: "),
        (("--to", "someone/small"), "holds no exported student; run: distill export"),
    ]:
        result = distill("push", "--run", run, *arguments)
        assert message in result.error and result.status == 2
    rows = (run / "annotate" / "rationales.jsonl").read_text().splitlines()
    broken = json.loads(rows[2]) | {"images": ["images/none.png"]}
    (run / "annotate" / "rationales.jsonl").write_text("\n".join([*rows[:2], json.dumps(broken), *rows[3:]]) + "\n")
    result = distill("push", "--run", run, "--to", "someone/posts", "--data")
    assert "row 3" in result.error and "none.png" in result.error
    for stage in ("annotate", "augment"):
        (run / stage / "rationales.jsonl").unlink()
    assert "holds no reasoning data" in distill("push", "--run", run, "--to", "someone/posts", "--data").error

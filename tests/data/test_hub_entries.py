"""Data sets by name: the files of a split, from a folder that `datasets` reads as it reads a repository of the hub."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from distill.data import hub
from distill.data.corpus import read_corpus
from distill.errors import RunError, SettingsError
from distill.task.labels import LabelSpace
from tests.data import shard_files as files
from tests.data.test_stream import settings


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository `owner/posts` with labels as numbers."""
    folder = tmp_path / "owner" / "posts"
    labels = datasets.ClassLabel(names=["negative", "neutral", "positive"])
    for split, first in (("train", 0), ("validation", 10), ("test", 20)):
        rows = {"text": [f"post {first + n}" for n in range(4)], "label": [0, 1, 2, -1]}
        features = datasets.Features({"text": datasets.Value("string"), "label": labels})
        (folder / "data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return folder


def test_a_split_of_a_data_set_is_read_with_the_names_of_its_labels(
    repository: Path, tmp_path: Path, labels: LabelSpace
) -> None:
    given: dict[str, Any] = {"validation": ["hub:owner/posts:validation"], "test": ["hub:owner/posts:test"]}
    corpus = read_corpus(settings(tmp_path, "hub:owner/posts", **given), labels)
    assert [(post.text, post.label) for post in corpus.train] == [
        ("post 0", "negative"), ("post 1", "neutral"), ("post 2", "positive"), ("post 3", None),
    ]  # fmt: skip
    assert [post.text for post in corpus.test] == ["post 20", "post 21", "post 22"]


def test_what_the_hub_does_not_have_is_one_sentence(repository: Path, tmp_path: Path) -> None:
    files.jsonl(tmp_path / "unused.jsonl", [])
    with pytest.raises(SettingsError, match=r"^hub:owner/posts:dev has no split dev; its splits are train, validation"):
        hub.files("hub:owner/posts:dev")
    with pytest.raises((SettingsError, RunError), match=r"^hub:owner/nothing") as error:
        hub.files("hub:owner/nothing")
    assert "\n" not in str(error.value)

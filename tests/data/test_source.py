"""The fingerprint of the files of a data section."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from distill.data.postcards import PostcardSettings
from distill.data.source import DataSettings, data_fingerprint
from distill.errors import SettingsError
from tests.data.test_corpus import post, save_image, valid_settings, write


def test_the_fingerprint_depends_on_the_data_only(tmp_path: Path) -> None:
    root = tmp_path / "a"
    save_image(root / "a.png")
    write(root / "train.jsonl", [post("a", image="a.png"), post("b", image="gone.png"), post("c", image=3), b"broken"])
    settings = valid_settings(root)
    before = data_fingerprint(settings)
    assert before == data_fingerprint(settings)
    (root / "unrelated").write_text("x")
    os.utime(root / "train.jsonl", (0, 0))
    assert data_fingerprint(settings) == before
    shutil.copytree(root, tmp_path / "b")
    assert data_fingerprint(dataclasses.replace(settings, root=str(tmp_path / "b"))) == before

    seen = {before}
    Image.new("RGB", (40, 40), "blue").save(root / "a.png")
    seen.add(data_fingerprint(settings))
    save_image(root / "gone.png")
    seen.add(data_fingerprint(settings))
    write(root / "test.jsonl", [post("test", label="positive")])
    seen.add(data_fingerprint(settings))
    seen.add(data_fingerprint(dataclasses.replace(settings, validation=["test.jsonl"], test=["validation.jsonl"])))
    assert len(seen) == 5
    (root / "test.jsonl").unlink()
    with pytest.raises(SettingsError, match=r"data\.test: cannot read"):
        data_fingerprint(settings)


def test_the_fingerprint_covers_the_texts_of_mvsa_and_the_settings_of_postcards(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1.txt").write_text("one")
    (tmp_path / "labels.txt").write_text("ID\ttext,image\n1\tneutral,neutral\n")
    settings = DataSettings("mvsa", str(tmp_path), ["labels.txt"], test=[])
    before = data_fingerprint(settings)
    (tmp_path / "data" / "1.txt").write_text("two")
    assert data_fingerprint(settings) != before
    cards = [DataSettings("postcards", "nowhere", postcards=PostcardSettings(seed=seed)) for seed in (1, 1, 2)]
    fingerprints = [data_fingerprint(card) for card in cards]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]

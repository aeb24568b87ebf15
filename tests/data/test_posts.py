"""Posts from a program as samples: the same as rows of a file, with images in any form."""

from pathlib import Path

import pytest
from PIL import Image

from distill.data import jsonl
from distill.data.posts import as_samples, sample


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 6), (200, 10, 10)).save(path)
    return path


def test_a_post_is_the_sample_of_a_row_with_the_same_fields(picture: Path) -> None:
    row = {"id": 7, "text": "a\0b", "aspect": " x ", "images": ["a.png"]}
    with as_samples([row | {"images": [picture], "label": "positive", "rationale": "y"}]) as (found,):
        assert found == jsonl.to_sample(row, picture.parent)
        assert (found.id, found.text, found.aspect, found.label) == ("7", "a b", "x", None)


def test_images_that_are_no_files_become_files_within_the_context(picture: Path) -> None:
    image = Image.open(picture)
    forms = [picture, str(picture), image, picture.read_bytes(), {"bytes": picture.read_bytes(), "path": "gone"}]
    with as_samples({"image": form} for form in forms) as samples:
        assert [post.id for post in samples] == ["0", "1", "2", "3", "4"]
        for post in samples:
            (path,) = post.images
            assert Image.open(path).getpixel((3, 3)) == (200, 10, 10)
        made = [post.images[0] for post in samples if post.images[0] != picture]
    assert len(made) == 3 and not any(path.exists() for path in made) and picture.exists()


def test_names_are_kept_inside_a_root(picture: Path, tmp_path: Path) -> None:
    found = sample({"image": "a.png"}, "1", tmp_path, picture.parent)
    assert found.images == (picture,)
    (tmp_path / "inner").mkdir()
    with pytest.raises(ValueError, match="lies outside the data root"):
        sample({"image": "../a.png"}, "1", tmp_path, tmp_path / "inner")
    with pytest.raises(ValueError, match=r"^post 1: image gone\.png is missing$"), as_samples(
        [{"text": "a"}, {"image": picture.parent / "gone.png"}]
    ):  # fmt: skip
        pass

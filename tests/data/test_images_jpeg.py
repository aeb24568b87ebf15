"""Images encoded for transfer to a server: JPEG without metadata, unchanged where the file already is one."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.data.images import ImageError, decode, jpeg_bytes
from tests.data.test_images import photo


def pixels(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}, {"dpi": (300, 300)}])
def test_a_jpeg_without_metadata_is_not_changed(tmp_path: Path, options: dict[str, Any]) -> None:
    photo().save(tmp_path / "a.jpg", **options)
    assert jpeg_bytes(tmp_path / "a.jpg", 40) == (tmp_path / "a.jpg").read_bytes()


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010F] = 6, "a secret"  # rotated, with a manufacturer


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"exif": EXIF}),
        ("JPEG", {"comment": b"a secret"}),
        ("JPEG", {"icc_profile": b"a secret"}),
        ("JPEG", {"xmp": b"a secret"}),
        ("MPO", {"save_all": True, "append_images": [photo()]}),
        ("PNG", {}),
        ("WEBP", {"exif": EXIF}),
    ],
)
def test_metadata_is_removed(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    photo(4, 3).resize((40, 30), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", kind, **options)
    content = jpeg_bytes(tmp_path / "a.jpg", 40)
    assert content != (tmp_path / "a.jpg").read_bytes() and b"secret" not in content
    shown = np.asarray(decode(tmp_path / "a.jpg")).astype(float)
    assert pixels(content).shape == shown.shape
    assert np.abs(pixels(content) - shown).mean() < 4


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colour_modes_are_converted_to_rgb(tmp_path: Path, mode: str) -> None:
    photo().convert(mode).save(tmp_path / "a.jpg")
    assert pixels(jpeg_bytes(tmp_path / "a.jpg", 40)).shape == (30, 40, 3)


def test_a_large_image_is_scaled_down(tmp_path: Path) -> None:
    photo(40, 30).save(tmp_path / "a.jpg")
    assert pixels(jpeg_bytes(tmp_path / "a.jpg", 39)).shape == (29, 39, 3)


SECRET = b"\xff\xfe\x00\x0aa secret"  # a comment segment


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    "hide",
    [
        lambda jpeg: jpeg + b"a secret",
        lambda jpeg: jpeg + b"a secret\xff\xd9",
        lambda jpeg: jpeg[:-2] + SECRET + b"\xff\xd9",
        lambda jpeg: jpeg + jpeg[:2] + SECRET + jpeg[2:],
        lambda jpeg: jpeg[:2] + b"\xff\xe0\x00\x10JFXX\x00a secret\x00" + jpeg[2:],
        lambda jpeg: jpeg[:2] + b"\xff\xe0\x00\x0aa secret" + jpeg[2:],
        lambda jpeg: (at := jpeg.rindex(b"\xff\xda")) and jpeg[:at] + SECRET + jpeg[at:],  # the last scan
    ],
)
def test_data_hidden_in_a_jpeg_file_is_removed(tmp_path: Path, hide: Any, progressive: bool) -> None:
    photo().save(tmp_path / "a.jpg", progressive=progressive)
    shown = pixels((tmp_path / "a.jpg").read_bytes())
    (tmp_path / "a.jpg").write_bytes(hide((tmp_path / "a.jpg").read_bytes()))
    content = jpeg_bytes(tmp_path / "a.jpg", 40)
    assert b"secret" not in content and pixels(content).shape == shown.shape


def test_a_jpeg_without_a_scan_is_rejected(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: content.index(b"\xff\xda")] + b"\xff\xd9")
    with pytest.raises(ImageError, match=r"a\.jpg"):
        jpeg_bytes(tmp_path / "a.jpg", 40)


@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.9, 0.99])
def test_a_truncated_jpeg_is_rejected(tmp_path: Path, fraction: float) -> None:
    photo().save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(ImageError, match=r"a\.jpg"):
        jpeg_bytes(tmp_path / "a.jpg", 40)


def test_files_that_cannot_be_decoded_are_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    photo(400, 2).save(tmp_path / "narrow.jpg")
    photo(40, 30).save(tmp_path / "large.jpg")
    (tmp_path / "words.jpg").write_bytes(b"just words")
    for name, message in (
        ("pipe", "missing"),
        ("none", "missing"),
        ("narrow", "aspect ratio"),
        ("large", "pixels"),
        ("words", "none of"),
    ):
        with pytest.raises(ImageError, match=message):
            jpeg_bytes(tmp_path / f"{name}.jpg", 1000, 1199)

"""Decoding and path resolution of untrusted images: every colour mode is converted, every unsafe file is rejected."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data.images import ImageError, decode, resolve

LIMIT = 50_000_000
RED = (255, 0, 0)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A small PNG file whose header declares a large image."""
    ihdr = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + png_chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + png_chunk(b"IEND", b"")


def photo(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "no-suffix", "really-a-png.jpg"])
def test_decodes_each_format_by_content(tmp_path: Path, name: str) -> None:
    kind = {"jpg": "JPEG", "gif": "GIF", "webp": "WEBP", "bmp": "BMP"}.get(name.rpartition(".")[2], "PNG")
    Image.new("RGB", (40, 30), RED).save(tmp_path / name, "PNG" if name.startswith("really") else kind)
    image = decode(tmp_path / name, LIMIT)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    np.testing.assert_allclose(np.asarray(image)[15, 20], RED, atol=4)


def test_decodes_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
        np.testing.assert_allclose(np.asarray(decode(tmp_path / name, LIMIT))[4, 4], RED, atol=6)


def test_decodes_the_first_image_of_a_multi_picture_jpeg(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), RED).save(
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")]
    )
    np.testing.assert_allclose(np.asarray(decode(tmp_path / "a.jpg", LIMIT))[8, 8], RED, atol=4)


def test_cmyk_is_converted_to_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)  # magenta and yellow: red
    image = decode(tmp_path / "a.jpg", LIMIT)
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image)[8, 8], RED, atol=6)


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.asarray(decode(tmp_path / "a.png", LIMIT))[0].tolist() == [[v, v, v] for v in (0, 0, 1, 128, 255)]


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    rgba.paste((0, 0, 255, 128), (0, 0, 4, 8))
    rgba.save(tmp_path / "rgba.png")
    image = decode(tmp_path / "rgba.png", LIMIT)
    assert image.getpixel((6, 0)) == (255, 255, 255)
    np.testing.assert_allclose(np.asarray(image)[0, 0], (127, 127, 255), atol=1)

    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.paste(0, (0, 0, 4, 8))
    for name in ("p.png", "p.gif"):
        palette.save(tmp_path / name, transparency=0)
        image = decode(tmp_path / name, LIMIT)
        assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((6, 0)) == RED

    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "la.png")
    assert decode(tmp_path / "la.png", LIMIT).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:8, :12] = 255  # a white corner, top left
    stored = {  # how a camera stores this image with each orientation
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.png", LIMIT)), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_image_with_broken_exif_is_decoded(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12" + b"\xff" * 9)
    assert decode(tmp_path / "a.jpg", LIMIT).size == (40, 30)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp", "a.bmp"])
@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.9])
def test_truncated_files_are_rejected(tmp_path: Path, name: str, fraction: float) -> None:
    photo().save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(ImageError, match=name):
        decode(tmp_path / name, LIMIT)


def test_corruption_that_pillows_verify_misses_is_rejected(tmp_path: Path) -> None:
    rows = zlib.compress(b"\0" + b"\xff" * 30)[:-8]  # valid checksums around a truncated stream
    ihdr = struct.pack(">IIBBBBB", 10, 10, 8, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", ihdr) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with Image.open(tmp_path / "a.png") as image:
        image.verify()
    with pytest.raises(ImageError, match=r"image a\.png is broken"):
        decode(tmp_path / "a.png", LIMIT)


@pytest.mark.parametrize("noise", range(8))
def test_random_damage_raises_only_image_error(tmp_path: Path, noise: int) -> None:
    rng = np.random.default_rng(noise)
    rejected = 0
    for name in ("a.jpg", "a.png", "a.gif", "a.webp", "a.bmp"):
        photo().save(tmp_path / name)
        data = bytearray((tmp_path / name).read_bytes())
        for position in rng.integers(0, len(data), 20):
            data[position] = rng.integers(0, 256)
        (tmp_path / name).write_bytes(data)
        try:
            assert decode(tmp_path / name, LIMIT).mode == "RGB"
        except ImageError:
            rejected += 1
    assert rejected >= 1  # the checksums of PNG detect the damage


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [7_100, 10_000, 60_000])  # below, between and above the limits of pillow
def test_decompression_bombs_are_rejected_from_the_header(tmp_path: Path, side: int) -> None:
    (tmp_path / "a.png").write_bytes(png_header(side, side))
    with pytest.raises(ImageError, match="pixels"):
        decode(tmp_path / "a.png", LIMIT)


@pytest.mark.filterwarnings("error")
def test_a_decompression_bomb_warning_raised_as_an_error_is_an_image_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(10_000, 10_000))
    with pytest.raises(ImageError, match="pixels"):
        decode(tmp_path / "a.png", LIMIT)


@pytest.mark.filterwarnings("error")
def test_the_limit_may_be_above_that_of_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for name in ("a.png", "a.jpg", "a.gif", "a.webp"):
        photo(40, 30).save(tmp_path / name)  # more than twice the limit
        assert decode(tmp_path / name, 1200).size == (40, 30)
        with pytest.raises(ImageError, match="40 x 30 pixels, more than 1,199"):
            decode(tmp_path / name, 1199)
    assert Image.MAX_IMAGE_PIXELS == 500


def test_a_gif_frame_larger_than_its_canvas_is_rejected(tmp_path: Path) -> None:
    Image.new("P", (8, 8)).save(tmp_path / "a.gif")
    data = bytearray((tmp_path / "a.gif").read_bytes())
    frame = data.index(b"\x2c\0\0\0\0\x08\0\x08\0")
    data[frame + 5 : frame + 9] = struct.pack("<HH", 9000, 9000)
    (tmp_path / "a.gif").write_bytes(data)
    with pytest.raises(ImageError, match="9000 x 9000 pixels"):
        decode(tmp_path / "a.gif", LIMIT)


def test_the_pixel_limit_is_an_argument(tmp_path: Path) -> None:
    photo(40, 30).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", 1200).size == (40, 30)
    with pytest.raises(ImageError, match="40 x 30 pixels, more than 1,199"):
        decode(tmp_path / "a.png", 1199)


def test_extreme_aspect_ratios_are_rejected(tmp_path: Path) -> None:
    Image.new("RGB", (400, 2)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="400 x 2 pixels, an aspect ratio of 200 or more"):
        decode(tmp_path / "a.png", LIMIT)


@pytest.mark.parametrize(
    "content",
    [
        b"just words",
        b"",
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"II*\0\x08\0\0\0",
    ],
)
def test_other_formats_are_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=r"image a\.jpg is none of JPEG, PNG"):
        decode(tmp_path / "a.jpg", LIMIT)


def test_tiff_is_rejected(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.jpg", "TIFF")
    with pytest.raises(ImageError, match="none of"):
        decode(tmp_path / "a.jpg", LIMIT)


def test_folders_pipes_and_missing_files_are_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path, tmp_path / "pipe.jpg", tmp_path / "none.jpg", tmp_path / ("x" * 5000)):
        with pytest.raises(ImageError, match=r"missing|broken"):
            decode(path, LIMIT)


def test_resolve_finds_files_inside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "images" / "a.jpg").touch()
    (root / "link.jpg").symlink_to(root / "images" / "a.jpg")
    inside = (root / "images" / "a.jpg").resolve()
    for name in ("images/a.jpg", "images/../images/a.jpg", "link.jpg", str(inside)):
        assert resolve(root, name) == inside
    (tmp_path / "alias").symlink_to(root)
    assert resolve(tmp_path / "alias", "images/a.jpg") == inside


def test_resolve_rejects_paths_outside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "root-2").mkdir()
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "folder").symlink_to(tmp_path)
    for name in ("../secret.jpg", "/etc/passwd", "link.jpg", "folder/secret.jpg", "../root-2/a.jpg", "a/../../b"):
        with pytest.raises(ImageError, match="outside the data root"):
            resolve(root, name)


def test_resolve_rejects_invalid_paths(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="not a usable path"):
        resolve(tmp_path, "a\0b.jpg")

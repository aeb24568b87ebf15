"""Pictures from strangers: every colour space comes out right, everything hostile is refused with one sentence."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.data.images import ImageError, decode, jpeg, resolve

LIMIT = 50_000_000
RED = (255, 0, 0)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A tiny file that claims to be a huge picture."""
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


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
        np.testing.assert_allclose(np.asarray(decode(tmp_path / name, LIMIT))[4, 4], RED, atol=6)


def test_a_phones_two_picture_jpeg(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), RED).save(
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")]
    )
    np.testing.assert_allclose(np.asarray(decode(tmp_path / "a.jpg", LIMIT))[8, 8], RED, atol=4)


def test_cmyk_becomes_the_colours_it_means(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)  # no cyan, all else: red
    image = decode(tmp_path / "a.jpg", LIMIT)
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image)[8, 8], RED, atol=6)


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.asarray(decode(tmp_path / "a.png", LIMIT))[0].tolist() == [[v, v, v] for v in (0, 0, 1, 128, 255)]


def test_transparency_shows_white(tmp_path: Path) -> None:
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
    stored = {  # how a camera stores this picture under each orientation
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
def test_broken_exif_costs_the_orientation_and_not_the_picture(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12" + b"\xff" * 9)
    assert decode(tmp_path / "a.jpg", LIMIT).size == (40, 30)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp", "a.bmp"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, name: str, share: float) -> None:
    photo().save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImageError, match=name):
        decode(tmp_path / name, LIMIT)


def test_corruption_that_verify_would_pass_is_refused(tmp_path: Path) -> None:
    rows = zlib.compress(b"\0" + b"\xff" * 30)[:-8]  # good checksums around a stream that ends too early
    ihdr = struct.pack(">IIBBBBB", 10, 10, 8, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", ihdr) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with Image.open(tmp_path / "a.png") as image:
        image.verify()
    with pytest.raises(ImageError, match=r"image a\.png is broken"):
        decode(tmp_path / "a.png", LIMIT)


@pytest.mark.parametrize("noise", range(8))
def test_random_damage_raises_nothing_but_image_error(tmp_path: Path, noise: int) -> None:
    rng = np.random.default_rng(noise)
    refused = 0
    for name in ("a.jpg", "a.png", "a.gif", "a.webp", "a.bmp"):
        photo().save(tmp_path / name)
        data = bytearray((tmp_path / name).read_bytes())
        for position in rng.integers(0, len(data), 20):
            data[position] = rng.integers(0, 256)
        (tmp_path / name).write_bytes(data)
        try:
            assert decode(tmp_path / name, LIMIT).mode == "RGB"
        except ImageError:
            refused += 1
    assert refused >= 1  # a PNG's checksums see to that


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [7_100, 10_000, 60_000])  # below, within and above what pillow itself minds
def test_bombs_are_refused_from_the_header(tmp_path: Path, side: int) -> None:
    (tmp_path / "a.png").write_bytes(png_header(side, side))
    with pytest.raises(ImageError, match="pixels"):
        decode(tmp_path / "a.png", LIMIT)


@pytest.mark.filterwarnings("error")
def test_a_bomb_warning_made_an_error_is_still_an_image_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(10_000, 10_000))
    with pytest.raises(ImageError, match="pixels"):
        decode(tmp_path / "a.png", LIMIT)


def test_a_gif_frame_larger_than_its_screen_is_a_bomb_too(tmp_path: Path) -> None:
    Image.new("P", (8, 8)).save(tmp_path / "a.gif")
    data = bytearray((tmp_path / "a.gif").read_bytes())
    frame = data.index(b"\x2c\0\0\0\0\x08\0\x08\0")
    data[frame + 5 : frame + 9] = struct.pack("<HH", 9000, 9000)
    (tmp_path / "a.gif").write_bytes(data)
    with pytest.raises(ImageError, match="9000 x 9000 pixels"):
        decode(tmp_path / "a.gif", LIMIT)


def test_the_pixel_limit_is_the_callers(tmp_path: Path) -> None:
    photo(40, 30).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", 1200).size == (40, 30)
    with pytest.raises(ImageError, match="40 x 30 pixels, more than 1,199"):
        decode(tmp_path / "a.png", 1199)


def test_strips_no_processor_takes_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (400, 2)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="strip of 400 x 2"):
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
def test_what_is_no_picture_or_no_allowed_one_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=r"image a\.jpg is none of JPEG, PNG"):
        decode(tmp_path / "a.jpg", LIMIT)


def test_tiff_is_not_on_the_list(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.jpg", "TIFF")
    with pytest.raises(ImageError, match="none of"):
        decode(tmp_path / "a.jpg", LIMIT)


def test_folders_pipes_and_nothing_are_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path, tmp_path / "pipe.jpg", tmp_path / "none.jpg", tmp_path / ("x" * 5000)):
        with pytest.raises(ImageError, match=r"missing|broken"):
            decode(path, LIMIT)


def pixels(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}, {"dpi": (300, 300)}])
def test_a_bare_jpeg_is_sent_as_it_is(tmp_path: Path, options: dict[str, Any]) -> None:
    photo().save(tmp_path / "a.jpg", **options)
    assert jpeg(tmp_path / "a.jpg", 40) == (tmp_path / "a.jpg").read_bytes()


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010F] = 6, "a secret"  # to be turned


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
def test_what_else_a_file_tells_is_not_sent(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    photo(4, 3).resize((40, 30), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", kind, **options)
    content = jpeg(tmp_path / "a.jpg", 40)
    assert content != (tmp_path / "a.jpg").read_bytes() and b"secret" not in content
    shown = np.asarray(decode(tmp_path / "a.jpg")).astype(float)  # upright
    assert pixels(content).shape == shown.shape
    assert np.abs(pixels(content) - shown).mean() < 4


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours_are_sent_as_rgb(tmp_path: Path, mode: str) -> None:
    photo().convert(mode).save(tmp_path / "a.jpg")
    assert pixels(jpeg(tmp_path / "a.jpg", 40)).shape == (30, 40, 3)


def test_a_large_picture_is_sent_smaller(tmp_path: Path) -> None:
    photo(40, 30).save(tmp_path / "a.jpg")
    assert pixels(jpeg(tmp_path / "a.jpg", 39)).shape == (29, 39, 3)


SECRET = b"\xff\xfe\x00\x0aa secret"  # a comment, as a segment


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
def test_what_is_hidden_around_a_picture_is_not_sent(tmp_path: Path, hide: Any, progressive: bool) -> None:
    photo().save(tmp_path / "a.jpg", progressive=progressive)
    shown = pixels((tmp_path / "a.jpg").read_bytes())
    (tmp_path / "a.jpg").write_bytes(hide((tmp_path / "a.jpg").read_bytes()))
    content = jpeg(tmp_path / "a.jpg", 40)
    assert b"secret" not in content and pixels(content).shape == shown.shape


def test_a_header_alone_is_not_sent(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: content.index(b"\xff\xda")] + b"\xff\xd9")
    with pytest.raises(ImageError, match=r"a\.jpg"):
        jpeg(tmp_path / "a.jpg", 40)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.99])
def test_a_truncated_jpeg_is_not_sent(tmp_path: Path, share: float) -> None:
    photo().save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImageError, match=r"a\.jpg"):
        jpeg(tmp_path / "a.jpg", 40)


def test_what_cannot_be_decoded_is_not_sent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    photo(400, 2).save(tmp_path / "strip.jpg")
    photo(40, 30).save(tmp_path / "large.jpg")
    (tmp_path / "words.jpg").write_bytes(b"just words")
    for name, says in (
        ("pipe", "missing"),
        ("none", "missing"),
        ("strip", "strip"),
        ("large", "pixels"),
        ("words", "none of"),
    ):
        with pytest.raises(ImageError, match=says):
            jpeg(tmp_path / f"{name}.jpg", 1000, 1199)


def test_resolve_finds_what_is_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "images" / "a.jpg").touch()
    (root / "link.jpg").symlink_to(root / "images" / "a.jpg")
    inside = (root / "images" / "a.jpg").resolve()
    for name in ("images/a.jpg", "images/../images/a.jpg", "link.jpg", str(inside)):
        assert resolve(root, name) == inside
    (tmp_path / "alias").symlink_to(root)
    assert resolve(tmp_path / "alias", "images/a.jpg") == inside


def test_resolve_refuses_to_leave_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "root-2").mkdir()
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "folder").symlink_to(tmp_path)
    for name in ("../secret.jpg", "/etc/passwd", "link.jpg", "folder/secret.jpg", "../root-2/a.jpg", "a/../../b"):
        with pytest.raises(ImageError, match="outside the data root"):
            resolve(root, name)


def test_resolve_refuses_what_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="not a usable path"):
        resolve(tmp_path, "a\0b.jpg")

"""Pictures from strangers: found inside the data root, refused where unsafe or broken, decoded to plain RGB."""

import contextlib
import io
import os
import re
import threading
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What may be decoded, by content and not by suffix; of an animation the first frame."""

MAX_PIXELS = 50_000_000
"""What `decode` accepts unless told otherwise."""

MAX_RATIO = 200
"""Longest side over shortest: image processors refuse more (Qwen2-VL's at 200), hours into a run."""


class ImageError(ValueError):
    """An image that must not or cannot be used; one sentence with its name."""


_DECODING = threading.BoundedSemaphore(os.cpu_count() or 1)  # a picture takes a core, and memory for all its pixels


def resolve(root: Path, name: str) -> Path:
    """The file that `name` means below `root`, with every link followed. The file need not exist.

    Raises:
        ImageError: the name leaves the root, by `..`, as an absolute path or through a link, or is no path at all.
    """
    try:
        base = root.resolve()
        path = (base / name).resolve()
    except (OSError, RuntimeError, ValueError):  # a name too long, a loop of links, a zero byte
        raise ImageError(f"{name[:80]!r} is not a usable path") from None
    if not path.is_relative_to(base):
        raise ImageError(f"{name[:80]!r} lies outside the data root")
    return path


def decode(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The whole picture in RGB, upright (EXIF), alpha composited on white, 16-bit grey scaled to 8 bits.

    Raises:
        ImageError: no such file, none of FORMATS, more than `max_pixels` pixels (read from the header, before any is
            decoded), a side of MAX_RATIO times the other or more, or truncated or corrupt.
    """
    try:
        if not path.is_file():  # opening a named pipe would wait for ever
            raise ImageError(f"image {path.name} is missing")
        with Image.open(path, formats=FORMATS) as image:
            _check_size(path, image, max_pixels)
            image.load()
            return _rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"image {path.name} is none of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the warning where filters make it raise
        raise ImageError(f"image {path.name} has far too many pixels") from None
    except Exception as error:  # on hostile files decoders raise nearly everything: SyntaxError, struct.error, KeyError
        raise ImageError(f"image {path.name} is broken: {error or type(error).__name__}") from error


def jpeg(path: Path, max_side: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """A picture as a JPEG file without metadata, its longer side `max_side` pixels at most.

    That is the file itself, not decoded, where it is one: it loses nothing by being encoded again.

    Raises:
        ImageError: as `decode`.
        OSError: the file cannot be read.
    """
    if (content := _bare_jpeg(path, max_side, max_pixels)) is not None:
        return content
    with _DECODING:
        picture = decode(path, max_pixels)
        picture.thumbnail((max_side, max_side))
        picture.info.clear()  # a comment would be written again
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=95)
    return encoded.getvalue()


def _bare_jpeg(path: Path, max_side: int, max_pixels: int) -> bytes | None:
    """The content of a JPEG file in RGB of that size that holds a picture and nothing else.

    None for any other, and for all that `decode` will refuse.
    """
    if not path.is_file():
        return None
    try:
        with Image.open(path, formats=("JPEG",)) as image:
            _check_size(path, image, max_pixels)
            width, height = image.size
            fits = image.mode == "RGB" and max(width, height) <= max_side
        if not fits or path.stat().st_size > 4 * width * height + 65_536:  # no picture needs as much
            return None
        content = path.read_bytes()
    except Exception:  # noqa: BLE001 - as in `decode`, which will say what is wrong
        return None
    return content if _is_bare(content) else None


_TABLES, _FRAMES, _SCAN = b"\xc4\xdb\xdd", b"\xc0\xc2", b"\xda"  # the JPEG markers of a baseline or progressive picture
_STRAY = re.compile(rb"\xff[^\x00\xff\xd0-\xd7" + _TABLES + _SCAN + rb"]")


def _is_bare(content: bytes) -> bool:
    """Whether a JPEG file is what its picture needs and no more: no thumbnail, no comment, nothing behind its end."""
    if not (content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9")):
        return False
    at, seen = 2, b""
    while _SCAN not in seen:
        marker, end = content[at + 1 : at + 2], at + 2 + int.from_bytes(content[at + 2 : at + 4])
        body = content[at + 4 : end]
        plain = len(body) == 14 and body.startswith(b"JFIF\0") and body.endswith(b"\0\0")  # without a thumbnail
        known = bool(marker) and marker in _TABLES + _FRAMES + _SCAN
        if content[at : at + 1] != b"\xff" or not (plain if marker == b"\xe0" else known):
            return False
        at, seen = end, seen + marker
    one_frame = sum(seen.count(frame) for frame in (b"\xc0", b"\xc2")) == 1
    return one_frame and b"\xc4" in seen and b"\xdb" in seen and not _STRAY.search(content, at, len(content) - 2)


def _check_size(path: Path, image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"image {path.name} has {width} x {height} pixels, more than {max_pixels:,}")
    if max(width, height) >= MAX_RATIO * min(width, height):
        raise ImageError(f"image {path.name} is a strip of {width} x {height} pixels")


def _rgb(image: Image.Image) -> Image.Image:
    upright = image
    with contextlib.suppress(Exception):  # a broken EXIF block says nothing about the pixels
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey; convert() would clip at 255
        return Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if upright.has_transparency_data:
        colours = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return upright.convert("RGB")

"""Untrusted images: path resolution inside the data root, safety checks, decoding to RGB, encoding for transfer."""

import contextlib
import io
import os
import re
import sys
import threading
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from distill.data.media_cache import fetch

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that are decoded, recognised by content and not by suffix. The first frame of an animation is used."""

MAX_PIXELS = 50_000_000
"""Default limit of `decode`."""

MAX_ASPECT_RATIO = 200
"""Limit of the longer side over the shorter side: image processors raise an error above it (Qwen2-VL: 200)."""


class ImageError(ValueError):
    """An image that is unsafe or cannot be decoded. The message names the image."""


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
_OPENING = threading.Lock()
_DECODE_SLOTS = threading.BoundedSemaphore(os.cpu_count() or 1)  # bounds the memory of concurrent decoding


def resolve(root: Path, name: str) -> Path:
    """Resolve `name` relative to `root`, following links. The file need not exist.

    Raises:
        ImageError: the path is outside `root` (through `..`, an absolute path or a link), is an address, or is not a
            valid path.
    """
    if _ADDRESS.match(name):
        raise ImageError(f"{name[:80]!r} is an address; store the file in the data root and give its file name")
    try:
        base = root.resolve()
        path = (base / name).resolve()
    except (OSError, RuntimeError, ValueError):  # name too long, link loop, null byte
        raise ImageError(f"{name[:80]!r} is not a usable path") from None
    if not path.is_relative_to(base):
        raise ImageError(f"{name[:80]!r} lies outside the data root")
    return path


def open_image(path: Path, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image without decoding it and without the pixel limit of Pillow: callers apply their own."""
    with _OPENING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def decode(path: Path, max_pixels: int = MAX_PIXELS, name: str = "") -> Image.Image:
    """Decode an image to RGB: EXIF orientation applied, alpha composited on white, 16-bit grey scaled to 8 bits.

    Args:
        name: what messages call the image; empty: its file name.

    Raises:
        ImageError: the file is missing, has none of FORMATS, has more than `max_pixels` pixels (checked from the header
            before decoding), has an aspect ratio of MAX_ASPECT_RATIO or more, or is truncated or corrupt.
    """
    name = name or path.name
    fetch(path)
    try:
        if not path.is_file():  # opening a named pipe would block
            raise ImageError(f"image {name} is missing")
        with open_image(path) as image:
            _check_size(name, image, max_pixels)
            image.load()
            return _rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"image {name} is none of {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise many types on corrupt files: SyntaxError, struct.error
        raise ImageError(f"image {name} is broken: {error or type(error).__name__}") from error


def resized(path: Path, size: int, max_pixels: int = sys.maxsize) -> Image.Image:
    """An image as a square of `size` pixels a side; 0: as it is.

    Args:
        max_pixels: none by default, because the user's limit was applied when the corpus was read.

    Raises:
        ImageError: as `decode` does.
    """
    image = decode(path, max_pixels)
    return image.resize((size, size)) if size and image.size != (size, size) else image


def jpeg_bytes(path: Path, max_side: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """Encode an image as JPEG without metadata, with a longer side of at most `max_side` pixels.

    A file that already is such a JPEG is returned unchanged, without the loss of re-encoding.

    Raises:
        ImageError: as `decode` does.
        OSError: the file cannot be read.
    """
    if (content := _unmodified_jpeg(path, max_side, max_pixels)) is not None:
        return content
    with _DECODE_SLOTS:
        image = decode(path, max_pixels)
        image.thumbnail((max_side, max_side))
        image.info.clear()  # otherwise a comment is written to the new file
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=95)
    return encoded.getvalue()


def _unmodified_jpeg(path: Path, max_side: int, max_pixels: int) -> bytes | None:
    """The content of an RGB JPEG file within the size limits that contains nothing but image data.

    None for any other file, including every file that `decode` rejects.
    """
    fetch(path)
    if not path.is_file():
        return None
    try:
        with open_image(path, ("JPEG",)) as image:
            _check_size(path.name, image, max_pixels)
            width, height = image.size
            fits = image.mode == "RGB" and max(width, height) <= max_side
        if not fits or path.stat().st_size > 4 * width * height + 65_536:  # larger than any image of this size
            return None
        content = path.read_bytes()
    except Exception:  # noqa: BLE001 - `decode` raises the error with its reason
        return None
    return content if _has_only_image_data(content) else None


_TABLES, _FRAMES, _SCAN = b"\xc4\xdb\xdd", b"\xc0\xc2", b"\xda"  # JPEG markers of a baseline or progressive image
_OTHER_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7" + _TABLES + _SCAN + rb"]")


def _has_only_image_data(content: bytes) -> bool:
    """Whether a JPEG file has no metadata: no thumbnail, comment or other segment, and no bytes after its end."""
    if not (content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9")):
        return False
    at, seen = 2, b""
    while _SCAN not in seen:
        marker, end = content[at + 1 : at + 2], at + 2 + int.from_bytes(content[at + 2 : at + 4])
        body = content[at + 4 : end]
        plain_jfif = len(body) == 14 and body.startswith(b"JFIF\0") and body.endswith(b"\0\0")  # without a thumbnail
        allowed = bool(marker) and marker in _TABLES + _FRAMES + _SCAN
        if content[at : at + 1] != b"\xff" or not (plain_jfif if marker == b"\xe0" else allowed):
            return False
        at, seen = end, seen + marker
    one_frame = sum(seen.count(frame) for frame in (b"\xc0", b"\xc2")) == 1
    return one_frame and b"\xc4" in seen and b"\xdb" in seen and not _OTHER_MARKER.search(content, at, len(content) - 2)


def _check_size(name: str, image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"image {name} has {width} x {height} pixels, more than {max_pixels:,}")
    if max(width, height) >= MAX_ASPECT_RATIO * min(width, height):
        ratio = f"an aspect ratio of {MAX_ASPECT_RATIO} or more"
        raise ImageError(f"image {name} has {width} x {height} pixels, {ratio}")


def _rgb(image: Image.Image) -> Image.Image:
    upright = image
    with contextlib.suppress(Exception):  # a broken EXIF block does not affect the pixels
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey; convert() clips at 255
        return Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if upright.has_transparency_data:
        colours = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return upright.convert("RGB")

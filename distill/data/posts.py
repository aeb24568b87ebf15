"""Posts that a program gives, instead of rows of a file."""

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from distill.data import jsonl
from distill.data.images import decode, resolve
from distill.task.sample import Sample


@contextmanager
def as_samples(posts: Iterable[Mapping[str, Any]]) -> Iterator[list[Sample]]:
    """The posts as samples, with images as files. Files of images that were given as such exist within the context.

    An image is a path, a PIL image, the bytes of a file, or a `datasets` cell with `bytes` or `path`. A post without
    `id` is named by its number, from 0.

    Raises:
        ValueError: a post cannot be used, or an image is missing or broken. The message names the post.
    """
    with TemporaryDirectory(prefix="distill-posts-") as scratch:
        samples = []
        for number, post in enumerate(posts):
            try:
                samples.append(sample(post, str(number), Path(scratch)))
            except ValueError as error:
                raise ValueError(f"post {number}: {error}") from None
        yield samples


def sample(post: Mapping[str, Any], name: str, scratch: Path, root: Path | None = None) -> Sample:
    """One post as a sample.

    Args:
        name: the id of a post without one, and a name for the files of its images.
        scratch: folder for images that are given as such.
        root: folder of the images that are given by name, outside of which there are none; None: any path.

    Raises:
        ValueError: as `as_samples`, without the name of the post.
    """
    if not isinstance(post, Mapping):
        raise ValueError(f"must be a mapping with text or image, not {type(post).__name__}")
    one, many = (post.get(field) for field in ("image", "images"))
    if one is not None and many is not None:
        raise ValueError("image and images are both given")
    given = list(many) if isinstance(many, list | tuple) else [item for item in (one, many) if item is not None]
    names = [str(index) for index in range(len(given))]  # stand for the images while the other fields are checked
    identity = post.get("id")
    fields = {"text": post.get("text"), "aspect": post.get("aspect"), "images": names}
    plain = jsonl.to_sample(fields | {"id": name if identity is None else identity}, scratch)
    files = tuple(_file(image, scratch / f"{name}-{index}.png", root) for index, image in enumerate(given))
    for file in files:
        decode(file)
    return replace(plain, images=files)


def _file(image: Any, path: Path, root: Path | None) -> Path:
    """The file of an image, written to `path` unless it has one."""
    if isinstance(image, Mapping):  # a cell of `datasets` that is not decoded
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str | PathLike):
        return Path(image).absolute() if root is None else resolve(root, str(image))
    if isinstance(image, Image.Image):
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        image = encoded.getvalue()
    if not isinstance(image, bytes):
        raise ValueError(f"an image must be a path, a PIL image or bytes, not {type(image).__name__}")
    path.write_bytes(image)
    return path

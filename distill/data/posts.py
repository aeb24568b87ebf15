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
from distill.data.images import decode
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
                samples.append(_sample(post, number, Path(scratch)))
            except ValueError as error:
                raise ValueError(f"post {number}: {error}") from None
        yield samples


def _sample(post: Mapping[str, Any], number: int, scratch: Path) -> Sample:
    if not isinstance(post, Mapping):
        raise ValueError(f"must be a mapping with text or image, not {type(post).__name__}")
    one, many = (post.get(name) for name in ("image", "images"))
    if one is not None and many is not None:
        raise ValueError("image and images are both given")
    given = list(many) if isinstance(many, list | tuple) else [item for item in (one, many) if item is not None]
    names = [str(index) for index in range(len(given))]  # stand for the images while the other fields are checked
    known = {name: post.get(name) for name in ("text", "aspect")}
    identity = post.get("id")
    sample = jsonl.to_sample(known | {"id": number if identity is None else identity, "images": names}, scratch)
    files = tuple(_file(image, scratch / f"{number}-{index}.png") for index, image in enumerate(given))
    for file in files:
        decode(file)
    return replace(sample, images=files)


def _file(image: Any, path: Path) -> Path:
    """The file of an image, written to `path` unless it has one."""
    if isinstance(image, Mapping):  # a cell of `datasets` that is not decoded
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str | PathLike):
        return Path(image).absolute()
    if isinstance(image, Image.Image):
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        image = encoded.getvalue()
    if not isinstance(image, bytes):
        raise ValueError(f"an image must be a path, a PIL image or bytes, not {type(image).__name__}")
    path.write_bytes(image)
    return path

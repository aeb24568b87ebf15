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
from distill.data.clips import ClipReader
from distill.data.images import decode, resolve
from distill.task.sample import Sample


@contextmanager
def as_samples(posts: Iterable[Mapping[str, Any]], clips: ClipReader | None = None) -> Iterator[list[Sample]]:
    """The posts as samples, with images and clips as files. Those that were given as such exist within the context.

    An image is a path, a PIL image, the bytes of a file, or a `datasets` cell with `bytes` or `path`; a `video` and an
    `audio` are a path, bytes, or such a cell. A post without `id` is named by its number, from 0.

    Args:
        clips: what checks videos and sounds; None: a reader with the default limits.

    Raises:
        ValueError: a post cannot be used, or a file is missing or broken. The message names the post.
    """
    with TemporaryDirectory(prefix="distill-posts-") as scratch:
        samples = []
        for number, post in enumerate(posts):
            try:
                samples.append(sample(post, str(number), Path(scratch), clips=clips))
            except ValueError as error:
                raise ValueError(f"post {number}: {error}") from None
        yield samples


def sample(
    post: Mapping[str, Any], name: str, scratch: Path, root: Path | None = None, clips: ClipReader | None = None
) -> Sample:
    """One post as a sample.

    Args:
        name: the id of a post without one, and a name for its files.
        scratch: folder for images and clips that are given as such.
        root: folder of the files that are given by name, outside of which there are none; None: any path.
        clips: what checks videos and sounds; None: a reader with the default limits.

    Raises:
        ValueError: as `as_samples`, without the name of the post.
    """
    if not isinstance(post, Mapping):
        raise ValueError(f"must be a mapping with text, image, video or audio, not {type(post).__name__}")
    post = {name: None if isinstance(value, float) and value != value else value for name, value in post.items()}
    one, many = (post.get(field) for field in ("image", "images"))
    if one is not None and many is not None:
        raise ValueError("image and images are both given")
    given = list(many) if isinstance(many, list | tuple) else [item for item in (one, many) if item is not None]
    files = tuple(_file(image, scratch / f"{name}-{index}.png", root) for index, image in enumerate(given))
    video, audio = (
        None
        if (clip := post.get(field)) is None or clip is False or (isinstance(clip, str) and not clip.strip())
        else _file(clip, scratch / f"{name}.{field}", root, field)
        for field in ("video", "audio")
    )
    identity = post.get("id")
    fields = {"text": post.get("text"), "aspect": post.get("aspect"), "id": name if identity is None else identity}
    names = {"images": ["image"] * len(files), "video": video and "video", "audio": audio and "audio"}
    plain = jsonl.to_sample(fields | names, scratch)  # the names stand for the files
    for file in files:
        decode(file)
    clips = clips or ClipReader()
    sounding = video is not None and clips.decode(video)
    if audio is not None:
        clips.decode(audio, video=False)
    elif sounding and post.get("audio") is not False:
        audio = video
    return replace(plain, images=files, video=video, audio=audio)


def _file(given: Any, path: Path, root: Path | None, kind: str = "image") -> Path:
    """The file of an image or a clip, written to `path` unless it has one."""
    if isinstance(given, Mapping):  # a cell of `datasets` that is not decoded
        given = given.get("bytes") or given.get("path")
    if isinstance(given, str | PathLike):
        return Path(given).absolute() if root is None else resolve(root, str(given))
    if kind == "image" and isinstance(given, Image.Image):
        encoded = io.BytesIO()
        given.save(encoded, "PNG")
        given = encoded.getvalue()
    if not isinstance(given, bytes):
        forms = "an image must be a path, a PIL image" if kind == "image" else f"{kind} must be a path"
        raise ValueError(f"{forms} or bytes, not {type(given).__name__}")
    path.write_bytes(given)
    return path

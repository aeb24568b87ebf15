"""The files of posts on a worker, read from an fsspec address such as s3://bucket/posts."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from distill.errors import RunError, first_line
from distill.task.sample import Sample

_THREADS = 16  # files that are read at the same time


@contextmanager
def fetched(samples: Sequence[Sample], root: Path, address: str) -> Iterator[list[Sample]]:
    """The samples with their files as local copies, which exist within the context.

    Args:
        root: the folder that the files of the samples are in.
        address: fsspec address of a copy of it; empty: the files are read from `root`.

    Raises:
        RunError: a file cannot be read.
    """
    if not address:
        yield list(samples)
        return
    owners = {path: sample for sample in samples for path in sample.media.files}
    with TemporaryDirectory(prefix="distill-posts-") as scratch:
        copies = {path: Path(scratch, f"{number}-{path.name}") for number, path in enumerate(owners)}

        def fetch(path: Path) -> None:
            url = f"{address.rstrip('/')}/{path.relative_to(root).as_posix()}"
            try:
                import fsspec

                with fsspec.open(url, "rb") as file:
                    copies[path].write_bytes(file.read())
            except Exception as error:  # each file system raises its own types
                raise RunError(f"post {owners[path].id}: {url} cannot be read: {first_line(error)}") from error

        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(fetch, owners))
        yield [
            replace(
                sample, images=tuple(copies[path] for path in sample.images),
                video=copies[sample.video] if sample.video else None,
                audio=copies[sample.audio] if sample.audio else None,
            )
            for sample in samples
        ]  # fmt: skip

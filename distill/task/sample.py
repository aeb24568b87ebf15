"""One post: the model's inputs and their annotations."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

MODALITIES = ("text", "images", "video", "audio")
"""What a post can have; fields of `Sample`."""

_ABSENT: dict[str, Any] = {"text": "", "images": (), "video": None, "audio": None}


class Media(NamedTuple):
    """What a post has besides its text. False if it has nothing.

    Attributes:
        video: the file of its video, of which the frames are shown.
        audio: the file whose sound is heard; for a video with its own sound the same file.
    """

    images: tuple[Path, ...] = ()
    video: Path | None = None
    audio: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.files)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files, each once: the images, the video, and the sound unless it is that of the video."""
        return tuple(dict.fromkeys(path for path in (*self.images, self.video, self.audio) if path is not None))

    @property
    def extent(self) -> tuple[int, int]:
        """How many of images, video and audio there are, and how many images: an order of posts by their media."""
        return bool(self.images) + (self.video is not None) + (self.audio is not None), len(self.images)


NO_MEDIA = Media()


@dataclass(frozen=True)
class Sample:
    """A post with its annotations.

    Attributes:
        video: the file of its video, or None.
        audio: the file whose sound belongs to the post: that of the video, unless another one is given; None for a post
            without sound.
        aspect: the target of an aspect-level sentiment; None for the sentiment of the whole post.
        label: a name of the label space, a value on a continuous scale, or None if the post is unlabelled.
        rationale: a teacher's text in any format that `task/rationale.py` parses.
        attributes: ground truth about a post of the built-in corpus, for evaluation and the reward `grounded`; never
            shown to a model.
    """

    id: str
    text: str
    images: tuple[Path, ...] = ()
    aspect: str | None = None
    label: str | float | None = None
    rationale: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    video: Path | None = None
    audio: Path | None = None

    @property
    def media(self) -> Media:
        """The files that a model is given besides the text."""
        return Media(self.images, self.video, self.audio)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those of MODALITIES that the post has."""
        return tuple(name for name in MODALITIES if getattr(self, name) != _ABSENT[name])

    def without(self, *names: str) -> "Sample":
        """The post as if it did not have some of MODALITIES. Its label stays; its rationale may be about them."""
        return replace(self, **{name: _ABSENT[name] for name in names})

"""The folder of a built-in corpus: generated from its settings, replaced as a whole, never written over other files."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from distill.files import atomic_folder, read_json, write_json

PARTS = ("train", "validation", "test", "teacher")


class Counts(Protocol):
    """The settings of a built-in corpus, as far as all have them."""

    labelled: int
    unlabelled: int
    validation: int
    test: int
    teacher: int


@dataclass(frozen=True)
class BuiltIn:
    """A built-in corpus of given settings.

    Attributes:
        name: of the corpus, as in `data.source`.
        folder: of its media, in its root.
        suffix: of the files in that folder, with the dot.
        version: of the posts that the same settings give.
        settings: a dataclass.
        write: writes the media of the posts to the root, given the number of posts of each part, and yields the name
            and the rows of each part.
    """

    name: str
    folder: str
    suffix: str
    version: int
    settings: Any
    write: Callable[[Path, Mapping[str, int]], Iterable[tuple[str, Iterable[Mapping[str, Any]]]]]

    @property
    def counts(self) -> dict[str, int]:
        """The number of posts of each part; those of the teacher only if there are any."""
        found: Counts = self.settings
        counts = {"train": found.labelled + found.unlabelled, "validation": found.validation, "test": found.test}
        return counts | ({"teacher": found.teacher} if found.teacher else {})

    @property
    def fingerprint(self) -> str:
        """Hash of the settings and of the version."""
        return hashlib.sha256(f"{self.settings}, version={self.version}".encode()).hexdigest()

    @property
    def marker(self) -> str:
        """Name of the file that says of which settings a folder is."""
        return f"{self.name}.json"

    def is_generated(self, root: Path) -> bool:
        """Whether `root` contains the corpus of these settings."""
        marker = root / self.marker
        return marker.exists() and bool(read_json(marker) == self._content)

    def generate(self, root: str | Path) -> None:
        """Write the JSONL files of the parts and the folder of media to `root`, unless they are already generated.

        A corpus of other settings in the same folder is replaced. A process that is killed leaves the folder as it was.

        Raises:
            FileExistsError: `root` contains files that were not generated here.
            OSError: `root` cannot be written.
        """
        root = Path(root).resolve()  # of a link, the folder that it names is replaced
        if self.is_generated(root):
            return
        if root.exists():
            found = {path.name for path in root.iterdir()}
            # The folder is written atomically, marker included: without the marker, nothing in it was generated here.
            if foreign := self._foreign(root, found) if (root / self.marker).exists() else found:
                name = min(foreign)
                raise FileExistsError(
                    f"data.root: {root} contains {name}; use a new or empty folder for the {self.name}"
                )
        with atomic_folder(root) as new:
            (new / self.folder).mkdir()
            for part, rows in self.write(new, self.counts):
                with (new / f"{part}.jsonl").open("w", encoding="utf-8") as file:
                    for row in rows:
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
            write_json(new / self.marker, self._content)

    @property
    def _content(self) -> dict[str, int | float]:
        return {"version": self.version} | asdict(self.settings)

    def _foreign(self, root: Path, found: Set[str]) -> Set[str]:
        """The names in a folder of this corpus, and in its folder of media, that were not generated here."""
        media = [path.name for path in (root / self.folder).iterdir()] if (root / self.folder).is_dir() else []
        ours = re.compile(rf"({'|'.join(PARTS)})-\d{{4,}}{re.escape(self.suffix)}")
        generated = {*(f"{part}.jsonl" for part in PARTS), self.folder, self.marker}
        return (found - generated) | {f"{self.folder}/{name}" for name in media if not ours.fullmatch(name)}

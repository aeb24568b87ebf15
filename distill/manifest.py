"""The manifest of a run, `chain.json`: what each stage was made from, and which files it wrote.

A stage is known by content. Its entry has the fingerprint of its settings, the identities of the stages it read,
digests of the images and models behind its settings, and a digest of every file it wrote. The identity of a stage is
the hash of all of these: it changes if a file that later stages read is edited.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from distill.digests import Digests, combine
from distill.errors import SettingsError
from distill.files import damage, read_json, write_json

log = logging.getLogger(__name__)

_MODEL = r"(adapter/)?([^/]+\.(json|safetensors|jinja|model|bin|py)|README\.md|merges\.txt|vocab\.txt)"
_WORK = (
    r"checkpoints/[^/]+\.ckpt|checkpoints/checkpoint-\d+/[^/]+|metrics\.earlier\.csv|hparams\.yaml|(.+/)?\.[^/]+\.part"
)
_TRAINING = rf"(hard_labels/)?(adapter/{_MODEL}|metrics\.csv|{_WORK})"
_KEPT = (  # keyed by their own inputs; decisions of a person
    r"ledger\.jsonl|batches/.*|shards/.*|soft_targets/.*|curation\.jsonl"
)
_READ = (  # by later stages; and evaluate/metrics.json
    r"(hard_labels/)?adapter(/.*)?|(rationales|curated)\.jsonl|calibration\.json"
)


CURATION = "curation"
"""The content of `annotate` that is the digest of the decisions in `distill review`; absent without any."""


class Manifest:
    """The entries of the stages, with the questions that a chain asks about them. Nothing is written but by `write`.

    Args:
        folder: the run's folder.
        outputs: for each stage of a chain, in order, the outputs that must exist.

    Raises:
        SettingsError: `chain.json` is not a manifest.
    """

    def __init__(self, folder: Path, digests: Digests, outputs: Mapping[str, Sequence[str]]) -> None:
        self.path = folder / "chain.json"
        self.folder = folder
        self.digests = digests
        self.outputs = outputs
        try:
            content = read_json(self.path)
            self.stages: dict[str, Any] = content["stages"]
            self.models: dict[str, str] = content.get("models", {})
            if not all(isinstance(item, dict) for item in (self.stages, self.models, *self.stages.values())):
                raise TypeError
        except FileNotFoundError:
            self.stages, self.models = {}, {}
        except (ValueError, LookupError, TypeError, AttributeError):
            raise SettingsError(f"{self.path} is not a valid manifest; move it or its folder away") from None
        self._moved_away = not self.stages and self._is_run()

    def write(self, name: str, entry: dict[str, Any]) -> None:
        """Replace the entry of a stage and write the file."""
        self.stages[name] = entry
        stages = {stage: self.stages[stage] for stage in self.outputs if stage in self.stages}
        write_json(self.path, {"stages": stages} | ({"models": self.models} if self.models else {}))

    # ---- what is up to date ----

    def done(self, name: str, fingerprint: str, inputs: Mapping[str, str], contents: Mapping[str, str | None]) -> bool:
        """Whether a stage has finished with these settings, inputs and contents, and its outputs are complete.

        Raises:
            SettingsError: an output is damaged.
        """
        if not self.finished_with(name, fingerprint, inputs, contents):
            return False
        entry = self.stages[name]
        files = [file for file, digest in entry.get("files", {}).items() if digest is not None]
        expected = [*entry.get("outputs", ()), *(f"{name}/{file}" for file in files)]
        if not all((self.folder / output).exists() for output in expected):
            return False
        for file in self.changed(name):
            self._check(self.folder / name / file)
        return True

    def finished_with(
        self, name: str, fingerprint: str, inputs: Mapping[str, str], contents: Mapping[str, str | None]
    ) -> bool:
        """Whether a stage has finished with these settings, inputs and contents; its outputs may be gone."""
        entry = self.stages.get(name, {})
        same = entry.get("status") == "done" and entry.get("fingerprint") == fingerprint
        return same and self.same_inputs(name, inputs, contents)

    def same_inputs(self, name: str, inputs: Mapping[str, str], contents: Mapping[str, str | None]) -> bool:
        """Whether the last run of a stage read these stages and contents; an unknown content is taken as the same.

        Decisions that are not there are known: there are none.
        """
        entry = self.stages.get(name, {})
        recorded = entry.get("contents", {})
        known = {key: digest for key, digest in contents.items() if digest is not None and recorded.get(key)}
        if recorded.get(CURATION) != contents.get(CURATION):
            return False
        return entry.get("inputs") == inputs and all(recorded[key] == digest for key, digest in known.items())

    def changed(self, name: str) -> list[str]:
        """The existing files of a stage whose content is no longer what the stage wrote.

        Raises:
            SettingsError: a file cannot be read.
        """
        recorded = {file: digest for file, digest in self.stages.get(name, {}).get("files", {}).items() if digest}
        return [file for file in recorded if self._digest(self.folder / name / file) not in (None, recorded[file])]

    def identity(self, name: str) -> str:
        """The identity of a finished stage, with the files as they are now."""
        entry = self.stages[name]
        edited = [file for file in self.changed(name) if _is_read(name, file)]
        if not edited:
            identity: str = entry.get("identity", entry["fingerprint"])
            return identity
        return combine([entry["fingerprint"], {file: self._digest(self.folder / name / file) for file in edited}])

    def ended(self, name: str, entry: dict[str, Any], foreign: Sequence[str] = ()) -> dict[str, Any]:
        """The entry of a stage that has ended, with the files that it wrote; if it is done with their digests.

        Args:
            foreign: files that were there before and are not the stage's.
        """
        folder = self.folder / name
        written = sorted(file for file in _files(folder) if self._may_write(name, file) and file not in foreign)
        files: dict[str, str | None] = dict.fromkeys(written)
        if entry["status"] == "done":
            results = [file for file in written if not _matches(rf"(hard_labels/)?({_WORK})", file)]
            files |= {file: self._digest(folder / file) for file in results}
            read = {file: digest for file, digest in files.items() if _is_read(name, file)}
            made_from = [entry["fingerprint"], entry["inputs"], entry["contents"]]
            entry = {"identity": combine([*made_from, read])} | entry
        return entry | {"files": files}

    def adopt(self, name: str, contents: Mapping[str, str | None]) -> None:
        """Complete the entry of a stage that an earlier version finished: its files are taken as they are.

        Raises:
            SettingsError: an output is damaged.
        """
        entry = self.stages[name]
        complete = self.ended(name, {"identity": entry["fingerprint"]} | entry | {"contents": dict(contents)})
        for file, digest in complete["files"].items():
            if digest is not None:
                self._check(self.folder / name / file)
        self.write(name, complete)

    def _digest(self, path: Path) -> str | None:
        try:
            digest = self.digests.file(path)
        except OSError as error:
            raise _damaged(path, error.strerror or str(error)) from None
        return None if digest is None else digest[:16]

    def _check(self, path: Path) -> None:
        try:
            problem = damage(path)
        except OSError as error:
            problem = error.strerror or str(error)
        if problem is not None:
            raise _damaged(path, problem)

    def check(self) -> None:
        """Raise SettingsError if a file of a finished stage is damaged."""
        for name, entry in self.stages.items():
            if entry.get("status") == "done":
                for file in self.changed(name):
                    self._check(self.folder / name / file)

    def check_current(self, name: str) -> None:
        """Raise SettingsError if a stage has not finished, or is older than a stage that it read."""
        entry = self.stages.get(name, {})
        if entry.get("status") != "done":
            raise SettingsError(f"{self.folder}: the stage {name} has not finished; run: distill run")
        for read, identity in entry.get("inputs", {}).items():
            if self.stages.get(read, {}).get("status") != "done" or self.identity(read) != identity:
                raise SettingsError(f"{self.folder}: {name} is older than {read}, which it reads; run: distill run")

    # ---- whose a file is ----

    def owned(self, name: str) -> list[str]:
        """The files in a stage's folder that the stage wrote.

        Without a list of them, after a kill or in a run of an earlier version, those with the names that it writes.
        """
        folder = self.folder / name
        if (files := self.stages.get(name, {}).get("files")) is not None:
            return [file for file in files if os.path.lexists(folder / file)]
        if name in self.stages or self._moved_away:
            return [file for file in _files(folder) if self._may_write(name, file)]
        return []

    def foreign(self, name: str) -> list[str]:
        """The files in a stage's folder that the stage did not write, caches aside."""
        owned = set(self.owned(name))
        return [file for file in _files(self.folder / name) if file not in owned and not _matches(_KEPT, file)]

    def check_names(self, name: str) -> None:
        """Raise SettingsError if a file that the stage did not write has the name of one that it writes."""
        for file in self.foreign(name):
            if self._may_write(name, file):
                raise SettingsError(
                    f"{self.folder / name / file} is in the way: {name} writes a file of this name, and this one is "
                    "not from this run; move it away"
                )
        if self.stages or self._moved_away:
            return
        for file, content in (("recipe.yaml", "resolved recipe"), ("report.html", "report")):
            if (path := self.folder / file).exists():
                raise SettingsError(f"{path} is in the way: the run writes its {content} there; move it away")

    def keep_edited(self, name: str) -> None:
        """Copy every file that was edited by hand before its stage writes it again: to `FILE.edited`, and the next ones
        to `FILE.edited.2` and so on."""
        for file in self.changed(name):
            path = self.folder / name / file
            names = (f"{path.name}.edited{'' if number == 1 else f'.{number}'}" for number in count(1))
            copies = map(path.with_name, names)
            copy = next(copy for copy in copies if self._digest(copy) in (None, self._digest(path)))
            if not copy.exists():
                shutil.copy2(path, copy)
                log.warning(
                    "%s was edited by hand; %s writes it again, the edited file is kept as %s", path, name, copy
                )

    def clear(self, name: str) -> None:
        """Delete the files that a stage wrote, and folders that this leaves empty. Caches stay."""
        folder = self.folder / name
        for file in self.owned(name):
            (folder / file).unlink()
            for parent in Path(file).parents[:-1]:
                if not any((folder / parent).iterdir()):
                    (folder / parent).rmdir()

    def _may_write(self, name: str, file: str) -> bool:
        return file in self.outputs[name] or _matches(_MODEL if name == "export" else _TRAINING, file)

    def _is_run(self) -> bool:
        """Whether the folder is one that a chain wrote; `recipe.yaml` says so after `chain.json` was moved away."""
        try:
            lines = (self.folder / "recipe.yaml").read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return False
        return f"name: {self.folder.name}" in lines and not any(line.lstrip().startswith("#") for line in lines)


def _files(folder: Path) -> Iterator[str]:
    """Every file below a folder, relative to it. Links are not followed."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in sorted([*files, *links]):
            yield (Path(parent) / name).relative_to(folder).as_posix()


def _is_read(name: str, file: str) -> bool:
    """Whether later stages read a file of a stage."""
    return _matches(_READ, file) if name not in ("evaluate", "export") else (name, file) == ("evaluate", "metrics.json")


def _matches(pattern: str, file: str) -> bool:
    return re.fullmatch(pattern, file) is not None


def _damaged(path: Path, reason: str) -> SettingsError:
    return SettingsError(f"{path} is damaged ({reason}); delete it and run: distill run, which rebuilds it")

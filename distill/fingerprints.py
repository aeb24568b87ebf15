"""What a stage is made from: a hash of its settings, and digests of what is behind them.

A fingerprint holds settings and the rows of the data; the contents of a stage are the images and the models that its
settings name. `manifest.py` compares both with what the last run of the stage had.
"""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

import yaml

from distill.data.source import data_fingerprint
from distill.digests import Digests
from distill.manifest import CURATION, Manifest
from distill.models.backbone import ModelSettings
from distill.models.lora import ALL_LINEAR, EARLIER_TARGETS
from distill.recipe import Recipe, load, masked, parser
from distill.settings import Settings, fields
from distill.task import prompts
from distill.training.processes import process_count
from distill.training.schedules import DECAYING
from distill.training.trainer_arguments import with_defaults

_IRRELEVANT = frozenset({
    "enable_progress_bar", "enable_model_summary", "log_every_n_steps", "profiler", "workers",
    "api_key_env", "replicas", "concurrency", "timeout_s", "deadline_s", "max_attempts", "backoff_s",
    "prompt_price", "completion_price", "gradient_checkpointing", "loggers",
    "cache_mb", "decode_seconds", "batch", "cache", "cache_gb",
})  # fmt: skip
"""Fields that do not change results, in any section."""

_DEVICES = frozenset({"accelerator", "devices", "num_nodes", "strategy"})
"""Trainer arguments that say where a training runs. With more devices a step has more posts, but a training that was
begun on some devices is continued on others, and what it has trained is kept."""

_CHECKS = frozenset({"check_samples"})
"""Fields that change how much of a result is checked, not the result."""

_LEFT_OUT = _IRRELEVANT | _DEVICES | _CHECKS

_DROPPED = "drop_modality"
"""A field of `data` that only the trainings depend on."""

_ACCUMULATION = "accumulate_grad_batches"

_TRAININGS = ("teacher", "assistant", "student")

_LENGTH = frozenset({"max_epochs", "max_steps"})
"""Trainer arguments that a training can continue from if they are raised."""


_LATER = frozenset({"refine"})
"""Stages that the first version did not have. A recipe without them has the hashes of that version."""


class Inputs(Protocol):
    """What a stage depends on: the earlier stages that it reads, and sections besides its own."""

    @property
    def reads(self) -> tuple[str, ...]: ...
    @property
    def sections(self) -> tuple[str, ...]: ...


class Fingerprints(NamedTuple):
    """Hashes of the settings of each stage.

    Attributes:
        whole: of all settings that change results.
        rest: of these without the length of a training.
        limits: for each training that can continue, the epochs and steps; -1: no limit.
    """

    whole: dict[str, str]
    rest: dict[str, str]
    limits: dict[str, list[int]]

    def entry(self, name: str) -> dict[str, Any]:
        """The fields of a stage's entry in the manifest."""
        length = {"rest": self.rest[name], "limits": self.limits[name]} if name in self.limits else {}
        return {"fingerprint": self.whole[name]} | length

    def lengthens(self, name: str, entry: Mapping[str, Any]) -> bool:
        """Whether a stage only trains longer than its entry says."""
        if name not in self.limits or entry.get("rest") != self.rest[name] or "limits" not in entry:
            return False
        pairs = zip(self.limits[name], entry["limits"], strict=True)
        return all(new < 0 or 0 <= old <= new for new, old in pairs)


def fingerprints(recipe: Recipe, stages: Mapping[str, Inputs]) -> Fingerprints:
    """The fingerprints of a recipe's stages. Of the data, only the content is hashed, not its folder.

    Raises:
        SettingsError: a file of the data is missing.
    """
    return _fingerprints(recipe, data_fingerprint(recipe.data), stages)


def contents(
    recipe: Recipe, name: str, data: str | None, digests: Digests, decisions: str | None = None
) -> dict[str, str | None]:
    """Digests of the images and the models behind the settings of a stage; None: not known yet.

    Args:
        data: the result of `data_digest`.
        decisions: digest of the decisions in `distill review`.
    """
    section, found = getattr(recipe, name), {"data": data}
    if (model := getattr(section, "model", None)) is not None and model.path:
        found["model"] = digests.model(model.path, model.revision)
    if name == "annotate" and decisions is not None:
        found[CURATION] = decisions
    if name == "evaluate":
        found["similarity_model"] = digests.model(section.similarity_model)
    return found


def translate(manifest: Manifest, recipe: Recipe, current: Fingerprints, stages: Mapping[str, Inputs]) -> None:
    """Replace the fingerprints of an earlier version in a manifest by those of this one, without writing it.

    Earlier versions hashed all settings, and had fewer. The run's `recipe.yaml` has the settings as they were: an entry
    is translated if its fingerprint is that of `recipe.yaml`. Other numbers of devices and of accumulated batches that
    make the same number of posts per step are the same settings, and so are the default LoRA targets of then and now.
    """
    old = {
        name: entry for name, entry in manifest.stages.items() if entry.get("fingerprint") != current.whole.get(name)
    }
    path = recipe.folder / "recipe.yaml"
    if not old or not path.exists():
        return
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        written = load(parser("run"), ["--config", str(path)])[0]
        data = data_fingerprint(replace(written.data, root=recipe.data.root))
        ignored: list[frozenset[str]] = [
            frozenset(),
            _IRRELEVANT,
            _IRRELEVANT | _DEVICES,
            _LEFT_OUT,
        ]  # by version, today's last
        formulas = [_hashes(_without(settings, names), data, stages) for names in ignored]
        written = _same_targets(_same_steps(written, recipe), recipe, settings)
        today = _fingerprints(written, data, stages)
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):  # SettingsError among them
        return
    for name, entry in old.items():
        fingerprint = entry.get("fingerprint")
        if name in today.whole and fingerprint in [hashes.get(name) for hashes in formulas]:
            manifest.stages[name] = {"identity": fingerprint} | entry | today.entry(name)


def _same_steps(written: Recipe, recipe: Recipe) -> Recipe:
    """`written` with the accumulation of `recipe`, if every training has the same number of posts per step in both."""
    if _posts_per_step(written) != _posts_per_step(recipe):
        return written
    sections: dict[str, Any] = {"trainer": _with_accumulation(written.trainer, recipe.trainer)}
    for name in _TRAININGS:
        if (section := getattr(written, name)) is not None:
            trainer = _with_accumulation(section.trainer, getattr(recipe, name).trainer)
            sections[name] = replace(section, trainer=trainer)
    return replace(written, **sections)


def _same_targets(written: Any, recipe: Any, settings: Any) -> Any:
    """Settings that an earlier version wrote, with the default LoRA targets of `recipe` where theirs are the default.

    Args:
        settings: what was written; since `images` is a field of models, the default is the present one.
    """
    if not isinstance(written, Settings) or type(written) is not type(recipe) or not isinstance(settings, Mapping):
        return written
    if isinstance(written, ModelSettings) and isinstance(recipe, ModelSettings):
        old, new = written.lora, recipe.lora
        if "images" in settings or old is None or new is None:
            return written
        same = old.targets == EARLIER_TARGETS and new.targets == ALL_LINEAR
        return replace(written, lora=replace(old, targets=ALL_LINEAR)) if same else written
    sections = {
        name: _same_targets(getattr(written, name), getattr(recipe, name), settings.get(name))
        for name in fields(type(written))
    }
    return replace(written, **sections)


def _posts_per_step(recipe: Recipe) -> dict[str, int]:
    steps = {}
    for name in _TRAININGS:
        if (section := getattr(recipe, name)) is not None:
            given = with_defaults(recipe.trainer, section.trainer)
            steps[name] = section.batch_size * process_count(given) * given.get(_ACCUMULATION, 1)
    return steps


def _with_accumulation(written: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    return _without(written, {_ACCUMULATION}) | {k: value for k, value in current.items() if k == _ACCUMULATION}


def _fingerprints(recipe: Recipe, data: str, stages: Mapping[str, Inputs]) -> Fingerprints:
    settings = _without(masked(recipe), _LEFT_OUT)
    limits = {}
    for name in _TRAININGS:
        section = getattr(recipe, name)
        if section is not None and section.schedule not in DECAYING:  # their rates depend on the length
            given = with_defaults(recipe.trainer, section.trainer)
            values = [given.get(limit) for limit in ("max_epochs", "max_steps")]
            limits[name] = [value if isinstance(value, int) else -1 for value in values]
    return Fingerprints(_hashes(settings, data, stages), _hashes(_without(settings, _LENGTH), data, stages), limits)


def _hashes(settings: Mapping[str, Any], data: str, stages: Mapping[str, Inputs]) -> dict[str, str]:
    """Hash of the inputs of each stage: its settings, the data, the seed, and the hashes of the stages it reads."""
    rows = [data, {name: value for name, value in settings["data"].items() if name not in ("root", _DROPPED)}]
    dropped = [settings["data"][_DROPPED]] if settings["data"].get(_DROPPED) else []
    task, hashes = settings["task"], dict[str, str]()
    if task.get("fields"):
        task = task | {"fields": list(task["fields"].items())}  # their order counts
    for name, stage in stages.items():
        if settings.get(name) is None:
            continue
        inputs = [
            rows,
            prompts.VERSION,
            settings["seed"],
            task,
            settings[name],
            *_section_values(settings, stage.sections),
            *(dropped if name in _TRAININGS else ()),
            *(hashes.get(read) for read in reads(name, stage, settings[name]) if read not in _LATER or read in hashes),
        ]
        hashes[name] = sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    return hashes


def reads(name: str, stage: Inputs, section: Mapping[str, Any]) -> tuple[str, ...]:
    """The earlier stages that a stage reads; student and refine also the teacher, if they learn its distributions.

    Args:
        section: the settings of the stage.
    """
    options = section.get("distillation") or {}
    labels = name == "student" and options.get("label_weight") and options.get("label_teacher") == "teacher"
    tokens = name == "refine" and section.get("method") == "distill" and section.get("teacher") == "teacher"
    return (*stage.reads, "teacher") if labels or tokens else stage.reads


def _section_values(settings: Mapping[str, Any], sections: Sequence[str]) -> list[Any]:
    """The values of sections, such as `trainer` or `cascade.teacher`. One inside another is left out if not given."""
    values = []
    for section in sections:
        outer, _, inner = section.partition(".")
        value = settings[outer] if not inner else (settings.get(outer) or {}).get(inner)
        values += [] if inner and value is None else [value]
    return values


def _without(settings: Any, names: Set[str]) -> Any:
    """Settings without the fields of these names, at any depth."""
    if not isinstance(settings, Mapping):
        return settings
    return {name: _without(value, names) for name, value in settings.items() if name not in names}

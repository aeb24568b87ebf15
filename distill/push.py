"""`distill push`: upload of an exported student, or of a run's reasoning data, to the Hugging Face hub."""

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from datasets import Dataset, Features, Image, List, Value, disable_progress_bars
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    DatasetCardData,
    EvalResult,
    HfApi,
    ModelCard,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from distill import chain
from distill.data import jsonl
from distill.data.images import open_image
from distill.data.media_cache import fetch
from distill.data.source import media_root
from distill.errors import RunError, SettingsError
from distill.files import read_json
from distill.models.hub import is_hub_id
from distill.runs import Run

log = logging.getLogger(__name__)

FEATURES = Features({
    "id": Value("string"), "text": Value("string"), "aspect": Value("string"), "images": List(Image()),
    "label": Value("string"), "rationale": Value("string"), "source": Value("string"),
})  # fmt: skip
CLIP = {"bytes": Value("binary"), "path": Value("string")}
"""A column of videos or sounds, which rows have if posts have clips. The features of `datasets` need a decoder."""
_SHARD_BYTES = 500_000_000
_METRICS = {"accuracy": "accuracy", "macro_f1": "f1", "mae": "mae", "correlation": "pearsonr"}
"""Metrics of a run that the card's `model-index` has, by name, and their types on the hub."""
_EARLIER = re.compile(
    r"data/train-\d+-of-\d+\.parquet|(model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json)"
)
"""Files of an earlier upload that would be read beside those of the next one."""


@dataclass(frozen=True)
class Target:
    """Where to upload to.

    Attributes:
        repository: `user/name`.
        private: whether a new repository is private.
        language: code of the language of the posts, such as `en`; None: not stated.
        datasets: ids of datasets on the hub from which the student was trained.
    """

    repository: str
    private: bool = False
    language: str | None = None
    datasets: Sequence[str] = ()

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise SettingsError(f"--to: {error}") from None
        if self.repository.count("/") != 1:
            raise SettingsError(f"--to is {self.repository!r}; it takes user/name")


def push_student(folder: Path, target: Target) -> str:
    """Upload the export of a run with a completed model card. Returns the address of the repository.

    Only the files that the stage wrote are uploaded. The card gets tags, the test metrics as `model-index`, and the
    language and datasets of the target. `base_model` stays only if it is an id of the hub.

    Raises:
        SettingsError: the run has no export, the export is older than its student, or there is no token.
        RunError: the hub refused the upload or cannot be reached.
    """
    _check_token()
    run = Run(folder)
    export, manifest = run.folder / "export", chain.read_manifest(run.folder)
    if not (export / "config.json").exists() or not (export / "README.md").exists():
        raise SettingsError(f"{export} holds no exported student; run: distill export")
    manifest.check_current("export")
    files: dict[str, Path | bytes] = {name: export / name for name in manifest.owned("export")}
    return _upload(target, "model", files | {"README.md": _model_card(run, target).encode()})


def push_data(folder: Path, target: Target) -> str:
    """Upload the reasoning data of a run as a dataset with its pictures and clips. Returns the repository's address.

    Raises:
        SettingsError: the run has no reasoning data, a row or a file of it cannot be read, or there is no token.
        RunError: the hub refused the upload or cannot be reached.
    """
    _check_token()
    run = Run(folder)
    paths = [run.folder / stage / "rationales.jsonl" for stage in ("annotate", "augment")]
    paths = [path for path in paths if path.exists()]
    if not paths:
        raise SettingsError(f"{run.folder} holds no reasoning data; run: distill annotate")
    fields = {name for path in paths for row in jsonl.read(path) for name, value in row.fields.items() if value}
    clips = [name for name in ("video", "audio") if name in fields]
    disable_progress_bars()
    with TemporaryDirectory(prefix="distill-push-") as scratch:
        try:
            rows = Dataset.from_generator(
                _rows, features=Features(FEATURES | dict.fromkeys(clips, CLIP)), cache_dir=scratch, split="train",
                gen_kwargs={"paths": paths, "root": media_root(run.recipe.data), "clips": tuple(clips)},
            )  # fmt: skip
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None
        count = max(1, math.ceil(rows.data.nbytes / _SHARD_BYTES))
        files: dict[str, Path | bytes] = {}
        for number in range(count):
            name = f"data/train-{number:05d}-of-{count:05d}.parquet"
            path = Path(scratch) / Path(name).name
            rows.shard(count, number, contiguous=True).to_parquet(str(path))
            files[name] = path
        files["README.md"] = _dataset_card(run, target, len(rows), clips).encode()
        return _upload(target, "dataset", files)


def _rows(paths: Sequence[Path], root: Path, clips: Sequence[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        for row in jsonl.read(path):
            where = f"{path} row {row.number}"
            if row.problem is not None:
                raise SettingsError(f"{where} {row.problem}")
            try:
                sample = jsonl.to_sample(row.fields, root)
                images = []
                for image in sample.images:
                    fetch(image)
                    open_image(image).close()
                    images.append(_content(image))
                own = {"video": sample.video, "audio": None if sample.audio == sample.video else sample.audio}
                files = {name: None if (clip := own[name]) is None else _content(clip) for name in clips}
            except (ValueError, OSError) as error:
                raise SettingsError(f"{where}: {error}") from None
            yield {
                "id": sample.id, "text": sample.text, "aspect": sample.aspect, "images": images,
                "label": None if sample.label is None else str(sample.label), "rationale": sample.rationale,
                "source": str(row.fields.get("source")),
            } | files  # fmt: skip


def _content(path: Path) -> dict[str, Any]:
    fetch(path)
    return {"bytes": path.read_bytes(), "path": path.name}


def _model_card(run: Run, target: Target) -> str:
    card = ModelCard((run.folder / "export" / "README.md").read_text(encoding="utf-8"))
    data: Any = card.data
    if data.base_model is not None and not is_hub_id(str(data.base_model)):  # the export of an earlier version
        data.base_model = None
    data.tags = ["distill", "knowledge-distillation"]
    data.language, data.datasets = target.language, list(target.datasets) or None
    data.model_name = target.repository.split("/")[1]
    path = run.folder / "evaluate" / "metrics.json"
    metrics: Mapping[str, Any] = read_json(path).get(run.recipe.student_role, {}) if path.exists() else {}
    source = run.recipe.data.source
    data.eval_results = [
        EvalResult(
            task_type="text-classification", dataset_type=source, dataset_name=run.recipe.name, dataset_split="test",
            metric_type=kind, metric_name=name, metric_value=round(metrics[name], 4),
        )
        for name, kind in _METRICS.items()
        if isinstance(metrics.get(name), int | float)
    ] or None  # fmt: skip
    return _without_folders(str(card))


def _without_folders(card: str) -> str:
    """The card with the last part alone of each folder of this machine that its recipe names."""

    def shortened(block: re.Match[str]) -> str:
        recipe = _last_parts(yaml.safe_load(block[1]))
        return f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```"

    return re.sub(r"^```yaml\n(.*?)^```", shortened, card, flags=re.MULTILINE | re.DOTALL)


def _last_parts(value: Any) -> Any:
    """A tree of settings with the last part of each absolute path in it."""
    if isinstance(value, Mapping):
        return {name: _last_parts(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_last_parts(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~/")) else value


def _dataset_card(run: Run, target: Target, count: int, clips: Sequence[str]) -> str:
    data = DatasetCardData(
        language=target.language,
        tags=["distill", "rationales"],
        pretty_name=f"Rationales of {run.recipe.name}",
        size_categories=_size_category(count),
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    )
    labels = ", ".join(run.recipe.labels.names)
    explained = {
        "video": 'its video as `bytes` and `path`; `rows.cast_column("video", datasets.Video())` decodes it',
        "audio": "the same of a sound that is not that of the video, for `datasets.Audio()`",
    }
    columns = "".join(f"\n| `{name}` | {explained[name]} |" for name in clips)
    text = f"""# Rationales of {run.recipe.name}

{count} rows, each a post with the label and a rationale from which a student was trained with `distill` (MulCoT-RD,
arXiv 2508.05234). Labels: {labels}.

| column | content |
| --- | --- |
| `id`, `text`, `aspect`, `images` | the post; `aspect` is its target, if it has one |{columns}
| `label` | gold, or the teacher's where there was none |
| `rationale` | fields from the analysis of the text to the prediction |
| `source` | `predicted` or `explained` by the teacher, `recorded`, or `augmented` by the assistant |

```python
from datasets import load_dataset

rows = load_dataset("{target.repository}", split="train")
rows[0]["images"]
```
"""
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _size_category(count: int) -> str:
    sizes = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
    return next((name for limit, name in sizes.items() if count < limit), "1M<n<10M")


def _check_token() -> None:
    if get_token() is None:
        raise SettingsError("push needs a token of the hub: set HF_TOKEN, or run: hf auth login")


def _upload(target: Target, kind: str, files: Mapping[str, Path | bytes]) -> str:
    """One commit with all files, so that a repository has either all of them or none.

    Weights and tables of an earlier upload that this one does not replace are deleted by the same commit.
    """
    api = HfApi()
    operations: list[Any] = [
        CommitOperationAdd(name, file if isinstance(file, bytes) else str(file)) for name, file in files.items()
    ]
    log.info("upload %d files to %s", len(files), target.repository)
    try:
        address = api.create_repo(target.repository, repo_type=kind, private=target.private, exist_ok=True)
        there: Any = api.repo_info(target.repository, repo_type=kind)
        if target.private and not there.private:
            raise SettingsError(
                f"--private: {target.repository} exists and is public; make it private on the hub first"
            )
        names = [file.rfilename for file in there.siblings or ()]
        operations += [CommitOperationDelete(name) for name in names if name not in files and _EARLIER.fullmatch(name)]
        api.create_commit(target.repository, operations, commit_message="Upload by distill", repo_type=kind)
    except SettingsError:
        raise
    except OfflineModeIsEnabled:
        raise SettingsError("push needs a connection, and HF_HUB_OFFLINE is set") from None
    except HfHubHTTPError as error:
        reason = error.server_message or str(error).splitlines()[0]
        raise RunError(f"push: the hub refused {target.repository}: {reason}") from None
    except Exception as error:
        raise RunError(f"push: {target.repository} was not uploaded: {type(error).__name__}: {error}") from error
    return str(address)

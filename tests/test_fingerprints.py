"""Which settings make a stage another one: where a training runs does not, also in manifests of earlier versions."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill import fingerprints
from distill.chain import STAGES, run, stages_of
from distill.data.source import data_fingerprint
from distill.errors import RunError
from distill.models.lora import EARLIER_TARGETS
from distill.recipe import Recipe, masked
from tests import micro
from tests.fake_stages import Fakes

TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return micro.write(tmp_path, micro.WITH_TEACHER, trainer__accumulate_grad_batches=4)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


def make_earlier(recipe: Recipe) -> None:
    """Replace the fingerprints in the manifest by those of the version before, which had the devices in them.

    Of the later fields, `keep_layers` was none of the recipe, and the number of checked posts was in the fingerprints.
    """
    path = recipe.folder / "recipe.yaml"
    written = fingerprints._without(yaml.safe_load(path.read_text()), {"keep_layers"})
    path.write_text(yaml.safe_dump(written, sort_keys=False))
    settings = fingerprints._without(masked(recipe), fingerprints._IRRELEVANT | {"keep_layers"})
    known = json.loads((recipe.folder / "chain.json").read_text())["stages"].keys()
    with_trainer = {name for name in known if "trainer" in STAGES[name].sections}
    assert set_fingerprints(recipe, settings) >= with_trainer | {"teacher", "student", "export"} & known


def set_fingerprints(recipe: Recipe, settings: dict[str, Any]) -> set[str]:
    """Write the fingerprints of settings into the manifest. Returns the stages whose fingerprint is another one."""
    hashes = fingerprints._hashes(settings, data_fingerprint(recipe.data), STAGES)
    manifest = recipe.folder / "chain.json"
    content = json.loads(manifest.read_text())
    changed = {name for name, entry in content["stages"].items() if entry["fingerprint"] != hashes[name]}
    for name, entry in content["stages"].items():
        entry["fingerprint"] = hashes[name]
    manifest.write_text(json.dumps(content))
    return changed


def pretrained(folder: Path, **lora: Any) -> Path:
    """A recipe whose assistant and student have LoRA adapters."""
    model = {"path": str(folder / "model"), "lora": {"r": 4} | lora}
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    return micro.write(folder, micro.RECORDED, assistant__model=model, student__model=model)


def of_version_without_images(recipe: Recipe) -> None:
    """Turn a finished run into one of the version that had no `model.images` and another default of the targets."""
    file = recipe.folder / "recipe.yaml"
    settings = yaml.safe_load(file.read_text())
    for name in ("assistant", "student"):
        del settings[name]["model"]["images"]
        settings[name]["model"]["lora"]["targets"] = EARLIER_TARGETS
    file.write_text(yaml.safe_dump(settings))
    names = fingerprints._IRRELEVANT | fingerprints._DEVICES
    learners = {"assistant", "student"}
    changed = {name for name in stages_of(recipe) if learners & {name, *STAGES[name].reads}}
    assert set_fingerprints(recipe, fingerprints._without(settings, names)) == changed


def test_a_run_of_the_version_before_is_finished_with_the_new_default_of_the_targets(
    tmp_path: Path, fakes: Fakes
) -> None:
    recipe = micro.read(pretrained(tmp_path))
    run(recipe)
    of_version_without_images(recipe)
    assert run(recipe) == []
    assert run(micro.read(pretrained(tmp_path, targets=EARLIER_TARGETS))) == [], "as the run was written"
    assert run(recipe) == []


def test_other_targets_and_images_train_again(tmp_path: Path, fakes: Fakes) -> None:
    recipe = micro.read(pretrained(tmp_path))
    run(recipe)
    assert run(micro.read(pretrained(tmp_path, targets=EARLIER_TARGETS)))[0] == "assistant"
    of_version_without_images(micro.read(pretrained(tmp_path, targets=EARLIER_TARGETS)))
    assert run(micro.read(pretrained(tmp_path, targets=["q_proj"])))[0] == "assistant"
    assert run(micro.read(pretrained(tmp_path, targets=["q_proj"]), "--student.model.images", "false"))[0] == "student"
    assert run(micro.read(pretrained(tmp_path)))[0] == "assistant", "the present version wrote the run"


@pytest.mark.parametrize(
    "flags",
    [
        TWO,
        ("--trainer.accelerator", "auto", "--trainer.num_nodes", "1"),
        ("--student.trainer.devices", "2"),
        (*TWO, "--trainer.accumulate_grad_batches", "2"),
        ("--export.check_samples", "64"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("earlier", [False, True])
def test_other_devices_and_another_number_of_checked_posts_run_nothing(
    flags: tuple[str, ...], earlier: bool, path: Path, fakes: Fakes
) -> None:
    run(micro.read(path))
    if earlier:
        make_earlier(micro.read(path))
    assert run(micro.read(path, *flags)) == []
    assert run(micro.read(path)) == []


@pytest.mark.parametrize(
    "flags",
    [
        ("--trainer.accumulate_grad_batches", "2"),
        (*TWO, "--trainer.accumulate_grad_batches", "3"),
        ("--trainer.precision", "bf16-true"),
        ("--student.batch_size", "3"),
    ],
    ids=" ".join,
)
def test_another_number_of_posts_per_step_or_precision_trains_again(
    flags: tuple[str, ...], path: Path, fakes: Fakes
) -> None:
    run(micro.read(path))
    assert "student" in run(micro.read(path, *flags))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_training_begun_on_two_devices_keeps_its_checkpoint_on_one(earlier: bool, path: Path, fakes: Fakes) -> None:
    two = micro.read(path, *TWO, "--trainer.accumulate_grad_batches", "2")
    fakes.extra["student"], fakes.failing["student"] = ["checkpoints/last.ckpt"], RunError("killed")
    with pytest.raises(RunError, match="killed"):
        run(two)
    fakes.extra.clear()
    if earlier:
        make_earlier(two)
    one = micro.read(path)
    assert run(one)[0] == "student", "the finished stages are kept"
    assert (one.folder / "student" / "checkpoints" / "last.ckpt").exists()


NEW_FIELDS = frozenset({
    "schedule", "early_stopping", "max_length", "min_pixels", "max_pixels", "gradient_checkpointing",
    "divergence", "beta", "skew", "label_weight", "label_teacher", "question", "definitions", "language",
    "fields", "examples", "templates", "quality", "signal", "modalities", "video", "audio", "frames",
    "audio_hidden", "audio_depth", "drop_modality", "label_column", "batch", "posts", "labelled_posts", "engine", "ray",
    "replicas", "stream",
})  # fmt: skip
"""Fields that earlier versions did not have; their defaults do what those versions did."""


def test_a_run_of_a_version_without_the_new_fields_is_kept(path: Path, fakes: Fakes) -> None:
    recipe = micro.read(path)
    run(recipe)
    file = recipe.folder / "recipe.yaml"
    written = fingerprints._without(yaml.safe_load(file.read_text()), NEW_FIELDS)
    assert written != yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(written))
    names = fingerprints._IRRELEVANT | fingerprints._DEVICES
    assert "student" in set_fingerprints(recipe, fingerprints._without(written, names))
    assert run(micro.read(path)) == []
    assert run(micro.read(path, "--student.distillation.divergence", "jsd"))[0] == "student"
    assert run(micro.read(path, "--task.language", "Chinese"))[0] == "teacher"


def test_other_fields_of_rationales_or_another_order_change_all_stages(path: Path, fakes: Fakes) -> None:
    def flags(*names: str) -> tuple[str, str]:
        return "--task.fields", json.dumps(dict.fromkeys(names, "what"))

    run(micro.read(path))
    assert run(micro.read(path, *flags("Words", "Image", "Label")))[0] == "teacher"
    assert run(micro.read(path, *flags("Words", "Image", "Label"))) == []
    assert run(micro.read(path, *flags("Image", "Words", "Label")))[0] == "teacher"


def test_templates_count_by_their_content(path: Path, fakes: Fakes, tmp_path: Path) -> None:
    file = tmp_path / "templates.yaml"
    flags = ("--task.templates", str(file))
    file.write_text("classify: 'Judge {text}: {prefix}'")
    run(first := micro.read(path, *flags))
    assert run(micro.read(path, *flags)) == []
    assert run(micro.read(first.folder / "recipe.yaml", "--runs", str(first.runs))) == [], "the run has the content"
    file.write_text("classify: 'Label {text}: {prefix}'")
    assert run(micro.read(path, *flags))[0] == "teacher"


def test_what_does_not_change_the_weights_runs_nothing(path: Path, fakes: Fakes) -> None:
    run(micro.read(path))
    logger = '[{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}}]'
    assert run(micro.read(path, "--trainer.loggers", logger, "--student.model.gradient_checkpointing", "true")) == []
    assert "student" in run(micro.read(path, "--student.early_stopping", "3"))


def test_more_epochs_continue_a_training_unless_its_learning_rate_depends_on_their_number(
    path: Path, fakes: Fakes
) -> None:
    for schedule, kept in (("plateau", True), ("cosine", False)):
        flags = ("--student.schedule", schedule, "--student.trainer.max_epochs")
        fakes.extra["student"] = ["checkpoints/last.ckpt"]
        run(first := micro.read(path, *flags, "2"))
        fakes.extra.clear()
        checkpoint = first.folder / "student" / "checkpoints" / "last.ckpt"
        assert "student" in run(micro.read(path, *flags, "3"))
        assert checkpoint.exists() == kept, schedule


def test_refine_changes_nothing_of_a_recipe_without_it_and_what_follows_it_in_one_with_it(path: Path) -> None:
    recipe = micro.read(path)
    whole = fingerprints.fingerprints(recipe, STAGES).whole
    before = {
        name: stage._replace(reads=tuple(read for read in stage.reads if read != "refine"))
        for name, stage in STAGES.items()
        if name != "refine"
    }
    assert fingerprints.fingerprints(recipe, before).whole == whole
    refined = fingerprints.fingerprints(micro.read(path, "--refine", "{}"), STAGES).whole
    assert {name for name in whole if refined[name] != whole[name]} == {"evaluate", "calibrate", "cascade", "export"}


def test_modalities_that_a_training_leaves_out_change_the_trainings_only(tmp_path: Path, fakes: Fakes) -> None:
    path = micro.write(tmp_path, micro.RECORDED)
    run(micro.read(path))
    flags = ("--data.drop_modality", "{images: 0.2}")
    assert run(micro.read(path, *flags))[0] == "assistant"
    assert run(micro.read(path, *flags)) == []

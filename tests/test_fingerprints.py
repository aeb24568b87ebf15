"""Which settings make a stage another one: where a training runs does not, also in manifests of earlier versions."""

import json
from pathlib import Path

import pytest
import yaml

from distill import fingerprints
from distill.chain import STAGES, run
from distill.data.source import data_fingerprint
from distill.errors import RunError
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
    hashes = fingerprints._hashes(settings, data_fingerprint(recipe.data), STAGES)
    manifest = recipe.folder / "chain.json"
    content = json.loads(manifest.read_text())
    for name, entry in content["stages"].items():
        assert entry["fingerprint"] != hashes[name] or "trainer" not in STAGES[name].sections
        assert entry["fingerprint"] != hashes[name] or name not in ("teacher", "student", "export")
        entry["fingerprint"] = hashes[name]
    manifest.write_text(json.dumps(content))


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

"""`engine: ray` in a recipe: what is refused, before anything is asked or started."""

import importlib.util
import signal
from pathlib import Path
from typing import Any

import pytest

from distill import cli
from distill.errors import RunError, SettingsError
from distill.planning.tables import plan_text
from distill.workers.pool import cluster
from distill.workers.settings import RaySettings, check
from tests import micro
from tests.models.openai_server import Server


def recipe(folder: Path, url: str, **changes: Any) -> Path:
    endpoint = {"base_url": url, "model": "big-vl", "concurrency": 8}
    names = ("name", "seed", "data", "trainer", "tracking")
    content = {name: micro.RECORDED[name] for name in names} | {"annotate": {"endpoint": endpoint}, "engine": "ray"}
    return micro.write(folder, content, **changes)


def test_without_ray_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "distill.workers.settings.find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest)
    )
    with Server() as server:
        path = recipe(tmp_path, server.url)
        assert cli.main(["annotate", "--config", str(path)]) == 2
        assert server.requests == 0
    message = "engine: ray needs the package ray: pip install 'distill[ray]'"
    assert capsys.readouterr().err.splitlines()[-1] == f"distill: {message}"
    assert message in plan_text(micro.read(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "spark"}, "engine"),
        ({"ray__workers": 0}, "ray.workers is 0; it takes 1 or more"),
        ({"ray__gpus": -1}, "ray.gpus is -1"),
        ({"ray__batch_size": 0}, "ray.batch_size is 0"),
        ({"ray__worker": 2}, "ray.worker is not a field (did you mean workers?)"),
    ],
)
def test_a_bad_setting_is_one_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        micro.read(recipe(tmp_path, "http://127.0.0.1:9/v1", **changes))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_an_address_of_files_that_nothing_reads_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"^ray\.files: nosuch://bucket cannot be read: .*nosuch"):
        check(RaySettings(files="nosuch://bucket"))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_an_address_without_a_cluster_is_named(address: str) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    message = rf"^ray\.address: Ray cannot be used at {address}: .*\w"
    with pytest.raises(RunError, match=message), cluster(RaySettings(address=address)):
        pass
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_plan_names_the_engine(tmp_path: Path) -> None:
    text = plan_text(micro.read(recipe(tmp_path, "http://127.0.0.1:9/v1", ray={"workers": 3, "gpus": 0.5})))
    assert "annotate on Ray: 3 workers with 1 CPU and 0.5 GPU each" in text
    assert "8 requests in flight per worker, 24 in all" in text
    assert "Ray" not in plan_text(micro.read(recipe(tmp_path, "http://127.0.0.1:9/v1", engine="local")))

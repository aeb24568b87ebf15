"""The files in deploy/serving: they name what exists, and the dashboard asks for metrics of the gateway."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from distill import recipe
from distill.serving.metrics import Metrics

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "serving"

SUFFIXES = {
    "counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count"),
}  # fmt: skip


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def metric_names() -> set[str]:
    families = text_string_to_metric_families(Metrics().text().decode())
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


def test_every_metric_of_the_dashboard_is_one_of_the_gateway() -> None:
    text = (FOLDER / "grafana" / "dashboards" / "distill.json").read_text()
    dashboard = json.loads(text)
    shown = {
        name
        for panel in dashboard["panels"]
        for t in panel["targets"]
        for name in re.findall(r"distill_\w+", t["expr"])
    }
    assert shown and shown <= metric_names()
    assert set(re.findall(r"distill_\w+", text)) <= metric_names()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_dashboard_shows_every_metric() -> None:
    text = (FOLDER / "grafana" / "dashboards" / "distill.json").read_text()
    families = text_string_to_metric_families(Metrics().text().decode())
    names = {family.name for family in families if not family.name.endswith("_created")}
    assert {name for name in names if name not in text} == set()


def test_files_and_services_that_the_compose_file_names_exist() -> None:
    compose = read("compose.yaml")
    services = compose["services"]
    assert set(services) == {"student-1", "student-2", "gateway", "prometheus", "grafana"}
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
        for volume in service["volumes"]:
            source = (FOLDER / volume.split(":")[0]).resolve()
            assert source.exists() or source.name in ("runs", "data"), volume
    build = services["gateway"]["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).resolve() == FOLDER / "Dockerfile"
    targets = [
        target for job in read("prometheus.yaml")["scrape_configs"] for target in job["static_configs"][0]["targets"]
    ]
    assert {target.partition(":")[0] for target in targets} == {"gateway", "student-1", "student-2"}
    grafana = FOLDER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((grafana / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert f'"uid": "{source["uid"]}"' in (FOLDER / "grafana" / "dashboards" / "distill.json").read_text()
    (provider,) = yaml.safe_load((grafana / "dashboards" / "distill.yaml").read_text())["providers"]
    assert any(volume.split(":")[1] == provider["options"]["path"] for volume in services["grafana"]["volumes"])


@pytest.mark.parametrize("service", ["student-1", "gateway"])
def test_the_commands_of_the_services_are_accepted(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    default = re.compile(r"\$\{\w+:-([^}]*)\}")
    command, *flags = [default.sub(r"\1", part) for part in read("compose.yaml")["services"][service]["command"]]
    assert command == "serve"
    settings = recipe.load(recipe.parser("serve"), flags)[0]
    assert settings.serve.host == "0.0.0.0"
    if service == "gateway":
        student = settings.serve.student
        assert student is not None and student.model == f"{settings.name}-student"
        urls = [student.base_url, *student.replicas]
        assert urls == ["http://student-1:8000/v1", "http://student-2:8000/v1"]

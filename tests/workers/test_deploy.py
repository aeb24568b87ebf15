"""The image and the manifest of a Ray cluster: read and compared, not run."""

import re
import shlex
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_image_manifest_and_constraints_have_one_version_of_ray() -> None:
    image, constraints = (ROOT / "deploy/Dockerfile").read_text(), (ROOT / "constraints.txt").read_text()
    (_, job) = yaml.safe_load_all((ROOT / "deploy/rayjob.yaml").read_text())
    pinned = re.search(r"^ray==(\S+)$", constraints, re.MULTILINE)
    tags = re.findall(r"rayproject/ray:([\d.]+)-py", image)
    assert pinned and set(tags) == {pinned[1], job["spec"]["rayClusterSpec"]["rayVersion"]}
    instructions = {line.split()[0] for line in re.sub(r"\\\n", " ", image).splitlines() if line and line[0] != "#"}
    assert instructions == {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV"}
    for line in re.findall(r"^COPY \S+ (.+) \S+$", image, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())


def test_the_head_and_all_workers_share_volume_image_and_key() -> None:
    claim, job = yaml.safe_load_all((ROOT / "deploy/rayjob.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    cluster = job["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for pod in pods:
        (volume,), (container,) = pod["volumes"], pod["containers"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert [(mount["name"], mount["mountPath"]) for mount in container["volumeMounts"]] == [("data", "/data")]
    for name in ("image", "envFrom"):
        assert len({repr(pod["containers"][0][name]) for pod in pods}) == 1
    command = shlex.split(job["spec"]["entrypoint"].partition("&& ")[2])
    assert command == ["distill", "run", "--config", "mine.yaml", "--until", "annotate"]

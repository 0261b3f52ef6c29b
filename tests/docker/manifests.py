"""What docker/ describes, as plain values: the compose file, and the base as rendered."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
BASE = DOCKER / "kuberay"
COMPOSE = DOCKER / "compose.yaml"
PINNED = r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}"
OURS = r"midas:\d+\.\d+\.\d+-(cpu|gpu)"


@dataclass(frozen=True)
class Pod:
    """A pod that some resource starts.

    Attributes:
        where: kind, name and part of the resource.
        template: its labels and specification, as in a PodTemplate.
    """

    where: str
    template: dict[str, Any]

    @property
    def spec(self) -> dict[str, Any]:
        return self.template["spec"]

    @property
    def labels(self) -> dict[str, str]:
        return self.template["metadata"]["labels"]


@cache
def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())


@cache
def rendered() -> tuple[dict[str, Any], ...]:
    """The resources of the base; skips where there is no kubectl to render them."""
    kubectl = shutil.which("kubectl")
    if not kubectl:
        pytest.skip("no kubectl, which has kustomize in it")
    command = [kubectl, "kustomize", str(BASE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def resource(kind: str, name: str) -> dict[str, Any]:
    [found] = [
        document
        for document in rendered()
        if (document["kind"], document["metadata"]["name"]) == (kind, name)
    ]
    return found


def pods() -> Iterator[Pod]:
    """Every pod of the base."""
    for document in rendered():
        kind, spec = document["kind"], document.get("spec", {})
        where = f"{kind}/{document['metadata']['name']}"
        if kind in ("Deployment", "StatefulSet"):
            yield Pod(where, spec["template"])
        elif kind == "RayCluster":
            yield from ray_pods(where, spec)
        elif kind == "RayJob":
            yield from ray_pods(where, spec["rayClusterSpec"])
            yield Pod(f"{where}/submitter", spec["submitterPodTemplate"])


def ray_pods(where: str, cluster: dict[str, Any]) -> Iterator[Pod]:
    """The pods of the specification of a RayCluster, with the labels that KubeRay adds."""
    groups = [("head", "head", cluster["headGroupSpec"])]
    groups += [("worker", group["groupName"], group) for group in cluster["workerGroupSpecs"]]
    for node_type, name, group in groups:
        template = group["template"]
        labels = {**template["metadata"]["labels"], "ray.io/node-type": node_type}
        yield Pod(f"{where}/{name}", {**template, "metadata": {"labels": labels}})

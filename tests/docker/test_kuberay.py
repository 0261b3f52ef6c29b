"""The base for Kubernetes: valid, pods with few rights and limits, and few ways between them."""

import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.docker.manifests import BASE, DOCKER, OURS, PINNED, ROOT, pods, rendered, resource
from tests.docker.ray_schema import CLUSTER, JOB

KUBERNETES = "1.37"
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
LOCKED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def labels(policy: dict[str, Any]) -> str | None:
    """The component that a selector of pods means; None for all pods of the namespace."""
    words = policy.get("matchLabels", {})
    name = words.get("app.kubernetes.io/component") or words.get("k8s-app")
    return name or words.get("app.kubernetes.io/name")


def openings() -> set[tuple[str, str | None, str | None, tuple[int, ...]]]:
    """What policies open: (direction, of which pods, from or to whom, ports; none is all)."""
    found = set()
    for policy in (document for document in rendered() if document["kind"] == "NetworkPolicy"):
        spec = policy["spec"]
        for direction, key in (("ingress", "from"), ("egress", "to")):
            for rule in spec.get(direction, []):
                ports = tuple(sorted({port["port"] for port in rule.get("ports", [])}))
                for peer in rule[key]:
                    found.add(
                        (direction, labels(spec["podSelector"]), labels(peer["podSelector"]), ports)
                    )
    return found


def test_files_that_are_named_exist_and_all_are_named():
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    named = set(kustomization["resources"])
    assert named == {path.name for path in BASE.iterdir()} - {"kustomization.yaml"}


def test_resources_follow_the_schemas_of_kubernetes():
    checked = [document for document in rendered() if document["apiVersion"] != "ray.io/v1"]
    assert len(checked) == 14
    for document in checked:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_pods_of_ray_follow_the_schema_of_kubernetes():
    checked = [pod for pod in pods() if pod.where.startswith("Ray")]
    assert len(checked) == 7
    for pod in checked:
        document = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}}
        kubernetes_validate.validate(
            {**document, "template": pod.template}, KUBERNETES, strict=True
        )


def test_resources_of_ray_have_known_fields():
    jsonschema.validate(resource("RayCluster", "midas")["spec"], CLUSTER)
    jsonschema.validate(resource("RayJob", "midas")["spec"], JOB)


def test_schemas_refuse_misspelt_fields():
    document = resource("Deployment", "mlflow")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {**document, "spec": {**document["spec"], "replica": 1}}, KUBERNETES, strict=True
        )
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**resource("RayCluster", "midas")["spec"], "authOption": {}}, CLUSTER)


def test_the_job_has_a_cluster_of_the_same_kind():
    job = resource("RayJob", "midas")["spec"]
    assert job["rayClusterSpec"] == resource("RayCluster", "midas")["spec"]


def test_ray_is_the_version_that_the_image_has():
    pinned = re.search(r'"ray\[.*\]==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned
    assert resource("RayCluster", "midas")["spec"]["rayVersion"] == pinned[1]


def test_all_is_in_the_namespace_which_admits_restricted_pods_only():
    namespace = resource("Namespace", "midas")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for document in rendered():
        if document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == "midas"


def test_pods_have_a_user_and_no_account():
    for pod in pods():
        user = pod.spec["securityContext"]
        assert user["runAsNonRoot"] is True, pod.where
        assert user["runAsUser"] > 0, pod.where
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}, pod.where
        assert pod.spec["automountServiceAccountToken"] is False, pod.where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec), pod.where
        for volume in pod.spec["volumes"]:
            assert "hostPath" not in volume, pod.where
            assert "sizeLimit" in volume.get("emptyDir", {"sizeLimit": ""}), pod.where


def test_containers_have_limits_and_probes_and_cannot_write_their_root():
    for pod in pods():
        [container] = pod.spec["containers"]
        assert container["securityContext"] == LOCKED, pod.where
        assert {"cpu", "memory"} <= set(container["resources"]["limits"]), pod.where
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]), pod.where
        if "submitter" not in pod.where:  # a pod that ends
            assert all(probe in container for probe in PROBES), pod.where
        assert re.fullmatch(f"{PINNED}|{OURS}", container["image"]), pod.where


def test_gpu_workers_ask_for_gpus_and_have_the_image_for_it():
    [pod] = [pod for pod in pods() if pod.where == "RayCluster/midas/gpu"]
    [container] = pod.spec["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["image"].endswith("-gpu")
    assert pod.spec["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_object_stores_fit_into_shared_memory():
    cluster = resource("RayCluster", "midas")["spec"]
    sizes = {"1500Mi": 1500 << 20, "16Gi": 16 << 30}
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        [shm] = [v for v in group["template"]["spec"]["volumes"] if v["name"] == "shm"]
        assert shm["emptyDir"]["medium"] == "Memory"
        store = int(group["rayStartParams"]["object-store-memory"])
        assert store < sizes[shm["emptyDir"]["sizeLimit"]]


def test_nothing_is_open_but_what_is_needed():
    deny = resource("NetworkPolicy", "deny-all")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert openings() == {
        ("egress", None, "kube-dns", (53,)),
        ("ingress", "ray", "ray", ()),
        ("egress", "ray", "ray", ()),
        ("egress", "ray", "mlflow", (5000,)),
        ("ingress", "ray", "kuberay-operator", (8265,)),
        ("ingress", "ray", "submitter", (8265,)),
        ("egress", "submitter", "ray", (8265,)),
        ("ingress", "mlflow", "ray", (5000,)),
        ("egress", "mlflow", "postgres", (5432,)),
        ("ingress", "postgres", "mlflow", (5432,)),
    }


def test_policies_and_services_mean_pods_that_exist():
    present = [pod.labels for pod in pods()]
    selectors = [
        document["spec"]["selector"] for document in rendered() if document["kind"] == "Service"
    ]
    selectors += [
        document["spec"]["podSelector"].get("matchLabels", {})
        for document in rendered()
        if document["kind"] == "NetworkPolicy"
    ]
    for selector in selectors:
        assert any(selector.items() <= labels.items() for labels in present), selector


def test_ports_of_policies_are_ports_of_containers():
    listening = {
        (pod.labels["app.kubernetes.io/component"], port["containerPort"])
        for pod in pods()
        for port in pod.spec["containers"][0].get("ports", [])
    }
    for direction, pod, peer, ports in openings():
        target = pod if direction == "ingress" else peer
        if target != "kube-dns":
            assert {(target, port) for port in ports} <= listening


def test_no_service_is_seen_from_outside():
    for document in rendered():
        if document["kind"] == "Service":
            assert document["spec"].get("type", "ClusterIP") == "ClusterIP"
        assert document["kind"] not in ("Ingress", "Secret", "ConfigMap")


def test_ray_asks_for_the_token_of_the_secret():
    auth = resource("RayCluster", "midas")["spec"]["authOptions"]
    assert auth == {"mode": "token", "secretName": "midas-ray"}


def test_secrets_are_those_that_the_script_makes(tmp_path: Path):
    """By name and key; no environment variable holds one as text."""
    subprocess.run([DOCKER / "secrets.sh", tmp_path], check=True)
    for pod in pods():
        [container] = pod.spec["containers"]
        for variable in container.get("env", []):
            name = variable["name"]
            if re.search("TOKEN|PASSWORD|SECRET", name):
                if "value" in variable:
                    assert name.endswith("_FILE"), f"{pod.where}: {name}"
                else:
                    wanted = variable["valueFrom"]["secretKeyRef"]
                    service = wanted["name"].removeprefix("midas-")
                    assert (tmp_path / service / wanted["key"]).is_file(), pod.where
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        for volume in pod.spec["volumes"]:
            if "secret" in volume:
                service = volume["secret"]["secretName"].removeprefix("midas-")
                assert mounts[volume["name"]] == f"/run/secrets/{service}"
        for variable in container.get("env", []):
            if variable["name"].endswith("_FILE"):
                file = tmp_path / variable["value"].removeprefix("/run/secrets/")
                assert file.is_file(), f"{pod.where}: {variable}"


def test_cluster_and_job_wait_in_a_queue_of_kueue():
    for kind in ("RayCluster", "RayJob"):
        labels = resource(kind, "midas")["metadata"]["labels"]
        assert labels["kueue.x-k8s.io/queue-name"] == "midas"
    assert resource("RayJob", "midas")["spec"]["suspend"] is True

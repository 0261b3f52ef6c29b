"""The compose file: valid, closed to the outside, and without a secret in it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docker.manifests import COMPOSE, DOCKER, OURS, PINNED, compose

SERVICES = ("ray-head", "ray-worker", "mlflow", "bucket", "postgres", "store")
SECRET_WORDS = re.compile(r"TOKEN|PASSWORD|SECRET|ACCESS_KEY|_KEY(_|$)")


def service(name: str) -> dict[str, Any]:
    return compose()["services"][name]


def test_it_follows_the_compose_specification():
    command = [Path(sys.executable).parent / "check-jsonschema", "--builtin-schema"]
    done = subprocess.run(
        [*command, "vendor.compose-spec", COMPOSE], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_topology_is_head_two_workers_mlflow_postgres_and_store():
    assert tuple(compose()["services"]) == SERVICES
    assert service("ray-worker")["deploy"]["replicas"] == 2


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned(name: str):
    image = service(name)["image"]
    if "build" in service(name):
        assert re.fullmatch(OURS, image)
        context = COMPOSE.parent / service(name)["build"]["context"]
        assert (context / service(name)["build"]["dockerfile"]).samefile(DOCKER / "Dockerfile")
    else:
        assert re.fullmatch(PINNED, image)


@pytest.mark.parametrize("name", SERVICES)
def test_containers_have_few_rights_and_limits(name: str):
    container = service(name)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", container["user"])
    assert container["read_only"] is True
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "memory", "pids"} == set(container["deploy"]["resources"]["limits"])
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & set(container)


@pytest.mark.parametrize("name", SERVICES)
def test_containers_say_how_they_are(name: str):
    health = service(name)["healthcheck"]
    assert health.get("disable") is True if name == "bucket" else health["test"][0] == "CMD"


def test_only_loopback_ports_are_published():
    published = {port for name in SERVICES for port in service(name).get("ports", [])}
    assert published == {"127.0.0.1:8265:8265", "127.0.0.1:5000:5000"}


def test_database_and_store_are_reached_by_mlflow_alone():
    assert compose()["networks"]["backing"]["internal"] is True
    for name in ("postgres", "store", "bucket"):
        assert service(name)["networks"] == ["backing"]
    for name in ("ray-head", "ray-worker"):
        assert service(name)["networks"] == ["cluster"]


def test_secrets_are_files_and_no_value_stands_here():
    for name in SERVICES:
        environment = service(name).get("environment", {})
        for key, value in environment.items():
            if SECRET_WORDS.search(key):
                assert re.fullmatch(r"/run/secrets/\w+", value), f"{name}: {key}={value}"
        used = {
            value.removeprefix("/run/secrets/")
            for value in [
                *environment.values(),
                *" ".join(service(name).get("command", [])).split("="),
            ]
            if value.startswith("/run/secrets/")
        }
        assert used == set(service(name).get("secrets", [])), name
    assert set(compose()["secrets"]) == {
        secret for name in SERVICES for secret in service(name).get("secrets", [])
    }


def test_the_script_makes_every_secret(tmp_path: Path):
    subprocess.run([DOCKER / "secrets.sh", tmp_path / "secrets"], check=True)
    for secret in compose()["secrets"].values():
        assert (tmp_path / secret["file"]).stat().st_size > 20


def test_ray_asks_for_its_token():
    for name in ("ray-head", "ray-worker"):
        environment = service(name)["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"


def test_object_stores_fit_into_shared_memory():
    """Ray falls back to files in /tmp where they do not, which are slow."""
    for name in ("ray-head", "ray-worker"):
        [store] = [w for w in service(name)["command"] if w.startswith("--object-store-memory=")]
        assert service(name)["shm_size"] == "2gb"
        assert int(store.partition("=")[2]) < 2e9


def test_mlflow_has_accounts_and_no_job_runners():
    mlflow = service("mlflow")
    assert "--app-name=basic-auth" in mlflow["command"]
    assert mlflow["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert "*" not in mlflow["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"]


def test_services_wait_for_what_they_need():
    for name in SERVICES:
        for needed, how in service(name).get("depends_on", {}).items():
            expected = "service_completed_successfully" if needed == "bucket" else "service_healthy"
            assert how["condition"] == expected, f"{name} on {needed}"

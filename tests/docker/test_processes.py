"""The compose file as processes: the same services, on loopback, without a secret in sight."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.docker.manifests import DOCKER, compose
from tests.docker.test_dockerfile import last_stage


@pytest.fixture(scope="module")
def processes() -> ModuleType:
    """docker/processes.py; the package that is called docker is another."""
    name = "docker_processes"
    found = importlib.util.spec_from_file_location(name, DOCKER / "processes.py")
    assert found
    assert found.loader
    sys.modules[name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def waves(processes: ModuleType, tmp_path: Path) -> list[list]:
    if not list(Path("/usr/lib/postgresql").glob("*/bin")):
        pytest.skip("no PostgreSQL on this machine")
    plan = processes.Plan(tmp_path, 1, 200 << 20)
    return list(plan.waves(list(compose()["services"])))


def test_all_services_of_compose_run_after_what_they_need(waves: list[list]):
    assert [[service.name for service in wave] for wave in waves] == [
        ["postgres", "store"],
        ["bucket"],
        ["mlflow"],
        ["ray-head"],
        ["ray-worker-1", "ray-worker-2"],
    ]


def test_nothing_listens_beyond_loopback_or_names_a_container(waves: list[list]):
    foreign = ("0.0.0.0", "/run/secrets", "/opt/runtime", *(f"{n}:" for n in compose()["services"]))
    for service in (service for wave in waves for service in wave):
        described = {k: v for k, v in service.environment.items() if k not in os.environ}
        for text in (*service.command, *(service.health or ()), *described.values()):
            assert not any(text.startswith(word) or f"/{word}" in text for word in foreign), text


def test_commands_are_those_of_compose_but_for_places(waves: list[list]):
    for service in (service for wave in waves for service in wave):
        described = compose()["services"][service.name.removesuffix("-1").removesuffix("-2")]
        if service.name in ("postgres", "store"):
            continue
        flags = {word.partition("=")[0].rpartition("/")[2] for word in service.command}
        assert {w.partition("=")[0].rpartition("/")[2] for w in described["command"]} <= flags


def test_secrets_are_given_as_files(waves: list[list], tmp_path: Path):
    for service in (service for wave in waves for service in wave):
        for name, value in service.environment.items():
            if name.endswith(("_FILE", "_TOKEN_PATH")) and name not in os.environ:
                assert value.startswith(f"{tmp_path}/secrets/"), name


def test_the_environment_of_the_image_is_set(processes: ModuleType):
    [line] = last_stage("cpu")["ENV"]
    for name, value in processes.image_environment().items():
        assert f"{name}={value}" in line
    assert "RAY_AUTH_MODE" in processes.image_environment()


def test_a_folder_that_exists_or_is_too_long_is_refused(processes: ModuleType, tmp_path: Path):
    with pytest.raises(processes.StartError, match="takes a new folder: remove it or name another"):
        processes.make_folder(Path("/tmp"))
    with pytest.raises(processes.StartError, match="too many for the paths of Ray's sockets"):
        processes.make_folder(tmp_path / ("x" * 40))


def test_an_unknown_service_is_named(processes: ModuleType, tmp_path: Path):
    plan = processes.Plan(tmp_path, 1, 200 << 20)
    with pytest.raises(processes.StartError, match="no service redis; it has ray-head, ray-worker"):
        list(plan.waves(["redis"]))

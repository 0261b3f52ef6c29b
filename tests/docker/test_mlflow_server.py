"""The MLflow server as compose.yaml starts it, as processes: PostgreSQL, accounts, S3."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from tests.cluster.topology import Topology, running

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: where it listens.
        password: of its account `midas`.
        pid: of its first process.
    """

    url: str
    password: str
    pid: int
    topology: Topology

    def ask(self, path: str, **options: object) -> requests.Response:
        return requests.get(self.url + path, timeout=20, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Command and environment of compose.yaml; only addresses and folders are this machine's."""
    with running("mlflow") as topology:
        given = topology.environment
        url, password = given["MLFLOW_TRACKING_URI"], given["MLFLOW_TRACKING_PASSWORD"]
        yield Server(url, password, topology.pids["mlflow"], topology)


SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"


def test_without_or_with_a_wrong_password_nobody_comes_in(server: Server):
    assert server.ask(SEARCH).status_code == 401
    assert server.ask(SEARCH, auth=("midas", "wrong")).status_code in (401, 429)
    assert server.ask(SEARCH, auth=("admin", "password1234")).status_code in (401, 429)
    assert server.ask(SEARCH, auth=("midas", server.password)).status_code == 200


def test_other_names_of_the_host_are_refused(server: Server):
    """As a page does that makes a browser ask under its own name (DNS rebinding)."""
    asked = server.ask(
        SEARCH, auth=("midas", server.password), headers={"Host": "attacker.example"}
    )
    assert asked.status_code == 403


def test_a_run_with_an_artifact_goes_to_database_and_store(server: Server, tmp_path: Path):
    """The client has no key of the store: the server hands artifacts on."""
    with server.topology.mlflow() as client:
        run = client.create_run(client.create_experiment("first"))
        client.log_metric(run.info.run_id, "loss", 0.5)
        client.log_text(run.info.run_id, "hello", "note.txt")
        assert client.get_run(run.info.run_id).data.metrics == {"loss": 0.5}
        got = client.download_artifacts(run.info.run_id, "note.txt", str(tmp_path))
    assert Path(got).read_text() == "hello"
    assert any(run.info.run_id in key for key in server.topology.objects())


def test_there_are_no_job_runners(server: Server):
    """The server, its one worker and Python's resource tracker; job runners would be seven more."""
    listed = subprocess.check_output(["ps", "-e", "-o", "ppid=,pid=,args="], text=True)
    family, lines = {server.pid}, [line.split(None, 2) for line in listed.splitlines()]
    for _ in range(4):
        family |= {int(pid) for parent, pid, *_ in lines if int(parent) in family}
    commands = [line[2] for line in lines if int(line[1]) in family]
    assert len(commands) <= 4, commands
    assert not any("huey" in command for command in commands)


def test_no_secret_is_on_a_command_line(server: Server):
    listed = subprocess.check_output(["ps", "-e", "-o", "args="], text=True)
    assert server.password not in listed

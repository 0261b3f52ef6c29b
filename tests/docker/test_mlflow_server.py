"""The MLflow server as compose.yaml starts it, as processes: PostgreSQL, accounts, S3."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer

from tests.docker.manifests import DOCKER, compose

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
START_SECONDS = 300


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: where it listens.
        password: of its account `midas`.
        process: its first process.
    """

    url: str
    password: str
    process: subprocess.Popen[bytes]

    def ask(self, path: str, **options: object) -> requests.Response:
        return requests.get(self.url + path, timeout=20, **options)  # type: ignore[arg-type]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def postgres(folder: Path, password: Path) -> Iterator[int]:
    """A server with the user and the database of compose.yaml, which asks for the password."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.skip("no PostgreSQL on this machine")
    settings = compose()["services"]["postgres"]["environment"]
    user, port, data = settings["POSTGRES_USER"], free_port(), folder / "cluster"
    folder.mkdir()
    shutil.copy(password, folder / "password")
    account = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        shutil.chown(folder / "password", "postgres")
        account = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    initdb = [found[-1] / "initdb", f"--username={user}", f"--pgdata={data}"]
    initdb += [f"--pwfile={folder / 'password'}", *settings["POSTGRES_INITDB_ARGS"].split()]
    subprocess.run([*account, *map(str, initdb)], check=True, capture_output=True, cwd="/")
    command = [found[-1] / "postgres", "-D", data, "-p", str(port), "-k", folder]
    command += ["-c", "listen_addresses=127.0.0.1"]
    process = subprocess.Popen([*account, *command], cwd="/", stderr=subprocess.DEVNULL)
    try:
        environment = {**os.environ, "PGPASSWORD": password.read_text()}
        create = [found[-1] / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", user]
        create.append(settings["POSTGRES_DB"])
        deadline = time.monotonic() + 60
        while subprocess.run(create, env=environment, capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, "PostgreSQL did not start"
            time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Command and environment of compose.yaml; only addresses and folders are this machine's."""
    # PostgreSQL's user must be able to reach its folder, which pytest's own do not allow.
    folder = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    folder.chmod(0o755)
    secrets = folder / "secrets"
    subprocess.run([DOCKER / "secrets.sh", secrets], check=True)
    store = ThreadedMotoServer("127.0.0.1", port=0)
    store.start()
    try:
        with postgres(folder / "postgres", secrets / "postgres/password") as database:
            yield from _serving(folder, secrets, store, database)
    finally:
        store.stop()
        shutil.rmtree(folder)


def _serving(
    folder: Path, secrets: Path, store: ThreadedMotoServer, database: int
) -> Iterator[Server]:
    described, port = compose()["services"]["mlflow"], free_port()
    host, store_port = store.get_host_and_port()
    places = {name: secret["file"] for name, secret in compose()["secrets"].items()}
    environment = {
        key: str(secrets.parent / places[value.removeprefix("/run/secrets/")])
        if value.startswith("/run/secrets/")
        else value.replace("/opt/runtime", str(DOCKER / "runtime")).replace(":5000", f":{port}")
        for key, value in described["environment"].items()
    }
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "PGHOST": "127.0.0.1",
        "PGPORT": str(database),
        "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{store_port}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    entrypoint = str(DOCKER / "runtime/entrypoint.sh")
    make_bucket = [entrypoint, sys.executable, str(DOCKER / "runtime/bucket.py")]
    subprocess.run(make_bucket, env=environment, check=True, cwd=folder)
    command = [word.replace("0.0.0.0", "127.0.0.1") for word in described["command"]]
    command = [word.replace("--port=5000", f"--port={port}") for word in command]
    with (folder / "mlflow.log").open("wb") as log:
        process = subprocess.Popen(
            [entrypoint, *command], env=environment, cwd=folder, stdout=log, stderr=log
        )
    try:
        running = Server(
            f"http://127.0.0.1:{port}", (secrets / "mlflow/password").read_text(), process
        )
        _wait(running, environment["HEALTH_URL"], folder / "mlflow.log")
        yield running
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        process.kill()


def _wait(server: Server, health_url: str, log: Path) -> None:
    check = [sys.executable, str(DOCKER / "runtime/health.py")]
    environment = {**os.environ, "HEALTH_URL": health_url}
    deadline = time.monotonic() + START_SECONDS
    while subprocess.run(check, env=environment, capture_output=True, check=False).returncode:
        assert server.process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(1)


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


def test_a_run_with_an_artifact_goes_to_database_and_store(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The client has no key of the store: the server hands artifacts on."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "midas")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.password)
    client = MlflowClient(server.url)
    run = client.create_run(client.create_experiment("first"))
    client.log_metric(run.info.run_id, "loss", 0.5)
    client.log_text(run.info.run_id, "hello", "note.txt")
    assert client.get_run(run.info.run_id).data.metrics == {"loss": 0.5}
    got = client.download_artifacts(run.info.run_id, "note.txt", str(tmp_path))
    assert Path(got).read_text() == "hello"


def test_there_are_no_job_runners(server: Server):
    """The server, its one worker and Python's resource tracker; job runners would be seven more."""
    listed = subprocess.check_output(["ps", "-e", "-o", "ppid=,pid=,args="], text=True)
    family, lines = {server.process.pid}, [line.split(None, 2) for line in listed.splitlines()]
    for _ in range(4):
        family |= {int(pid) for parent, pid, *_ in lines if int(parent) in family}
    commands = [line[2] for line in lines if int(line[1]) in family]
    assert len(commands) <= 4, commands
    assert not any("huey" in command for command in commands)


def test_no_secret_is_on_a_command_line(server: Server):
    listed = subprocess.check_output(["ps", "-e", "-o", "args="], text=True)
    assert server.password not in listed

"""`midas doctor` on this machine, and on machines that are made to look ill."""

import json
import os
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from service import doctor, exposure
from service.doctor import Finding
from tests.service.cli import until
from tests.service.test_cli import midas
from tests.service.test_tracking import free_port, wait_until_up

ROOT = Path(__file__).parents[2]
VARIABLES = (
    *("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"),
    "MLFLOW_TRACKING_URI",
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An environment and a home without anything of Ray or MLflow."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def only(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    return found


def test_it_says_what_it_found_and_ends_with_its_verdict(tmp_path: Path):
    storage = tmp_path / "not" / "there"
    done = midas("doctor", "--storage", storage, "--json")
    result = json.loads(done.out.splitlines()[-1])
    assert done.code == int(not result["doctor/ok"])
    for name in ("python", "ray", "mlflow", "torch", "shared memory", "storage", "ray token"):
        assert f" {name}  " in done.err
    assert result["ray"].startswith(f"ok: {metadata.version('ray')}")
    assert result["storage"].startswith("ok: ")
    assert "clock, the storage" in result
    assert not (tmp_path / "not").exists()


def test_old_versions_are_to_be_replaced(monkeypatch: pytest.MonkeyPatch):
    old = {"ray": "2.54.1", "mlflow": "3.9.0", "torch": "2.9.1+cpu"}
    monkeypatch.setattr(doctor.metadata, "version", old.get)
    found = {finding.name: finding for finding in doctor.versions()}
    assert {name: found[name].state for name in old} == dict.fromkeys(old, "fix")
    assert "CVE-2026-41486" in found["ray"].remedy
    assert "2.58 or newer" in found["ray"].remedy
    monkeypatch.setattr(doctor.metadata, "version", {**old, "ray": "2.58.0rc1"}.get)
    assert states(list(doctor.versions()))["ray"] == "ok"


def test_pinned_and_installed_versions_have_no_known_holes():
    """The audit that works without an advisory service."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {need.name: need for need in map(Requirement, project["dependencies"])}
    for name, (minimum, holes) in doctor.MINIMUM_VERSIONS.items():
        (pin,) = pinned[name].specifier
        assert pin.operator == "==", f"{name} is not pinned"
        for version in (pin.version, metadata.version(name)):
            assert Version(version) >= Version(minimum), f"{name} {version} has {holes}"


def test_storage_that_cannot_be_used(tmp_path: Path):
    (tmp_path / "file").write_text("")
    found = only(doctor.disk(tmp_path / "file" / "runs"))
    assert (found.state, found.name) == ("fix", "storage")
    assert "--storage DIR" in found.remedy
    done = midas("doctor", "--storage", tmp_path / "file" / "runs")
    assert done.code == 1
    assert "FIX" in done.out


def test_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "GOOD_DISK", 1 << 62)
    assert states(list(doctor.disk(tmp_path))) == {"storage": "ok", "free space": "warn"}
    monkeypatch.setattr(doctor, "MIN_DISK", 1 << 61)
    assert states(list(doctor.disk(tmp_path))) == {"storage": "ok", "free space": "fix"}


def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "MIN_SHM", 1 << 62)
    found = next(doctor.shared_memory())
    assert found.state == "warn"
    assert "--shm-size" in found.remedy


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        doctor.PORTS[port] = "this test"
        try:
            assert states(list(doctor.ports()))[f"port {port}"] == "warn"
        finally:
            del doctor.PORTS[port]


@pytest.mark.parametrize(
    ("environment", "state", "words"),
    [
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x" * 32}, "ok", "ask for a token"),
        ({"RAY_AUTH_MODE": "disabled"}, "fix", "ask nobody"),
        ({"RAY_ADDRESS": "10.0.0.7:6379"}, "fix", "without a token"),
        ({"RAY_ADDRESS": "127.0.0.1:6379"}, "warn", "without a token"),
        ({"RAY_ADDRESS": "10.0.0.7:6379", "RAY_AUTH_MODE": "token"}, "fix", "no token"),
        (
            {"RAY_ADDRESS": "10.0.0.7:6379", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"},
            "warn",
            "in clear",
        ),
        (
            {"RAY_ADDRESS": "auto", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"},
            "ok",
            "from RAY_AUTH_TOKEN",
        ),
    ],
)
def test_authentication(
    environment: dict[str, str], state: str, words: str, monkeypatch: pytest.MonkeyPatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = only(doctor.authentication())
    assert (found.state, words in found.found) == (state, True)


def test_token_files_are_for_their_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    token = tmp_path / "token"
    token.write_text("x" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    tmp_path.chmod(0o755)
    token.chmod(0o644)
    found = only(doctor.token_files())
    assert (found.state, found.remedy.endswith(f"chmod 600 {token}")) == ("fix", True)
    tmp_path.chmod(0o700)  # as docker/secrets.sh leaves them: for containers' users, nobody else
    assert only(doctor.token_files()).state == "ok"
    tmp_path.chmod(0o755)
    token.chmod(0o600)
    assert only(doctor.token_files()).state == "ok"


def test_mlflow_that_is_away_or_holds_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://u:hidden@127.0.0.1:{free_port()}")
    found = {finding.name: finding for finding in doctor.tracking_server(tmp_path)}
    assert states(list(found.values())) == {"mlflow address": "warn", "mlflow": "warn"}
    assert "MLFLOW_TRACKING_USERNAME" in found["mlflow address"].remedy
    assert "hidden" not in str(found)


def test_runs_that_mlflow_missed_are_named(tmp_path: Path):
    from service.outbox import Outbox

    Outbox(tmp_path / "left").put({"kind": "tags", "tags": {}})
    found = {finding.name: finding for finding in doctor.tracking_server(tmp_path)}
    assert found["mlflow outbox"].state == "warn"
    assert "left" in found["mlflow outbox"].found
    assert found["mlflow outbox"].remedy.startswith("midas sync")


def test_a_server_that_does_not_speak_http_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(
            target=lambda: server.accept()[0].sendall(b"\0\0\x18\x04"), daemon=True
        ).start()
        assert doctor.answer(f"http://127.0.0.1:{server.getsockname()[1]}/") is None


def test_storage_that_everyone_can_write(tmp_path: Path):
    tmp_path.chmod(0o777)
    assert states(exposure.exposure(tmp_path))["storage"] == "fix"
    tmp_path.chmod(0o755)
    assert states(exposure.exposure(tmp_path))["storage"] == "ok"


def test_names_of_secrets_are_listed_and_never_their_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MY_API_KEY", "very-hidden-value")
    done = midas("doctor", "--security", "--storage", tmp_path)
    assert "MY_API_KEY" in done.out
    assert "very-hidden" not in done.out + done.err


@pytest.mark.ray
@pytest.mark.parametrize(("host", "state"), [("127.0.0.1", "ok"), ("0.0.0.0", "fix")])
def test_an_mlflow_server_without_login_may_not_leave_this_machine(
    host: str, state: str, tmp_path: Path
):
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/m.db", "--workers", "1"]
    extra = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(command, env=os.environ | extra, start_new_session=True)
    try:
        wait_until_up(f"http://127.0.0.1:{port}", server)
        found = {f.name: f for f in exposure.exposure(tmp_path)}[f"MLflow server, port {port}"]
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=20)
    assert found.state == state
    assert f"{host}:{port}" in found.found
    assert ("this machine only" in found.found) == (host == "127.0.0.1")
    assert "answers whoever connects" in found.found


@pytest.mark.ray
def test_an_mlflow_server_beyond_loopback_asks_for_a_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tmp_path / "auth.ini"
    config.touch(0o600)
    config.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{tmp_path}/auth.db\n"
        "admin_username = admin\nadmin_password = a-long-password-1\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    port = free_port()
    environment = {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 32,
    }
    command = ["-m", "service", "ui", "--host", "0.0.0.0", "--port", str(port)]
    refused = subprocess.run(
        [sys.executable, *command, "--storage", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 1
    assert "MLFLOW_AUTH_CONFIG_PATH" in refused.stderr
    server = subprocess.Popen(
        [sys.executable, *command, "--storage", str(tmp_path)],
        env=os.environ | environment,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    probe = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        until(lambda: doctor.answer(f"{url}/health") is not None)
        assert doctor.answer(probe) == 401
        wrong = {"Authorization": "Basic YWRtaW46d3Jvbmc="}
        assert doctor.answer(probe, wrong) == 401
        right = {"Authorization": "Basic YWRtaW46YS1sb25nLXBhc3N3b3JkLTE="}
        assert doctor.answer(probe, right) == 200
        found = {f.name: f for f in exposure.exposure(tmp_path)}[f"MLflow server, port {port}"]
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=20)
    assert (found.state, "asks for a login" in found.found) == ("ok", True)


@pytest.mark.ray
@pytest.mark.usefixtures("one_cpu_ray")
def test_sockets_of_ray_are_listed_with_who_reaches_them(tmp_path: Path):
    def sockets() -> list[Finding]:
        ours = [f"(pid {child.pid})" for child in psutil.Process().children(recursive=True)]
        findings = exposure.exposure(tmp_path)
        return [finding for finding in findings if any(pid in finding.found for pid in ours)]

    until(lambda: any("tells metrics" in finding.found for finding in sockets()))
    found = sockets()
    assert any("gcs_server" in finding.name for finding in found)
    metrics = [finding for finding in found if "tells metrics" in finding.found]
    assert {f.state for f in metrics} == {"warn"}  # Ray asks nobody there, on all addresses
    asking = [finding for finding in found if finding not in metrics]
    assert not [f for f in asking if f.state != "ok"]  # with the token of tests/conftest.py
    assert all("asks for a token" in finding.found for finding in asking)


@pytest.mark.parametrize("mode", ["token", ""])
def test_a_process_without_an_environment_asks_as_the_one_that_started_it(mode: str):
    child = f"subprocess.Popen([{sys.executable!r}, '-c', 'input()'], env={{}})"
    script = f"import subprocess; child = {child}; print(child.pid, flush=True); child.wait()"
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"RAY_AUTH_MODE": mode},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        assert parent.stdout
        assert exposure.has_token_mode(int(parent.stdout.readline()))[0] == (mode == "token")
        parent.communicate("\n")

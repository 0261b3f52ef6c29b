"""A cluster as `ray start --head` makes it: dashboard, token, its own folder and ports."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.service.cli import until

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        url: of its dashboard.
        token: file with its token.
    """

    url: str
    token: Path

    def environment(self, **changes: str) -> dict[str, str]:
        """What a client needs; nothing of a cluster that this process might have."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_A", "MLFLOW_"))}
        return {**own, "RAY_AUTH_TOKEN_PATH": str(self.token), **changes}

    def midas(self, *args: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            self._command(args),
            capture_output=True,
            text=True,
            timeout=400,
            cwd=ROOT,
            env=self.environment(**changes),
        )

    def start(self, *args: str, **changes: str) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            self._command(args),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=self.environment(**changes),
        )

    def _command(self, args: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "service", args[0], "--address", self.url, *args[1:]]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def running_head(cpus: int = 2) -> Iterator[Head]:
    """A head with this many CPUs, for as long as the body runs."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets want a short path
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    port = free_port()
    head = Head(f"http://127.0.0.1:{port}", token)
    ports = {
        "port": free_port(),
        "dashboard-port": port,
        "ray-client-server-port": free_port(),
        "dashboard-agent-listen-port": free_port(),
        "object-store-memory": 256 << 20,
        "num-cpus": cpus,
    }
    python = Path(sys.executable).parent
    environment = head.environment(
        RAY_AUTH_MODE="token",
        RAY_JOB_START_TIMEOUT_SECONDS="3600",
        PATH=f"{python}{os.pathsep}{os.environ['PATH']}",
    )
    log = (folder / "start.txt").open("w")
    process = subprocess.Popen(
        [
            *(str(python / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address", "127.0.0.1", "--temp-dir", str(folder / "r")),
            *(f"--{name}={value}" for name, value in ports.items()),
        ],
        stdout=log,
        stderr=log,
        cwd=folder,
        env=environment,
    )

    def answers() -> bool:
        assert process.poll() is None, (folder / "start.txt").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        until(answers)
        yield head
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        finally:
            process.kill()
            log.close()
            shutil.rmtree(folder, ignore_errors=True)

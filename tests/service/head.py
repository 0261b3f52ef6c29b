"""A cluster as `ray start --head` makes it: dashboard, token, its own folder and ports."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil

from tests.service.cli import finish, until

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        url: of its dashboard.
        address: for drivers that join.
        folder: its own, and home of the user who started it.
    """

    url: str
    address: str
    folder: Path

    @property
    def token(self) -> Path:
        """File with the token."""
        return self.folder / ".ray" / "auth_token"

    def environment(self, **changes: str | None) -> dict[str, str]:
        """What a client needs, and nothing of a cluster that this process might have.

        Args:
            changes: of single variables; None takes one away.
        """
        own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_A", "MLFLOW_"))}
        changed = {**own, "RAY_AUTH_TOKEN_PATH": str(self.token), **changes}
        return {name: value for name, value in changed.items() if value is not None}

    def jobs(self) -> dict[str, dict[str, Any]]:
        """What Ray itself says of the jobs, by id."""
        wanted = Request(
            f"{self.url}/api/jobs/", headers={"Authorization": f"Bearer {self.token.read_text()}"}
        )
        with urlopen(wanted, timeout=30) as answer:
            return {job["submission_id"]: job for job in json.load(answer) if job["submission_id"]}

    def midas(
        self, *args: str, cwd: Path = ROOT, **changes: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return finish(self.start(*args, cwd=cwd, **changes))

    def start(self, *args: str, cwd: Path = ROOT, **changes: str | None) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            [str(BIN / "midas"), args[0], "--address", self.url, *args[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=self.environment(**changes),
        )

    def ray_job(self, *args: str, **changes: str | None) -> str:
        """`ray job submit --no-wait ARGS`; returns the job's id."""
        done = subprocess.run(
            [str(BIN / "ray"), "job", "submit", "--no-wait", "--address", self.url, *args],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
            env=self.environment(RAY_AUTH_MODE="token", **changes),
        )
        found = re.search(r"Job '(\S+)' submitted", done.stdout)
        assert found, done.stdout + done.stderr
        return found[1]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def running_head(cpus: int = 2) -> Iterator[Head]:
    """A head with this many CPUs, for as long as the body runs."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets want a short path
    port, joined = free_port(), free_port()
    head = Head(f"http://127.0.0.1:{port}", f"127.0.0.1:{joined}", folder)
    home = head.environment(HOME=str(folder), RAY_AUTH_TOKEN_PATH=None)
    words = [BIN / "ray", "get-auth-token", "--generate"]
    subprocess.run(words, env=home, umask=0o077, check=True, capture_output=True)
    ports = {
        "port": joined,
        "dashboard-port": port,
        "ray-client-server-port": free_port(),
        "dashboard-agent-listen-port": free_port(),
        "object-store-memory": 256 << 20,
        "num-cpus": cpus,
    }
    environment = head.environment(
        RAY_AUTH_MODE="token",
        RAY_JOB_START_TIMEOUT_SECONDS="3600",
        PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}",
    )
    log = (folder / "start.txt").open("w")
    process = subprocess.Popen(
        [
            *(str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
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
        _kill(process)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a head and all that it started; Ray's own way takes half a minute."""
    with suppress(psutil.NoSuchProcess):
        for member in (family := psutil.Process(process.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=30)
    process.kill()
    process.wait(timeout=30)

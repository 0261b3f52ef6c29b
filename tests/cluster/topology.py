"""docker/processes.py for as long as a test or a measurement runs."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from mlflow import MlflowClient

from tests.service.cli import until

ROOT = Path(__file__).parents[2]
START_SECONDS = 400.0


@dataclass(frozen=True)
class Topology:
    """What runs.

    Attributes:
        folder: of docker/processes.py.
        pids: the first process of each service.
        ports: those of this machine, by those of compose.yaml.
        environment: of a shell that has read FOLDER/environment.
    """

    folder: Path
    pids: dict[str, int]
    ports: dict[str, int]
    environment: dict[str, str]

    @property
    def runs(self) -> Path:
        """The jobs' storage."""
        return Path(self.environment["RUNS"])

    def sessions(self) -> list[Path]:
        """Folders of Ray's nodes, with their logs."""
        return [found for name in self.pids if (found := self.folder / name).is_dir()]

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a shell command in the root of the repository, in a process group of its own."""
        return subprocess.Popen(
            ["bash", "-c", command],
            env=self.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run a shell command to its end."""
        with self.start(command) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            finally:
                process.kill()
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    @contextlib.contextmanager
    def mlflow(self) -> Iterator[MlflowClient]:
        """The server, with the login of its user."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("USERNAME", "PASSWORD"):
                key = f"MLFLOW_TRACKING_{name}"
                patch.setenv(key, self.environment[key])
            yield MlflowClient(self.environment["MLFLOW_TRACKING_URI"])

    def objects(self) -> list[str]:
        """Keys in the bucket of the store."""
        store = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.ports['8333']}",
            aws_access_key_id="any",
            aws_secret_access_key="any",
            region_name="us-east-1",
        )
        pages = store.get_paginator("list_objects_v2").paginate(Bucket="mlflow")
        return [found["Key"] for page in pages for found in page.get("Contents", [])]


@contextlib.contextmanager
def running(*services: str) -> Iterator[Topology]:
    """These services and what they depend on; without names all of compose.yaml."""
    if not list(Path("/usr/lib/postgresql").glob("*/bin")):
        pytest.skip("no PostgreSQL on this machine")
    # PostgreSQL's user must be able to reach it, which pytest's own folders do not allow.
    folder = Path(tempfile.mkdtemp(prefix="midas", dir="/tmp"))
    folder.rmdir()
    words = [sys.executable, str(ROOT / "docker/processes.py"), str(folder), *services]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, env=_plain(), cwd=ROOT)

        def is_ready() -> bool:
            if process.poll() is None:
                return (folder / "environment").is_file()
            said.seek(0)
            raise AssertionError(said.read())

        try:
            until(is_ready, START_SECONDS)
            described: dict[str, Any] = json.loads((folder / "processes.json").read_text())
            yield Topology(folder, environment=_shell(folder), **described)
        finally:
            process.terminate()
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)


def _plain() -> dict[str, str]:
    """This process's environment without what it has set for a cluster of its own."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}


def _shell(folder: Path) -> dict[str, str]:
    read = ["bash", "-c", f". {folder}/environment && env --null"]
    shown = subprocess.check_output(read, env=_plain(), text=True)
    entries = dict(entry.split("=", 1) for entry in shown.rstrip("\0").split("\0"))
    return {**entries, "UV_NO_SYNC": "1"}  # else every `uv run` compiles for two seconds

"""Ray that does not start, from the command line: one paragraph, exit code 1, nothing written."""

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

# Ray gives up after about 20 s; without the limits of service/environment.py after 14 minutes.
LIMIT_SECONDS = 60


def midas(
    *args: str | Path, ray_address: str = "", ray_tmpdir: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    if ray_address:
        environment["RAY_ADDRESS"] = ray_address
    if ray_tmpdir:
        environment["RAY_TMPDIR"] = str(ray_tmpdir)
    return subprocess.run(
        [sys.executable, "-m", "service", *args],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        env=environment,
    )


def contents(storage: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file, and the folders."""
    return {
        str(path.relative_to(storage)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in storage.rglob("*")
    }


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a command that failed as it should: one paragraph, the last on stderr."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr
    assert done.stderr.count("Error: ") == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    return last


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage folder in which only data was prepared."""
    folder = tmp_path_factory.mktemp("runs")
    done = midas("prepare", "digits", "--storage", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def check_join_failure(storage: Path, address: str) -> None:
    before = contents(storage)
    done = midas("train", "digits", "--name", "x", "--storage", storage, ray_address=address)
    error = error_of(done)
    assert f"Ray could not join the cluster at RAY_ADDRESS={address}: " in error
    assert "correct RAY_ADDRESS, or unset it to train on this machine" in error
    assert contents(storage) == before  # no run folder, and no MLflow store, hence no open run


def test_a_closed_port_is_given_up_soon(storage: Path):
    check_join_failure(storage, "127.0.0.1:1")


def test_a_port_where_no_ray_answers_is_given_up_soon(storage: Path, deaf_port: int):
    check_join_failure(storage, f"127.0.0.1:{deaf_port}")


def test_a_malformed_address(storage: Path):
    check_join_failure(storage, "head-node")


def test_a_local_start_without_its_folder(storage: Path, tmp_path: Path):
    blocked = tmp_path / "file" / "ray"
    blocked.parent.write_text("a file, where a folder should be")
    before = contents(storage)
    done = midas("train", "digits", "--name", "x", "--storage", storage, ray_tmpdir=blocked)
    error = error_of(done)
    assert "Ray could not start on this machine: [Errno 20] Not a directory: " in error
    assert str(blocked) in error
    assert "its folder (RAY_TMPDIR, else /tmp) must be writable" in error
    assert contents(storage) == before


def test_debug_shows_the_trace(storage: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    done = midas(
        *("train", "digits", "--storage", storage, "--debug"), ray_tmpdir=tmp_path / "file" / "ray"
    )
    assert done.returncode == 1
    assert "Traceback (most recent call last):" in done.stderr
    assert "NotADirectoryError" in done.stderr

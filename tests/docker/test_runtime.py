"""The scripts of the images and the one that makes secrets."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.docker.manifests import DOCKER

RUNTIME = DOCKER / "runtime"


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/well" else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def health(url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, RUNTIME / "health.py"]
    return subprocess.run(command, env={"HEALTH_URL": url}, capture_output=True, text=True)


def test_health_follows_the_answer(server: str):
    assert health(f"{server}/well").returncode == 0
    sick = health(f"{server}/sick")
    assert sick.returncode == 1
    assert "503" in sick.stderr


def test_health_of_nobody_is_bad():
    done = health("http://127.0.0.1:9")
    assert done.returncode == 1
    assert "http://127.0.0.1:9" in done.stderr


def entrypoint(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RUNTIME / "entrypoint.sh", "sh", "-c", script],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
    )


def test_entrypoint_reads_secrets_from_files(tmp_path: Path):
    secret = tmp_path / "password"
    secret.write_text("a 'b' $c\n")
    done = entrypoint('printf %s "$PGPASSWORD"; env', PGPASSWORD_FILE=str(secret))
    assert done.stdout.startswith("a 'b' $c")
    assert "PGPASSWORD_FILE" not in done.stdout


def test_entrypoint_leaves_other_files_alone():
    assert entrypoint("echo $SSL_CERT_FILE", SSL_CERT_FILE="/x").stdout == "/x\n"


@pytest.mark.parametrize("content", [None, ""])
def test_entrypoint_refuses_a_secret_that_is_not_there(content: str | None, tmp_path: Path):
    secret = tmp_path / "password"
    if content is not None:
        secret.write_text(content)
    done = entrypoint("echo ran", PGPASSWORD_FILE=str(secret))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"PGPASSWORD_FILE={secret} is missing or empty" in done.stderr


def test_entrypoint_hands_on_the_exit_code():
    assert entrypoint("exit 7").returncode == 7


def test_secrets_are_random_private_and_kept(tmp_path: Path):
    def made(folder: Path) -> dict[str, str]:
        subprocess.run([DOCKER / "secrets.sh", folder], check=True)
        return {
            str(path.relative_to(folder)): path.read_text()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    first, other = made(tmp_path / "a"), made(tmp_path / "b")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert len(set(first.values()) | set(other.values())) == 2 * len(first)
    assert min(map(len, first.values())) >= 24
    assert made(tmp_path / "a") == first


def test_the_store_knows_the_keys_it_was_given(tmp_path: Path):
    subprocess.run([DOCKER / "secrets.sh", tmp_path], check=True)
    identities = (tmp_path / "store/identities.json").read_text()
    for key in ("access_key", "secret_key"):
        assert (tmp_path / "store" / key).read_text() in identities


@pytest.mark.ray
def test_the_bucket_is_made_once():
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environment = {
            **{"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"},
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}",
            "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow",
        }
        for _ in range(2):
            subprocess.run(
                [sys.executable, RUNTIME / "bucket.py"], env=environment, check=True, timeout=60
            )
        store = boto3.client(
            "s3",
            endpoint_url=environment["MLFLOW_S3_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id="a",
            aws_secret_access_key="b",
        )
        assert [bucket["Name"] for bucket in store.list_buckets()["Buckets"]] == ["mlflow"]
    finally:
        server.stop()

"""Jobs, without a cluster: addresses, secrets, packages, shares, and servers that are not Ray."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from service.__main__ import main
from service.config import ConfigError, RunError, ScalingConfig
from service.environment import check_submitter, worker_environment
from service.jobs import Cluster, check_clear_text, check_versions, exit_code, jobs_url
from service.submission import (
    HEAD_SHARE,
    MAX_DRIVERS,
    check_arguments,
    check_package,
    check_paths,
    entrypoint,
    head_share,
    job_environment,
    job_id,
    package_sizes,
)
from tests.service.head import free_port

NOBODY = ["--address", "http://127.0.0.1:1"]


@pytest.mark.parametrize(
    ("given", "environ", "url"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        ("https://ray.example/", {"RAY_ADDRESS": "http://other:1"}, "https://ray.example"),
        (None, {"RAY_API_SERVER_ADDRESS": "http://a:1", "RAY_ADDRESS": "b:2"}, "http://a:1"),
        (None, {"RAY_ADDRESS": "http://b:2"}, "http://b:2"),
    ],
)
def test_the_address_is_looked_for_in_order(given, environ, url):
    assert jobs_url(given, environ) == url


@pytest.mark.parametrize(
    ("given", "environ", "message"),
    [
        ("10.0.0.1:6379", {}, "--address=10.0.0.1:6379 .*--address http://10.0.0.1:8265"),
        (None, {"RAY_ADDRESS": "ray://h:10001"}, "RAY_ADDRESS=ray://h:10001 .*http://h:8265"),
        ("http://me:word@h:8265", {}, "holds a user or password"),
    ],
)
def test_an_address_that_cannot_be_used(given, environ, message):
    with pytest.raises(ConfigError, match=message) as caught:
        jobs_url(given, environ)
    assert "word@" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://10.0.0.5:8265", "http://head:8265", "http://0.0.0.0:80"])
def test_a_token_does_not_leave_this_machine_in_clear(url):
    with pytest.raises(ConfigError, match="--insecure"):
        check_clear_text(url, True, insecure=False)
    check_clear_text(url, True, insecure=True)
    check_clear_text(url, False, insecure=False)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[::1]:1", "http://localhost:1"])
def test_a_token_may_stay_on_this_machine_or_go_encrypted(url):
    check_clear_text(url, True, insecure=False)
    check_clear_text("https://head.example", True, insecure=False)


def test_versions_must_be_equal():
    check_versions(Cluster("http://h", "2.60.0", "3.11"), "2.60.0", "3.11")
    check_versions(Cluster("http://h", "2.60.0", None), "2.60.0", "3.11")
    with pytest.raises(RunError, match=r'runs Ray 2\.59\.0, this command Ray 2\.60\.0.*2\.59\.0"'):
        check_versions(Cluster("http://h", "2.59.0", "3.11"), "2.60.0", "3.11")
    with pytest.raises(RunError, match=r"Python 3\.12, this command Python 3\.11"):
        check_versions(Cluster("http://h", "2.60.0", "3.12"), "2.60.0", "3.11")


def test_a_job_runs_on_nodes_of_its_own_version(monkeypatch):
    found, _ = job_environment({}, {}, uv=False, with_secrets=False)
    monkeypatch.setenv("MIDAS_SUBMITTER", found["MIDAS_SUBMITTER"])
    check_submitter()
    monkeypatch.setenv("MIDAS_SUBMITTER", "0.0.1")
    with pytest.raises(ConfigError, match=r"submitted by midas 0\.0\.1, its node has midas 0"):
        check_submitter()


@pytest.mark.parametrize(
    "word",
    [
        "s3://KEY:SECRET@bucket/runs",
        "--checkpoint.storage=s3://b/r?secret_key=abc",
        "http://me:word@host/x",
    ],
)
def test_a_secret_in_the_command_is_refused_and_not_repeated(word):
    with pytest.raises(ConfigError, match="holds a secret") as caught:
        check_arguments(["train", "digits", word])
    for secret in ("SECRET", "abc", "word@"):
        assert secret not in str(caught.value)


def test_addresses_without_a_secret_are_no_secret():
    check_arguments(["train", "digits", "s3://bucket/runs?endpoint_override=localhost:9000"])
    check_arguments(["train", "digits", "--optim.lr", "1e-3", "http://host:5000/a?b=c"])


def test_secrets_stay_here_unless_they_are_meant_to_go(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    environ = {
        "MLFLOW_TRACKING_URI": "https://mlflow",
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": "word",
        "MLFLOW_TRACKING_TOKEN": "t",
        "MLFLOW_REGISTRY_URI": "https://me:word@mlflow",
        "RAY_worker_niceness": "0",
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    candidates = worker_environment()
    found, hidden = job_environment(*candidates, uv=False, with_secrets=False)
    assert hidden == ["MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"]
    assert "word" not in json.dumps(found)
    assert found["MLFLOW_TRACKING_USERNAME"] == "me"
    assert int(found["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    found, hidden = job_environment(*candidates, uv=True, with_secrets=True)
    assert not hidden
    assert found["MLFLOW_TRACKING_PASSWORD"] == "word"
    assert found["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "1"


def test_the_entrypoint_is_the_same_command_line_quoted():
    assert entrypoint(["train", "digits", "--name", "a b;c"], uv=False) == (
        "python -m service train digits --name 'a b;c'"
    )
    assert entrypoint(["train"], uv=True).startswith("uv run --no-dev python -m service train")


def test_ids_say_what_the_job_is():
    assert job_id(["train", "digits"], "").startswith("train-digits-")
    assert job_id(["train", "my sets/own.yaml"], "").startswith("train-own-")
    assert job_id(["train", "digits"], "a/../b?").startswith("train-b_-")
    assert job_id(["train", "digits"], "") != job_id(["train", "digits"], "")


def test_jobs_share_the_head_as_their_workers_share_the_cluster():
    two = ScalingConfig(num_workers=2)
    assert head_share(two, {"CPU": 2}, all_of_it=False) == pytest.approx(HEAD_SHARE)
    assert head_share(two, {"CPU": 8}, all_of_it=False) == pytest.approx(HEAD_SHARE / 4, abs=1e-4)
    elastic = ScalingConfig(num_workers=(1, 4))
    assert head_share(elastic, {"CPU": 8}, all_of_it=False) == pytest.approx(HEAD_SHARE / 2)
    gpus = head_share(two, {"CPU": 64, "GPU": 4}, all_of_it=False)
    assert gpus == pytest.approx(HEAD_SHARE / 2)
    assert head_share(two, {"CPU": 64}, all_of_it=True) == pytest.approx(HEAD_SHARE)
    smallest = head_share(None, {"CPU": 64}, all_of_it=False)
    assert smallest == pytest.approx(HEAD_SHARE / MAX_DRIVERS, abs=1e-4)
    assert smallest * MAX_DRIVERS <= HEAD_SHARE  # as many as that do fit


def test_the_package_is_what_a_job_needs(tmp_path: Path):
    kept = ["service/a.py", "data/b.py", "own.yaml", "notes/runs/c.txt"]
    left = ["runs/x/model.bin", ".venv/lib/d.py", ".git/HEAD", "big/e", ".env", "service/k.pem"]
    for name in (*kept, *left):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 100)
    (tmp_path / ".gitignore").write_text("/big/\n")
    sizes = package_sizes(tmp_path)
    assert sizes.keys() == {*kept, ".gitignore"}
    assert sizes["own.yaml"] == 100
    check_package(tmp_path, sizes)


def test_a_large_package_is_refused_with_its_numbers(tmp_path: Path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.avi").write_bytes(b"x" * (3 << 20))
    (tmp_path / "own.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match=r"3\.0 MiB in 2 files.*limit is 2\.0 MiB.*videos 3\.0"):
        check_package(tmp_path, package_sizes(tmp_path), limit=2 << 20)


def test_relative_folders_are_refused():
    check_paths({"--storage": "/mnt/runs", "--data.root": None, "--data.storage": "s3://b/sets"})
    with pytest.raises(ConfigError, match="--data.root raw is relative"):
        check_paths({"--storage": "/mnt/runs", "--data.root": "raw"})


@pytest.mark.parametrize(
    ("state", "code", "shown"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 130),
        ("RUNNING", None, None),
        ("PENDING", None, None),
    ],
)
def test_exit_codes(state, code, shown):
    assert exit_code(state, code) == shown


@contextmanager
def server(status: int, body: str, python: str = "Python/3.11 aiohttp/3.12") -> Iterator[str]:
    """A server that gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status)
            self.send_header("Server", python)
            self.send_header("Location", "http://example.invalid/")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


@pytest.mark.parametrize(
    ("status", "body", "python", "message"),
    [
        (200, '{"ray_version": "2.9.0"}', "Python/3.11", "runs Ray 2.9.0, this command Ray 2"),
        (200, '{"ray_version": "2.60.0"}', "Python/3.9", "runs Python 3.9, this command Python"),
        (200, "<html>", "", "answers, but not as Ray's dashboard does"),
        (302, "", "", "answers, but not as Ray's dashboard does"),
        (401, "Unauthorized", "", "wants a token, and none was sent"),
        (403, "Forbidden", "", "refused the token"),
    ],
)
def test_a_cluster_that_does_not_fit(capsys, status, body, python, message):
    with server(status, body, python) as url:
        assert main(["jobs", "--address", url]) == 1
    assert message in capsys.readouterr().err


def test_nobody_there(capsys):
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["jobs", "--address", url]) == 1
    assert f"no Ray answers jobs at {url}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["jobs"], ["stop", "j"], ["submit", "doctor", "--storage", "/s"]])
def test_no_verb_sends_a_token_in_clear(capsys, verb):
    assert main([verb[0], "--address", "http://ray-head.example:8265", *verb[1:]]) == 1
    assert "everyone on the way could read the token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "digits"], "--storage runs is relative"),
        (["tune", "--resume", "s"], "--storage runs is relative"),
        (["predict", "m", "--storage", "/s", "--input", "a", "--output", "/b"], "--input a is rel"),
        (["train", "digits", "--data.root", "s3://K:S@b", "--storage", "/s"], "holds a secret"),
    ],
)
def test_a_command_line_that_could_not_work_is_refused_here(capsys, words, message):
    assert main(["submit", *NOBODY, *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["train", "digits", "--optim.lrr", "1"], ["evaluate"], ["submit", "train"], ["ui"]]
)
def test_a_wrong_command_line_is_refused_here(words):
    with pytest.raises(SystemExit) as caught:
        main(["submit", *NOBODY, *words])
    assert caught.value.code == 2

"""Jobs on a real cluster with a token: submit, follow, stop, resume, as a user does."""

import json
import secrets
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from service.files import read_history
from service.submission import HEAD_RESOURCE, HEAD_SHARE
from tests.service.cli import SMALL, finish, tracked, until, weights
from tests.service.head import BIN, ROOT, Head, free_port, running_head
from tests.service.test_tracking import wait_until_up

pytestmark = pytest.mark.ray

EPOCHS = 100  # longer than a command takes to start on a fast machine
TRAIN = ["train", "digits", *SMALL, "--optim.epochs", str(EPOCHS)]
# Several commands in one process: what takes the time of a command is its start.
MANY = """
import json, sys
from service.__main__ import main
sys.exit(max(main(words) for words in json.load(sys.stdin)))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head() as head:
        yield head


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def mlflow(storage: Path) -> Iterator[str]:
    """The address of a server over the storage."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [BIN / "midas", "ui", "--port", str(port), "--storage", str(storage)]
    server = subprocess.Popen(command, cwd=storage, stderr=subprocess.DEVNULL)  # files go to cwd
    try:
        wait_until_up(url, server)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


class Cutter(socketserver.BaseRequestHandler):
    """Passes a connection on, and cuts it after two seconds if it follows a job."""

    target: tuple[str, int]
    cuts = 0

    def handle(self) -> None:
        first = self.request.recv(1 << 16)
        tail = b"/logs/tail" in first
        deadline = time.monotonic() + (2 if tail else 60)
        with socket.create_connection(self.target) as there:
            there.sendall(first)
            other = {self.request: there, there: self.request}
            while (left := deadline - time.monotonic()) > 0:
                for ready in select.select(list(other), [], [], left)[0]:
                    if not (data := ready.recv(1 << 16)):
                        return
                    other[ready].sendall(data)
        Cutter.cuts += tail


@pytest.fixture(scope="module")
def cut(head: Head) -> Iterator[Head]:
    """The head behind a bad connection."""
    parts = urlsplit(head.url)
    Cutter.target = (parts.hostname or "", parts.port or 0)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Cutter) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Head(f"http://127.0.0.1:{server.server_address[1]}", head.address, head.folder)
        server.shutdown()


def at(storage: Path, name: str) -> list[str]:
    return ["--name", name, "--storage", str(storage)]


def job_of(done: subprocess.CompletedProcess[str]) -> str:
    line = next(line for line in done.stdout.splitlines() if line.startswith("job "))
    return line.split()[1]


def many(head: Head, *commands: list[str]) -> list[dict]:
    """Run commands one after the other; what each said with --json."""
    words = [[verb, "--address", head.url, "--json", *rest] for verb, *rest in commands]
    done = subprocess.run(
        [sys.executable, "-c", MANY],
        input=json.dumps(words),
        capture_output=True,
        text=True,
        timeout=250,
        cwd=ROOT,
        env=head.environment(),
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(said) == len(commands), done.stdout
    return said


def all_ended(head: Head, wanted: Iterable[str]) -> bool:
    time.sleep(1)
    found = head.jobs()
    return all(found[job]["end_time"] for job in wanted)


@pytest.fixture(scope="module")
def whole(cut: Head, storage: Path, mlflow: str) -> subprocess.CompletedProcess[str]:
    command = ["submit", "--follow", *TRAIN, *at(storage, "whole")]
    return cut.midas(*command, MLFLOW_TRACKING_URI=mlflow)


def test_a_training_is_followed_to_its_end_over_a_connection_that_breaks(
    whole: subprocess.CompletedProcess[str], head: Head, storage: Path, mlflow: str
):
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "SUCCEEDED, exit code 0" in whole.stderr
    run = tracked(storage, "whole")[1].info
    assert run.status == "FINISHED"
    assert f"MLflow: {mlflow}/#/runs/{run.run_id}" in whole.stdout  # said at its start
    assert Cutter.cuts >= 2
    log = head.midas("logs", job_of(whole)).stdout
    assert "run folder" in log  # the job's own end
    assert whole.stdout.endswith(log)


def test_stop_saves_and_a_plain_ray_job_goes_on_to_the_same_weights(
    whole: subprocess.CompletedProcess[str], head: Head, storage: Path, mlflow: str
):
    command = ["submit", "--follow", *TRAIN, *at(storage, "halted")]
    submit = head.start(*command, MLFLOW_TRACKING_URI=mlflow)
    history = storage / "halted" / "history.jsonl"
    until(lambda: len(read_history(history)) >= 1)
    submit.send_signal(signal.SIGINT)
    left = finish(submit)
    assert left.returncode == 130
    assert "goes on" in left.stderr

    job = job_of(left)
    stopped = head.midas("stop", job, "--json")
    assert json.loads(stopped.stdout)["state"] == "STOPPED", stopped.stderr
    assert 1 <= len(read_history(history)) < EPOCHS, "it was not stopped in its middle"
    assert tracked(storage, "halted")[1].info.status == "KILLED"
    assert list((storage / "halted" / "checkpoints").glob("*/state.json"))
    followed = head.midas("logs", job, "--follow")
    assert followed.returncode == 130
    assert "--name halted continues the run" in followed.stdout  # it ended by itself

    variables = json.dumps({"env_vars": {"MLFLOW_TRACKING_URI": mlflow}})
    plain = ["--working-dir", ".", "--runtime-env-json", variables, "--", "midas", *TRAIN]
    again = head.midas("logs", head.ray_job(*plain, *at(storage, "halted")), "--follow")
    assert again.returncode == 0, again.stdout
    assert len(read_history(history)) == EPOCHS
    for name, value in weights(storage, "whole").items():
        assert (value == weights(storage, "halted")[name]).all(), name
    assert tracked(storage, "halted")[1].info.status == "FINISHED"


def test_a_secret_of_the_driver_reaches_the_workers_and_no_file(
    head: Head, storage: Path, mlflow: str
):
    word = f"hidden-{secrets.token_hex(8)}"
    joined = head.environment(
        RAY_ADDRESS=head.address,
        RAY_AUTH_MODE="token",
        MLFLOW_TRACKING_URI=mlflow.replace("://", f"://me:{word}@"),
    )
    command = [BIN / "midas", "train", "digits", *SMALL, *at(storage, "joined")]
    done = subprocess.run(command, env=joined, cwd=storage, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    client, run = tracked(storage, "joined")
    assert len(client.get_metric_history(run.info.run_id, "val/accuracy")) == 4  # by a worker
    files = [path for root in (head.folder, storage) for path in root.rglob("*") if path.is_file()]
    assert any(path.name == "runtime_env_agent.log" for path in files)
    assert not [path for path in files if word.encode() in path.read_bytes()]


def test_following_ends_with_the_exit_code_of_the_job(head: Head, storage: Path):
    failed = head.midas("submit", "--follow", "evaluate", "nothing", "--storage", str(storage))
    assert failed.returncode == 1
    assert "FAILED, exit code 1" in failed.stderr
    assert "nothing" in failed.stdout
    assert head.midas("logs", head.ray_job("--", "exit", "3"), "--follow").returncode == 3


def test_a_folder_of_ones_own_is_sent_without_what_is_large_or_secret(
    head: Head, storage: Path, tmp_path: Path
):
    (tmp_path / "own.yaml").write_text("data: {name: digits}\n")
    (tmp_path / ".env").write_text("SECRET=1\n")
    for name in ("videos", "runs", ".venv"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "large").write_bytes(b"x" * (60 << 20))
    command = ["submit", "--follow", "prepare", "own.yaml", "--storage", str(storage)]
    refused = head.midas(*command, cwd=tmp_path)
    assert refused.returncode == 1
    assert "the largest: videos 60.0 MiB" in refused.stderr
    (tmp_path / ".gitignore").write_text("/videos/\n")
    done = head.midas(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    copies = [p.parent for p in head.folder.glob("r/session_2*/runtime_resources/**/own.yaml")]
    assert len(copies) == 1
    assert {p.name for p in copies[0].iterdir()} == {"own.yaml", ".gitignore"}


def test_more_workers_than_the_cluster_has_are_refused_at_once(head: Head, storage: Path):
    before = head.jobs().keys()
    asked = ["--scaling.num-workers", "5"]
    done = head.midas("submit", *TRAIN, *asked, *at(storage, "large"))
    assert done.returncode == 1
    assert "the Ray cluster has 2 CPUs; 5 workers with 1 each need 5" in done.stderr
    thick = ["--scaling.num-workers", "1", "--scaling.cpus-per-worker", "3"]
    done = head.midas("submit", *TRAIN, *thick, *at(storage, "thick"))
    assert (done.returncode, "has 2 CPUs; 1 workers with 3 each" in done.stderr) == (1, True)
    trials = ["submit", "tune", "digits", "--search.workers-per-trial", "3"]
    done = head.midas(*trials, *at(storage, "trials"))
    assert (done.returncode, "3 workers with 1 each need 3" in done.stderr) == (1, True)
    assert head.jobs().keys() == before


def test_without_the_token_nothing_is_said_or_done(head: Head, tmp_path: Path):
    before = head.jobs().keys()
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    for changes, message in (
        ({"RAY_AUTH_TOKEN_PATH": str(wrong)}, "refused the token"),
        ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "no")}, "there is no token for http"),
        ({"RAY_AUTH_TOKEN_PATH": None, "HOME": str(tmp_path)}, "wants a token, and none was sent"),
    ):
        command = ["submit", "train", "digits", "--dry-run", "--storage", str(tmp_path)]
        done = head.midas(*command, **changes)
        assert done.returncode == 1
        assert message in done.stderr
        assert "chmod 600" in done.stderr
        assert head.token.read_text() not in done.stderr + done.stdout
    assert head.jobs().keys() == before


def test_an_unknown_job(head: Head):
    done = head.midas("stop", "nothing")
    assert done.returncode == 1
    assert "knows no job 'nothing'" in done.stderr


@pytest.mark.slow
def test_twenty_jobs_at_once_queue_and_end_in_the_right_state(head: Head, storage: Path):
    kinds = {
        "plan": (0, ["train", "digits", "--dry-run", "--storage", str(storage)]),
        "evaluate": (1, ["evaluate", "nothing", "--storage", str(storage)]),
        "prepare": (0, ["prepare", "digits", "--storage", str(storage)]),
        "one": (0, ["train", "digits", *SMALL, *at(storage, "one")]),
        "two": (0, ["train", "digits", *SMALL, *at(storage, "two")]),
        "train": (130, [*TRAIN, *at(storage, "waiting")]),
    }
    order = ["one", "two", *["plan", "evaluate", "prepare"] * 5, "plan", "plan", "train"]
    everything = json.dumps({HEAD_RESOURCE: HEAD_SHARE})
    head.ray_job("--entrypoint-resources", everything, "--", "sleep", "25")
    said = many(head, *(["submit", *kinds[kind][1]] for kind in order))
    wanted = {one["job"]: kinds[kind][0] for one, kind in zip(said, order, strict=True)}
    assert len(wanted) == 20
    last = said[-1]["job"]
    found = head.jobs()
    waiting = [job for job in wanted if found[job]["status"] == "PENDING"]
    assert len(waiting) == 20, "they did not queue"
    assert many(head, ["stop", last])[0]["state"] in ("PENDING", "STOPPED")
    until(lambda: all_ended(head, wanted), 300)
    found = many(head, ["jobs"])[0]
    assert {job: found[f"{job}/exit_code"] for job in wanted} == wanted
    assert found[f"{last}/state"] == "STOPPED"
    for name in ("one", "two"):
        assert tracked(storage, name)[1].info.status == "FINISHED"


@pytest.mark.slow
def test_a_plain_ray_job_is_stopped_as_gently(head: Head, storage: Path):
    long = [*TRAIN, "--optim.epochs", "400", *at(storage, "plain")]
    job = head.ray_job("--working-dir", ".", "--", "midas", *long)
    until(lambda: len(read_history(storage / "plain" / "history.jsonl")) >= 1)
    stopped = head.midas("stop", job, "--json")
    assert json.loads(stopped.stdout)["state"] == "STOPPED", stopped.stderr
    assert tracked(storage, "plain")[1].info.status == "KILLED"
    assert not any("kill" in found["entrypoint"] for found in head.jobs().values())


@pytest.mark.slow
def test_uv_makes_the_environment_of_driver_and_workers(head: Head, storage: Path):
    small = ["train", "digits", *SMALL, *at(storage, "uv")]
    done = head.midas("submit", "--follow", "--uv", *small)
    assert done.returncode == 0, done.stdout
    assert tracked(storage, "uv")[1].info.status == "FINISHED"

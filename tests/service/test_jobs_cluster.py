"""Jobs on a real cluster with a token: submit, follow, stop, resume, as a user does."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.files import read_history
from tests.service.cli import SMALL, finish, tracked, until, weights
from tests.service.head import Head, running_head

pytestmark = pytest.mark.ray

TRAIN = ["train", "digits", *SMALL, "--optim.epochs", "30"]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head() as head:
        yield head


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def at(storage: Path, name: str) -> list[str]:
    return ["--name", name, "--storage", str(storage)]


def job_of(done: subprocess.CompletedProcess[str]) -> str:
    line = next(line for line in done.stdout.splitlines() if line.startswith("job "))
    return line.split()[1]


def jobs(head: Head) -> dict:
    done = head.midas("jobs", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def whole(head: Head, storage: Path) -> subprocess.CompletedProcess[str]:
    return head.midas("submit", "--follow", *TRAIN, *at(storage, "whole"))


def test_a_training_is_submitted_and_followed_to_its_end(
    whole: subprocess.CompletedProcess[str], storage: Path
):
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "run folder" in whole.stdout  # the job's own end
    assert "SUCCEEDED, exit code 0" in whole.stderr
    assert tracked(storage, "whole")[1].info.status == "FINISHED"


def test_stop_saves_and_the_same_job_goes_on_to_the_same_weights(
    whole: subprocess.CompletedProcess[str], head: Head, storage: Path
):
    submit = head.start("submit", "--follow", *TRAIN, *at(storage, "halted"))
    history = storage / "halted" / "history.jsonl"
    until(lambda: len(read_history(history)) >= 1)
    submit.send_signal(signal.SIGINT)
    left = finish(submit)
    assert left.returncode == 130
    assert "following ended" in left.stderr
    assert "goes on" in left.stderr
    job = job_of(left)

    stopped = head.midas("stop", job, "--json")
    assert json.loads(stopped.stdout)["state"] == "STOPPED", stopped.stderr
    trained = len(read_history(history))
    assert 1 <= trained < 30, "it was not stopped in its middle"
    assert tracked(storage, "halted")[1].info.status == "KILLED"
    assert list((storage / "halted" / "checkpoints").glob("*/state.json"))
    followed = head.midas("logs", job, "--follow")
    assert followed.returncode == 130
    assert "--name halted" in followed.stdout  # what the driver said: it ended by itself

    resumed = head.midas("submit", "--follow", *TRAIN, *at(storage, "halted"))
    assert resumed.returncode == 0, resumed.stdout
    assert len(read_history(history)) == 30
    for name, value in weights(storage, "whole").items():
        assert (value == weights(storage, "halted")[name]).all(), name
    assert tracked(storage, "halted")[1].info.status == "FINISHED"


def test_following_ends_with_the_exit_code_of_the_job(head: Head, storage: Path):
    failed = head.midas("submit", "--follow", "evaluate", "nothing", "--storage", str(storage))
    assert failed.returncode == 1
    assert "nothing" in failed.stdout
    plain = subprocess.run(
        ["ray", "job", "submit", "--no-wait", "--address", head.url, "--", "exit", "3"],
        env=head.environment(RAY_AUTH_MODE="token"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    job = plain.stdout.partition("midas logs ")[2] or plain.stdout.partition("Job '")[2]
    assert head.midas("logs", job.partition("'")[0], "--follow").returncode == 3
    found = jobs(head)
    assert {v for k, v in found.items() if k.endswith("/exit_code")} >= {1, 3}


def test_more_workers_than_the_cluster_has_are_refused_at_once(head: Head, storage: Path):
    before = jobs(head)["jobs"]
    asked = ["--scaling.num-workers", "5"]
    done = head.midas("submit", *TRAIN, *asked, *at(storage, "large"))
    assert done.returncode == 1
    assert "the Ray cluster has 2 CPUs; 5 workers with 1 each need 5" in done.stderr
    assert jobs(head)["jobs"] == before


def test_a_wrong_flag_is_found_before_anything_is_sent(head: Head, storage: Path):
    done = head.midas("submit", *TRAIN, "--optim.lrr", "1", *at(storage, "x"))
    assert done.returncode == 2
    assert "lrr" in done.stderr


def test_without_the_token_nothing_is_said_or_done(head: Head, tmp_path: Path):
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    refused = head.midas("jobs", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert refused.returncode == 1
    assert "refused the token" in refused.stderr
    none = head.midas("jobs", RAY_AUTH_MODE="disabled")
    assert none.returncode == 1
    assert "wants a token, and none was sent" in none.stderr
    for done in (refused, none):
        assert "Traceback" not in done.stderr
        assert head.token.read_text() not in done.stderr + done.stdout


def test_an_unknown_job(head: Head):
    done = head.midas("stop", "nothing")
    assert done.returncode == 1
    assert "knows no job 'nothing'" in done.stderr


@pytest.mark.slow
def test_twenty_jobs_at_once_all_end_in_the_right_state(head: Head, storage: Path):
    kinds = {
        "train": (0, lambda n: [*TRAIN[:2], *SMALL, *at(storage, f"burst{n}")]),
        "evaluate": (1, lambda n: ["evaluate", f"nothing{n}", "--storage", str(storage)]),
        "prepare": (0, lambda n: ["prepare", "digits", "--storage", str(storage / f"b{n}")]),
    }
    order = ["train", "evaluate", "prepare", "prepare"] * 5
    wanted, started = {}, []
    for number, kind in enumerate(order):
        code, words = kinds[kind]
        started.append((head.start("submit", "--json", *words(number)), code))
        if len(started) % 4 == 0:
            for process, code in started[-4:]:
                done = finish(process)
                assert done.returncode == 0, done.stderr
                wanted[json.loads(done.stdout.splitlines()[-1])["job"]] = code
    assert len(wanted) == 20
    until(lambda: all(f"{job}/exit_code" in jobs(head) for job in wanted), 30)
    until(lambda: all(jobs(head)[f"{job}/exit_code"] is not None for job in wanted), 900)
    found = jobs(head)
    assert {job: found[f"{job}/exit_code"] for job in wanted} == wanted


@pytest.mark.slow
def test_a_plain_ray_job_is_stopped_as_gently(head: Head, storage: Path):
    plain = subprocess.run(
        [
            *("ray", "job", "submit", "--no-wait", "--address", head.url, "--working-dir", "."),
            *("--submission-id", "plain", "--", "midas", *TRAIN, "--optim.epochs", "400"),
            *at(storage, "plain"),
        ],
        env=head.environment(RAY_AUTH_MODE="token"),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert plain.returncode == 0, plain.stderr
    until(lambda: len(read_history(storage / "plain" / "history.jsonl")) >= 1)
    stopped = head.midas("stop", "plain", "--json")
    assert json.loads(stopped.stdout)["state"] == "STOPPED", stopped.stderr
    assert tracked(storage, "plain")[1].info.status == "KILLED"
    assert not any("kill" in str(v) for k, v in jobs(head).items() if k.endswith("/command"))


@pytest.mark.slow
def test_uv_makes_the_environment_of_driver_and_workers(head: Head, storage: Path):
    small = ["train", "digits", *SMALL, *at(storage, "uv")]
    done = head.midas("submit", "--follow", "--uv", *small)
    assert done.returncode == 0, done.stdout
    assert tracked(storage, "uv")[1].info.status == "FINISHED"

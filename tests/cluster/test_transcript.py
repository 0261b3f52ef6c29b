"""The README's way from a laptop to a cluster, typed as it stands there, and what came of it."""

import base64
import json
import os
import re
import signal
import subprocess
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from service.files import read_history
from tests.cluster.topology import ROOT, Topology
from tests.service.cli import finish, until

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.timeout(900)]
FOLDER = "/tmp/midas"
TRACKING = "MLFLOW_TRACKING_URI"
# How a followed command ends that is interrupted; all others end with 0.
INTERRUPTED = 130


def readme_commands() -> list[str]:
    """Of the section's blocks, without comments."""
    text = (ROOT / "README.md").read_text()
    section = text.partition("\n## From a laptop to a cluster\n")[2].partition("\n## ")[0]
    blocks = [block.partition("```")[0] for block in section.split("```sh\n")[1:]]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*", "", line) for line in lines]


@dataclass(frozen=True)
class Step:
    """A command of the transcript.

    Attributes:
        said: stdout and stderr.
        states: of the MLflow runs after it, by name.
    """

    command: str
    code: int
    said: str
    states: dict[str, str]


def states(topology: Topology) -> dict[str, str]:
    with topology.mlflow() as client:
        experiments = [found.experiment_id for found in client.search_experiments()]
        runs = client.search_runs(experiments, max_results=1000)
    return {run.info.run_name or "": run.info.status for run in runs}


def interrupted(topology: Topology, command: str) -> subprocess.CompletedProcess[str]:
    """Follow a run until it has an epoch, then Ctrl-C."""
    following = topology.start(command)
    until(lambda: len(read_history(topology.runs / "second" / "history.jsonl")) >= 1, 240)
    os.killpg(following.pid, signal.SIGINT)
    return finish(following, 60)


@pytest.fixture(scope="module")
def transcript(topology: Topology) -> list[Step]:
    """All commands in their order, but the two that start the topology; up to the first failure."""
    steps: list[Step] = []
    job = ""
    for line in readme_commands()[2:]:
        command = line.replace("JOB", job)
        follows = command.startswith("uv run midas logs")
        done = interrupted(topology, command) if follows else topology.run(command)
        said = done.stdout + done.stderr
        print(f"$ {command}\n{said}[{done.returncode}]\n")  # noqa: T201
        steps.append(Step(command, done.returncode, said, states(topology)))
        if done.returncode != (INTERRUPTED if follows else 0):
            break
        if found := re.search(r"^job\s+(\S+)$", done.stdout, re.MULTILINE):
            job = found[1]
    return steps


def step(transcript: list[Step], verb: str, part: str = "") -> Step:
    """The last of the commands with this verb and this word in them."""
    found = [s for s in transcript if f"midas {verb} " in f"{s.command} " and part in s.command]
    assert found, f"{verb} {part} was not reached: {transcript[-1]}"
    return found[-1]


def test_it_begins_with_the_processes_in_three_commands():
    start, environment, train, *_ = readme_commands()
    assert start == f"uv run python docker/processes.py {FOLDER}"
    assert environment == f". {FOLDER}/environment"
    assert train.startswith("uv run midas submit --follow train digits ")


def test_every_command_does_as_it_should(transcript: list[Step]):
    last = transcript[-1]
    assert len(transcript) == len(readme_commands()) - 2, f"{last.command}:\n{last.said}"


def test_a_training_runs_and_is_recorded(transcript: list[Step], topology: Topology):
    trained = step(transcript, "submit", "--name first")
    assert trained.states["first"] == "FINISHED"
    assert f"{topology.environment['MLFLOW_TRACKING_URI']}/#/runs/" in trained.said
    with topology.mlflow() as client:
        [experiment] = [e for e in client.search_experiments() if e.name == "midas"]
        runs = client.search_runs([experiment.experiment_id])
        [first] = [run for run in runs if run.info.run_name == "first"]
        accuracies = client.get_metric_history(first.info.run_id, "val/accuracy")
    rows = read_history(topology.runs / "first" / "history.jsonl")
    assert [m.value for m in accuracies] == [row["val/accuracy"] for row in rows]
    assert any(first.info.run_id in key for key in topology.objects())


def test_the_two_workers_were_on_two_nodes(transcript: list[Step], topology: Topology):
    listed = topology.run(
        "uv run ray list actors --limit 1000 --format json --filter class_name=RayTrainWorker"
    )
    assert listed.returncode == 0, listed.stderr
    nodes: dict[str, set[str]] = {}
    for actor in json.loads(listed.stdout.splitlines()[-1]):
        nodes.setdefault(actor["job_id"], set()).add(actor["node_id"])
    assert len(nodes[min(nodes)]) == 2, nodes


def test_stopped_it_is_killed_and_the_same_command_ends_it(
    transcript: list[Step], topology: Topology
):
    assert "goes on" in step(transcript, "logs").said
    assert step(transcript, "stop").states["second"] == "KILLED"
    assert step(transcript, "submit", "--name second").states["second"] == "FINISHED"
    epochs = [row["epoch"] for row in read_history(topology.runs / "second" / "history.jsonl")]
    assert epochs == list(range(len(epochs)))


def test_a_sweep_is_a_job_with_its_trials_inside(transcript: list[Step], topology: Topology):
    done = step(transcript, "submit", "tune digits")
    assert done.states["sweep"] == "FINISHED"
    with topology.mlflow() as client:
        experiments = [found.experiment_id for found in client.search_experiments()]
        [sweep] = client.search_runs(experiments, "attributes.`Run Name` = 'sweep'")
        trials = client.search_runs(
            experiments, f"tags.`mlflow.parentRunId` = '{sweep.info.run_id}'"
        )
    assert f"{topology.environment[TRACKING]}/#/runs/{sweep.info.run_id}" in done.said
    assert len(trials) == 2
    assert [trial.data.tags.get("best") for trial in trials].count("true") == 1
    assert (topology.runs / "sweep" / "best.yaml").is_file()


def test_the_champion_predicts(transcript: list[Step], topology: Topology):
    step(transcript, "promote")
    with topology.mlflow() as client:
        champion = client.get_model_version_by_alias("digits", "champion")
        assert champion.version == "1"
    step(transcript, "submit", "predict")
    table = pq.read_table(topology.runs / "out.parquet")
    [manifest] = (topology.runs / "shards").glob("digits-*/manifest.json")
    assert table.num_rows == 179, manifest
    right = sum(map(lambda a, b: a == b, *(table[n].to_pylist() for n in ("label", "predicted"))))
    assert right / table.num_rows > 0.8


def test_oversized_and_malformed_requests_are_refused_and_change_nothing(
    transcript: list[Step], topology: Topology
):
    ray, mlflow = topology.environment["RAY_API_SERVER_ADDRESS"], topology.environment[TRACKING]
    token = Path(topology.environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    name, word = (topology.environment[f"MLFLOW_TRACKING_{n}"] for n in ("USERNAME", "PASSWORD"))
    jobs = {"Authorization": f"Bearer {token}"}
    login = {"Authorization": f"Basic {base64.b64encode(f'{name}:{word}'.encode()).decode()}"}
    jobs_before, runs_before = topology.run("uv run midas jobs").stdout, states(topology)
    metrics = [{"key": "x", "value": 1, "timestamp": 1, "step": n} for n in range(1001)]
    run = {"run_id": "0" * 32, "metrics": metrics}
    for url, headers, body in (
        (f"{ray}/api/jobs/", jobs, b"{"),
        (f"{ray}/api/jobs/", jobs, b'{"entrypoint": 7}'),
        (f"{ray}/api/jobs/", jobs, b'{"entrypoint": "sleep 1", "runtime_env": "../../etc"}'),
        (f"{ray}/api/jobs/", jobs, b"[" * 100_000),
        (f"{ray}/api/jobs/", jobs, b"x" * (101 << 20)),
        (f"{mlflow}/api/2.0/mlflow/runs/create", login, b"{"),
        (f"{mlflow}/api/2.0/mlflow/runs/create", login, b"[" * 100_000),
        (f"{mlflow}/api/2.0/mlflow/runs/log-batch", login, json.dumps(run).encode()),
        (f"{mlflow}/api/2.0/mlflow/artifacts/list?run_id=../../etc", login, None),
    ):
        status, kind = answered(url, headers, body), (body or b"")[:30]
        assert 400 <= status <= 500, (url, kind, status)
    assert topology.run("uv run midas jobs").stdout == jobs_before
    assert states(topology) == runs_before


def answered(url: str, headers: dict[str, str], body: bytes | None) -> int:
    """The status of an answer."""
    sent = {**headers, "Content-Type": "application/json"}
    request = urllib.request.Request(url, data=body, headers=sent)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (BrokenPipeError, ConnectionResetError, urllib.error.URLError):
        return 413  # it closed the connection before it had all of it


def test_no_secret_was_said(transcript: list[Step], topology: Topology):
    token = Path(topology.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    for secret in (token, topology.environment["MLFLOW_TRACKING_PASSWORD"]):
        assert not any(secret in step.said for step in transcript)


def test_no_secret_is_in_the_storage_or_in_the_logs_of_the_cluster(
    transcript: list[Step], topology: Topology
):
    password = topology.environment["MLFLOW_TRACKING_PASSWORD"].encode()
    folders = [topology.runs, *topology.sessions()]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "runtime_env_agent.log" for path in files)
    assert any(path.name == "payload.json" for path in files)
    assert not [path for path in files if password in path.read_bytes()]

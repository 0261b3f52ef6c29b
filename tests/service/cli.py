"""Running the command line as a user does, for the tests that need Ray."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from safetensors.numpy import load_file

SMALL = [
    "--optim.epochs",
    "4",
    "--midas.warmup-epochs",
    "1",
    "--train.global-batch-size",
    "128",
    "--model.encoders.image.kind",
    "mlp",
    "--model.encoders.audio.kind",
    "mlp",
]


def midas(
    *args: str, storage: Path, timeout: float = 400, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "service", *args, "--storage", str(storage)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )


def start(*args: str, storage: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a command."""
    return subprocess.Popen(
        [sys.executable, "-m", "service", *args, "--storage", str(storage)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def finish(
    process: subprocess.Popen[str], timeout: float = 400
) -> subprocess.CompletedProcess[str]:
    """Wait for a command that was started."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def until(condition: Callable[[], bool], timeout: float = 120) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def last_json(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def weights(storage: Path, name: str) -> dict[str, np.ndarray]:
    result = json.loads((storage / name / "result.json").read_text())
    return load_file(storage / name / "checkpoints" / result["checkpoint"] / "model.safetensors")


def tracked(storage: Path, name: str):
    """The only MLflow run of this name."""
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("midas")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    found = [run for run in runs if run.info.run_name == name]
    assert len(found) == 1
    return client, found[0]

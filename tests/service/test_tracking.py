"""MLflow records, on a real store in a file; and the figures that go into them."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient

from service.config import ConfigError
from service.figures import curves
from service.tracking import (
    DatasetInfo,
    RunLogger,
    finish_run,
    git_commit,
    open_run,
    tracking_uri,
    ui_command,
)

DATA = DatasetInfo("toy", "ab" * 32, 128)
PARAMS = {
    "method": {"name": "midas", "lambda_mis": 1.0, "alpha_cap": None},
    "data": {"modalities": ["audio", "visual"], "note": "x" * 7000, "options": {}},
    "many": {f"p{i:03}": i for i in range(150)},
}
HISTORY = [
    {
        "main_phase": float(epoch >= 2),
        "alpha/audio": 1.0,
        "alpha/visual": 1.0 + 0.1 * epoch,
        "train/loss": math.nan if epoch == 1 else 2.0 - 0.1 * epoch,
        "val/accuracy": 0.1 * epoch,
    }
    for epoch in range(5)
]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the module: creating its tables takes two seconds."""
    return tmp_path_factory.mktemp("with space")


@pytest.fixture
def run(storage: Path) -> tuple[str, str]:
    uri = tracking_uri(storage)
    return uri, open_run(uri, storage, "toy", "first", PARAMS, {"seed": "1"}, DATA)


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    points = MlflowClient(uri).get_metric_history(run_id, key)
    return [(point.step, point.value) for point in points]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_configured_store_wins(tmp_path: Path) -> None:
    assert tracking_uri(tmp_path, "http://h:5000") == "http://h:5000"
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


def test_open_run_records_config_data_and_code(run: tuple[str, str], storage: Path) -> None:
    uri, run_id = run
    record = MlflowClient(uri).get_run(run_id)
    params = record.data.params
    assert (record.info.run_name, record.info.status) == ("first", "RUNNING")
    assert record.info.artifact_uri.startswith((storage / "mlartifacts").as_uri())
    assert len(params) == 156
    assert params["method.name"] == "midas"
    assert params["method.lambda_mis"] == "1.0"
    assert params["method.alpha_cap"] == "null"
    assert params["data.modalities"] == '["audio", "visual"]'
    assert params["data.options"] == "{}"
    assert params["many.p149"] == "149"
    assert params["data.note"] == "x" * 5997 + "..."
    assert record.data.tags["seed"] == "1"
    assert record.data.tags["mlflow.source.name"] == "midas"
    assert record.data.tags.get("git_commit") == git_commit(Path(__file__).parent)
    dataset = record.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("toy", "ab" * 16)
    assert dataset.profile == '{"num_rows": 128}'


def test_a_killed_run_continues_as_the_same_run(run: tuple[str, str], storage: Path) -> None:
    uri, run_id = run
    RunLogger(uri, run_id).log({"train/loss": 1.0}, step=0, seconds=1.7e9)
    assert finish_run(uri, run_id, "KILLED", {}, dict, {}, checkpoint="/runs/1/checkpoint_3")
    record = MlflowClient(uri).get_run(run_id)
    assert record.info.status == "KILLED"
    assert record.data.tags["checkpoint"] == "/runs/1/checkpoint_3"

    changed = {"method": {"name": "other"}}  # MLflow would refuse to change a param
    assert open_run(uri, storage, "toy", "first", changed, {"seed": "2"}, DATA, run_id) == run_id
    record = MlflowClient(uri).get_run(run_id)
    assert (record.info.status, record.data.params["method.name"]) == ("RUNNING", "midas")
    assert record.data.tags["seed"] == "2"
    assert len(record.inputs.dataset_inputs) == 1

    RunLogger(uri, run_id).log({"train/loss": 0.5}, step=1, seconds=1.7e9)
    assert finish_run(uri, run_id, "FINISHED", {"test/accuracy": 0.7}, dict, {})
    assert MlflowClient(uri).get_run(run_id).info.status == "FINISHED"
    assert history(uri, run_id, "train/loss") == [(0, 1.0), (1, 0.5)]


def test_logging_again_after_a_restart_adds_nothing(run: tuple[str, str]):
    for _ in range(2):
        RunLogger(*run).log({"train/loss": 0.25}, step=7, seconds=1.7e9)
    assert history(*run, "train/loss") == [(7, 0.25)]


def test_finish_run_stores_results(run: tuple[str, str], tmp_path: Path) -> None:
    uri, run_id = run
    (tmp_path / "r.json").write_text('{"a": 1}')
    artifacts = {"config.yaml": "seed: 1\n", "result.json": tmp_path / "r.json"}
    results = {"test/accuracy": 0.75, "test/macro_f1": math.nan}
    assert finish_run(uri, run_id, "FINISHED", results, lambda: curves(HISTORY), artifacts)
    client = MlflowClient(uri)
    assert client.get_run(run_id).data.metrics == {"test/accuracy": 0.75}
    folder = Path(client.download_artifacts(run_id, "", str(tmp_path)))
    names = sorted(artifact.path for artifact in client.list_artifacts(run_id))
    assert names == ["accuracy.png", "alpha.png", "config.yaml", "loss.png", "result.json"]
    assert (folder / "result.json").read_text() == '{"a": 1}'
    assert (folder / "alpha.png").read_bytes()[:4] == b"\x89PNG"


def test_a_failing_result_still_ends_the_run(
    run: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri, run_id = run
    assert not finish_run(uri, run_id, "FAILED", {}, dict, {"result.json": tmp_path / "none.json"})
    assert MlflowClient(uri).get_run(run_id).info.status == "FAILED"
    assert "none.json" in caplog.text


def test_values_that_are_not_finite_drop_with_one_warning(
    run: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    log = RunLogger(*run)
    log.log({"train/loss": math.nan, "val/accuracy": 0.5}, step=0, seconds=1.7e9)
    log.log({"train/loss": math.inf}, step=1, seconds=1.7e9)
    assert log.close() == 0
    assert log.num_dropped == 2
    assert caplog.text.count("not finite") == 1
    assert MlflowClient(run[0]).get_run(run[1]).data.metrics == {"val/accuracy": 0.5}


def test_a_metric_mlflow_refuses_does_not_hold_up_the_rest(run: tuple[str, str]) -> None:
    log = RunLogger(*run)
    log.log({"bad name;": 1.0}, step=0, seconds=1.7e9)
    log.log({"good": 1.0}, step=1, seconds=1.7e9)
    assert log.close() == 0
    assert history(*run, "good") == [(1, 1.0)]


def test_metrics_survive_a_store_that_is_away_for_a_while(
    run: tuple[str, str], storage: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri, run_id = run
    mount = tmp_path / "mount"
    mount.symlink_to(tmp_path / "gone" / "deeper")  # a store on a disk that is not there
    log = RunLogger(f"sqlite:///{mount}/mlflow.db", run_id)
    for step in range(3):
        log.log({"train/loss": float(step)}, step, seconds=1.7e9)
    assert log.close() == 3
    assert history(uri, run_id, "train/loss") == []
    assert caplog.text.count("metrics are kept for later") == 1

    mount.unlink()
    mount.symlink_to(storage)
    caplog.set_level(logging.INFO, "service.tracking")
    time.sleep(0.1)
    log.log({"train/loss": 3.0}, step=3, seconds=1.7e9)
    assert log.close() == 0
    assert history(uri, run_id, "train/loss") == [(step, float(step)) for step in range(4)]
    assert "is back" in caplog.text


def test_a_dead_server_delays_training_by_seconds_once(caplog: pytest.LogCaptureFixture) -> None:
    log = RunLogger(f"http://127.0.0.1:{free_port()}", "0" * 32)
    started = time.monotonic()
    for step in range(50):
        log.log({"train/loss": 1.0}, step, seconds=1.7e9)
    assert time.monotonic() - started < 8.0  # MLflow's own defaults: about four minutes per call
    assert caplog.text.count("metrics are kept for later") == 1


def test_open_run_says_what_to_do_when_the_store_or_run_is_unknown(storage: Path) -> None:
    uri = tracking_uri(storage)
    with pytest.raises(ConfigError, match="the store it began in"):
        open_run(uri, storage, "toy", "n", {}, {}, DATA, run_id="0" * 32)


@pytest.mark.ray
def test_another_process_writes_to_the_same_file(run: tuple[str, str], storage: Path) -> None:
    uri, run_id = run
    code = (
        "import sys, time; from service.tracking import RunLogger; log = RunLogger(*sys.argv[1:])\n"
        "row = {f'm{i}': 0.1 * i for i in range(30)}\n"
        "for step in range(20): log.log(row, step, seconds=1.7e9)\n"
        "sys.exit(log.close())"
    )
    root = Path(__file__).parents[2]
    worker = subprocess.Popen(
        [sys.executable, "-c", code, uri, run_id], cwd=root, stderr=subprocess.PIPE, text=True
    )
    driver = RunLogger(uri, run_id)
    step = 0
    while worker.poll() is None:  # the driver writes at the same time
        driver.log({"driver": float(step)}, step, seconds=1.7e9)
        step += 1
        time.sleep(0.05)
    assert worker.stderr is not None
    assert (worker.returncode, worker.stderr.read()) == (0, "")
    assert driver.close() == 0
    assert len(history(uri, run_id, "driver")) == step
    assert len(history(uri, run_id, "m29")) == 20


def test_git_commit_of_a_folder(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None

    def git(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        subprocess.run(command, check=True, capture_output=True)

    git("init")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-m", "one")
    commit = git_commit(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    (tmp_path / "f").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"


def test_import_is_cheap() -> None:
    """`midas --help` must not pay for mlflow or matplotlib."""
    code = "import sys, service.tracking, service.figures; print(sorted(sys.modules))"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    assert "'mlflow'" not in answer.stdout
    assert "'matplotlib'" not in answer.stdout


def test_a_tracking_server_has_its_own_pages() -> None:
    with pytest.raises(ConfigError, match="open http://mlflow:5000 in a browser"):
        ui_command("http://mlflow:5000", "127.0.0.1", 5000)


def test_curves_skip_what_the_history_lacks_and_keep_colours() -> None:
    figures = curves(HISTORY)
    assert sorted(figures) == ["accuracy.png", "alpha.png", "loss.png"]
    assert curves([]) == {}
    alpha = figures["alpha.png"].axes[0]
    lines = {line.get_label(): line for line in alpha.lines}
    assert sorted(lines) == ["audio", "visual"]
    more = [row | {"conf_uni/visual": 0.5, "conf_multi/visual": 0.6} for row in HISTORY]
    confidences = curves(more)["confidences.png"].axes[0].lines
    assert {line.get_color() for line in confidences} == {lines["visual"].get_color()}
    assert [line.get_linestyle() for line in confidences] == ["-", "--"]
    assert list(figures["loss.png"].axes[0].lines[0].get_xdata()) == [1, 3, 4, 5]
    shade = alpha.patches[0]
    assert (shade.get_x(), shade.get_width()) == (0.5, 2.0)


def wait_until_up(url: str, process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                return answer.status
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise TimeoutError(f"nothing answered at {url}")


@pytest.mark.ray
def test_pages_are_served_and_metrics_reach_a_late_server(run: tuple[str, str]) -> None:
    uri, run_id = run
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command, extra = ui_command(uri, "127.0.0.1", port)
    log = RunLogger(url, run_id)
    log.log({"late": 0.0}, step=0, seconds=1.7e9)
    assert history(uri, run_id, "late") == []
    process = subprocess.Popen(command, env=os.environ | extra, start_new_session=True)
    try:
        assert wait_until_up(url, process) == 200
        log.log({"late": 1.0}, step=1, seconds=1.7e9)
        assert log.close() == 0
        assert finish_run(url, run_id, "FINISHED", {}, dict, {})
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=20)
    assert history(uri, run_id, "late") == [(0, 0.0), (1, 1.0)]
    assert MlflowClient(uri).get_run(run_id).info.status == "FINISHED"
    with pytest.raises(ProcessLookupError):  # nothing of its process group is left
        os.killpg(process.pid, 0)

"""MLflow records, on a real store in a file; and the figures that go into them."""

from __future__ import annotations

import itertools
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
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from service import mlflow_server, sending, tracking
from service.config import ConfigError
from service.figures import curves
from service.mlflow_server import ui_command
from service.outbox import Outbox
from service.tracking import (
    DatasetInfo,
    RunLogger,
    finish_run,
    git_commit,
    open_run,
    tracking_uri,
)
from tests.service.cli import until

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
def run(storage: Path, tmp_path: Path) -> tuple[str, Path]:
    """Store and folder of a run that was opened."""
    uri, folder = tracking_uri(storage), tmp_path / "run"
    assert open_run(uri, folder, storage, "toy", "first", PARAMS, {"seed": "1"}, DATA)
    return uri, folder


def history(uri: str, folder: Path, key: str) -> list[tuple[int, float]]:
    points = MlflowClient(uri).get_metric_history(tracking.run_id(folder), key)
    return [(point.step, point.value) for point in points]


def record(uri: str, folder: Path) -> Run:
    return MlflowClient(uri).get_run(tracking.run_id(folder))


def log(run: tuple[str, Path], metrics: dict[str, float], step: int) -> int:
    """Log one row in a process of its own, so to say."""
    logger = RunLogger(*run)
    logger.log(metrics, step, seconds=1.7e9)
    return logger.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_configured_store_wins(tmp_path: Path) -> None:
    assert tracking_uri(tmp_path, "http://h:5000") == "http://h:5000"
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


def test_open_run_records_config_data_and_code(run: tuple[str, Path], storage: Path) -> None:
    found = record(*run)
    params = found.data.params
    assert (found.info.run_name, found.info.status) == ("first", "RUNNING")
    assert found.info.artifact_uri.startswith((storage / "mlartifacts").as_uri())
    assert len(params) == 156
    assert params["method.name"] == "midas"
    assert params["method.lambda_mis"] == "1.0"
    assert params["method.alpha_cap"] == "null"
    assert params["data.modalities"] == '["audio", "visual"]'
    assert params["data.options"] == "{}"
    assert params["many.p149"] == "149"
    assert params["data.note"] == "x" * 5997 + "..."
    assert found.data.tags["seed"] == "1"
    assert found.data.tags["mlflow.source.name"] == "midas"
    assert found.data.tags.get("git_commit") == git_commit(Path(__file__).parent)
    dataset = found.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("toy", "ab" * 16)
    assert dataset.profile == '{"num_rows": 128}'


def test_a_killed_run_continues_as_the_same_run(run: tuple[str, Path], storage: Path) -> None:
    uri, folder = run
    first = tracking.run_id(folder)
    assert log(run, {"train/loss": 1.0}, 0) == 0
    assert finish_run(uri, folder, "KILLED", {}, dict, {}, checkpoint="/runs/1/checkpoint_3")
    found = record(*run)
    assert found.info.status == "KILLED"
    assert found.data.tags["checkpoint"] == "/runs/1/checkpoint_3"

    changed = {"method": {"name": "other"}}  # MLflow would refuse to change a param
    assert open_run(uri, folder, storage, "toy", "first", changed, {"seed": "2"}, DATA) == first
    found = record(*run)
    assert (found.info.status, found.data.params["method.name"]) == ("RUNNING", "midas")
    assert found.data.tags["seed"] == "2"
    assert len(found.inputs.dataset_inputs) == 1

    assert log(run, {"train/loss": 0.5}, 1) == 0
    assert finish_run(uri, folder, "FINISHED", {"test/accuracy": 0.7}, dict, {})
    assert record(*run).info.status == "FINISHED"
    assert history(*run, "train/loss") == [(0, 1.0), (1, 0.5)]


def test_a_run_whose_folder_knows_no_id_continues_by_its_id(
    run: tuple[str, Path], storage: Path, tmp_path: Path
) -> None:
    uri, known = run[0], tracking.run_id(run[1])
    again = tmp_path / "again"
    assert open_run(uri, again, storage, "toy", "first", PARAMS, {}, DATA, known) == known
    assert tracking.run_id(again) == known


def test_logging_again_after_a_restart_adds_nothing(run: tuple[str, Path]) -> None:
    for value in (0.25, 0.5):  # computed again, and not to the same bits
        assert log(run, {"train/loss": value}, 7) == 0
    assert history(*run, "train/loss") == [(7, 0.25)]


def test_sending_again_after_a_crash_adds_nothing(run: tuple[str, Path]) -> None:
    sent = Outbox(run[1]).state()["sent"]
    log(run, {"train/loss": 0.1 + 0.2}, 7)
    Outbox(run[1]).note(sent=sent)  # the process ended before it wrote down that it was sent
    assert Outbox(run[1]).num_due() == 1
    assert tracking.sync(*run) == (1, 0)
    assert history(*run, "train/loss") == [(7, 0.1 + 0.2)]


def test_rows_are_sent_together_and_seconds_apart(
    run: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "SEND_SECONDS", 1.0)
    calls: list[float] = []
    log_batch = MlflowClient.log_batch

    def counted(*args: Any, **kwargs: Any) -> None:
        calls.append(time.monotonic())
        log_batch(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    logger = RunLogger(*run)
    for step in range(300):
        logger.log({"a": float(step), "b": -float(step)}, step, seconds=1.7e9 + step)
        time.sleep(0.01)
    during = list(calls)
    assert logger.close() == 0
    assert 2 <= len(during) <= 5
    assert min(b - a for a, b in itertools.pairwise(during)) > 0.9
    assert len(calls) <= len(during) + 1
    assert history(*run, "a") == [(step, float(step)) for step in range(300)]
    assert len(history(*run, "b")) == 300


def test_what_does_not_fit_into_a_call_follows_sooner(
    run: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "SEND_SECONDS", 60.0)
    monkeypatch.setattr(sending, "CATCH_UP_SECONDS", 0.2)
    logger = RunLogger(*run)
    steps = 2 * sending.ENTITIES_PER_BATCH + 1
    logger.log_many(({"a": float(step)}, step, 1.7e9 + step) for step in range(steps))
    until(lambda: not Outbox(run[1]).has_due(), timeout=30)
    assert logger.close() == 0
    assert len(history(*run, "a")) == steps


def test_finish_run_stores_results(run: tuple[str, Path], tmp_path: Path) -> None:
    uri, folder = run
    (tmp_path / "r.json").write_text('{"a": 1}')
    artifacts = {
        "config.yaml": "seed: 1\n",
        "result.json": tmp_path / "r.json",
        "data/card.md": "# digits",
    }
    results = {"test/accuracy": 0.75, "test/macro_f1": math.nan}
    assert finish_run(uri, folder, "FINISHED", results, lambda: curves(HISTORY), artifacts)
    client, run_id = MlflowClient(uri), tracking.run_id(folder)
    assert client.get_run(run_id).data.metrics == {"test/accuracy": 0.75}
    copy = Path(client.download_artifacts(run_id, "", str(tmp_path)))
    names = sorted(artifact.path for artifact in client.list_artifacts(run_id))
    assert names == ["accuracy.png", "alpha.png", "config.yaml", "data", "loss.png", "result.json"]
    assert (copy / "result.json").read_text() == '{"a": 1}'
    assert (copy / "data/card.md").read_text() == "# digits"
    assert (copy / "alpha.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in folder.iterdir()) == ["mlflow.json", "mlflow.jsonl"]


def test_a_failing_result_still_ends_the_run(
    run: tuple[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri, folder = run
    missing = {"result.json": tmp_path / "none.json", "there.txt": "there"}
    assert not finish_run(uri, folder, "FAILED", {}, dict, missing)
    assert record(*run).info.status == "FAILED"
    assert "none.json" in caplog.text
    found = MlflowClient(uri).list_artifacts(tracking.run_id(folder))
    assert [artifact.path for artifact in found] == ["there.txt"]


def test_artifacts_that_cannot_be_stored_hold_up_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri, folder = tracking_uri(tmp_path), tmp_path / "run"
    (tmp_path / "mlartifacts").write_text("in the place of the folder")
    open_run(uri, folder, tmp_path, "toy", "first", {}, {}, DATA)
    assert not finish_run(uri, folder, "FINISHED", {"a": 1.0}, dict, {"x": "1"}, patience=0.1)
    assert record(uri, folder).info.status == "FINISHED"
    assert "tried again behind the rest" in caplog.text
    assert Outbox(folder).num_due() == 1

    (tmp_path / "mlartifacts").unlink()
    sending._retry_at.clear()
    assert tracking.sync(uri, folder) == (1, 0)
    found = MlflowClient(uri).list_artifacts(tracking.run_id(folder))
    assert [artifact.path for artifact in found] == ["x"]


def test_artifacts_that_cannot_be_stored_let_the_run_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri, folder = tracking_uri(tmp_path), tmp_path / "run"
    (tmp_path / "mlartifacts").write_text("in the place of the folder")
    about = (uri, folder, tmp_path, "toy", "first", {}, {}, DATA)
    run_id = open_run(*about)
    assert not finish_run(uri, folder, "KILLED", {}, dict, {"x": "1"}, patience=0.0)
    sending._retry_at.clear()
    assert open_run(*about) == run_id
    assert record(uri, folder).info.status == "RUNNING"
    sending._retry_at.clear()
    assert not finish_run(uri, folder, "FINISHED", {}, dict, {"y": "2"}, patience=0.0)
    assert record(uri, folder).info.status == "FINISHED"
    assert Outbox(folder).num_due() == 2

    (tmp_path / "mlartifacts").unlink()
    sending._retry_at.clear()
    assert tracking.sync(uri, folder) == (2, 0)
    found = MlflowClient(uri).list_artifacts(run_id)
    assert [artifact.path for artifact in found] == ["x", "y"]


def test_a_run_of_another_store_is_left_as_it_is(
    run: tuple[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    uri, folder = run
    Outbox(folder).put({"kind": "tags", "tags": {"late": "1"}})
    assert tracking.sync("http://127.0.0.1:9", folder) == (0, 1)
    assert f"began in the MLflow store {uri}" in caplog.text
    assert tracking.sync(uri, folder) == (1, 0)


def test_values_that_are_not_finite_drop_with_one_warning(
    run: tuple[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    logger = RunLogger(*run)
    logger.log({"train/loss": math.nan, "val/accuracy": 0.5}, step=0, seconds=1.7e9)
    logger.log({"train/loss": math.inf}, step=1, seconds=1.7e9)
    assert logger.close() == 2
    assert caplog.text.count("not finite") == 1
    assert record(*run).data.metrics == {"val/accuracy": 0.5}


def test_a_metric_mlflow_refuses_does_not_hold_up_the_rest(run: tuple[str, Path]) -> None:
    logger = RunLogger(*run)
    rows = [({"before": 1.0}, 0, 1.7e9), ({"bad name;": 1.0}, 0, 1.7e9), ({"good": 1.0}, 1, 1.7e9)]
    logger.log_many(rows)
    assert logger.close() == 1
    assert history(*run, "before") == [(0, 1.0)]
    assert history(*run, "good") == [(1, 1.0)]


def test_metrics_survive_a_store_that_is_away_for_a_while(
    run: tuple[str, Path],
    storage: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sending, "SEND_SECONDS", 0.2)
    uri, folder = run
    mount = tmp_path / "mount"
    mount.symlink_to(tmp_path / "gone" / "deeper")  # a store on a disk that is not there
    logger = RunLogger(f"sqlite:///{mount}/mlflow.db", folder)
    caplog.set_level(logging.INFO, "service.sending")
    for step in range(3):
        logger.log({"train/loss": float(step)}, step, seconds=1.7e9)
    until(lambda: "metrics are kept for later" in caplog.text)
    assert history(uri, folder, "train/loss") == []

    mount.unlink()
    mount.symlink_to(storage)
    logger.log({"train/loss": 3.0}, step=3, seconds=1.7e9)
    until(lambda: "is back" in caplog.text)
    assert logger.close() == 0
    assert history(uri, folder, "train/loss") == [(step, float(step)) for step in range(4)]
    assert caplog.text.count("metrics are kept for later") == 1


def test_a_dead_server_delays_neither_training_nor_its_end(
    run: tuple[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    logger = RunLogger(f"http://127.0.0.1:{free_port()}", run[1])
    started = time.monotonic()
    for step in range(50):
        logger.log({"train/loss": 1.0}, step, seconds=1.7e9)
    assert time.monotonic() - started < 0.5  # MLflow's own defaults: about four minutes per call
    assert logger.close() == 0
    assert time.monotonic() - started < 8.0
    assert caplog.text.count("metrics are kept for later") == 1
    assert Outbox(run[1]).num_due() == 50


def test_open_run_says_what_to_do_when_the_store_or_run_is_unknown(
    storage: Path, tmp_path: Path
) -> None:
    uri, folder = tracking_uri(storage), tmp_path / "run"
    with pytest.raises(ConfigError, match="the store it began in"):
        open_run(uri, folder, storage, "toy", "n", {}, {}, DATA, run_id="0" * 32)
    assert Outbox(folder).num_due() == 0
    (tmp_path / "file").write_text("in the place of a folder")
    nowhere = f"sqlite:///{tmp_path}/file/mlflow.db"
    with pytest.raises(ConfigError, match="could not open run 'n'"):
        open_run(nowhere, folder, storage, "toy", "n", {}, {}, DATA)


def test_secrets_do_not_reach_mlflow(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    uri, folder = tracking_uri(storage), tmp_path / "run"
    params = {"a": {"b": "x wJalrXUtnFEMI y", "c": ["s3://K:hidden@bucket/z"]}}
    tags = {"place": "postgresql://u:hidden@h/d", "key": "wJalrXUtnFEMI"}
    open_run(uri, folder, storage, "toy", "n", params, tags, DATA)
    finish_run(uri, folder, "FINISHED", {}, dict, {}, checkpoint="s3://K:hidden@bucket/z")
    found = record(uri, folder)
    assert found.data.params == {"a.b": "x *** y", "a.c": '["s3://K:***@bucket/z"]'}
    assert found.data.tags["place"] == "postgresql://u:***@h/d"
    assert found.data.tags["checkpoint"] == "s3://K:***@bucket/z"
    kept = "".join(path.read_text() for path in folder.iterdir())
    assert "hidden" not in kept
    assert "wJalr" not in kept
    assert tracking.for_workers("postgresql://u:hidden@h/d") == {"uri": None}


@pytest.mark.ray
def test_another_process_writes_to_the_same_file(
    run: tuple[str, Path], storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "SEND_SECONDS", 0.05)
    code = (
        "import sys, pathlib, service.tracking as t, service.sending as s; s.SEND_SECONDS = 0.05\n"
        "log = t.RunLogger(sys.argv[1], pathlib.Path(sys.argv[2]))\n"
        "import time; row = {f'm{i}': 0.1 * i for i in range(30)}\n"
        "for step in range(20): log.log(row, step, seconds=1.7e9); time.sleep(0.1)\n"
        "sys.exit(log.close())"
    )
    root = Path(__file__).parents[2]
    worker = subprocess.Popen(
        [sys.executable, "-c", code, run[0], str(run[1])],
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
    )
    other = (run[0], tmp_path / "other")
    open_run(*other, storage, "toy", "other", {}, {}, DATA)
    driver = RunLogger(*other)
    step = 0
    while worker.poll() is None:  # the driver writes at the same time
        driver.log({"driver": float(step)}, step, seconds=1.7e9)
        step += 1
        time.sleep(0.05)
    assert worker.stderr is not None
    assert (worker.returncode, worker.stderr.read()) == (0, "")
    assert driver.close() == 0
    assert len(history(*other, "driver")) == step
    assert len(history(*run, "m29")) == 20


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
        ui_command("http://mlflow:5000", Path("runs"), "127.0.0.1", 5000)


def test_no_password_of_a_database_is_on_the_command_line() -> None:
    uri = "postgresql://midas:hidden-word@db/mlflow"
    command, variables = ui_command(uri, Path("runs"), "127.0.0.1", 5000)
    assert "hidden-word" not in " ".join(command)
    assert variables["MLFLOW_BACKEND_STORE_URI"] == uri


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
def test_pages_are_served_and_the_process_group_ends(run: tuple[str, Path]) -> None:
    uri, folder = run
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command, extra = ui_command(uri, folder.parent, "127.0.0.1", port)
    process = subprocess.Popen(command, env=os.environ | extra, start_new_session=True)
    try:
        assert wait_until_up(url, process) == 200
        assert finish_run(url, folder, "FINISHED", {"late": 1.0}, dict, {})
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=20)
    assert history(uri, folder, "late") == [(0, 1.0)]
    assert record(uri, folder).info.status == "FINISHED"
    with pytest.raises(ProcessLookupError):  # nothing of its process group is left
        os.killpg(process.pid, 0)


def test_beyond_loopback_only_with_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in mlflow_server.AUTH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(ConfigError, match="MLFLOW_AUTH_CONFIG_PATH and MLFLOW_FLASK_SERVER"):
            ui_command("sqlite:///x.db", Path("runs"), host, 5000)
    for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        assert "basic-auth" not in ui_command("sqlite:///x.db", Path("runs"), host, 5000)[0]
    for name in mlflow_server.AUTH_VARIABLES:
        monkeypatch.setenv(name, "set")
    command = ui_command("sqlite:///x.db", Path("runs"), "0.0.0.0", 5000)[0]
    assert command[-2:] == ["--app-name", "basic-auth"]

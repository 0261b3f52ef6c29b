"""MLflow slow, away and back: a real server that is stopped (SIGSTOP), killed and started again."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from service import sending, tracking
from service.mlflow_server import ui_command
from service.outbox import EVENTS_NAME, Outbox
from service.tracking import RunLogger, finish_run, open_run, sync, tracking_uri
from tests.service.cli import midas, start, until
from tests.service.test_tracking import DATA, free_port, wait_until_up

DOWN, SLOW, UP = "down", "slow", "up"


class Server:
    """An MLflow server over an SQLite file, in a process group of its own."""

    def __init__(self, storage: Path):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.store = tracking_uri(storage)
        self._storage = storage
        self._process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        """Start it."""
        command, extra = ui_command(self.store, self._storage, "127.0.0.1", self.port)
        self._process = subprocess.Popen(
            command, env=os.environ | extra, cwd=self._storage, start_new_session=True
        )
        wait_until_up(self.url, self._process)

    def down(self) -> None:
        """Kill it, as a power cut would."""
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=20)
            self._process = None

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It takes connections and does not answer, in the body."""
        assert self._process
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def server(storage: Path) -> Iterator[Server]:
    sending._retry_at.clear()
    server = Server(storage)
    yield server
    server.down()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sending, "SEND_SECONDS", 0.2)
    monkeypatch.setattr(sending, "MAX_RETRY_SECONDS", 0.5)


def opened(server: Server, folder: Path, name: str) -> str:
    return open_run(server.url, folder, folder.parent, "toy", name, {"p": 1}, {"t": "1"}, DATA)


def runs(server: Server, name: str) -> list[Run]:
    """Runs of this name that are in the store, without the server."""
    client = MlflowClient(server.store)
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(ids, run_view_type=ViewType.ACTIVE_ONLY)
    return [run for run in found if run.info.run_name == name]


def points(server: Server, folder: Path, key: str) -> list[tuple[int, float, int]]:
    """Step, value and time of each point, as the store has them."""
    history = MlflowClient(server.store).get_metric_history(tracking.run_id(folder), key)
    return [(point.step, point.value, point.timestamp) for point in history]


def wanted(steps: int) -> list[tuple[int, float, int]]:
    return [(step, float(step), 1_700_000_000_000 + 1000 * step) for step in range(steps)]


def log(logger: RunLogger, steps: range) -> float:
    """Log steps; returns how long the slowest took."""
    slowest = 0.0
    for step in steps:
        began = time.monotonic()
        logger.log({"a": float(step), "b": float(step)}, step, seconds=1.7e9 + step)
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.005)
    return slowest


def test_events_are_read_back_in_order_and_a_line_that_was_cut_off_is_left_out(tmp_path: Path):
    outbox = Outbox(tmp_path / "run")
    outbox.put({"n": 0}, {"n": 1})
    file = tmp_path / "run" / EVENTS_NAME
    file.write_text(file.read_text()[:-3])
    assert [due.event for due in outbox.due()] == [{"n": 0}]
    outbox.put({"n": 2})
    assert [due.event for due in outbox.due()] == [{"n": 0}, {"n": 2}]
    outbox.note(sent=next(outbox.due()).end)
    assert [due.event for due in Outbox(tmp_path / "run").due()] == [{"n": 2}]
    assert [event["n"] for event in outbox.events()] == [0, 2]


def test_events_wait_for_a_folder_that_cannot_be_written(tmp_path: Path):
    folder = tmp_path / "run"
    folder.write_text("in the place of the folder")
    outbox = Outbox(folder)
    outbox.put({"n": 0})
    outbox.put({"n": 1})
    assert (outbox.num_due(), outbox.has_due()) == (2, False)
    folder.unlink()
    outbox.put({"n": 2})
    assert [due.event["n"] for due in outbox.due()] == [0, 1, 2]


def filled(store: str, folder: Path, batches: int) -> Outbox:
    """An opened run with so many calls' worth of metrics that were not sent."""
    open_run(store, folder, folder.parent, "toy", folder.name, {}, {}, DATA)
    outbox = Outbox(folder)
    size = sending.ENTITIES_PER_BATCH
    for batch in range(batches):
        many = {f"m{n}": float(n) for n in range(size)}
        outbox.put({"kind": "metrics", "metrics": many, "step": batch, "time": 1.7e9, "once": True})
    return outbox


def test_a_store_that_answers_but_has_much_to_take_is_given_a_bounded_time(tmp_path: Path):
    store = tracking_uri(tmp_path)
    outbox = filled(store, tmp_path / "run", 5)
    due = outbox.num_due()
    assert not sending.attempt(store, outbox, patience=0.0, seconds=0.0)
    assert 0 < outbox.num_due() < due  # one call was under way
    assert sending.may_try(store), "it is not away"
    assert sending.attempt(store, outbox, patience=0.0)
    assert outbox.num_due() == 0


def test_a_run_ends_also_when_its_folder_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    store, folder = tracking_uri(tmp_path), tmp_path / "run"
    filled(store, folder, 0)
    run = tracking.run_id(folder)
    events = (folder / EVENTS_NAME).rename(folder / "events")
    (folder / EVENTS_NAME).mkdir()  # as good as a full disk
    assert not finish_run(store, folder, "FAILED", {"x": 1.0}, dict, {}, patience=0.0)
    assert "cannot be written" in caplog.text
    assert MlflowClient(store).get_run(run).info.status == "FAILED"
    assert sending.may_try(store)
    (folder / EVENTS_NAME).rmdir()
    events.rename(folder / EVENTS_NAME)
    assert finish_run(store, folder, "FINISHED", {"x": 1.0}, dict, {}, patience=0.0)
    assert MlflowClient(store).get_run(run).data.metrics == {"x": 1.0}


def test_one_sends_at_a_time(tmp_path: Path):
    outbox = Outbox(tmp_path)
    outbox.put({"n": 0})
    with outbox.held() as first, Outbox(tmp_path).held() as second:
        assert (first, second) == (True, False)
    with Outbox(tmp_path).held() as again:
        assert again


@pytest.mark.ray
def test_nothing_is_lost_doubled_or_waited_for_while_the_server_comes_and_goes(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "service.sending")
    folder = tmp_path / "run"
    began = time.monotonic()
    assert opened(server, folder, "outages") == ""  # down at start
    assert time.monotonic() - began < 5.0
    logger = RunLogger(server.url, folder)
    slowest = [log(logger, range(0, 100))]
    server.up()
    until(lambda: tracking.run_id(folder) != "")
    slowest.append(log(logger, range(100, 200)))
    with server.stopped():  # slow
        slowest.append(log(logger, range(200, 600)))
        time.sleep(6.0)  # longer than a request waits
    slowest.append(log(logger, range(600, 700)))
    until(lambda: not Outbox(folder).has_due())
    server.down()  # in the middle
    slowest.append(log(logger, range(700, 1000)))
    server.up()
    slowest.append(log(logger, range(1000, 1100)))
    assert logger.close() == 0
    assert finish_run(server.url, folder, "FINISHED", {"end": 1.0}, dict, {"x.txt": "x"})
    assert max(slowest) < 0.5

    (run,) = runs(server, "outages")
    assert (run.info.status, run.data.params, run.data.tags["t"]) == ("FINISHED", {"p": "1"}, "1")
    for key in ("a", "b"):
        assert sorted(points(server, folder, key)) == wanted(1100)
    assert "is back" in caplog.text


@pytest.mark.ray
def test_a_process_that_is_killed_while_the_server_is_away_loses_nothing(
    server: Server, tmp_path: Path
):
    folder = tmp_path / "run"
    server.up()
    opened(server, folder, "killed")
    server.down()
    code = (
        "import sys, time, pathlib, service.tracking as t\n"
        "log = t.RunLogger(sys.argv[1], pathlib.Path(sys.argv[2]))\n"
        "for step in range(10**6):\n"
        "    row = {'a': float(step), 'b': float(step)}\n"
        "    log.log(row, step, seconds=1.7e9 + step); time.sleep(0.01)\n"
    )
    root = Path(__file__).parents[2]
    worker = subprocess.Popen([sys.executable, "-c", code, server.url, str(folder)], cwd=root)
    until(lambda: Outbox(folder).num_due() > 100)
    worker.kill()
    worker.wait(timeout=20)
    kept = Outbox(folder).num_due()

    server.up()
    logger = RunLogger(server.url, folder)
    log(logger, range(kept - 50, kept + 50))  # back to an older checkpoint
    assert logger.close() == 0
    assert points(server, folder, "b") == wanted(kept + 50)
    assert points(server, folder, "a") == wanted(kept + 50)


@pytest.mark.ray
def test_a_request_that_is_heard_too_late_makes_no_second_run(server: Server, tmp_path: Path):
    server.up()
    folder = tmp_path / "run"
    MlflowClient(server.url).create_experiment("toy-late")
    with server.stopped():
        assert opened(server, folder, "late") == ""
        sending._retry_at.clear()
        assert sync(server.url, folder) == (0, 1)
    sending._retry_at.clear()
    assert sync(server.url, folder)[1] == 0
    tracking.set_tags(server.url, folder, {"more": "1"})
    assert finish_run(server.url, folder, "FINISHED", {}, dict, {})
    (run,) = runs(server, "late")
    assert (run.info.status, run.data.tags["more"]) == ("FINISHED", "1")


@pytest.mark.ray
def test_a_lost_answer_to_the_creation_of_a_run_makes_no_second_run(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server.up()
    create_run = MlflowClient.create_run

    def heard_but_not_answered(*args: object, **kwargs: object) -> Run:
        create_run(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        raise tracking_error("connection reset")

    def tracking_error(text: str) -> Exception:
        from mlflow.exceptions import MlflowException

        return MlflowException(text)

    monkeypatch.setattr(MlflowClient, "create_run", heard_but_not_answered)
    folder = tmp_path / "run"
    assert opened(server, folder, "lost") == ""
    monkeypatch.setattr(MlflowClient, "create_run", create_run)
    sending._retry_at.clear()
    assert sync(server.url, folder) == (1, 0)
    (run,) = runs(server, "lost")
    assert run.info.run_id == tracking.run_id(folder)
    assert run.data.params == {"p": "1"}


@pytest.mark.ray
def test_sync_sends_what_is_left_of_ended_runs(server: Server, tmp_path: Path):
    parent, child = tmp_path / "sweep", tmp_path / "sweep" / "trial-000"
    opened(server, parent, "sweep")
    arguments = ("toy", "trial", {}, {}, DATA)
    assert open_run(server.url, child, tmp_path, *arguments, parent=parent) == ""
    for folder in (parent, child):
        logger = RunLogger(server.url, folder)
        log(logger, range(10))
        logger.close()
        assert not finish_run(server.url, folder, "KILLED", {}, dict, {"x.txt": "x"}, patience=0.0)
    environment = {"MLFLOW_TRACKING_URI": server.url}
    away = midas("sync", "--json", storage=tmp_path, **environment)
    assert (away.returncode, json.loads(away.stdout)["sync/sent"]) == (1, 0)

    server.up()
    done = midas("sync", "--json", storage=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        **{"sync/runs": 2, "sync/left": 0, "sync/complete": True},
        "sync/sent": 2 * (1 + 10 + 2),
    }
    for folder in (parent, child):
        assert points(server, folder, "a") == wanted(10)
        artifacts = MlflowClient(server.url).list_artifacts(tracking.run_id(folder))
        assert [artifact.path for artifact in artifacts] == ["x.txt"]
    (trial,) = runs(server, "trial")
    assert trial.data.tags["mlflow.parentRunId"] == tracking.run_id(parent)
    assert trial.info.status == "KILLED"
    outbox = Outbox(child)
    outbox.put({"kind": "tags", "tags": {"late": "yes"}})
    by_name = {"MLFLOW_TRACKING_URI": server.url.replace("127.0.0.1", "localhost")}
    assert midas("sync", storage=tmp_path, **by_name).returncode == 0  # the same, by another name
    assert runs(server, "trial")[0].data.tags["late"] == "yes"
    other = midas("sync", storage=tmp_path)
    assert (other.returncode, "0 runs had something" in other.stderr) == (0, True)


@pytest.mark.ray
def test_training_does_not_notice_a_server_that_is_away(server: Server, tmp_path: Path):
    server.up()
    environment = {"MLFLOW_TRACKING_URI": server.url}
    # fmt: off
    command = (
        "train", "digits", "--name", "run", "--optim.epochs", "40", "--midas.warmup-epochs", "2",
        "--model.encoders.image.kind", "mlp", "--model.encoders.audio.kind", "mlp",
        "--scaling.num-workers", "1", "--json",
    )
    # fmt: on
    process = start(*command, storage=tmp_path, **environment)
    history = tmp_path / "run" / "history.jsonl"
    until(lambda: history.is_file() and history.read_text().count("\n") >= 5)
    server.down()
    gone = history.read_text().count("\n")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "midas sync sends it" in stderr
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    assert len(rows) == 40 > gone
    server.up()
    assert midas("sync", storage=tmp_path, **environment).returncode == 0
    (run,) = runs(server, "run")
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/accuracy"] == pytest.approx(
        json.loads(stdout.splitlines()[-1])["test/accuracy"], abs=1e-5
    )
    folder = tmp_path / "run"
    for key in ("train/loss", "val/accuracy", "time/epoch_seconds"):
        there = [(step, value) for step, value, _ in points(server, folder, key)]
        assert there == [(row["epoch"], row[key]) for row in rows]

"""What rank 0 writes while it trains: history and progress files, and a real MLflow store."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from data.order import Order
from service import reporting
from service.config import RunConfig
from service.files import read_history, read_json
from service.reporting import Reporter
from service.tracking import DatasetInfo, open_run, tracking_uri
from training.loop import Position

ORDER = Order((40,), global_batch_size=8, lanes=2, window_batches=1, seed=0)  # five steps
CONFIG = RunConfig.model_validate({"midas": {"warmup_epochs": 2}, "optim": {"epochs": 9}})


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the module: creating its tables takes two seconds."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture
def tracking(storage: Path, tmp_path: Path) -> dict[str, str]:
    """Store and id of the MLflow run of `tmp_path`."""
    uri = tracking_uri(storage)
    data = DatasetInfo("toy", "ab" * 32, 40)
    return {"uri": uri, "run_id": open_run(uri, tmp_path, storage, "toy", "run", {}, {}, data)}


def started(folder: Path, tracking: dict[str, str]) -> Reporter:
    return Reporter(CONFIG, ORDER, folder, {"uri": tracking["uri"]})


def metrics(epoch: int) -> dict[str, float]:
    return {"train/loss": 2.0 - 0.1 * epoch, "val/accuracy": 0.1 * epoch, "alpha/image": 1.5}


def train(folder: Path, tracking: dict[str, str], start: int, stop: int) -> None:
    """An attempt that validates epochs [start, stop)."""
    reporter = started(folder, tracking)
    for epoch in range(start, stop):
        reporter.epoch(epoch, metrics(epoch))
    assert reporter.close() == 0


def history(folder: Path) -> list[dict[str, Any]]:
    """Rows of the history file without their times."""
    rows = read_history(folder / "history.jsonl")
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def points(tracking: dict[str, str], key: str = "val/accuracy") -> list[tuple[int, float]]:
    found = MlflowClient(tracking["uri"]).get_metric_history(tracking["run_id"], key)
    return [(point.step, point.value) for point in found]


def progress(folder: Path) -> dict[str, Any]:
    record = read_json(folder / "progress.json")
    assert record is not None
    return record


def test_every_epoch_is_one_row_and_one_point(tmp_path: Path, tracking: dict[str, str]):
    before = time.time()
    train(tmp_path, tracking, 0, 3)
    assert history(tmp_path) == [metrics(epoch) | {"epoch": epoch} for epoch in range(3)]
    times = [row["time"] for row in read_history(tmp_path / "history.jsonl")]
    assert before <= times[0] <= times[1] <= times[2] <= time.time()
    assert points(tracking) == [(epoch, 0.1 * epoch) for epoch in range(3)]
    assert points(tracking, "alpha/image") == [(epoch, 1.5) for epoch in range(3)]


def test_an_epoch_that_is_validated_again_adds_nothing(tmp_path: Path, tracking: dict[str, str]):
    train(tmp_path, tracking, 0, 2)
    first = (tmp_path / "history.jsonl").read_text()
    for start, stop in ((1, 2), (1, 3), (2, 3)):  # from the checkpoint before a validation
        train(tmp_path, tracking, start, stop)
    assert (tmp_path / "history.jsonl").read_text().startswith(first)
    assert history(tmp_path) == [metrics(epoch) | {"epoch": epoch} for epoch in range(3)]
    assert points(tracking) == [(0, 0.0), (1, 0.1), (2, 0.2)]


def test_a_row_that_mlflow_missed_is_made_up_for(tmp_path: Path, tracking: dict[str, str]):
    nowhere = tracking | {"uri": f"sqlite:///{tmp_path}/none/deeper/mlflow.db"}
    reporter = started(tmp_path, nowhere)
    reporter.epoch(0, metrics(0))  # the process ends here
    (row,) = read_history(tmp_path / "history.jsonl")
    assert points(tracking) == []
    train(tmp_path, tracking, 0, 1)
    client = MlflowClient(tracking["uri"])
    (point,) = client.get_metric_history(tracking["run_id"], "val/accuracy")
    assert (point.step, point.timestamp) == (0, int(row["time"] * 1000))
    assert read_history(tmp_path / "history.jsonl") == [row]


def test_epochs_that_are_gone_through_again_are_recorded_once(
    tmp_path: Path, tracking: dict[str, str]
):
    train(tmp_path, tracking, 0, 5)
    before = history(tmp_path)
    reporter = started(tmp_path, tracking)  # back to an older checkpoint
    for epoch in (2, 3, 4, 5):
        reporter.epoch(epoch, metrics(epoch) | {"time/epoch_seconds": 9.0})
    assert reporter.close() == 0
    assert history(tmp_path)[:5] == before
    assert [row["epoch"] for row in history(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert [step for step, _ in points(tracking)] == [0, 1, 2, 3, 4, 5]


def test_storage_that_is_away_delays_rows_and_stops_nothing(
    tmp_path: Path, tracking: dict[str, str]
):
    reporter = started(tmp_path, tracking)
    reporter.epoch(0, metrics(0))
    away = tmp_path.rename(tmp_path.with_name("away"))
    tmp_path.write_text("in the place of the folder")
    reporter.epoch(1, metrics(1))
    reporter.phase("validate", 1)
    tmp_path.unlink()
    away.rename(tmp_path)
    reporter.epoch(2, metrics(2))
    assert [row["epoch"] for row in history(tmp_path)] == [0, 1, 2]


def test_a_row_that_was_cut_off_is_written_again(tmp_path: Path, tracking: dict[str, str]):
    train(tmp_path, tracking, 0, 3)
    file = tmp_path / "history.jsonl"
    file.write_text(file.read_text()[:-9])
    train(tmp_path, tracking, 2, 4)
    assert [row["epoch"] for row in history(tmp_path)] == [0, 1, 2, 3]


def test_metrics_that_are_not_finite_count_as_not_taken(tmp_path: Path, tracking: dict[str, str]):
    reporter = started(tmp_path, tracking)
    reporter.epoch(0, metrics(0) | {"val/accuracy": math.nan})
    assert reporter.close() == 1
    assert points(tracking) == []
    assert points(tracking, "train/loss") == [(0, 2.0)]
    assert math.isnan(history(tmp_path)[0]["val/accuracy"])


def test_the_progress_file_says_where_the_run_is(tmp_path: Path, tracking: dict[str, str]):
    reporter = started(tmp_path, tracking)
    totals = {"loss_sum": torch.tensor(6.0), "rows": torch.tensor(4.0)}
    reporter.step(Position(epoch=1, step=3, totals=totals))
    place = {"phase": "warm-up", "epoch": 1, "num_epochs": 9, "step": 3, "steps_per_epoch": 5}
    assert progress(tmp_path) == place | {"train/loss": 1.5}

    reporter.epoch(2, metrics(2) | {"val/f1_macro": 0.5})
    place |= {"phase": "main", "epoch": 2, "step": 5}
    values = {"alpha": {"image": 1.5}, "train/loss": 1.8, "val/accuracy": 0.2}
    assert progress(tmp_path) == place | values

    reporter.phase("evaluate", 8)
    assert progress(tmp_path) == place | values | {"phase": "evaluate", "epoch": 8}


def test_progress_is_written_at_most_every_half_second(
    tmp_path: Path, tracking: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    assert reporting.PROGRESS_SECONDS == 0.5
    monkeypatch.setattr(reporting, "PROGRESS_SECONDS", 60.0)
    reporter = started(tmp_path, tracking)
    totals = {"loss_sum": torch.tensor(6.0), "rows": torch.tensor(4.0)}
    for step in (1, 2):
        reporter.step(Position(step=step, totals=totals))
    assert progress(tmp_path)["step"] == 1
    monkeypatch.setattr(reporting, "PROGRESS_SECONDS", 0.0)
    reporter.step(Position(step=3, totals=totals))
    assert progress(tmp_path)["step"] == 3


def test_an_attempt_keeps_the_rows_of_the_ones_before_byte_for_byte(
    tmp_path: Path, tracking: dict[str, str]
):
    train(tmp_path, tracking, 0, 2)
    before = (tmp_path / "history.jsonl").read_bytes()
    started(tmp_path, tracking)
    assert (tmp_path / "history.jsonl").read_bytes() == before
    assert json.loads(before.splitlines()[0])["epoch"] == 0

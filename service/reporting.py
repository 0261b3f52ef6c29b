"""What rank 0 tells the world while it trains: progress file, history file, MLflow metrics."""

import contextlib
import json
import logging
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from data.order import Order
from service.config import RunConfig
from service.files import (
    HISTORY_NAME,
    PROGRESS_NAME,
    TRAINING_PHASES,
    read_history,
    write_text,
)
from service.tracking import RunLogger
from training.clock import gpu_utilization
from training.loop import Position

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.5


class Reporter:
    """Rank 0's files and MLflow metrics.

    An epoch is recorded once in the life of a run: a restarted run that goes through it again, and
    computes the same, records nothing. So the history has one row per epoch and MLflow one point.
    Storage or MLflow that is away holds up neither training nor later rows.

    Args:
        folder: run folder, on shared storage.
        tracking: arguments of RunLogger, but the folder.
    """

    def __init__(self, config: RunConfig, order: Order, folder: Path, tracking: dict[str, Any]):
        self._config = config
        self._steps_per_epoch = order.num_steps
        self._folder = folder
        self._shown = 0.0
        self._record: dict[str, Any] = {}
        self._gpu_percent: list[float] = []
        self._logger = RunLogger(folder=folder, **tracking)
        rows = read_history(folder / HISTORY_NAME)
        self._recorded = {int(row["epoch"]) for row in rows}
        self._unwritten: list[dict[str, float]] = []
        write_text(folder / HISTORY_NAME, "".join(map(_line, rows)))  # a cut last line goes
        # The process may have ended before it was passed on; or the rows are another trial's.
        self._logger.log_many((row, int(row["epoch"]), row["time"]) for row in rows)

    def step(self, position: Position) -> None:
        """Write the progress record, at most every PROGRESS_SECONDS."""
        if time.monotonic() - self._shown > PROGRESS_SECONDS:
            loss = float(position.totals["loss_sum"] / position.totals["rows"])
            self._progress(position.epoch, position.step, {"train/loss": loss})
            self._watch_gpu()

    def note(self, text: str) -> None:
        """Show a line once, with the next progress record."""
        self._record["notes"] = [*self._record.get("notes", []), text]

    def epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Record the metrics of an epoch."""
        alpha = {k.removeprefix("alpha/"): v for k, v in metrics.items() if k.startswith("alpha/")}
        shown = {k: metrics[k] for k in ("train/loss", "val/accuracy") if k in metrics}
        self._progress(epoch, self._steps_per_epoch, {"alpha": alpha, **shown})
        if epoch in self._recorded:
            return
        row = metrics | self._gpu_use() | {"epoch": epoch, "time": time.time()}
        self._recorded.add(epoch)
        self._unwritten.append(row)
        self._write()
        self._logger.log(row, step=epoch, seconds=row["time"])

    def phase(self, phase: str, epoch: int) -> None:
        """Show a phase other than training."""
        self._progress(epoch, self._steps_per_epoch, {}, phase)

    def close(self) -> int:
        """Send what is still to be sent to MLflow; returns how many metrics it did not take."""
        self._write()
        return self._logger.close()

    def _watch_gpu(self) -> None:
        percent = gpu_utilization()
        if percent is not None:
            self._gpu_percent.append(percent)

    def _gpu_use(self) -> dict[str, float]:
        """Mean use of rank 0's GPU since the last call, in per cent, as its driver counts it."""
        use = {"gpu/utilization": fmean(self._gpu_percent)} if self._gpu_percent else {}
        self._gpu_percent = []
        return use

    def _write(self) -> None:
        try:
            with (self._folder / HISTORY_NAME).open("a") as file:
                file.writelines(map(_line, self._unwritten))
        except OSError as error:
            log.warning("%s is written later: %s", HISTORY_NAME, error)
        else:
            self._unwritten = []

    def _progress(
        self, epoch: int, step: int, values: dict[str, Any], phase: str | None = None
    ) -> None:
        self._shown = time.monotonic()
        main = epoch >= self._config.warmup_epochs
        self._record |= values | {
            "phase": phase or TRAINING_PHASES[main],
            "epoch": epoch,
            "num_epochs": self._config.optim.epochs,
            "step": step,
            "steps_per_epoch": self._steps_per_epoch,
        }
        with contextlib.suppress(OSError):  # the next one may come through
            write_text(self._folder / PROGRESS_NAME, json.dumps(self._record))


def _line(row: dict[str, float]) -> str:
    return json.dumps(row, sort_keys=True) + "\n"

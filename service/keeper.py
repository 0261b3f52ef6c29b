"""When training is saved, and what goes with it."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from service.config import CheckpointConfig
from service.storage import CheckpointStore, CheckpointWriter, StorageError, checkpoint_name
from training.chain import Chain, StepRecord, order_text
from training.checkpoint import Packed
from training.distributed import from_rank_zero, rank, world_size
from training.loop import LOSS, ORDER, Position


class Keeper:
    """When and what to save: step records, the chain over them, the best checkpoint.

    Every rank has one and knows the best checkpoint; rank 0 takes records and writes.

    Args:
        settings: when to save.
        store: where to.
        pack: (position, notes) -> copy of the state of training.
        is_hopeless: whether the newest step has come to nothing and is not to be saved.
    """

    def __init__(
        self,
        settings: CheckpointConfig,
        store: CheckpointStore,
        pack: Callable[[Position, dict[str, Any]], Packed],
        is_hopeless: Callable[[], bool],
    ):
        self.best: dict[str, Any] | None = None
        self.candidate: str | None = None
        self.chain = Chain()
        self._settings = settings
        self._pack = pack
        self._is_hopeless = is_hopeless
        self._writer = CheckpointWriter(store, settings.keep)
        self._pending: list[tuple[int, int, Tensor, Tensor]] = []
        self._saved_steps, self._saved_at = 0, time.monotonic()

    @property
    def error(self) -> StorageError | None:
        """What kept the last checkpoint from being written; rank 0 knows."""
        return self._writer.error

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writer.busy

    def restore(self, position: Position, notes: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.best, self.chain = notes["best"], Chain(**notes["chain"])
        self._saved_steps = position.steps_done

    def step(self, position: Position, signals: dict[str, Tensor]) -> None:
        """Take the record of a step; save if it is time."""
        if rank() > 0:
            return
        record = (position.epoch, position.step - 1, signals[ORDER], signals[LOSS])
        self._pending.append(record)
        if not self._writer.busy and self._is_due(position):
            self.save(position)

    def _is_due(self, position: Position) -> bool:
        every, seconds = self._settings.every_steps, self._settings.every_seconds
        steps = position.steps_done - self._saved_steps
        return bool(every and steps >= every) or time.monotonic() - self._saved_at >= seconds

    def save(self, position: Position) -> None:
        """Start to write a checkpoint of this position."""
        if rank() > 0 or position.steps_done == self._saved_steps or self._is_hopeless():
            return
        records = self._take_records()
        notes = {"best": self.best, "chain": vars(self.chain), "workers": world_size()}
        self._writer.submit(
            checkpoint_name(position.steps_done),
            self._pack(position, notes),
            self._saved_steps,
            records,
            keep=self.best["name"] if self.best else None,
        )
        self._saved_steps, self._saved_at = position.steps_done, time.monotonic()

    def validated(self, epoch: int, metrics: dict[str, float], main_phase: bool) -> None:
        """Compare the candidate with the best of the main phase so far; the earlier one wins."""
        if not main_phase:
            return
        if self.best is None or metrics["val/accuracy"] > self.best["metrics"]["val/accuracy"]:
            chosen = {name: value for name, value in metrics.items() if name.startswith("val/")}
            self.best = {"name": self.candidate, "epoch": epoch, "metrics": chosen}

    def wait(self) -> None:
        """Return when nothing is being written."""
        self._writer.wait()

    def agree(self) -> None:
        """Meet the other ranks when rank 0 has written everything.

        Raises:
            StorageError: on every rank, if rank 0 could not write.
        """
        self._take_records()
        self.wait()
        if message := from_rank_zero(str(self.error) if self.error else None):
            raise StorageError(message)

    def _take_records(self) -> list[StepRecord]:
        records = []
        if self._pending:
            losses = torch.stack([loss for *_, loss in self._pending]).tolist()
            orders = torch.stack([order for _, _, order, _ in self._pending]).cpu()
            records = [
                StepRecord(epoch, step, order_text(digest), loss, world_size())
                for (epoch, step, *_), digest, loss in zip(
                    self._pending, orders, losses, strict=True
                )
            ]
        self._pending = []
        self.chain = self.chain.extended(records)
        return records

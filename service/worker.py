"""What one Ray Train worker does: its rows in, the loop, checkpoints and reports out. The only
bridge between Ray and training/.

Everything a worker needs arrives in one JSON-like payload; what it returns (from rank 0) is
`{"metrics": {...}}`, `{"error": message}` for failures that all ranks agree on, or
`{"stopped": message}` when the driver asked to stop.
"""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective
import ray.train.torch
import torch
from torch import Tensor, nn

from data.schema import Manifest, Split
from service.config import ConfigError, RunConfig
from service.faults import Faults
from service.files import STOP_NAME
from service.reporting import Reporter
from service.rows import WorkerRows, make_order
from service.storage import CheckpointStore, CheckpointWriter, StorageError, checkpoint_name
from training import checkpoint as checkpoints
from training.chain import Chain, StepRecord, order_text
from training.distributed import rank, world_size
from training.encoders import ModalityKind, build_model
from training.evaluation import evaluate
from training.loop import LOSS, ORDER, Hooks, Position, fit
from training.methods import build_method
from training.methods.base import EpochData, Method, NonFiniteError
from training.optim import build_optimizer, build_schedule

log = logging.getLogger(__name__)

STOP, LEAVE, FAILED = "stop", "leave", "failed"
STOP_POLL_SECONDS = 0.2
LEAVE_SECONDS = 30.0


class Stopped(Exception):
    """The driver asked to stop, and the checkpoint is safe."""


class Termination:
    """Whether this process was asked to end by SIGTERM; read between steps.

    Training gets LEAVE_SECONDS for its checkpoint; a second signal ends the process at once.
    """

    asked = False

    def watch(self) -> None:
        """Take over SIGTERM; to be called in the main thread."""
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, signum: int, frame: object) -> None:
        if self.asked:
            os._exit(128 + signum)
        self.asked = True
        timer = threading.Timer(LEAVE_SECONDS, os._exit, (128 + signum,))
        timer.daemon = True
        timer.start()


termination = Termination()


def watch_termination() -> None:
    """Make SIGTERM ask this worker to save and leave, instead of ending it at once."""
    termination.watch()


class _TerminableBackend(ray.train.torch.TorchConfig().backend_cls):
    """The set-up of a torch worker; Ray runs it in the worker's main thread, the loop in another.

    Only the main thread may set a signal handler.
    """

    def on_training_start(self, worker_group, backend_config) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(watch_termination)


class TerminableTorchConfig(ray.train.torch.TorchConfig):
    """`TorchConfig` for workers that save when they get SIGTERM."""

    @property
    def backend_cls(self):
        return _TerminableBackend


def make_method(config: RunConfig, manifest: Manifest) -> Method:
    """The model, initialised from the training seed, inside its method.

    Raises:
        ConfigError: model or method settings do not fit the data set.
    """
    parts: list[tuple[str, ModalityKind, tuple[int, ...]]] = [
        (m.name, m.kind, m.shape) for m in manifest.modalities
    ]
    try:
        model = build_model(config.model, parts, len(manifest.classes), config.train.seed)
        return build_method(config.method, model, config.method_sections)
    except ValueError as error:  # settings that do not fit this data set
        raise ConfigError(str(error)) from error


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Train, then evaluate the best checkpoint on the test split.

    Args:
        payload: `config` and `manifest` (JSON values), `data_folder`, `run_folder` (shared
            storage), `checkpoints` (URI), `tracking` (arguments of RunLogger) and `faults`
            (see service/faults.py).
    """
    run = _Training(payload)
    try:
        return run.fit() | {"lost_metrics": run.close()}
    except Stopped as stop:
        run.close()
        return {"stopped": str(stop)}
    except (NonFiniteError, StorageError, checkpoints.CheckpointError) as error:
        run.close()
        return {"error": str(error)}  # every rank is here


def evaluate_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Evaluate a checkpoint on one split.

    Args:
        payload: `config`, `manifest`, `data_folder` and `checkpoints` as for `train_worker`, the
            name of the `checkpoint`, and `split`.
    """
    config = RunConfig.model_validate(payload["config"])
    manifest = Manifest.model_validate(payload["manifest"])
    device = ray.train.torch.get_device()
    rows = WorkerRows(config, manifest, payload["data_folder"], device)
    method = make_method(config, manifest).to(device)
    try:
        _load_weights(CheckpointStore.at(payload["checkpoints"]), payload["checkpoint"], method)
    except checkpoints.CheckpointError as error:
        return {"error": str(error)}
    return {"metrics": _evaluate_split(method, rows, payload["split"], config, device)}


class _Training:
    """One worker's part in a run: state, hooks of the loop, checkpoints."""

    def __init__(self, payload: dict[str, Any]):
        self._config = config = RunConfig.model_validate(payload["config"])
        self._manifest = manifest = Manifest.model_validate(payload["manifest"])
        self._device = ray.train.torch.get_device()
        self._rows = WorkerRows(config, manifest, payload["data_folder"], self._device)
        self._method = make_method(config, manifest).to(self._device)
        self._optimizer = build_optimizer(config.optim, self._method)
        self._schedule = build_schedule(config.optim, self._optimizer, config.warmup_epochs)
        self._store = CheckpointStore.at(payload["checkpoints"])
        self._keeper = _Keeper(config, self._store, payload, self._pack)
        self._payload = payload
        self._reporter: Reporter | None = None
        self._stop_seen, self._stop_polled = False, 0.0
        self._faults = Faults(payload["faults"], Path(payload["run_folder"]))

    def fit(self) -> dict[str, Any]:
        """Train from the newest checkpoint on, or from the start; test the best one."""
        position = self._resume()
        order = make_order(self._config, self._manifest)
        if rank() == 0:
            folder, tracking = Path(self._payload["run_folder"]), self._payload["tracking"]
            self._reporter = Reporter(self._config, order, folder, tracking, position.epoch)
        self._faults.resumed(position.steps_done)
        hooks = Hooks(
            wrap=_wrap,
            train_batches=self._rows.train,
            data=EpochData(
                lambda: self._rows.evaluation("train"), lambda: self._rows.evaluation("val")
            ),
            signals=self._signals,
            on_step=self._on_step,
            on_trained=self._on_trained,
            validate=self._validate,
            on_epoch=self._on_epoch,
        )
        fit(
            *(self._method, self._optimizer, self._schedule, hooks, position),
            seed=self._config.train.seed,
            num_epochs=self._config.optim.epochs,
            eval_every_epochs=self._config.train.eval_every_epochs,
        )
        return self._test_best()

    def close(self) -> int:
        """Finish what is being written; returns how many metrics MLflow did not take."""
        self._keeper.wait()
        return self._reporter.close() if self._reporter else 0

    def _resume(self) -> Position:
        """Restore the newest checkpoint that is whole, the same one on every rank.

        Raises:
            CheckpointError: there are checkpoints, but none can be used.
        """
        problems: list[str] = []
        name, position, notes = None, Position(), None
        if rank() == 0:
            for name in reversed(self._store.names()):
                try:
                    position, notes = self._load(name)
                    break
                except checkpoints.CheckpointError as error:
                    log.warning("%s", error)
                    problems.append(str(error))
            else:
                name = None
        name, problem = ray.train.collective.broadcast_from_rank_zero(
            (name, problems[0] if problems and notes is None else None)
        )
        if problem:
            raise checkpoints.CheckpointError(problem)
        if name is not None:
            if rank() > 0:
                position, notes = self._load(name)
            assert notes is not None
            self._keeper.restore(position, notes)
        return position

    def _load(self, name: str) -> tuple[Position, dict[str, Any]]:
        files, where = self._store.load(name), self._store.where(name)
        return checkpoints.load(files, where, self._method, self._optimizer, self._schedule)

    def _pack(self, position: Position, notes: dict[str, Any]) -> checkpoints.Packed:
        parts = (self._method, self._optimizer, self._schedule)
        return checkpoints.pack(*parts, position, notes)

    def _signals(self) -> dict[str, Tensor]:
        flags = {
            STOP: self._stop_asked(),
            LEAVE: termination.asked,
            FAILED: self._keeper.error is not None,
        }
        return {
            name: torch.tensor(float(flag), device=self._device) for name, flag in flags.items()
        }

    def _stop_asked(self) -> bool:
        """Whether the driver left its note; looked for by rank 0, not in every step."""
        if rank() == 0 and time.monotonic() - self._stop_polled > STOP_POLL_SECONDS:
            self._stop_polled = time.monotonic()
            self._stop_seen |= (Path(self._payload["run_folder"]) / STOP_NAME).exists()
        return self._stop_seen

    def _on_step(self, position: Position, signals: dict[str, Tensor]) -> None:
        self._keeper.step(position, signals)
        if self._reporter:
            self._reporter.step(position)
        self._faults.strike(position.steps_done)
        asked = torch.stack([signals[name] for name in (STOP, LEAVE, FAILED)]).tolist()
        if any(asked):
            self._interrupt(position, *asked)

    def _interrupt(self, position: Position, stop: float, leave: float, failed: float) -> None:
        """All ranks are here, after the same step: save, then end."""
        if not failed:
            self._keeper.save(position)
        self._keeper.agree()
        if not stop and leave:
            if termination.asked:
                os._exit(
                    128 + signal.SIGTERM
                )  # the node wants this process to end; Ray starts the group again
            time.sleep(LEAVE_SECONDS)  # ended by Ray with the group
        raise Stopped(f"stopped after epoch {position.epoch + 1}, step {position.step}")

    def _on_trained(self, position: Position, validates: bool) -> None:
        """Save the weights that will be validated: the candidate for the best checkpoint."""
        if self._reporter and validates:
            self._reporter.phase("validate", position.epoch)
        if validates:
            self._keeper.save(position)
        self._keeper.candidate = checkpoint_name(position.steps_done) if validates else None

    def _validate(self) -> dict[str, float]:
        metrics = evaluate(
            *(self._method, self._rows.evaluation("val")),
            seed=self._config.train.seed,
            subsets=False,
            device=self._device,
        )
        return {_val_name(name): value for name, value in metrics.items()}

    def _on_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        if "val/accuracy" in metrics:
            self._keeper.validated(epoch, metrics, self._method.is_main_phase(epoch))
            self._keeper.wait()
        if self._reporter and self._keeper.error is None:
            self._reporter.epoch(epoch, metrics)

    def _test_best(self) -> dict[str, Any]:
        """Load the checkpoint with the best validation accuracy of the main phase and test it."""
        if self._reporter:
            self._reporter.phase("evaluate", self._config.optim.epochs - 1)
        self._keeper.agree()
        best = self._keeper.best
        assert best is not None
        _load_weights(self._store, best["name"], self._method)
        test = _evaluate_split(self._method, self._rows, "test", self._config, self._device)
        chain = self._keeper.chain
        return {
            "metrics": {**best["metrics"], **test, "best_epoch": best["epoch"]},
            "checkpoint": best["name"],
            "order_chain": chain.order,
            "loss_chain": chain.loss,
        }


class _Keeper:
    """When and what to save: step records, the chain over them, the best checkpoint.

    Every rank has one and knows the best checkpoint; rank 0 takes records and writes.
    """

    def __init__(
        self, config: RunConfig, store: CheckpointStore, payload: dict[str, Any], pack: Any
    ):
        self.best: dict[str, Any] | None = None
        self.candidate: str | None = None
        self.chain = Chain()
        self._settings = config.checkpoint
        self._pack = pack
        self._writer = CheckpointWriter(store, config.checkpoint.keep)
        self._pending: list[tuple[int, int, Tensor, Tensor]] = []
        self._saved_steps, self._saved_at = 0, time.monotonic()

    @property
    def error(self) -> StorageError | None:
        """What kept the last checkpoint from being written; rank 0 knows."""
        return self._writer.error

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
        if rank() > 0 or position.steps_done == self._saved_steps:
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
        message = str(self.error) if self.error else None
        if message := ray.train.collective.broadcast_from_rank_zero(message):
            raise StorageError(message)

    def _take_records(self) -> list[StepRecord]:
        records = []
        if self._pending:
            losses = torch.stack([loss for *_, loss in self._pending]).tolist()
            orders = torch.stack([order for _, _, order, _ in self._pending]).cpu()
            records = [
                StepRecord(epoch, step, order_text(digest), loss)
                for (epoch, step, *_), digest, loss in zip(
                    self._pending, orders, losses, strict=True
                )
            ]
        self._pending = []
        self.chain = self.chain.extended(records)
        return records


def _load_weights(store: CheckpointStore, name: str, method: Method) -> None:
    files = store.load(name, checkpoints.WEIGHTS_FILES)
    checkpoints.load_weights(files, store.where(name), method)


def _evaluate_split(
    method: Method, rows: WorkerRows, split: Split, config: RunConfig, device: torch.device
) -> dict[str, float]:
    metrics = evaluate(
        method, rows.evaluation(split), seed=config.train.seed, subsets=True, device=device
    )
    return {f"{split}/{name}": value for name, value in metrics.items()}


def _wrap(method: Method) -> nn.Module:
    # Buffers: running statistics are not read in training, the loop synchronises them every epoch,
    # and what steers a method is equal on every rank by construction.
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    return ray.train.torch.prepare_model(method, parallel_strategy_kwargs=options)


def _val_name(name: str) -> str:
    """Validation metrics, named as the paper's diagnostics where it plots them."""
    special = {"misaligned_top2": "mis_val_top2", "misaligned_confidence": "mis_val_conf"}
    head, _, tail = name.partition("/")
    return f"{special[head]}{'/' if tail else ''}{tail}" if head in special else f"val/{name}"

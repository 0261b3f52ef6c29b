"""What one Ray Train worker does: its rows in, the loop, checkpoints and reports out. The only
bridge between Ray and training/.

Everything a worker needs arrives in one JSON-like payload; what it returns (from rank 0) is
`{"metrics": {...}}`, `{"error": message}` for failures that all ranks agree on, or
`{"stopped": message}` when the driver asked to stop.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.v2._internal.execution.context import get_train_context
from torch import Tensor

from data.schema import Manifest, Split
from service import contest
from service.config import RunConfig
from service.faults import Faults
from service.feed import Feed
from service.files import ATTEMPT_NAME, VALIDATION_PHASE
from service.keeper import Keeper
from service.reporting import Reporter
from service.rows import WorkerRows, make_order
from service.stepper import Stepper
from service.storage import CheckpointStore, StorageError, checkpoint_name, retried
from training import checkpoint as checkpoints
from training.batch import Batch
from training.chain import StepRecord, order_text
from training.delayed import Delayed
from training.distributed import any_rank, from_rank_zero, rank, world_size
from training.evaluation import evaluate
from training.loop import LOSS, ORDER, Hooks, Position, fit
from training.methods.base import HOPELESS, EpochData, NonFiniteError

log = logging.getLogger(__name__)

STOP, LEAVE, FAILED = "stop", "leave", "failed"
STOP_POLL_SECONDS = 0.2
LEAVE_SECONDS = 30.0
# Before a node is taken away: time for a last checkpoint.
NOTICE_SECONDS = 5.0


class Stopped(Exception):
    """The driver asked to stop, and the checkpoint is safe."""


class Termination:
    """Whether this process was asked to end by SIGTERM; read between steps.

    Training gets LEAVE_SECONDS for its checkpoint; a second signal ends the process at once.
    """

    asked = False
    _may_leave: Callable[[], bool] | None = None

    def watch(self) -> None:
        """Take over SIGTERM; to be called in the main thread."""
        signal.signal(signal.SIGTERM, self._ask)

    @contextlib.contextmanager
    def without_steps(self, may_leave: Callable[[], bool]) -> Iterator[None]:
        """Leave in the middle of the body, as soon as `may_leave` says that nothing is lost."""
        self._may_leave = may_leave
        try:
            yield
        finally:
            self._may_leave = None

    def _ask(self, signum: int, frame: object) -> None:
        if self.asked:
            os._exit(128 + signum)
        self.asked = True
        threading.Thread(target=self._end, args=(128 + signum,), daemon=True).start()

    def _end(self, code: int) -> None:
        began = time.monotonic()
        while time.monotonic() - began < LEAVE_SECONDS:
            may_leave = self._may_leave
            if may_leave and may_leave():
                leave()
            time.sleep(STOP_POLL_SECONDS)
        os._exit(code)


def notice() -> ray.train.PreemptionInfo | None:
    """What Ray knows of nodes of this run that will be taken away.

    `ray.train.get_preemption_info()` is the same behind a barrier of all ranks.
    """
    return get_train_context().preemption_context.preemption_info


def leave() -> None:
    """Have Ray start the group again now, as when a node was taken away.

    A process that just ends would count as a failure.
    """
    context = get_train_context()
    here = {ray.get_runtime_context().get_node_id(): [context.get_world_rank()]}
    info = ray.train.PreemptionInfo(deadline_ms=0, preempted_node_to_ranks=here)
    context.preemption_context.preemption_info = info


termination = Termination()


def watch_termination() -> None:
    """Make SIGTERM ask this worker to save and leave, instead of ending it at once."""
    termination.watch()


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Train, then evaluate the best checkpoint on the test split.

    Args:
        payload: `config` and `manifest` (JSON values), `data_folder`, `run_folder` (shared
            storage), `checkpoints` (URI), `tracking` (arguments of RunLogger), `faults` (see
            service/faults.py), and the id of the `attempt`.
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
    state = _State(payload)
    try:
        state.load_weights(payload["checkpoint"])
    except checkpoints.CheckpointError as error:
        return {"error": str(error)}
    return {"metrics": state.test(payload["split"])}


def bench_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Contend for speed; returns the numbers of every contender's turns.

    Args:
        payload: `config`, `manifest` and `data_folder` as for `train_worker`; the `folder` where
            contenders meet, the names of the `others` outside Ray, and `seconds` for all turns.
    """
    torch.set_num_threads(payload["config"]["scaling"]["cpus_per_worker"])
    return contest.conduct(payload, ray.train.torch.get_device())


def verify_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Take steps of a run again; returns their `records`, as JSON values.

    Args:
        payload: as for `evaluate_worker`, `checkpoint` None to begin at the start of the run,
            `start` and `stop`, numbers of steps of the run, and `widen`, to take them in double
            precision.
    """
    state = _State(payload)
    name = payload["checkpoint"]
    try:
        position = state.load(name)[0] if name else Position()
    except checkpoints.CheckpointError as error:
        return {"error": str(error)}
    if payload["widen"]:
        state.widen()
    records = _Replay(state, payload["start"], payload["stop"]).fit(position)
    return {"records": [asdict(record) for record in records]}


class _State(Stepper):
    """What a worker trains with: rows, method, optimizer and schedule, built from the payload."""

    def __init__(self, payload: dict[str, Any]):
        self.config = config = RunConfig.model_validate(payload["config"])
        self.manifest = Manifest.model_validate(payload["manifest"])
        device = ray.train.torch.get_device()
        if config.train.deterministic:
            torch.use_deterministic_algorithms(True)
        torch.set_num_threads(config.scaling.cpus_per_worker)
        self.rows = WorkerRows(config, self.manifest, payload["data_folder"], device)
        super().__init__(config, self.manifest, device)
        self.store = CheckpointStore.at(payload["checkpoints"])

    def load(self, name: str) -> tuple[Position, dict[str, Any]]:
        """Restore a checkpoint; returns its position and notes."""
        files, where = self._read(name), self.store.where(name)
        found = checkpoints.load(files, where, self.method, self.optimizer, self.schedule)
        self.keep_precision(found[1])
        return found

    def load_weights(self, name: str) -> None:
        """Restore parameters and buffers only."""
        files = self._read(name, checkpoints.WEIGHTS_FILES)
        notes = checkpoints.load_weights(files, self.store.where(name), self.method)
        self.keep_precision(notes)

    def _read(self, name: str, wanted: Collection[str] | None = None) -> dict[str, bytes]:
        return retried(lambda: self.store.load(name, wanted), f"reading checkpoint {name}")

    def pack(self, position: Position, notes: dict[str, Any]) -> checkpoints.Packed:
        """Copy the state of training."""
        notes = notes | {"precision": self.precision}
        return checkpoints.pack(self.method, self.optimizer, self.schedule, position, notes)

    def fit(self, hooks: Hooks, position: Position) -> None:
        """Run the loop."""
        fit(
            *(self.method, self.optimizer, self.schedule, hooks, position),
            seed=self.config.train.seed,
            num_epochs=self.config.optim.epochs,
            eval_every_epochs=self.config.train.eval_every_epochs,
        )

    def evaluate(self, chunks: Iterable[Batch], *, subsets: bool) -> dict[str, float]:
        """Metrics of a split, without prefix."""
        return evaluate(
            *(self.method, chunks),
            seed=self.config.train.seed,
            subsets=subsets,
            device=self.device,
        )

    def test(self, split: Split) -> dict[str, float]:
        """All metrics of a split, `<split>/<metric>`."""
        metrics = self.evaluate(self.rows.evaluation(split), subsets=True)
        return {f"{split}/{name}": value for name, value in metrics.items()}

    @property
    def data(self) -> EpochData:
        """Passes over the data for `Method.before_epoch`."""
        return EpochData(lambda: self.rows.evaluation("train"), lambda: self.rows.evaluation("val"))


class _Replay:
    """Takes some steps of a run again, and writes nothing."""

    def __init__(self, state: _State, start: int, stop: int):
        self._state = state
        self._start, self._stop = start, stop
        self._records: list[StepRecord] = []

    def fit(self, position: Position) -> list[StepRecord]:
        """Records of steps [start, stop) of the run, going from `position`."""
        hooks = Hooks(
            wrap=self._state.wrap,
            train_batches=self._state.rows.train,
            data=self._state.data,
            signals=dict,
            on_step=self._on_step,
            on_trained=lambda position, validates: None,
            validate=dict,
            on_epoch=lambda epoch, metrics: None,
        )
        with contextlib.suppress(Stopped):
            self._state.fit(hooks, position)
        return self._records

    def _on_step(self, position: Position, signals: dict[str, Tensor]) -> None:
        if position.steps_done > self._start:
            order, loss = order_text(signals[ORDER]), float(signals[LOSS])
            record = StepRecord(position.epoch, position.step - 1, order, loss, world_size())
            self._records.append(record)
        if position.steps_done == self._stop:
            raise Stopped


class _Training:
    """One worker's part in a run: hooks of the loop, checkpoints, reports."""

    def __init__(self, payload: dict[str, Any]):
        self._state = state = _State(payload)
        self._delayed = Delayed()
        self._keeper = Keeper(state.config.checkpoint, state.store, state.pack, self._is_hopeless)
        self._folder = Path(payload["run_folder"])
        self._tracking = payload["tracking"]
        self._attempt: str = payload["attempt"]
        self._reporter: Reporter | None = None
        self._stop_seen, self._stop_polled = False, 0.0
        self._validated = (0, 0)
        self._noticed = False
        self._feed: Feed | None = None
        self._unrecorded: list[tuple[int, dict[str, float]]] = []
        context = ray.get_runtime_context()
        node = (context.get_node_id(), context.gcs_address)
        self._faults = Faults(payload["faults"], self._folder, node)

    def fit(self) -> dict[str, Any]:
        """Train from the newest checkpoint on, or from the start; test the best one."""
        position, state = self._resume(), self._state
        if rank() == 0:
            order = make_order(state.config, state.manifest)
            self._reporter = Reporter(state.config, order, self._folder, self._tracking)
            threads = state.config.scaling.cpus_per_worker
            where = f"on {state.device.type}, threads each: {threads}"
            self._reporter.note(f"workers: {world_size()} {where}, {state.precision}")
        self._faults.resumed(position.steps_done)
        hooks = Hooks(
            wrap=state.wrap,
            train_batches=state.rows.train,
            prepare_seconds=lambda: state.rows.prepare_seconds,
            data=state.data,
            signals=self._signals,
            on_step=self._on_step,
            on_trained=self._on_trained,
            validate=self._validate,
            on_epoch=self._on_epoch,
        )
        state.fit(hooks, position)
        return self._test_best()

    def close(self) -> int:
        """Finish what is being written; returns how many metrics MLflow did not take."""
        self._keeper.wait()
        self._record()
        return self._reporter.close() if self._reporter else 0

    def _resume(self) -> Position:
        """Restore the newest checkpoint that is whole, the same one on every rank.

        Raises:
            CheckpointError: there are checkpoints, but none can be used.
        """
        found: tuple[Position, dict[str, Any]] | None = None
        name, problem = None, None
        if rank() == 0:
            names = retried(self._state.store.names, "listing checkpoints")
            for name in reversed(names):
                try:
                    found = self._state.load(name)
                    break
                except checkpoints.CheckpointError as error:
                    log.warning("%s", error)
                    problem = problem or str(error)
        name, problem = from_rank_zero((name if found else None, None if found else problem))
        if problem:
            raise checkpoints.CheckpointError(problem)
        if name is None:
            return Position()
        try:
            found = found or self._state.load(name)
        except checkpoints.CheckpointError as error:
            log.error("%s", error)
        if any_rank(found is None):
            raise checkpoints.CheckpointError(
                f"rank 0 could load checkpoint {self._state.store.where(name)}, another rank could "
                "not; all nodes must see the same files; give a checkpoint.storage that they share"
            )
        assert found is not None
        position, notes = found
        self._keeper.restore(position, notes)
        return position

    def _signals(self) -> dict[str, Tensor]:
        flags = {
            STOP: self._stop_asked(),
            LEAVE: termination.asked or self._node_goes(),
            FAILED: self._keeper.error is not None,
        }
        return {
            name: torch.tensor(float(flag), device=self._state.device)
            for name, flag in flags.items()
        }

    def _stop_asked(self) -> bool:
        """Whether the driver took the attempt back; looked for by rank 0, not in every step."""
        if rank() == 0 and time.monotonic() - self._stop_polled > STOP_POLL_SECONDS:
            self._stop_polled = time.monotonic()
            with contextlib.suppress(OSError):  # the storage is away for a while
                current = (self._folder / ATTEMPT_NAME).read_text()
                if current not in ("", self._attempt):
                    os._exit(1)  # our driver was lost, and the run goes on elsewhere
                self._stop_seen |= not current
        return self._stop_seen

    def _node_goes(self) -> bool:
        """Whether a node is about to be taken away; rank 0 decides, by its clock."""
        info = notice() if rank() == 0 else None
        return info is not None and time.time() + NOTICE_SECONDS > (info.deadline_ms or 0) / 1000

    def _heed_notice(self, position: Position) -> None:
        """Save when a notice comes, for the node may go before its time."""
        if not self._noticed and rank() == 0 and notice() is not None:
            self._noticed = True
            self._keeper.save(position)

    def _on_step(self, position: Position, signals: dict[str, Tensor]) -> None:
        names = (STOP, LEAVE, FAILED, HOPELESS, LOSS)
        asked = self._checked(self._delayed.put(torch.stack([signals[name] for name in names])))
        self._keeper.step(position, signals)
        if self._reporter:
            if self._feed is not (feed := self._state.rows.feed):
                self._feed = feed
                if feed is not None and feed.training_rows is not None:
                    self._reporter.note(str(feed))
            self._reporter.step(position)
        if not self._keeper.busy:
            self._record()
        self._faults.strike(position.steps_done)
        self._heed_notice(position)
        self._obey(position, asked)

    def _checked(self, asked: list[float] | None) -> list[float]:
        """What a step's signals ask for: stop, leave, give up; the same on every rank. To be read
        before anything is saved.

        Raises:
            NonFiniteError: the step came to nothing.
        """
        *flags, hopeless, loss = asked or [0.0] * 5
        if hopeless:
            raise NonFiniteError(loss)
        return flags

    def _obey(self, position: Position, asked: list[float]) -> None:
        if any(asked):
            self._interrupt(position, *asked)

    def _is_hopeless(self) -> bool:
        """Whether the newest step, whose signals may still be on the device, must not be saved."""
        asked = self._delayed.peek()
        return asked is not None and bool(asked[3])

    def _interrupt(self, position: Position, stop: float, leaves: float, failed: float) -> None:
        """All ranks are here, after the same step: save, then end."""
        if not failed:
            self._keeper.save(position)
        self._keeper.agree()
        if not stop and leaves:
            leave()
            time.sleep(LEAVE_SECONDS)  # ended by Ray with the group
        raise Stopped(f"stopped after epoch {position.epoch + 1}, step {position.step}")

    def _on_trained(self, position: Position, validates: bool) -> None:
        """Save the weights that will be validated: the candidate for the best checkpoint."""
        self._obey(position, self._checked(self._delayed.flush()))
        if self._reporter and validates:
            self._reporter.phase(VALIDATION_PHASE, position.epoch)
        if validates:
            self._keeper.save(position)
        self._keeper.candidate = checkpoint_name(position.steps_done) if validates else None
        self._validated = (position.epoch, position.steps_done)

    def _validate(self) -> dict[str, float]:
        chunks = self._faults.validating(self._state.rows.evaluation("val"), *self._validated)
        with termination.without_steps(self._is_saved):
            metrics = self._state.evaluate(chunks, subsets=False)
        return {_val_name(name): value for name, value in metrics.items()}

    def _is_saved(self) -> bool:
        """Whether the checkpoint that is being validated is safe; any rank can tell."""
        try:
            return self._keeper.candidate in self._state.store.names()
        except Exception:  # the storage is away for a while
            return False

    def _on_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        if "val/accuracy" in metrics:
            self._keeper.validated(epoch, metrics, self._state.method.is_main_phase(epoch))
        self._unrecorded.append((epoch, metrics))

    def _record(self) -> None:
        """Report the epochs whose checkpoint is safe."""
        if self._reporter and self._keeper.error is None:
            for epoch, metrics in self._unrecorded:
                self._reporter.epoch(epoch, metrics)
        self._unrecorded = []

    def _test_best(self) -> dict[str, Any]:
        """Load the checkpoint with the best validation accuracy of the main phase and test it."""
        if self._reporter:
            self._reporter.phase("evaluate", self._state.config.optim.epochs - 1)
        self._keeper.agree()
        self._record()
        best, chain = self._keeper.best, self._keeper.chain
        assert best is not None
        with termination.without_steps(lambda: True):
            self._state.load_weights(best["name"])
            tested = self._state.test("test")
        return {
            "metrics": {**best["metrics"], **tested, "best_epoch": best["epoch"]},
            "checkpoint": best["name"],
            "precision": self._state.precision,
            "order_chain": chain.order,
            "loss_chain": chain.loss,
        }


def _val_name(name: str) -> str:
    """Validation metrics, named as the paper's diagnostics where it plots them."""
    special = {"misaligned_top2": "mis_val_top2", "misaligned_confidence": "mis_val_conf"}
    head, _, tail = name.partition("/")
    return f"{special[head]}{'/' if tail else ''}{tail}" if head in special else f"val/{name}"

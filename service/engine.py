"""What one process does in a run, wherever it is started: its rows in, the loop, checkpoints and
reports out. Knows nothing of Ray's sessions; `Host` says what the surroundings want of it.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.schema import Manifest, Split
from service.capacity import num_cores
from service.config import RunConfig
from service.faults import Faults
from service.feed import Feed, local_workers
from service.files import ATTEMPT_NAME, VALIDATION_PHASE
from service.keeper import Keeper
from service.reporting import Reporter
from service.rows import WorkerRows, make_order
from service.stepper import Stepper
from service.storage import CheckpointStore, checkpoint_name, retried
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
# Read by cuBLAS at its first product; without it, torch refuses products on deterministic GPUs.
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class Stopped(Exception):
    """The driver asked to stop, and the checkpoint is safe."""


class Host:
    """What surrounds a process that trains; this one never wants it to go."""

    def may_soon_go(self) -> bool:
        """Whether this place is about to be taken away, so that a checkpoint is wise."""
        return False

    def must_go(self) -> bool:
        """Whether training here is to end now, and to go on elsewhere."""
        return False

    def go(self) -> None:
        """End this process, with its checkpoint safe."""

    def without_steps(
        self, may_leave: Callable[[], bool]
    ) -> contextlib.AbstractContextManager[None]:
        """For a body without steps: it may be left in its middle if `may_leave` says so."""
        return contextlib.nullcontext()


def idle_cores(device: torch.device, cores: int) -> str | None:
    """Advice, if the workers of this node leave most of its cores alone that could train; None if
    not."""
    workers, threads = local_workers(), torch.get_num_threads()
    each = cores // workers
    if device.type != "cpu" or each <= 2 * threads:
        return None
    left = cores - workers * (each - 1)
    return (
        f"this node has {cores} cores, its workers train on {workers * threads}; "
        f"scaling.cpus_per_worker={each - 1} gives them more and leaves {left} to readers"
    )


class State(Stepper):
    """What a process trains with: rows, method, optimizer and schedule, built from the payload."""

    def __init__(self, payload: dict[str, Any], device: torch.device):
        self.config = config = RunConfig.model_validate(payload["config"])
        self.manifest = Manifest.model_validate(payload["manifest"])
        if config.train.deterministic:
            os.environ.setdefault(*CUBLAS_WORKSPACE)
            torch.use_deterministic_algorithms(True)
        torch.set_num_threads(config.scaling.cpus_per_worker)
        self.rows = WorkerRows(config, self.manifest, payload["data_folder"], device)
        super().__init__(config, self.manifest, device)
        self.store = CheckpointStore.at(payload["checkpoints"])
        self._changes = bool(payload.get("generation"))

    def load(self, name: str) -> tuple[Position, dict[str, Any]]:
        """Restore a checkpoint; returns its position and notes."""
        files, where = self._read(name), self.store.where(name)
        found = checkpoints.load(files, where, self.method, self.optimizer, self.schedule)
        self.keep_precision(found[1])
        if self._changes:  # the state may be another trial's
            self.retune()
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


class Replay:
    """Takes some steps of a run again, and writes nothing."""

    def __init__(self, state: State, start: int, stop: int):
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


class Training:
    """One process's part in a run: hooks of the loop, checkpoints, reports.

    Args:
        payload: see `train_worker`. Also `generation`, of a trial in a population: it may go on
            from the state of another with other settings; see service/population.py.
        host: what surrounds this process.
        on_epoch: called after every epoch with the epoch and its metrics, when they are taken in.
    """

    def __init__(
        self,
        payload: dict[str, Any],
        device: torch.device,
        host: Host,
        faults: Faults,
        on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, metrics: None,
    ):
        self._state = state = State(payload, device)
        self._host = host
        self._faults = faults
        self._then = on_epoch
        self._delayed = Delayed()
        self._keeper = Keeper(state.config.checkpoint, state.store, state.pack, self._is_hopeless)
        self._folder = Path(payload["run_folder"])
        self._tracking = payload["tracking"]
        self._attempt: str = payload["attempt"]
        self._is_of_population = bool(payload.get("generation"))
        self._reporter: Reporter | None = None
        self._stop_seen, self._stop_polled = False, 0.0
        self._validated = (0, 0)
        self._noticed = False
        self._feed: Feed | None = None
        self._unrecorded: list[tuple[int, dict[str, float]]] = []

    def fit(self) -> None:
        """Train from the newest checkpoint on, or from the start, to the end."""
        position, state = self._resume(), self._state
        if rank() == 0:
            order = make_order(state.config, state.manifest)
            self._reporter = Reporter(state.config, order, self._folder, self._tracking)
            where = f"on {state.device.type}, threads each: {torch.get_num_threads()}"
            self._reporter.note(f"workers: {world_size()} {where}, {state.precision}")
            if hint := idle_cores(state.device, num_cores()):
                self._reporter.note(hint)
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
        self._keeper.agree()
        self._record()

    def best(self) -> dict[str, Any]:
        """Name, epoch (0-based) and validation metrics of the best checkpoint of the main phase,
        and the chains over all steps."""
        best, chain = self._keeper.best, self._keeper.chain
        assert best is not None
        return {
            "metrics": {**best["metrics"], "best_epoch": best["epoch"]},
            "checkpoint": best["name"],
            "precision": self._state.precision,
            "order_chain": chain.order,
            "loss_chain": chain.loss,
        }

    def test_best(self) -> dict[str, Any]:
        """Test the best checkpoint; `best` with the metrics of the test split."""
        if self._reporter:
            self._reporter.phase("evaluate", self._state.config.optim.epochs - 1)
        best = self.best()
        with self._host.without_steps(lambda: True):
            self._state.load_weights(best["checkpoint"])
            tested = self._state.test("test")
        return best | {"metrics": best["metrics"] | tested}

    def settle(self) -> None:
        """Return when every checkpoint and epoch so far is on record."""
        self._keeper.wait()
        self._record()

    def close(self) -> int:
        """Finish what is being written; returns how many metrics MLflow did not take."""
        self.settle()
        return self._reporter.close() if self._reporter else 0

    def _resume(self) -> Position:
        """Restore the newest checkpoint that is whole, the same one on every rank.

        Raises:
            CheckpointError: there are checkpoints, but none can be used.
        """
        found: tuple[Position, dict[str, Any]] | None = None
        name, problem, names = None, None, []
        if rank() == 0:
            names = retried(self._state.store.names, "listing checkpoints")
            for name in reversed(names):
                try:
                    found = self._state.load(name)
                    break
                except checkpoints.CheckpointError as error:
                    log.warning("%s", error)
                    problem = problem or str(error)
        name, problem, names = from_rank_zero(
            (name if found else None, None if found else problem, names)
        )
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
        if notes["best"] and notes["best"]["name"] not in names and self._is_of_population:
            notes["best"] = None  # the donor's
        self._keeper.restore(position, notes)
        return position

    def _signals(self) -> dict[str, Tensor]:
        flags = {
            STOP: self._stop_asked(),
            LEAVE: self._host.must_go(),
            FAILED: self._keeper.error is not None,
        }
        return {
            name: torch.full((), float(flag), device=self._state.device)
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

    def _heed_notice(self, position: Position) -> None:
        """Save when a notice comes, for the node may go before its time."""
        if not self._noticed and self._host.may_soon_go():
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
            self._host.go()
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
        with self._host.without_steps(self._is_saved):
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
        self._then(epoch, metrics)

    def _record(self) -> None:
        """Report the epochs whose checkpoint is safe."""
        if self._reporter and self._keeper.error is None:
            for epoch, metrics in self._unrecorded:
                self._reporter.epoch(epoch, metrics)
        self._unrecorded = []


def _val_name(name: str) -> str:
    """Validation metrics, named as the paper's diagnostics where it plots them."""
    special = {"misaligned_top2": "mis_val_top2", "misaligned_confidence": "mis_val_conf"}
    head, _, tail = name.partition("/")
    return f"{special[head]}{'/' if tail else ''}{tail}" if head in special else f"val/{name}"

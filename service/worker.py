"""What one Ray Train worker does: its rows in, the loop, checkpoints and reports out. The only
bridge between Ray and training/.

Everything a worker needs arrives in one JSON-like payload; what it returns (from rank 0) is
`{"metrics": {...}}`, `{"error": message}` for failures that all ranks agree on, or
`{"stopped": message}` when the driver asked to stop.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.v2._internal.execution.context import get_train_context

from service import contest
from service.awake import keep_awake
from service.config import RunConfig
from service.engine import STOP_POLL_SECONDS, Host, Replay, State, Stopped, Training
from service.faults import Faults
from service.storage import StorageError
from training import checkpoint as checkpoints
from training.distributed import rank
from training.loop import Position
from training.methods.base import NonFiniteError

LEAVE_SECONDS = 30.0
# Before a node is taken away: time for a last checkpoint.
NOTICE_SECONDS = 5.0


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


class TrainHost(Host):
    """A worker of a Ray Train group: nodes may be taken away, and SIGTERM asks it to leave."""

    def may_soon_go(self) -> bool:
        """Rank 0 decides."""
        return rank() == 0 and notice() is not None

    def must_go(self) -> bool:
        """By a signal, or by rank 0's clock before its node goes."""
        info = notice() if rank() == 0 else None
        limit = time.time() + NOTICE_SECONDS
        return termination.asked or (info is not None and limit > (info.deadline_ms or 0) / 1000)

    def go(self) -> None:
        leave()
        time.sleep(LEAVE_SECONDS)  # ended by Ray with the group

    def without_steps(
        self, may_leave: Callable[[], bool]
    ) -> contextlib.AbstractContextManager[None]:
        return termination.without_steps(may_leave)


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
    context = ray.get_runtime_context()
    node = (context.get_node_id(), context.gcs_address)
    faults = Faults(payload["faults"], Path(payload["run_folder"]), node)
    run = Training(payload, ray.train.torch.get_device(), TrainHost(), faults)
    try:
        run.fit()
        return run.test_best() | {"lost_metrics": run.close()}
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
    state = State(payload, ray.train.torch.get_device())
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
    scaling = RunConfig.model_validate(payload["config"]).scaling
    torch.set_num_threads(scaling.cpus_per_worker)
    if scaling.awake:  # of all contenders: they take turns on the same cores
        keep_awake(scaling.cpus_per_worker)
    return contest.conduct(payload, ray.train.torch.get_device())


def verify_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Take steps of a run again; returns their `records`, as JSON values.

    Args:
        payload: as for `evaluate_worker`, `checkpoint` None to begin at the start of the run,
            `start` and `stop`, numbers of steps of the run, and `widen`, to take them in double
            precision.
    """
    state = State(payload, ray.train.torch.get_device())
    name = payload["checkpoint"]
    try:
        position = state.load(name)[0] if name else Position()
    except checkpoints.CheckpointError as error:
        return {"error": str(error)}
    if payload["widen"]:
        state.widen()
    records = Replay(state, payload["start"], payload["stop"]).fit(position)
    return {"records": [asdict(record) for record in records]}

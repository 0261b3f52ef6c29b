"""Running a sweep's trials on Ray Tune: it places them, keeps their processes and restarts those
that are lost. What to try and what to end is asked of the sweep, see `service/study.py`.
"""

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from service.capacity import trial_scaling
from service.cluster import STOP_SECONDS, HeadLostError, watch
from service.config import RunError
from service.environment import environment, worker_environment
from service.study import OBJECTIVE
from service.sweep import Sweep
from service.trial import run_trial

TUNE_ENVIRONMENT = {
    # The sweep has its own record; Tune's would be written beside it after every result.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    # The last report of a trial that diverged has no score.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # A trial that is ended finishes its checkpoint and its metrics before the next begins.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "30",
    "RAY_AIR_NEW_OUTPUT": "0",
}
SCRATCH = ".tune"


def run_trials(sweep: Sweep, *, seconds: float | None) -> None:
    """Run trials until the sweep has no more; to be called in an open Ray session.

    Args:
        seconds: time after which trials are asked to save and end; None is no limit.

    Raises:
        RunError: the sweep cannot go on.
        KeyboardInterrupt: a signal arrived; what runs has been asked to save, and had time to.
    """
    pending = {"TUNE_MAX_PENDING_TRIALS_PG": str(sweep.slots)}
    defaults = TUNE_ENVIRONMENT | pending
    os.environ.update({k: os.environ.get(k, v) for k, v in defaults.items()})
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    scaling = trial_scaling(sweep.config)
    worker = {"CPU": float(scaling.cpus_per_worker)} | ({"GPU": 1.0} if sweep.on_gpu else {})
    resources = tune.PlacementGroupFactory([worker] * scaling.max_workers)
    remote = environment()["RAY_ADDRESS"] is not None
    variables, hidden = worker_environment() if remote else ({}, {})
    # In Ray's object store, not in Tune's files.
    trial = tune.with_parameters(run_trial, variables=variables | hidden)
    tuner = tune.Tuner(
        tune.with_resources(trial, resources),
        tune_config=tune.TuneConfig(
            search_alg=_Asking(sweep),
            scheduler=_Ending(sweep),
            num_samples=-1,
            max_concurrent_trials=sweep.slots,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=SCRATCH,
            storage_path=str(sweep.folder),
            failure_config=tune.FailureConfig(max_failures=scaling.max_failures),
            verbose=0,
        ),
    )
    ended, problem = threading.Event(), []

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:  # handed to the main thread, which decides
            problem.append(error)
        finally:
            ended.set()

    threading.Thread(target=fit, name="tune", daemon=True).start()
    until = time.monotonic() + seconds if seconds is not None else None
    try:
        watch(ended, scaling, until)
        if not ended.is_set():  # the time is up
            sweep.ask_to_stop()
            watch(ended, scaling)
    except HeadLostError:
        sweep.ask_to_stop()  # trials elsewhere may still be training
        raise
    except KeyboardInterrupt:
        sweep.ask_to_stop()
        ended.wait(timeout=STOP_SECONDS)
        raise
    if problem:
        raise _explained(problem[0])


def _explained(error: BaseException) -> BaseException:
    """Tune wraps what the sweep raises."""
    cause: BaseException | None = error
    seen: set[int] = set()  # a chain of causes may be a ring
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, RunError | ValueError):
            return cause
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return error


class _NotKept:
    """Tune pickles its searcher and scheduler to go on with; here the sweep's record does that."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Asking(_NotKept, Searcher):
    """Asks the sweep what to try."""

    def __init__(self, sweep: Sweep):
        super().__init__(metric=OBJECTIVE, mode="max")
        self._sweep = sweep

    def suggest(self, trial_id: str) -> Any:
        found = self._sweep.next()
        if isinstance(found, str):
            return Searcher.FINISHED if found == "done" else None
        name, folder = found
        return {"trial": name, "folder": str(folder)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The sweep knows from the reports."""

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """There is nothing that the sweep's record does not have."""


class _Ending(_NotKept, FIFOScheduler):
    """Asks the sweep what to end."""

    def __init__(self, sweep: Sweep):
        super().__init__()
        self._sweep = sweep

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        # Tune flattens what a trial reports.
        start = "metrics/"
        metrics = {k.removeprefix(start): v for k, v in result.items() if k.startswith(start)}
        ends = self._sweep.report(trial.config["trial"], result | {"metrics": metrics})
        return TrialScheduler.STOP if ends else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        lines = [line.strip() for line in str(trial.get_error()).splitlines() if line.strip()]
        self._sweep.lost(trial.config["trial"], lines[-1] if lines else "its process ended")

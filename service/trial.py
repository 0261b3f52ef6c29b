"""What one trial of a sweep does, in a process of Ray Tune: the same loop as a run, its validation
accuracies to the scheduler. It never looks at the test split.

Ray Tune keeps the process for the next trial, which saves its start. A trial of several workers
holds the places of all of them from its begin, in one placement group: its process is rank 0, and
it starts the others in the rest. So trials and their workers never wait for each other, as groups
of Ray Train inside of trials do.
"""

import contextlib
import gc
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.train._internal.utils import get_address_and_port
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from data.schema import Manifest
from service.config import RunConfig
from service.engine import Host, Stopped, Training
from service.faults import Faults
from service.files import PAYLOAD_NAME, read_json, write_text
from service.launch import checkpoint_store
from service.storage import StorageError
from service.study import OBJECTIVE
from service.warmup import Warmups, put_down, take_over, warmup_key
from training import checkpoint as checkpoints
from training.distributed import process_group
from training.methods.base import NonFiniteError

log = logging.getLogger(__name__)


class Paused(Exception):
    """The trial has come to the end of its generation, and what it has is put down."""


def run_trial(asked: dict[str, Any], variables: dict[str, str]) -> dict[str, Any]:
    """Train; report every validation of the main phase.

    Args:
        asked: the trial's `folder`, where its payload is; see `train_worker` for that. It has
            `warmups`, a folder or None, `generation` of a population or None, `on_gpu`, and
            `slots`, how many trials run at a time.
        variables: environment for its processes.

    Returns:
        The last report: `end`, one of complete, paused, diverged, failed and stopped, and why.
    """
    began = time.time()
    gc.collect()  # what the trial before left: streams end with their last reference
    payload = read_json(Path(asked["folder"]) / PAYLOAD_NAME)
    assert payload
    payload["environment"] = variables
    _settle_in(payload)
    trial = _Trial(payload, began)
    trial.take_over()
    with _workers(payload):
        return trial.run()


@contextlib.contextmanager
def _workers(payload: dict[str, Any]) -> Iterator[None]:
    """The trial's other workers, and the process group of all, for the body."""
    scaling = RunConfig.model_validate(payload["config"]).scaling
    size = scaling.max_workers
    if size == 1:
        yield
        return
    address, port = get_address_and_port()
    meeting = f"tcp://{address}:{port}"
    resources: dict[str, Any] = {
        "num_cpus": scaling.cpus_per_worker,
        "num_gpus": int(payload["on_gpu"]),
    }
    group = get_current_placement_group()
    assert group is not None
    places = [PlacementGroupSchedulingStrategy(group, place) for place in range(1, size)]
    other: Any = ray.remote(**resources)(_Other)
    others = [other.options(scheduling_strategy=place).remote() for place in places]
    runs = [other.run.remote(payload, place, meeting) for place, other in enumerate(others, 1)]
    ended = threading.Event()
    threading.Thread(target=_follow, args=(runs, ended), daemon=True).start()
    try:
        with process_group(0, size, meeting, _device(payload)):
            yield
    finally:  # also when the scheduler ends the trial, in a report
        ended.set()
        for other in others:
            ray.kill(other)


def _follow(runs: list[Any], ended: threading.Event) -> None:
    """End this process when another worker is lost: collectives would wait for it."""
    try:
        ray.get(runs)
    except Exception as error:
        if not ended.is_set():
            log.error("a worker of the trial was lost: %s", error)
            os._exit(1)


class _Other:
    """A worker of a trial, but the first."""

    def run(self, payload: dict[str, Any], place: int, meeting: str) -> None:
        """Train as rank `place`."""
        _settle_in(payload)
        size = RunConfig.model_validate(payload["config"]).scaling.max_workers
        device, faults = _device(payload), Faults(None, Path(payload["run_folder"]), ("", ""))
        with process_group(place, size, meeting, device):
            training = Training(payload, device, Host(), faults)
            with contextlib.suppress(
                Stopped, NonFiniteError, StorageError, checkpoints.CheckpointError
            ):  # every rank is here, and rank 0 reports
                training.fit()
            threading.Event().wait()  # rank 0 ends this process


def _settle_in(payload: dict[str, Any]) -> None:
    """Make this process a worker of the trial."""
    os.environ.update(payload["environment"])
    # The reader keeps to the cores that no worker of this node owns.
    scaling = RunConfig.model_validate(payload["config"]).scaling
    neighbours = min(
        payload["slots"] * scaling.max_workers, (os.cpu_count() or 1) // scaling.cpus_per_worker
    )
    os.environ["LOCAL_WORLD_SIZE"] = str(max(1, neighbours))


def _device(payload: dict[str, Any]) -> torch.device:
    """The one GPU that Ray shows this process, by its number, or the CPU."""
    return torch.device("cuda:0" if payload["on_gpu"] else "cpu")


class _Trial:
    """Rank 0 of a trial."""

    def __init__(self, payload: dict[str, Any], began: float):
        self._payload = payload
        self._config = config = RunConfig.model_validate(payload["config"])
        self._folder = Path(payload["run_folder"])
        self._store = checkpoint_store(config)
        self._began = self._reported = began
        self._setup_seconds = 0.0
        self._forked = (0, 0.0)
        self._generation: dict[str, Any] = payload["generation"] or {}
        self._warmups = None
        if payload["warmups"] and config.warmup_epochs:
            digest = Manifest.model_validate(payload["manifest"]).digest
            key = warmup_key(config, digest)
            self._warmups = Warmups(Path(payload["warmups"]), key)
        self._training: Training | None = None
        self._last: dict[str, Any] = {}

    def take_over(self) -> None:
        """Begin with what another trial has trained, if there is something."""
        if donor := self._generation.get("from"):
            taken = self._folder / f"generation-{self._generation['number']}"
            if not taken.exists():  # else it did, and has gone on
                for name in self._store.folders():
                    self._store.remove(name)
                take_over(Path(donor), self._store, self._folder)
                write_text(taken, donor)
        elif self._warmups:
            self._forked = self._warmups.fork(self._store, self._folder, self._config.warmup_epochs)

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the last report."""
        faults = Faults(None, self._folder, ("", ""))
        device = _device(self._payload)
        self._training = training = Training(self._payload, device, Host(), faults, self._on_epoch)
        self._reported = time.time()
        self._setup_seconds = self._reported - self._began
        try:
            training.fit()
            return self._report(end="complete", **self._last, **training.best())
        except Paused:
            return self._report(end="paused", **self._last)
        except Stopped:
            return self._report(end="stopped")
        except NonFiniteError as error:
            return self._report(end="diverged", reason=str(error))
        except (StorageError, checkpoints.CheckpointError) as error:
            return self._report(end="failed", reason=str(error))
        finally:  # also when the scheduler ends the trial, in a report
            training.close()

    def _on_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        config = self._config
        if OBJECTIVE not in metrics:
            return
        assert self._training
        if epoch + 1 == config.warmup_epochs and self._warmups:
            self._training.settle()
            self._warmups.publish(self._store, self._folder, config.warmup_epochs)
        done = epoch + 1 - config.warmup_epochs
        if done <= self._generation.get("since", 0):
            return
        reached = {"main_epochs": done, "score": metrics[OBJECTIVE]}
        if epoch + 1 == config.optim.epochs:  # comes with the end
            self._last = reached
        elif done >= self._generation.get("until", config.optim.epochs):
            self._training.settle()
            put_down(Path(self._generation["to"]), self._store, self._folder)
            self._last = reached
            raise Paused
        else:
            tune.report(self._report(**reached))

    def _report(self, **values: Any) -> dict[str, Any]:
        """Values, and what time went into them since the last report."""
        now = time.time()
        seconds, self._reported = now - self._reported, now
        setup, self._setup_seconds = self._setup_seconds, 0.0
        times = {"began": self._began, "seconds": seconds, "setup_seconds": setup}
        forked = {"forked_epochs": self._forked[0], "forked_seconds": self._forked[1]}
        return {**values, **times, **forked}

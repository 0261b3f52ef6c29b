"""What one trial of a sweep does, in a process of Ray Tune: the same loop as a run, its validation
accuracies to the scheduler. It never looks at the test split.

Ray Tune keeps the process for the next trial, which saves its start.
"""

import gc
import os
import time
from pathlib import Path
from typing import Any

import torch
from ray import tune

from data.schema import Manifest
from service.config import RunConfig
from service.engine import Host, Stopped, Training
from service.faults import Faults
from service.files import PAYLOAD_NAME, read_json
from service.launch import checkpoint_store
from service.storage import StorageError
from service.study import OBJECTIVE
from service.warmup import Warmups, warmup_key
from training import checkpoint as checkpoints
from training.methods.base import NonFiniteError


def run_trial(asked: dict[str, Any]) -> dict[str, Any]:
    """Train; report every validation of the main phase.

    Args:
        asked: the trial's `folder`, where its payload is; see `train_worker` for that. It has
            `environment` for this process, `warmups`, a folder or None, `on_gpu`, and `slots`, how
            many trials run at a time.

    Returns:
        The last report: `end`, one of finished, diverged, failed and stopped, and why.
    """
    began = time.time()
    gc.collect()  # what the trial before left: streams end with their last reference
    payload = read_json(Path(asked["folder"]) / PAYLOAD_NAME)
    assert payload
    os.environ.update(payload["environment"])
    # The reader keeps to the cores that no trial of this node owns.
    cpus = payload["config"]["scaling"]["cpus_per_worker"]
    neighbours = min(payload["slots"], (os.cpu_count() or 1) // cpus)
    os.environ["LOCAL_WORLD_SIZE"] = str(max(1, neighbours))
    return _Trial(payload, began).run()


class _Trial:
    def __init__(self, payload: dict[str, Any], began: float):
        self._payload = payload
        self._config = config = RunConfig.model_validate(payload["config"])
        self._folder = Path(payload["run_folder"])
        self._store = checkpoint_store(config)
        self._began = self._reported = began
        self._forked = (0, 0.0)
        self._warmups = None
        if payload["warmups"] and config.warmup_epochs:
            digest = Manifest.model_validate(payload["manifest"]).digest
            key = warmup_key(config, digest)
            self._warmups = Warmups(Path(payload["warmups"]), key)
        self._training: Training | None = None
        self._last: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the last report."""
        if self._warmups:
            self._forked = self._warmups.fork(self._store, self._folder, self._config.warmup_epochs)
        device = torch.device("cuda" if self._payload["on_gpu"] else "cpu")
        faults = Faults(self._payload["faults"], self._folder, ("", ""))
        self._training = training = Training(self._payload, device, Host(), faults, self._on_epoch)
        self._reported = time.time()
        self._setup_seconds = self._reported - self._began
        try:
            training.fit()
            return self._report(end="complete", **self._last, **training.best())
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
        if epoch + 1 == config.warmup_epochs and OBJECTIVE in metrics and self._warmups:
            assert self._training
            self._training.settle()
            self._warmups.publish(self._store, self._folder, config.warmup_epochs)
        if epoch >= config.warmup_epochs and OBJECTIVE in metrics:
            done = epoch + 1 - config.warmup_epochs
            if epoch + 1 < config.optim.epochs:  # the last one comes with the end
                tune.report(self._report(main_epochs=done, score=metrics[OBJECTIVE]))
            else:
                self._last = {"main_epochs": done, "score": metrics[OBJECTIVE]}

    def _report(self, **values: Any) -> dict[str, Any]:
        """Values, and what time went into them since the last report."""
        now = time.time()
        seconds, self._reported = now - self._reported, now
        setup, self._setup_seconds = self._setup_seconds, 0.0
        times = {"began": self._began, "seconds": seconds, "setup_seconds": setup}
        forked = {"forked_epochs": self._forked[0], "forked_seconds": self._forked[1]}
        return {**values, **times, **forked}

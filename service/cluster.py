"""The Ray session of a command, and running a worker function on a worker group."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from service.config import RunConfig, ScalingConfig
from service.environment import configure_ray, environment, worker_environment

CONNECTION_WORDS = ("connection", "peer", "socket", "timed out", "timeout", "barrier")


class RunError(RuntimeError):
    """A run failed; the message says why and what continues it."""


@contextlib.contextmanager
def ray_session(config: RunConfig, *, debug: bool) -> Iterator[None]:
    """A Ray session for this process: joins RAY_ADDRESS, or starts a local cluster and ends it.

    While it is open, SIGINT and SIGTERM raise KeyboardInterrupt in the main thread. Inside an open
    session it does nothing, so several runs can share one.

    Raises:
        RunError: Ray did not start, or the machine or cluster cannot hold the workers.
    """
    configure_ray()
    check_local_capacity(config.scaling)
    import ray

    if ray.is_initialized():
        _check_cluster_capacity(config.scaling, ray.cluster_resources())
        yield
        return
    address = environment()["RAY_ADDRESS"]
    cores = config.scaling.num_workers * config.scaling.cpus_per_worker
    cluster: dict[str, Any] = {
        "address": "local",
        "num_cpus": max(cores, _num_cores()),
        "include_dashboard": False,
        "object_store_memory": _object_store_bytes(),
    }
    if address:
        cluster = {"address": address}
    level = logging.INFO if debug else logging.ERROR
    try:
        ray.init(**cluster, log_to_driver=debug, logging_level=level)  # pyright: ignore[reportArgumentType]
        with _interrupts():  # ray.init replaces handlers that were there before
            _check_cluster_capacity(config.scaling, ray.cluster_resources())
            yield
    except (RuntimeError, ConnectionError, TimeoutError, OSError) as error:
        if ray.is_initialized():
            raise
        where = f"join the cluster at RAY_ADDRESS={address}" if address else "start a local cluster"
        raise RunError(
            f"Ray could not {where}: {(str(error) or repr(error)).splitlines()[0]}; a busy machine "
            "can make the start time out, so try again, and with --debug to see Ray's own log"
        ) from error
    finally:
        ray.shutdown()


def run_workers(
    loop: str, scaling: ScalingConfig, folder: Path, payload: dict[str, Any]
) -> dict[str, Any]:
    """Run function `loop` of service/worker.py on a worker group; returns what rank 0 returned.

    Args:
        loop: name of the function.
        scaling: size of the group.
        folder: Ray keeps its snapshot and the checkpoints here; the same folder continues.
        payload: JSON values for the function.

    Raises:
        RunError: a worker failed, or the workers agreed that the run cannot go on.
        KeyboardInterrupt: a signal arrived; the caller ends the session.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from service import worker

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    use_gpu = _use_gpu(scaling, ray.cluster_resources())
    remote = environment()["RAY_ADDRESS"] is not None
    resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    trainer = TorchTrainer(
        getattr(worker, loop),
        train_loop_config=payload,
        torch_config=TorchConfig(timeout_s=300),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=ray.train.FailureConfig(
                max_failures=scaling.max_failures, controller_failure_limit=3
            ),
            # The latest checkpoint is kept beside the best one.
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1,
                checkpoint_score_attribute=worker.SELECTION,
                checkpoint_score_order="max",
            ),
            worker_runtime_env={"env_vars": worker_environment()} if remote else None,
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        returned = _fit_in_thread(trainer)
    except ray.train.TrainingFailedError as error:
        raise RunError(
            f"training failed on a worker: {_root_cause(error)}; the same command with --name "
            f"{folder.name} continues at the last checkpoint; --debug shows the whole trace"
        ) from error
    assert isinstance(returned, dict)
    if "error" in returned:
        raise RunError(returned["error"])
    return returned


def check_local_capacity(scaling: ScalingConfig) -> None:
    """Without a cluster address, the workers must fit this machine.

    Raises:
        RunError: they do not.
    """
    if environment()["RAY_ADDRESS"]:
        return
    cores, wanted = _num_cores(), scaling.num_workers * scaling.cpus_per_worker
    if wanted > cores:
        raise RunError(
            f"scaling.num_workers={scaling.num_workers} with scaling.cpus_per_worker="
            f"{scaling.cpus_per_worker} need {wanted} cores; this machine has {cores}; use fewer "
            "workers, or point RAY_ADDRESS at a cluster"
        )


def _check_cluster_capacity(scaling: ScalingConfig, have: Mapping[str, float]) -> None:
    wanted = scaling.num_workers * scaling.cpus_per_worker
    if have.get("CPU", 0) < wanted:
        raise RunError(
            f"the Ray cluster has {have.get('CPU', 0):g} CPUs; {scaling.num_workers} workers with "
            f"{scaling.cpus_per_worker} each need {wanted}; use fewer workers or add nodes"
        )
    if scaling.device == "gpu" and have.get("GPU", 0) < scaling.num_workers:
        raise RunError(
            f"scaling.device=gpu needs one GPU a worker, {scaling.num_workers}; the Ray cluster "
            f"has {have.get('GPU', 0):g}; use fewer workers or scaling.device=cpu"
        )


def _use_gpu(scaling: ScalingConfig, have: Mapping[str, float]) -> bool:
    enough = have.get("GPU", 0) >= scaling.num_workers
    return scaling.device == "gpu" or (scaling.device == "auto" and enough)


def _num_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _object_store_bytes() -> int:
    """A quarter of the memory that is free in /dev/shm, at most 4 GiB, at least 256 MiB."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return 1 << 30
    stats = os.statvfs(shm)
    return max(256 << 20, min(4 << 30, stats.f_bavail * stats.f_frsize // 4))


def _fit_in_thread(trainer: Any) -> object:
    """Run `fit` beside the main thread, where Ray would install a SIGINT handler that exits 0."""
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["value"] = trainer.fit().return_value
        except BaseException as error:  # handed to the main thread, which decides
            outcome["error"] = error

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)  # a wait without timeout would not be interrupted by signals
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt; earlier handlers come back at the end."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt(f"signal {signum}")

    with _handlers(interrupt):
        yield


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """SIGINT and SIGTERM do nothing: for the few seconds in which results are recorded."""
    with _handlers(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handlers(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only it is interrupted
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _root_cause(error: BaseException) -> str:
    """What went wrong first: a lost connection on one rank is the echo of a failure on another."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    lines = {rank: _last_line(failure) for rank, failure in sorted(failures.items())}
    causes = {
        rank: line
        for rank, line in lines.items()
        if not any(word in line.lower() for word in CONNECTION_WORDS)
    }
    rank, line = next(iter((causes or lines).items()))
    return f"rank {rank}: {line}"


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)

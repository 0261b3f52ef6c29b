"""RunConfig -> prepared data, local or remote Ray, TorchTrainer, MLflow run, result.

The driver's half of a run. Everything that can be checked is checked before Ray starts.
"""

import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from data.prepare import default_folder, prepare
from data.schema import Manifest, Split, load_manifest
from service import tracking
from service.config import ConfigError, RunConfig, config_yaml, difference
from service.environment import configure_ray, environment
from service.figures import curves
from service.files import (
    CONFIG_NAME,
    HISTORY_NAME,
    PROGRESS_NAME,
    RESULT_NAME,
    RUN_NAME,
    read_json,
    write_text,
)

log = logging.getLogger(__name__)

# Settings that may change when a run is continued: they do not change what it computes.
FREE = ("scaling", "storage", "name", "experiment")
DATA_CPUS = 1


class RunError(RuntimeError):
    """A run failed; the message says why and what continues it."""


@dataclass(frozen=True)
class RunOutcome:
    """What a finished run leaves: its folder, flat metrics, and whether it had finished before."""

    folder: Path
    result: dict[str, Any]
    finished_before: bool


View = Callable[[Callable[[], dict[str, Any] | None]], AbstractContextManager[Any]]


def ensure_prepared(config: RunConfig, progress: Callable[[int, int], None] | None) -> Path:
    """Folder of the prepared data set; prepares it if needed, and checks every shard's hash."""
    folder = default_folder(config.data, Path(config.storage))
    prepare(config.data, folder, progress)
    return folder


@contextlib.contextmanager
def ray_session(config: RunConfig, *, debug: bool) -> Iterator[None]:
    """A Ray session for this process: joins RAY_ADDRESS, or starts a local cluster and ends it.

    Raises:
        RunError: Ray did not start, or the machine cannot hold the workers.
    """
    configure_ray()
    _check_local_capacity(config)
    import ray

    if ray.is_initialized():  # several runs share one session
        _check_cluster_capacity(config)
        yield
        return
    address = environment()["RAY_ADDRESS"]
    cluster: dict[str, Any] = {
        "address": "local",
        "num_cpus": config.scaling.num_workers * config.scaling.cpus_per_worker + DATA_CPUS,
        "include_dashboard": False,
        "object_store_memory": _object_store_bytes(),
    }
    if address:
        cluster = {"address": address}
    level = logging.INFO if debug else logging.ERROR
    try:
        ray.init(**cluster, log_to_driver=debug, logging_level=level)  # pyright: ignore[reportArgumentType]
    except Exception as error:
        where = f"join the cluster at RAY_ADDRESS={address}" if address else "start a local cluster"
        raise RunError(
            f"Ray could not {where}: {str(error).splitlines()[0] if str(error) else error!r}; a "
            "busy machine can make the start time out, so try again, and with --debug to see "
            "Ray's own log"
        ) from error
    handler = signal.signal(signal.SIGTERM, _interrupt)  # ray.init replaced earlier handlers
    try:
        _check_cluster_capacity(config)
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        ray.shutdown()


def train(
    config: RunConfig,
    *,
    view: View,
    prepare_progress: Callable[[int, int], None] | None = None,
    debug: bool = False,
) -> RunOutcome:
    """Run a training to its end: prepare, train, test, record. The same name continues.

    Raises:
        DataError, ConfigError: something is wrong before anything has started.
        RunError: the run failed; its MLflow run is closed as FAILED.
        KeyboardInterrupt: SIGINT or SIGTERM; the MLflow run is closed as KILLED.
    """
    if config.name is None:
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")[:-3]
        name = f"{config.data.name}-{config.method}-{stamp}"
        config = config.model_copy(update={"name": name})
    assert config.name
    run_folder = Path(config.storage).resolve() / config.name
    if (done := _check_existing(run_folder, config)) is not None:
        return RunOutcome(run_folder, done, finished_before=True)
    began = time.monotonic()
    data_folder = ensure_prepared(config, prepare_progress)
    manifest = load_manifest(data_folder)
    check_plan(config, manifest)
    with ray_session(config, debug=debug):
        run_folder.mkdir(parents=True, exist_ok=True)
        write_text(run_folder / CONFIG_NAME, config_yaml(config))
        uri = tracking.tracking_uri(Path(config.storage), environment()["MLFLOW_TRACKING_URI"])
        run_id = _open_tracking(config, manifest, uri, run_folder)
        payload = {
            "config": config.model_dump(mode="json"),
            "manifest": manifest.model_dump(mode="json"),
            "data_folder": str(data_folder.resolve()),
            "run_folder": str(run_folder),
            "tracking": {"uri": uri, "run_id": run_id},
        }
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        result: dict[str, Any] = {}
        try:
            with view(lambda: read_json(run_folder / PROGRESS_NAME)):
                returned = _fit("train_worker", config, run_folder, payload)
            result = {
                **returned["metrics"],
                "name": config.name,
                "method": config.method,
                "run_folder": str(run_folder),
                "checkpoint": returned["checkpoint"],
                "data_digest": manifest.digest,
                "mlflow_run_id": run_id,
                "mlflow_uri": uri,
                "seconds": time.monotonic() - began,
            }
            write_text(
                run_folder / RESULT_NAME, json.dumps(result, indent=2, sort_keys=True) + "\n"
            )
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            _close_tracking(uri, run_id, status, result, run_folder)
    return RunOutcome(run_folder, result, finished_before=False)


def evaluate(run: str, storage: str, split: Split, *, debug: bool = False) -> dict[str, Any]:
    """Evaluate the best checkpoint of a finished run on a split.

    Args:
        run: run name under `storage`, or the run's folder.

    Raises:
        ConfigError: there is no such finished run.
    """
    folder = Path(run) if (Path(run) / RESULT_NAME).is_file() else Path(storage) / run
    result = read_json(folder / RESULT_NAME)
    if result is None:
        found = sorted(p.parent.name for p in Path(storage).glob(f"*/{RESULT_NAME}"))
        raise ConfigError(
            f"{folder} holds no {RESULT_NAME}; a finished run has one; finished runs under "
            f"{storage}: {', '.join(found) or 'none'}; the command that started a run continues it"
        )
    config = RunConfig.model_validate(yaml.safe_load((folder / CONFIG_NAME).read_text()))
    data_folder = ensure_prepared(config, None)
    manifest = load_manifest(data_folder)
    if manifest.digest != result["data_digest"]:
        raise ConfigError(
            f"the data in {data_folder} has digest {manifest.digest[:12]}, the run was trained on "
            f"{result['data_digest'][:12]}; evaluate on the data of the run"
        )
    payload = {
        "config": config.model_dump(mode="json"),
        "manifest": manifest.model_dump(mode="json"),
        "data_folder": str(data_folder.resolve()),
        "checkpoint": str((folder / result["checkpoint"]).resolve()),
        "split": split,
    }
    began = time.monotonic()
    with ray_session(config, debug=debug):
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        returned = _fit("evaluate_worker", config, folder.resolve() / f"evaluate-{stamp}", payload)
    return {**returned["metrics"], "name": config.name, "seconds": time.monotonic() - began}


def check_plan(config: RunConfig, manifest: Manifest) -> None:
    """Build the order once, so that its rules are checked before anything starts."""
    from service.worker import make_order

    make_order(config, manifest).lanes_of(0, config.scaling.num_workers)


def _fit(loop: str, config: RunConfig, folder: Path, payload: dict[str, Any]) -> dict[str, Any]:
    """Run a worker function on the worker group and return what rank 0 returned."""
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from service import worker

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    use_gpu = _use_gpu(config, ray.cluster_resources())
    trainer = TorchTrainer(
        getattr(worker, loop),
        train_loop_config=payload,
        torch_config=TorchConfig(timeout_s=300),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.scaling.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.scaling.cpus_per_worker}
            | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=ray.train.FailureConfig(
                max_failures=config.scaling.max_failures, controller_failure_limit=3
            ),
            # The latest checkpoint is kept beside the best one.
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1,
                checkpoint_score_attribute=worker.SELECTION,
                checkpoint_score_order="max",
            ),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        returned = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise RunError(
            f"training failed on a worker: {_root_cause(error)}; the same command with --name "
            f"{folder.name} continues at the last checkpoint; --debug shows the whole trace"
        ) from error
    assert isinstance(returned, dict)
    if "error" in returned:
        raise RunError(returned["error"])
    return returned


def _check_existing(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """Result of a finished run of this name, or None; refuses a changed config."""
    if not (folder / CONFIG_NAME).is_file():
        return None
    old = yaml.safe_load((folder / CONFIG_NAME).read_text())
    new = config.resolved()
    changed = difference(
        {k: v for k, v in old.items() if k not in FREE},
        {k: v for k, v in new.items() if k not in FREE},
    )
    if changed:
        raise ConfigError(
            f"run {config.name} exists in {folder.parent} with other settings "
            f"({'; '.join(changed)}); a name stands for one configuration; take another --name, "
            "or these settings to continue it"
        )
    return read_json(folder / RESULT_NAME)


def _open_tracking(config: RunConfig, manifest: Manifest, uri: str, folder: Path) -> str:
    """Open, or continue, the MLflow run of this run folder."""
    known = read_json(folder / RUN_NAME) or {}
    run_id = tracking.open_run(
        uri,
        Path(config.storage),
        config.experiment,
        config.name or "",
        params=config.resolved(),
        tags={
            "method": config.method,
            "data": manifest.name,
            "data_digest": manifest.digest,
            "run_folder": str(folder),
            "git_commit": tracking.git_commit(Path(__file__).parent) or "unknown",
        },
        dataset=tracking.DatasetInfo(manifest.name, manifest.digest, manifest.rows("train")),
        run_id=known.get("mlflow_run_id"),
    )
    write_text(folder / RUN_NAME, json.dumps({"mlflow_run_id": run_id, "mlflow_uri": uri}) + "\n")
    return run_id


def _close_tracking(
    uri: str,
    run_id: str,
    status: Literal["FINISHED", "FAILED", "KILLED"],
    result: dict[str, Any],
    folder: Path,
) -> None:
    history = folder / HISTORY_NAME
    lines = history.read_text().splitlines() if history.is_file() else []
    rows = [json.loads(line) for line in lines]
    tracking.finish_run(
        uri,
        run_id,
        status,
        metrics={k: v for k, v in result.items() if isinstance(v, int | float)},
        figures=curves(rows) if rows else {},
        artifacts={
            name: folder / name for name in (CONFIG_NAME, RESULT_NAME) if (folder / name).is_file()
        },
        checkpoint=str(folder / result["checkpoint"]) if result else None,
    )


def _check_local_capacity(config: RunConfig) -> None:
    scaling = config.scaling
    if environment()["RAY_ADDRESS"]:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = scaling.num_workers * scaling.cpus_per_worker
    if wanted > (cores or 1):
        raise RunError(
            f"scaling.num_workers={scaling.num_workers} with cpus_per_worker="
            f"{scaling.cpus_per_worker} need {wanted} cores; this machine has {cores}; use fewer "
            "workers, or point RAY_ADDRESS at a cluster"
        )


def _check_cluster_capacity(config: RunConfig) -> None:
    import ray

    have = ray.cluster_resources()
    scaling = config.scaling
    wanted = scaling.num_workers * scaling.cpus_per_worker + DATA_CPUS
    if have.get("CPU", 0) < wanted:
        raise RunError(
            f"the Ray cluster has {have.get('CPU', 0):g} CPUs; {scaling.num_workers} workers with "
            f"{scaling.cpus_per_worker} each, and {DATA_CPUS} for reading data, need {wanted}; use "
            "fewer workers or add nodes"
        )
    if scaling.device == "gpu" and have.get("GPU", 0) < scaling.num_workers:
        raise RunError(
            f"scaling.device=gpu needs one GPU a worker, {scaling.num_workers}; the Ray cluster "
            f"has {have.get('GPU', 0):g}; use fewer workers or scaling.device=cpu"
        )


def _use_gpu(config: RunConfig, have: Mapping[str, float]) -> bool:
    enough = have.get("GPU", 0) >= config.scaling.num_workers
    return config.scaling.device == "gpu" or (config.scaling.device == "auto" and enough)


def _object_store_bytes() -> int:
    """A quarter of the memory that is free in /dev/shm, at most 4 GiB, at least 256 MiB."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return 1 << 30
    stats = os.statvfs(shm)
    return max(256 << 20, min(4 << 30, stats.f_bavail * stats.f_frsize // 4))


def _root_cause(error: BaseException) -> str:
    """Last line of a worker's trace: the exception itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt(f"signal {signum}")

"""RunConfig -> prepared data, worker group, MLflow run, result: the driver's half of a run.

Everything that can be checked is checked before Ray starts.
"""

import contextlib
import fcntl
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from data.folder import Folder
from data.prepare import CARD_NAMES, Part, PrepareReport, Work, default_folder, prepare
from data.schema import MANIFEST_NAME, Manifest, load_manifest
from data.shards import ShardOutcome
from service import sending, tracking
from service.capacity import check_local_capacity
from service.cluster import (
    Session,
    lazy_session,
    load_workers,
    ray_session,
    run_workers,
    signals_ignored,
)
from service.config import ConfigError, RunConfig, RunError, config_yaml, difference
from service.environment import environment
from service.figures import curves
from service.files import (
    ATTEMPT_NAME,
    CHECKPOINTS_NAME,
    CONFIG_NAME,
    HISTORY_NAME,
    PROGRESS_NAME,
    RESULT_NAME,
    RUN_NAME,
    read_history,
    read_json,
    write_text,
)
from service.redaction import redact

if TYPE_CHECKING:
    from service.faults import Fault
    from service.storage import CheckpointStore

log = logging.getLogger(__name__)

# Settings that may change when a run is continued: they do not change what it computes.
FREE = ("scaling", "feed", "checkpoint", "storage", "name", "experiment")

View = Callable[[Callable[[], dict[str, Any] | None]], AbstractContextManager[Any]]


@dataclass(frozen=True)
class RunOutcome:
    """What a finished run leaves: its folder, flat metrics, and whether it had finished before."""

    folder: Path
    result: dict[str, Any]
    finished_before: bool


def resolve(config: RunConfig) -> RunConfig:
    """Give the run a name and make its folders absolute, so that it can be continued anywhere."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")[:-3]
    name = config.name or f"{config.data.name}-{config.method}-{stamp}"
    root = config.data.root and str(Path(config.data.root).expanduser().resolve())
    table = config.data.table and str(Path(config.data.table).expanduser().resolve())
    stored = config.data.storage
    if stored and "://" not in stored:
        stored = str(Path(stored).expanduser().resolve())
    data = config.data.model_copy(update={"root": root, "table": table, "storage": stored})
    kept = config.checkpoint.storage
    if kept and "://" not in kept:
        kept = str(Path(kept).expanduser().resolve())
    checkpoint = config.checkpoint.model_copy(update={"storage": kept})
    storage = str(Path(config.storage).expanduser().resolve())
    return config.model_copy(
        update={"name": name, "data": data, "checkpoint": checkpoint, "storage": storage}
    )


def ensure_prepared(
    config: RunConfig,
    progress: Callable[[int, int], None],
    *,
    session: Session | None = None,
    debug: bool = False,
) -> PrepareReport:
    """Prepare the data set if needed, on the cluster if it is large, and check every shard.

    Args:
        session: is started beside, once settings and raw files are found to be usable.
    """
    folder = default_folder(config.data, Path(config.storage))

    def report(done: int, total: int) -> None:
        if session:
            session.start()
        progress(done, total)

    @contextlib.contextmanager
    def cluster() -> Iterator[Callable[[Work, list[Part]], Iterator[ShardOutcome]]]:
        from data.pipeline import work_anywhere

        if session:
            session.ready()
        with ray_session(config, debug=debug):
            yield lambda work, parts: map(ShardOutcome.model_validate, work_anywhere(work, parts))

    if session and folder.has(MANIFEST_NAME):
        session.start()
    return prepare(config.data, folder, report, cluster)


def finished(config: RunConfig) -> RunOutcome | None:
    """The outcome of a finished run of this name.

    Raises:
        ConfigError: a run of this name exists with other settings.
    """
    folder = _folder(config)
    if not (folder / CONFIG_NAME).is_file():
        return None
    old, new = yaml.safe_load((folder / CONFIG_NAME).read_text()), config.resolved()
    changed = difference(
        {k: v for k, v in old.items() if k not in FREE},
        {k: v for k, v in new.items() if k not in FREE},
    )
    changed += difference(
        {"checkpoint.storage": old["checkpoint"]["storage"]},
        {"checkpoint.storage": new["checkpoint"]["storage"]},
    )
    if changed and checkpoint_store(RunConfig.model_validate(old)).names():
        raise ConfigError(
            f"run {config.name} exists in {folder.parent} with other settings "
            f"({'; '.join(changed)}); a name stands for one configuration; take another --name, "
            "or these settings to continue it"
        )
    if changed:  # it failed before its first checkpoint: there is nothing to continue
        for name in (RUN_NAME, HISTORY_NAME):
            (folder / name).unlink(missing_ok=True)
        tracking.forget(folder)
    result = read_json(folder / RESULT_NAME)
    return RunOutcome(folder, result, finished_before=True) if result else None


def train(
    config: RunConfig,
    data_folder: Folder,
    *,
    view: View,
    faults: "Sequence[Fault]" = (),
    session: Session | None = None,
    debug: bool = False,
) -> RunOutcome:
    """Run a training to its end: train, test, record. The same name continues.

    Args:
        config: from `resolve`.
        data_folder: from `ensure_prepared`.
        view: shows progress, given a function that reads the latest record.
        faults: what the workers are to do to the run.
        session: of this run alone; it ends while results are recorded.

    Raises:
        ConfigError: something is wrong before anything has started.
        RunError: the run failed; its MLflow run is closed as FAILED.
        KeyboardInterrupt: SIGINT or SIGTERM; the MLflow run is closed as KILLED.
    """
    if done := finished(config):
        return done
    began = time.monotonic()
    manifest = load_manifest(data_folder)
    check_plan(config, manifest)
    folder = _folder(config)
    run = _Run(config, manifest, data_folder, faults)
    run.load()
    try:
        with contextlib.ExitStack() as stack:
            session = session or stack.enter_context(lazy_session(config, debug=debug))
            session.ready()
            stack.enter_context(locked(folder))
            stack.enter_context(run.tracked())
            write_text(folder / ATTEMPT_NAME, run.attempt)
            with view(lambda: read_json(folder / PROGRESS_NAME)):
                returned = run_workers("train_worker", config.scaling, folder, run.payload())
            session.end()
            run.finish(returned, time.monotonic() - began)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"{stop}; the same command with --name {config.name} continues the run at its last "
            "checkpoint"
        ) from stop
    return RunOutcome(folder, run.result, finished_before=False)


def check_plan(config: RunConfig, manifest: Manifest) -> None:
    """Check what needs the data's sizes: machine, order, model and method.

    Raises:
        ConfigError, DataError, RunError: the run could not start.
    """
    from service.rows import make_order
    from service.stepper import make_method

    check_local_capacity(config.scaling)
    names = [modality.name for modality in manifest.modalities]
    if unknown := [name for name in config.augment if name not in names]:
        raise ConfigError(
            f"augment names {unknown[0]!r}, which is no modality of {manifest.name}; use one of "
            f"{', '.join(names)}"
        )
    make_order(config, manifest).lanes_of(0, config.scaling.max_workers)
    checkpoint_store(config)
    make_method(config, manifest)


class _Run:
    """One training run: its MLflow run, its files and its result."""

    def __init__(
        self, config: RunConfig, manifest: Manifest, data_folder: Folder, faults: "Sequence[Fault]"
    ):
        self._config = config
        self._faults = {"faults": [asdict(f) for f in faults], "driver": os.getpid()}
        self._manifest = manifest
        self._data_folder = data_folder
        self._folder = _folder(config)
        self._uri = tracking.tracking_uri(
            Path(config.storage), environment()["MLFLOW_TRACKING_URI"]
        )
        self._run_id = ""
        self.attempt = uuid.uuid4().hex
        # Read now: when the run is closed, nothing of this kind may fail any more.
        self._cards = {f"data/{name}": data_folder.read(name).decode() for name in CARD_NAMES}
        self.result: dict[str, Any] = {}

    def load(self) -> None:
        """Import what takes seconds, while Ray starts."""
        sending.load(self._uri)
        load_workers()

    def payload(self) -> dict[str, Any]:
        """Arguments of `train_worker`."""
        return base_payload(self._config, self._manifest, self._data_folder) | {
            "run_folder": str(self._folder),
            "tracking": tracking.for_workers(self._uri),
            "faults": self._faults,
            "attempt": self.attempt,
        }

    @contextlib.contextmanager
    def tracked(self) -> Iterator[None]:
        """Open the MLflow run, and close it with the status that fits what happened inside."""
        with signals_ignored():
            self._open()
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            yield
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            with signals_ignored():
                self._close(status)

    def finish(self, returned: dict[str, Any], seconds: float) -> None:
        """Record the result; a run with a result file is finished."""
        if returned["lost_metrics"]:
            log.warning(
                "MLflow at %s did not take %d metrics; %s has them all",
                redact(self._uri),
                returned["lost_metrics"],
                self._folder / HISTORY_NAME,
            )
        self._run_id = self._run_id or tracking.run_id(self._folder)
        self.result = {
            **returned["metrics"],
            "name": self._config.name,
            "method": self._config.method,
            "run_folder": str(self._folder),
            "checkpoint": returned["checkpoint"],
            "precision": returned["precision"],
            "order_chain": returned["order_chain"],
            "loss_chain": returned["loss_chain"],
            "data_digest": self._manifest.digest,
            "split": self._manifest.split_rule,
            "mlflow_run_id": self._run_id,
            "mlflow_uri": redact(self._uri),
            "seconds": seconds,
        }
        text = json.dumps(self.result, indent=2, sort_keys=True)
        write_text(self._folder / RESULT_NAME, text + "\n")

    def _open(self) -> None:
        known = read_json(self._folder / RUN_NAME) or {}
        digest = self._manifest.digest
        if known.get("data_digest", digest) != digest:
            raise ConfigError(
                f"run {self._config.name} was begun on data with digest "
                f"{known['data_digest'][:12]}, {self._data_folder} now has {digest[:12]}; a run "
                "keeps its data; take another --name, or restore the data"
            )
        self._run_id = tracking.open_run(
            self._uri,
            self._folder,
            Path(self._config.storage),
            self._config.experiment,
            self._config.name or "",
            params=self._config.resolved(),
            tags={
                "method": self._config.method,
                "data": self._manifest.name,
                "data_digest": digest,
                "split": self._manifest.split_rule,
                "run_folder": str(self._folder),
            },
            dataset=tracking.DatasetInfo(self._manifest.name, digest, self._manifest.rows("train")),
            run_id=known.get("mlflow_run_id") or None,
        )
        if page := tracking.run_page(self._uri, self._run_id):
            log.info("MLflow: %s", page)
        about = {
            "mlflow_run_id": self._run_id,
            "mlflow_uri": redact(self._uri),
            "data_folder": str(self._data_folder),
            "data_digest": digest,
        }
        write_text(self._folder / RUN_NAME, json.dumps(about, indent=2) + "\n")
        write_text(self._folder / CONFIG_NAME, config_yaml(self._config))

    def _close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        folder, best = self._folder, self.result.get("checkpoint")
        tracking.finish_run(
            self._uri,
            folder,
            status,
            metrics={  # val/... has its values per epoch already
                name: value
                for name, value in self.result.items()
                if isinstance(value, int | float) and not name.startswith("val/")
            },
            figures=lambda: curves(read_history(folder / HISTORY_NAME)),
            artifacts={
                name: folder / name
                for name in (CONFIG_NAME, RESULT_NAME)
                if (folder / name).is_file()
            }
            | self._cards,
            checkpoint=f"{checkpoints_uri(self._config)}/{best}" if best else None,
        )


def _folder(config: RunConfig) -> Path:
    assert config.name, "resolve() names the run"
    return Path(config.storage) / config.name


def checkpoints_uri(config: RunConfig) -> str:
    """Where a run's checkpoints are."""
    if config.checkpoint.storage is None:
        return str(_folder(config) / CHECKPOINTS_NAME)
    place, mark, query = config.checkpoint.storage.partition("?")
    return f"{place.rstrip('/')}/{config.name}{mark}{query}"


def checkpoint_store(config: RunConfig) -> "CheckpointStore":
    """The checkpoints of a run.

    Raises:
        ConfigError: the storage cannot be used.
    """
    from service.storage import CheckpointStore

    try:
        return CheckpointStore.at(checkpoints_uri(config))
    except (ValueError, OSError) as error:
        raise ConfigError(f"checkpoint.storage: {error}") from error


def base_payload(config: RunConfig, manifest: Manifest, data_folder: Folder) -> dict[str, Any]:
    """What every function of service/worker.py needs."""
    return {
        "checkpoints": checkpoints_uri(config),
        "config": config.model_dump(mode="json"),
        "manifest": manifest.model_dump(mode="json"),
        "data_folder": str(data_folder),
    }


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder; two commands must not train into one."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"run {folder.name} in {folder.parent} is being trained by another command; wait "
                "for it, stop it, or take another --name"
            ) from error
        yield

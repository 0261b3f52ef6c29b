"""MLflow: opening, feeding and closing the record of a run, and the command that shows it.

The only file that imports mlflow, and only inside functions: the import takes over a second. It
uses `MlflowClient` with explicit run ids, never the fluent API with its global active run.

All that MLflow is told about a run goes through the outbox of its folder (service/outbox.py): it is
written there first, and sent from there, by whoever can. So MLflow may be slow or away at any time.
Everything may be sent twice: MLflow ignores a metric that it holds (same key, step, timestamp and
value), and a run carries a key of ours, by which it is found again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import itertools
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from service.outbox import EVENTS_NAME, Due, Outbox
from service.redaction import has_credentials, redact, redacted

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

Json = None | bool | int | float | str | list["Json"] | Mapping[str, "Json"]
Status = Literal["FINISHED", "FAILED", "KILLED"]

SERVERS = ("http://", "https://")
MAX_PARAM_CHARACTERS = 6000
MAX_DIGEST_CHARACTERS = 32  # MLflow allows 36
PARAMS_PER_BATCH = 100
ENTITIES_PER_BATCH = 500  # MLflow allows 1000; a busy SQLite takes seconds for it
# Between two calls of a run while it trains, and between attempts while the store is away.
SEND_SECONDS = 5.0
MAX_RETRY_SECONDS = 30.0
CLOSE_SECONDS = 15.0
FINISH_SECONDS = 10.0
HELD_SECONDS = 10.0
WAIT_PER_FAILED_SECOND = 10.0
# MLflow's error codes of a server that does not answer or is in trouble, and of one that will never
# take this.
AWAY = (
    *("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED"),
    *("IO_ERROR", "CANCELLED"),
)
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")
# Of a server without seven processes for background jobs, which take a core when they start.
SERVER_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
# What MLflow's own login needs.
AUTH_VARIABLES = ("MLFLOW_AUTH_CONFIG_PATH", "MLFLOW_FLASK_SERVER_SECRET_KEY")
KEY_TAG = "midas.key"
STAGED_NAME = "mlflow-artifacts"


class DatasetInfo(NamedTuple):
    """What MLflow records about the data of a run: never rows, only what identifies them."""

    name: str
    digest: str
    num_rows: int


def tracking_uri(storage: Path, configured: str | None = None) -> str:
    """The store to use: the `configured` one (MLFLOW_TRACKING_URI), else a file in `storage`."""
    return configured or f"sqlite:///{storage.resolve()}/mlflow.db"


def for_workers(uri: str) -> dict[str, str | None]:
    """Arguments of RunLogger, but the folder, for processes elsewhere.

    An address with a password in it is not written anywhere: workers have it in their environment.
    """
    return {"uri": None if has_credentials(uri) else uri}


def run_page(uri: str, run_id: str) -> str | None:
    """The page of a run on a tracking server; None for a store that no server shows,
    and for a run that MLflow has not made yet.
    """
    if not uri.startswith(SERVERS) or not run_id:
        return None
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]  # without a password
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}/#/runs/{run_id}"


def load(uri: str) -> None:
    """Import what the store needs; takes seconds, which may pass beside something else."""
    import mlflow

    if not uri.startswith(SERVERS):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def git_commit(folder: Path) -> str | None:
    """The commit `folder` is at, with `-dirty` if tracked files differ; None outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        answer = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def open_run(
    uri: str,
    folder: Path,
    storage: Path,
    experiment: str,
    run_name: str,
    params: Mapping[str, Json],
    tags: Mapping[str, str],
    dataset: DatasetInfo,
    run_id: str | None = None,
    parent: Path | None = None,
) -> str:
    """Creates the MLflow run of a run folder, or continues it, and returns its id.

    A server that is away is no error: the id is then empty, and the run is created when the server
    is back. Continuing sets the status back to RUNNING and renews the tags; params and data stay
    as they were first written (MLflow params cannot change).

    Args:
        folder: run folder; what MLflow does not have yet is kept there.
        run_id: of the run to continue, where the folder does not say.
        parent: folder of the run that this one belongs to.

    Raises:
        ConfigError: the store cannot be used. This happens on the driver, before work starts.
    """
    from service.config import ConfigError

    outbox = Outbox(folder)
    size = outbox.size()
    outbox.put(
        {
            "kind": "open",
            "key": uuid.uuid4().hex,
            "run_id": run_id,
            "experiment": experiment,
            "artifacts": None if uri.startswith(SERVERS) else _artifact_location(storage),
            "name": run_name,
            "params": {key: _param_text(value) for key, value in _flatten(params).items()},
            "tags": redacted(_source_tags() | dict(tags)),
            "dataset": dataset._asdict(),
            "parent": str(parent) if parent else None,
            "time": time.time(),
        }
    )
    try:
        if _may_try(uri):
            _deliver(uri, outbox)
    except Exception as error:  # whatever MLflow, its HTTP client or its database raises
        said = redact(str(getattr(error, "message", error)))
        if not is_away(uri, error):
            outbox.cut(size)
            raise ConfigError(
                f"the MLflow store {redact(uri)} could not open run {run_id or run_name!r}: {said};"
                " check that it is up and, when continuing a run, that it is the store it began in "
                "(MLFLOW_TRACKING_URI; unset means mlflow.db in the storage folder)"
            ) from error
        logger.warning(
            "MLflow at %s does not answer: %s; %s goes on, and what it has to say is kept in %s",
            *(redact(uri), said, run_name, folder / EVENTS_NAME),
        )
    outbox.note(store=redact(uri))
    return outbox.run_id


class RunLogger:
    """Takes metrics of one run from the training loop, in no time, and has them sent by a thread.

    A metric is first added to the run folder's outbox, then sent from there: in order, with its
    first timestamp, by at most one call every SEND_SECONDS. So a server that is slow or away slows
    and stops nothing, and what it missed is sent when it is back, if need be by the next process.
    A key is recorded once a step: what was logged before a restart is not logged again.

    Args:
        uri: the store; None for the one that MLFLOW_TRACKING_URI names.
        folder: run folder.
    """

    def __init__(self, uri: str | None, folder: Path) -> None:
        self.num_dropped = 0
        self._uri = uri or os.environ["MLFLOW_TRACKING_URI"]
        self._outbox = Outbox(folder)
        self._logged = {
            (key, event["step"])
            for event in self._outbox.events()
            if event["kind"] == "metrics" and event["once"]
            for key in event["metrics"]
        }
        self._client: MlflowClient | None = None
        self._limit = ENTITIES_PER_BATCH
        self._thread: threading.Thread | None = None
        self._end_by: float | None = None
        self._wake = threading.Event()

    def log(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Records `metrics` at `step`, measured at `seconds` since 1970.

        Values that are not finite drop.
        """
        self.log_many([(metrics, step, seconds)])

    def log_many(self, records: Iterable[tuple[Mapping[str, float], int, float]]) -> None:
        """`log` for several (metrics, step, seconds)."""
        events = []
        for metrics, step, seconds in records:
            new = {k: v for k, v in metrics.items() if (k, step) not in self._logged}
            self._logged |= {(key, step) for key in new}
            if finite := self._finite(new):
                events.append(_metrics_event(finite, step, seconds, once=True))
        self._outbox.put(*events)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
            self._thread.start()

    def close(self, seconds: float = CLOSE_SECONDS) -> int:
        """Sends what is left, for at most `seconds` or until an attempt fails.

        Returns:
            How many metrics MLflow will never have: refused, or not finite. What it just does not
            have yet stays in the outbox.
        """
        self._outbox.put()
        if self._thread:
            self._end_by = time.monotonic() + seconds
            self._wake.set()
            self._thread.join(timeout=seconds)
        return self.num_dropped

    def _run(self) -> None:
        wait, failing = 0.0, False
        while True:
            self._wake.wait(wait)
            ending = self._end_by is not None
            began = time.monotonic()
            try:
                left = self._send()
            except Exception as error:  # whatever MLflow, its HTTP client or its database raises
                if not failing:
                    text = "MLflow at %s fails, metrics are kept for later: %s"
                    logger.warning(text, redact(self._uri), redact(str(error)))
                failing, left = True, False
                wait = min(MAX_RETRY_SECONDS, max(SEND_SECONDS, 2 * wait))
            else:
                if failing:
                    logger.info("MLflow at %s is back", redact(self._uri))
                failing, wait = False, SEND_SECONDS
            if ending and (not left or began > (self._end_by or 0.0)):
                return

    def _send(self) -> bool:
        """One call, a smaller one after a failure; returns whether there is more to send."""
        if not self._outbox.has_due():
            return False
        with self._outbox.held() as held:
            if not held:
                time.sleep(0.1)
                return True
            self._client = self._client or connect(self._uri)
            limit, self._limit = self._limit, max(1, self._limit // 2)
            self.num_dropped += _send_next(self._client, self._outbox, limit)
        self._limit = ENTITIES_PER_BATCH
        return self._outbox.has_due()

    def _finite(self, metrics: Mapping[str, float]) -> dict[str, float]:
        finite = _finite(metrics)
        if len(finite) < len(metrics):
            if self.num_dropped == 0:
                names = ", ".join(sorted(metrics.keys() - finite.keys()))
                logger.warning("Metrics that are not finite are not sent to MLflow: %s", names)
            self.num_dropped += len(metrics) - len(finite)
        return finite


def finish_run(
    uri: str,
    folder: Path,
    status: Status,
    metrics: Mapping[str, float],
    figures: Callable[[], Mapping[str, Figure]],
    artifacts: Mapping[str, Path | str],
    checkpoint: str | None = None,
    patience: float = FINISH_SECONDS,
) -> bool:
    """Writes the results of a run and ends it with `status`; False (and a warning) if MLflow does
    not have all of it.

    What it does not have stays in the run folder, and `sync` sends it.

    Args:
        figures: makes the figures: a failure in it is a warning, like any other here.
        artifacts: names -> text, or the path of a text file.
        checkpoint: a pointer, the files stay where they are.
        patience: seconds to try for; 0 for one attempt, and none while the store is known to be
            away.
    """
    outbox = Outbox(folder)
    if results := _finite(metrics):
        outbox.put(_metrics_event(results, 0, time.time(), once=False))
    if checkpoint is not None:
        outbox.put({"kind": "tags", "tags": redacted({"checkpoint": checkpoint})})
    staged, complete = _stage(folder, figures, artifacts)
    if staged:
        outbox.put({"kind": "artifacts", "folder": staged})
    outbox.put({"kind": "end", "status": status, "time": time.time()})
    return _attempt(uri, outbox, patience) and complete


def set_tags(uri: str, folder: Path, tags: Mapping[str, str]) -> bool:
    """Sets tags of a run; False if MLflow does not have them yet."""
    outbox = Outbox(folder)
    outbox.put({"kind": "tags", "tags": redacted(tags)})
    return _attempt(uri, outbox, patience=0.0)


def run_id(folder: Path) -> str:
    """MLflow's id of the run of this folder; empty while MLflow has not made it."""
    return Outbox(folder).run_id


def forget(folder: Path) -> None:
    """Let the run of this folder begin anew, as another MLflow run."""
    Outbox(folder).forget()


def unsent(storage: Path) -> list[Path]:
    """Folders under `storage` with something that MLflow does not have, parents first."""
    found = [path.parent for path in sorted(storage.rglob(EVENTS_NAME))]
    return [folder for folder in found if Outbox(folder).num_due()]


def sync(uri: str, folder: Path) -> tuple[int, int]:
    """Sends what MLflow does not have of the run of a folder.

    Returns:
        How many events were sent, and how many are left.

    Raises:
        ConfigError: the run began in another store.
    """
    from service.config import ConfigError

    outbox = Outbox(folder)
    store = outbox.state().get("store", redact(uri))
    if store != redact(uri):
        raise ConfigError(
            f"run {folder.name} began in the MLflow store {store}, not in {redact(uri)}; set "
            "MLFLOW_TRACKING_URI to that store"
        )
    before = outbox.num_due()
    _attempt(uri, outbox, patience=0.0)
    left = outbox.num_due()
    return before - left, left


def ui_command(uri: str, host: str, port: int) -> tuple[list[str], dict[str, str]]:
    """The command that serves the pages of a database store, and the environment to add for it.

    The environment keeps MLflow from starting seven processes for background jobs.

    Raises:
        ConfigError: the store is a tracking server, which serves its own pages; or the address can
            be reached from other machines and nobody would have to log in.
    """
    from service.config import ConfigError

    if uri.startswith(SERVERS):
        raise ConfigError(f"{uri} is a running MLflow server: open {uri} in a browser")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    if not is_loopback(host):
        _check_login(host)
        command += ["--app-name", "basic-auth"]
    return command, SERVER_ENVIRONMENT


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at this host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _check_login(host: str) -> None:
    from service.config import ConfigError

    missing = [name for name in AUTH_VARIABLES if not os.environ.get(name)]
    if importlib.util.find_spec("flask_wtf") is None:
        missing.append("the package Flask-WTF (mlflow[auth])")
    if missing:
        raise ConfigError(
            f"--host {host} can be reached from other machines, where whoever can connect may "
            "read and change every run; beyond loopback MLflow must ask for a login, and for that "
            f"{' and '.join(missing)} must be set; see Security in the README; or leave --host out "
            "and use an SSH tunnel: ssh -L 5000:127.0.0.1:5000 THIS_MACHINE"
        )


def connect(uri: str) -> MlflowClient:
    """A client that fails within seconds, sends no telemetry and says nothing on the terminal.

    MLflow takes these settings only from its environment variables; those already set win.
    """
    from mlflow import MlflowClient
    from mlflow import environment_variables as variables
    from mlflow.telemetry import set_telemetry_client

    for variable, value in (
        (variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES, 0),  # a request is heard once, or tried later
        (variables.MLFLOW_HTTP_REQUEST_TIMEOUT, 5),
        (variables.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT, True),
        (variables.MLFLOW_DISABLE_TELEMETRY, True),
    ):
        if not variable.is_set():
            variable.set(value)
    set_telemetry_client()  # the import made one, before the setting above
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _artifact_location(storage: Path) -> str:
    """Where artifacts go without a server; a server decides that itself."""
    return (storage.resolve() / "mlartifacts").as_uri()


def _attempt(uri: str, outbox: Outbox, patience: float) -> bool:
    """Sends all that is due; False (and a warning) if it did not work for `patience` seconds."""
    if patience == 0.0 and not _may_try(uri):
        return False
    end = time.monotonic() + patience
    while True:
        try:
            _deliver(uri, outbox)
            return True
        except Exception as error:  # a finished run must not fail because of its record
            if time.monotonic() < end:
                time.sleep(min(1.0, patience))
                continue
            logger.warning(
                "MLflow at %s did not record all of run %s: %s; it is kept in %s, and midas sync "
                "sends it",
                *(redact(uri), outbox.folder.name, redact(str(error)), outbox.folder / EVENTS_NAME),
            )
            return False


# Store -> when it may be tried again: waiting ten times as long as a failed attempt took bounds
# what a driver loses to a store that is away.
_retry_at: dict[str, float] = {}


def _may_try(uri: str) -> bool:
    return time.monotonic() >= _retry_at.get(uri, 0.0)


def _deliver(uri: str, outbox: Outbox) -> None:
    """Sends all that is due, in order."""
    began = time.monotonic()
    try:
        while outbox.has_due():
            with outbox.held() as held:
                if held:
                    _send_next(connect(uri), outbox)
                    continue
            if time.monotonic() > began + HELD_SECONDS:
                raise TimeoutError("another process is sending it")
            time.sleep(0.1)
    except Exception:
        now = time.monotonic()
        _retry_at[uri] = now + WAIT_PER_FAILED_SECOND * (now - began)
        raise


def is_away(uri: str, error: Exception) -> bool:
    """Whether a server did not answer, or not as one that works."""
    return uri.startswith(SERVERS) and getattr(error, "error_code", "") in AWAY


def _send_next(client: MlflowClient, outbox: Outbox, limit: int = ENTITIES_PER_BATCH) -> int:
    """Sends the oldest events, as many as fit into one call to MLflow.

    Args:
        limit: most metrics and tags, unless one event has more.

    Returns:
        How many metrics were refused.
    """
    batch: list[Due] = []
    for due in outbox.due():
        if due.event["kind"] not in ("metrics", "tags"):
            if not batch:
                _act(client, outbox, due)
                return 0
            break
        size = sum(len(d.event[d.event["kind"]]) for d in [*batch, due])
        if batch and size > limit:
            break
        batch.append(due)
    return _send_batch(client, outbox, batch) if batch else 0


def _send_batch(client: MlflowClient, outbox: Outbox, batch: list[Due]) -> int:
    from mlflow.entities import RunTag
    from mlflow.exceptions import MlflowException

    run = outbox.run_id
    metrics: list[Metric] = []
    tags: dict[str, str] = {}
    for event, _ in batch:
        if event["kind"] == "tags":
            tags |= event["tags"]
        else:
            metrics += _entities(event["metrics"], event["step"], event["time"])
    dropped = 0
    try:
        for start in range(0, max(1, len(metrics)), ENTITIES_PER_BATCH):
            part = metrics[start : start + ENTITIES_PER_BATCH]
            client.log_batch(run, metrics=part, tags=[RunTag(k, v) for k, v in tags.items()])
    except MlflowException as error:
        if error.error_code not in REFUSED:
            raise
        if len(batch) > 1:
            return sum(_send_batch(client, outbox, [due]) for due in batch)
        # It would be refused every time and hold up everything behind it.
        dropped = len(metrics)
        names = ", ".join([*(metric.key for metric in metrics[:3]), *tags][:3])
        text = "MLflow refused %d metrics and %d tags (%s ...), dropped: %s"
        logger.warning(text, len(metrics), len(tags), names, redact(error.message))
    outbox.note(sent=batch[-1].end)
    return dropped


def _act(client: MlflowClient, outbox: Outbox, due: Due) -> None:
    """Does what an event asks for that is neither metrics nor tags."""
    event = due.event
    if event["kind"] == "open":
        _open(client, outbox, event)
    elif event["kind"] == "end":
        _remove_twins(client, outbox)
        client.set_terminated(outbox.run_id, event["status"], int(event["time"] * 1000))
    elif (staged := outbox.folder / event["folder"]).is_dir():
        try:
            client.log_artifacts(outbox.run_id, str(staged))
        except Exception as error:
            if len(list(itertools.islice(outbox.due(), 2))) == 1:
                raise
            text = "MLflow did not take the artifacts of run %s, tried again behind the rest: %s"
            logger.warning(text, outbox.folder.name, redact(str(error)))
            outbox.put(event)
        else:
            shutil.rmtree(staged, ignore_errors=True)
    outbox.note(sent=due.end)


def _open(client: MlflowClient, outbox: Outbox, event: Mapping[str, Any]) -> None:
    """Creates the run, or continues it; may be done again after it was done in part."""
    from mlflow.entities import Param, RunTag

    state = outbox.state()
    run = state.get("run_id") or event["run_id"]
    if run and state.get("key") != event["key"]:
        client.update_run(run, status="RUNNING")
        client.log_batch(run, tags=[RunTag(key, value) for key, value in event["tags"].items()])
        outbox.note(run_id=run)
        return
    if not run:
        run = _find_or_create(client, outbox, event)
        outbox.note(run_id=run, key=event["key"])
    params = [Param(key, value) for key, value in event["params"].items()]
    for start in range(0, len(params), PARAMS_PER_BATCH):
        client.log_batch(run, params=params[start : start + PARAMS_PER_BATCH])
    _log_dataset(client, run, DatasetInfo(**event["dataset"]))


def _find_or_create(client: MlflowClient, outbox: Outbox, event: Mapping[str, Any]) -> str:
    """The run with the event's key; one that a lost answer was about is not made again."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

    experiment = _experiment_id(client, event["experiment"], event["artifacts"])
    tags = event["tags"] | {KEY_TAG: event["key"]}
    if event["parent"]:
        tags["mlflow.parentRunId"] = Outbox(Path(event["parent"])).run_id
        if not tags["mlflow.parentRunId"]:
            text = f"the run of {event['parent']}, which this one belongs to, is not there yet"
            raise MlflowException(text, TEMPORARILY_UNAVAILABLE)
    outbox.note(experiment_id=experiment, attempts=outbox.state().get("attempts", 0) + 1)
    if outbox.state()["attempts"] > 1 and (found := _twins(client, experiment, event["key"])):
        return found[0]
    milliseconds = int(event["time"] * 1000)
    run = client.create_run(experiment, milliseconds, tags, run_name=event["name"])
    return run.info.run_id


def _twins(client: MlflowClient, experiment: str, key: str) -> list[str]:
    """Runs made for one run folder."""
    found = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'")
    return [run.info.run_id for run in found]


def _remove_twins(client: MlflowClient, outbox: Outbox) -> None:
    """A request that timed out may have been heard later: then there is an empty run too many."""
    state = outbox.state()
    if state.get("attempts", 0) > 1:
        for other in _twins(client, state["experiment_id"], state["key"]):
            if other != state["run_id"]:
                client.delete_run(other)


def _stage(
    folder: Path,
    figures: Callable[[], Mapping[str, Figure]],
    artifacts: Mapping[str, Path | str],
) -> tuple[str | None, bool]:
    """Writes artifacts to a folder inside the run folder, to be sent from there.

    Returns:
        Name of that folder, None if there is nothing in it, and whether everything worked.
    """
    complete = True
    name = f"{STAGED_NAME}-{uuid.uuid4().hex[:8]}"

    def write(what: str, action: Callable[[Path], None]) -> None:
        nonlocal complete
        try:
            path = folder / name / what
            path.parent.mkdir(parents=True, exist_ok=True)
            action(path)
        except Exception as error:  # a finished run must not fail because of its record
            logger.warning("MLflow does not get %s: %s", what, redact(str(error)))
            complete = False

    def draw(path: Path) -> None:
        for figure_name, figure in figures().items():
            path.mkdir(exist_ok=True)
            figure.savefig(path / figure_name)

    def copy(content: Path | str, path: Path) -> None:
        path.write_text(content.read_text() if isinstance(content, Path) else content)

    for artifact, content in artifacts.items():
        write(artifact, partial(copy, content))
    write(".", draw)
    return (name if (folder / name).is_dir() else None), complete


def _experiment_id(client: MlflowClient, name: str, location: str | None) -> str:
    """Finds or creates an experiment, with its artifacts at `location` if there is no server."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    if client.get_experiment_by_name(name) is None:
        with contextlib.suppress(MlflowException):  # another process was faster
            return client.create_experiment(name, artifact_location=location)
    found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        text = f"experiment {name!r} is deleted or cannot be created; rename it"
        raise MlflowException(text, INVALID_PARAMETER_VALUE)
    return found.experiment_id


def _log_dataset(client: MlflowClient, run_id: str, info: DatasetInfo) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=info.name,
        digest=info.digest[:MAX_DIGEST_CHARACTERS],
        source_type="manifest",
        source=json.dumps({"digest": info.digest}),
        profile=json.dumps({"num_rows": info.num_rows}),
    )
    client.log_inputs(
        run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
    )


def _source_tags() -> dict[str, str]:
    """Tags naming the code of a run; MLflow shows the first two in its list of runs."""
    tags = {"mlflow.source.name": "midas"}
    commit = git_commit(Path(__file__).parent)
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
        tags["git_commit"] = commit
    return tags


def _flatten(tree: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    """Nested mappings as one mapping with dotted names; an empty mapping stays a value."""
    flat: dict[str, Json] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _param_text(value: Json) -> str:
    text = redact(value if isinstance(value, str) else json.dumps(value))
    if len(text) > MAX_PARAM_CHARACTERS:
        return text[: MAX_PARAM_CHARACTERS - 3] + "..."
    return text


def _entities(metrics: Mapping[str, float], step: int, seconds: float) -> list[Metric]:
    from mlflow.entities import Metric

    milliseconds = int(seconds * 1000)
    return [Metric(key, value, milliseconds, step) for key, value in metrics.items()]


def _metrics_event(
    metrics: Mapping[str, float], step: int, seconds: float, *, once: bool
) -> dict[str, Any]:
    """`once`: what was logged at this step before is not to be logged again."""
    return {
        "kind": "metrics",
        "metrics": {key: float(value) for key, value in metrics.items()},
        "step": step,
        "time": seconds,
        "once": once,
    }


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if math.isfinite(value)}

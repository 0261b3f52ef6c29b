"""What sends the events of an outbox to MLflow: in order, and as if once, however often it tries.

Everything may be sent twice: MLflow ignores a metric that it holds (same key, step, timestamp and
value), and a run carries a key of ours, by which it is found again. With service/registry.py the
only files that import mlflow, and only inside functions: the import takes over a second. They use
`MlflowClient` with explicit run ids, never the fluent API with its global active run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from service.outbox import EVENTS_NAME, Due, Outbox, WriteError
from service.redaction import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

SERVERS = ("http://", "https://")
MAX_DIGEST_CHARACTERS = 32  # MLflow allows 36
PARAMS_PER_BATCH = 100
ENTITIES_PER_BATCH = 1000  # MLflow allows no more
# Between two calls of a run while it trains, while it catches up, and between attempts while the
# store is away.
SEND_SECONDS = 5.0
CATCH_UP_SECONDS = 2.0
MAX_RETRY_SECONDS = 30.0
CLOSE_SECONDS = 15.0
HELD_SECONDS = 10.0
# What a command gives a store that answers, but has much to take: at its start, and at its end.
OPEN_SECONDS = 20.0
END_SECONDS = 60.0
WAIT_PER_FAILED_SECOND = 10.0
# MLflow's error codes of a server that does not answer or is in trouble, and of one that will never
# take this.
AWAY = (
    *("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED"),
    *("IO_ERROR", "CANCELLED"),
)
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")
KEY_TAG = "midas.key"
# Store -> when it may be tried again: waiting ten times as long as a failed attempt took bounds
# what a driver loses to a store that is away.
_retry_at: dict[str, float] = {}


class DatasetInfo(NamedTuple):
    """What MLflow records about the data of a run: never rows, only what identifies them."""

    name: str
    digest: str
    num_rows: int


class Sender:
    """A thread that sends an outbox by at most one call every SEND_SECONDS (CATCH_UP_SECONDS while
    more is due than fits into one).

    A server that is slow or away slows and stops nothing; what it missed is sent when it is back,
    in smaller calls at first.

    Args:
        uri: of the store.
    """

    def __init__(self, uri: str, outbox: Outbox) -> None:
        self.num_refused = 0
        self._uri = uri
        self._outbox = outbox
        self._client: MlflowClient | None = None
        self._limit = ENTITIES_PER_BATCH
        self._thread: threading.Thread | None = None
        self._end_by: float | None = None
        self._wake = threading.Event()

    def start(self) -> None:
        """Begin to send, if that has not begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
            self._thread.start()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Send what is left, for at most `seconds` or until an attempt fails."""
        if self._thread:
            self._end_by = time.monotonic() + seconds
            self._wake.set()
            self._thread.join(timeout=seconds)

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
                failing, wait = False, min(CATCH_UP_SECONDS, SEND_SECONDS) if left else SEND_SECONDS
            if ending and (not left or began > (self._end_by or 0.0)):
                return

    def _send(self) -> bool:
        """One call, a smaller one after a failure; returns whether it was too small for all."""
        if not self._outbox.has_due():
            return False
        size = self._outbox.size()
        with self._outbox.held() as held:
            if not held:
                time.sleep(0.1)
                return True
            self._client = self._client or connect(self._uri)
            limit, self._limit = self._limit, max(1, self._limit // 2)
            self.num_refused += _send_next(self._client, self._outbox, limit)
        self._limit = ENTITIES_PER_BATCH
        return self._outbox.state().get("sent", 0) < size


def load(uri: str) -> None:
    """Import what the store needs; takes seconds, which may pass beside something else."""
    import mlflow

    if not uri.startswith(SERVERS):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


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


def attempt(uri: str, outbox: Outbox, patience: float, seconds: float = END_SECONDS) -> bool:
    """Sends all that is due; False (and a warning) if it did not work for `patience` seconds, or
    took more than `seconds`.
    """
    if patience == 0.0 and not may_try(uri):
        return False
    end = time.monotonic() + patience
    while True:
        try:
            deliver(uri, outbox, seconds)
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


def may_try(uri: str) -> bool:
    """Whether the store is not known to be away."""
    return time.monotonic() >= _retry_at.get(uri, 0.0)


def deliver(uri: str, outbox: Outbox, seconds: float) -> None:
    """Sends all that is due, in order.

    Raises:
        TimeoutError: it is not done after `seconds`, or another process does it, and takes long.
        WriteError: there is more, which could not be written.
        Exception: whatever MLflow, its HTTP client or its database raises.
    """
    began = time.monotonic()
    client = None
    try:
        while outbox.has_due():
            if time.monotonic() > began + seconds:
                raise TimeoutError(f"it takes more than {seconds:g} s")
            with outbox.held() as held:
                if held:
                    client = client or connect(uri)
                    _send_next(client, outbox)
                    continue
            if time.monotonic() > began + HELD_SECONDS:
                raise TimeoutError("another process is sending it")
            time.sleep(0.1)
        outbox.check_written()
    except (TimeoutError, WriteError):
        raise  # it says nothing of the store
    except Exception:
        now = time.monotonic()
        _retry_at[uri] = now + WAIT_PER_FAILED_SECOND * (now - began)
        raise


def end(uri: str, run_id: str, status: str) -> None:
    """Gives a run its final state, past its outbox, which cannot be written; best effort."""
    with contextlib.suppress(Exception):
        connect(uri).set_terminated(run_id, status)


def has_run(uri: str, run_id: str, key: str) -> bool:
    """Whether a store has the run with this id that was made for this key.

    Raises:
        Exception: whatever MLflow, its HTTP client or its database raises, if it is away.
    """
    from mlflow.exceptions import MlflowException

    try:
        tags = connect(uri).get_run(run_id).data.tags
    except MlflowException as error:
        if is_away(uri, error):
            raise
        return False
    return tags.get(KEY_TAG) == key


def is_away(uri: str, error: Exception) -> bool:
    """Whether a server did not answer, or not as one that works, or it is not the store's fault."""
    if isinstance(error, TimeoutError | WriteError):
        return True
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
    outbox.confirm(batch[-1])
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
            if all(behind.event["kind"] == "artifacts" for behind in outbox.due()):
                raise
            text = "MLflow did not take the artifacts of run %s, tried again behind the rest: %s"
            logger.warning(text, outbox.folder.name, redact(str(error)))
            outbox.put(event)
        else:
            shutil.rmtree(staged, ignore_errors=True)
    outbox.confirm(due)


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


def _entities(metrics: Mapping[str, float], step: int, seconds: float) -> list[Metric]:
    from mlflow.entities import Metric

    milliseconds = int(seconds * 1000)
    return [Metric(key, value, milliseconds, step) for key, value in metrics.items()]

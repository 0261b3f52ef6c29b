"""MLflow: opening, feeding and closing the record of a run, and the command that shows it.

The only file that imports mlflow, and only inside functions: the import takes over a second. It
uses `MlflowClient` with explicit run ids, never the fluent API with its global active run. What a
run needs in order to go on (checkpoints, progress) is not kept here: losing MLflow loses curves.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import urlsplit

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
METRICS_PER_BATCH = 1000
# Waiting this many times as long as a failed attempt took bounds the time lost to a dead store.
WAIT_PER_FAILED_SECOND = 10.0


class DatasetInfo(NamedTuple):
    """What MLflow records about the data of a run: never rows, only what identifies them."""

    name: str
    digest: str
    num_rows: int


def tracking_uri(storage: Path, configured: str | None = None) -> str:
    """The store to use: the `configured` one (MLFLOW_TRACKING_URI), else a file in `storage`."""
    return configured or f"sqlite:///{storage.resolve()}/mlflow.db"


def run_page(uri: str, run_id: str) -> str | None:
    """The page of a run on a tracking server; None for a store that no server shows."""
    if not uri.startswith(SERVERS):
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
    storage: Path,
    experiment: str,
    run_name: str,
    params: Mapping[str, Json],
    tags: Mapping[str, str],
    dataset: DatasetInfo,
    run_id: str | None = None,
) -> str:
    """Creates a run, or continues the run `run_id`, and returns its id.

    Continuing sets the status back to RUNNING and renews the tags; params and data stay as they
    were first written (MLflow params cannot change). Raises ConfigError if the store cannot be
    used: this happens on the driver, before work starts.
    """
    from mlflow.exceptions import MlflowException

    from service.config import ConfigError

    try:
        client = _connect(uri)
        if run_id is None:
            run_id = _create_run(client, uri, storage, experiment, run_name, params, dataset)
        client.update_run(run_id, status="RUNNING")
        for key, value in (_source_tags() | dict(tags)).items():
            client.set_tag(run_id, key, value)
    except MlflowException as error:
        raise ConfigError(
            f"the MLflow store {uri} could not open run {run_id or run_name!r}: {error.message}; "
            "check that it is up and, when continuing a run, that it is the store it began in "
            "(MLFLOW_TRACKING_URI; unset means mlflow.db in the storage folder)"
        ) from error
    return run_id


class RunLogger:
    """Writes metrics of one run from the training loop; an MLflow failure never reaches the loop.

    What could not be written is kept, in order and with its first timestamp, and sent before
    anything newer; MLflow ignores a metric it already holds (same key, step, timestamp, value),
    so a batch whose answer was lost is not doubled. After a failure the next attempt waits ten
    times as long as the failed one took.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.num_dropped = 0
        self._uri = uri
        self._run_id = run_id
        self._client: MlflowClient | None = None
        self._pending: list[Metric] = []
        self._retry_at = 0.0
        self._failing = False

    def log(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Records `metrics` at `step` with one call to MLflow; values that are not finite drop.

        `seconds` is the time of the measurement since 1970: MLflow stores the same metric with the
        same step and time once, so that logging again after a restart adds nothing.
        """
        self.log_many([(metrics, step, seconds)])

    def log_many(self, records: Iterable[tuple[Mapping[str, float], int, float]]) -> None:
        """`log` for several (metrics, step, seconds), with as few calls to MLflow as possible."""
        for metrics, step, seconds in records:
            self._pending += _entities(self._finite(metrics), step, seconds)
        if self._pending and time.monotonic() >= self._retry_at:
            self._send()

    def close(self) -> int:
        """Tries once more to write what is left; returns how many metrics were lost."""
        if self._pending:
            self._send()
        if self._pending:
            logger.warning(
                "MLflow at %s did not come back: %d metrics of run %s are not recorded there",
                self._uri,
                len(self._pending),
                self._run_id,
            )
        return len(self._pending)

    def _finite(self, metrics: Mapping[str, float]) -> dict[str, float]:
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        if len(finite) < len(metrics):
            if self.num_dropped == 0:
                names = ", ".join(sorted(metrics.keys() - finite.keys()))
                logger.warning("Metrics that are not finite are not sent to MLflow: %s", names)
            self.num_dropped += len(metrics) - len(finite)
        return finite

    def _send(self) -> None:
        started = time.monotonic()
        try:
            self._client = self._client or _connect(self._uri)
            while self._pending:
                self._send_batch(self._client)
        except Exception as error:  # whatever MLflow, its HTTP client or its database raises
            now = time.monotonic()
            self._retry_at = now + WAIT_PER_FAILED_SECOND * (now - started)
            if not self._failing:
                logger.warning(
                    "MLflow at %s fails, metrics are kept for later: %s", self._uri, error
                )
            self._failing = True
        else:
            if self._failing:
                logger.info("MLflow at %s is back, all kept metrics are written", self._uri)
            self._failing = False

    def _send_batch(self, client: MlflowClient) -> None:
        from mlflow.exceptions import MlflowException

        batch = self._pending[:METRICS_PER_BATCH]
        try:
            client.log_batch(self._run_id, metrics=batch)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            # It would be refused every time and hold up everything behind it.
            self.num_dropped += len(batch)
            logger.warning("MLflow refused %d metrics, dropped: %s", len(batch), error.message)
        del self._pending[: len(batch)]


def finish_run(
    uri: str,
    run_id: str,
    status: Status,
    metrics: Mapping[str, float],
    figures: Callable[[], Mapping[str, Figure]],
    artifacts: Mapping[str, Path | str],
    checkpoint: str | None = None,
) -> bool:
    """Writes the results of a run and ends it with `status`; False (and a warning) if it failed.

    `figures` makes the figures: a failure in it is a warning, like any other here. `artifacts` maps
    names to text, or to the path of a text file; `checkpoint` is a pointer, the files stay where
    they are. Results are safe in the run folder, so failing here is no error.
    """

    def results() -> None:
        client = _connect(uri)
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        client.log_batch(run_id, metrics=_entities(finite, step=0, seconds=time.time()))
        if checkpoint is not None:
            client.set_tag(run_id, "checkpoint", checkpoint)
        for name, content in artifacts.items():
            text = content.read_text() if isinstance(content, Path) else content
            client.log_text(run_id, text, name)
        for name, figure in figures().items():
            client.log_figure(run_id, figure, name)

    def end() -> None:
        _connect(uri).set_terminated(run_id, status)

    recorded = _attempt(f"the results of run {run_id}", results)
    return _attempt(f"the end of run {run_id} ({status})", end) and recorded


def set_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> bool:
    """Sets tags of a run; False (and a warning) if it failed."""

    def set_all() -> None:
        client = _connect(uri)
        for key, value in tags.items():
            client.set_tag(run_id, key, value)

    return _attempt(f"tags of run {run_id}", set_all)


def ui_command(uri: str, host: str, port: int) -> tuple[list[str], dict[str, str]]:
    """The command that serves the pages of a database store, and the environment to add for it.

    The environment keeps MLflow from starting seven processes for background jobs.

    Raises ConfigError for a tracking server: it serves its own pages.
    """
    from service.config import ConfigError

    if uri.startswith(SERVERS):
        raise ConfigError(f"{uri} is a running MLflow server: open {uri} in a browser")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    environment = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return command, environment


def _connect(uri: str) -> MlflowClient:
    """A client that fails within seconds, sends no telemetry and says nothing on the terminal.

    MLflow takes these settings only from its environment variables; those already set win.
    """
    from mlflow import MlflowClient
    from mlflow import environment_variables as variables
    from mlflow.telemetry import set_telemetry_client

    for variable, value in (
        (variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES, 2),
        (variables.MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR, 1),
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


def _create_run(
    client: MlflowClient,
    uri: str,
    storage: Path,
    experiment: str,
    run_name: str,
    params: Mapping[str, Json],
    dataset: DatasetInfo,
) -> str:
    from mlflow.entities import Param

    experiment_id = _experiment_id(client, uri, storage, experiment)
    run_id = client.create_run(experiment_id, run_name=run_name).info.run_id
    entities = [Param(key, _param_text(value)) for key, value in _flatten(params).items()]
    for start in range(0, len(entities), PARAMS_PER_BATCH):
        client.log_batch(run_id, params=entities[start : start + PARAMS_PER_BATCH])
    _log_dataset(client, run_id, dataset)
    return run_id


def _experiment_id(client: MlflowClient, uri: str, storage: Path, name: str) -> str:
    """Finds or creates an experiment; a server decides itself where its artifacts go."""
    from mlflow.exceptions import MlflowException

    location = None
    if not uri.startswith(SERVERS):
        location = (storage.resolve() / "mlartifacts").as_uri()
    if client.get_experiment_by_name(name) is None:
        with contextlib.suppress(MlflowException):  # another process was faster
            return client.create_experiment(name, artifact_location=location)
    found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise MlflowException(f"experiment {name!r} is deleted or cannot be created; rename it")
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
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > MAX_PARAM_CHARACTERS:
        return text[: MAX_PARAM_CHARACTERS - 3] + "..."
    return text


def _entities(metrics: Mapping[str, float], step: int, seconds: float) -> list[Metric]:
    from mlflow.entities import Metric

    milliseconds = int(seconds * 1000)
    return [Metric(key, value, milliseconds, step) for key, value in metrics.items()]


def _attempt(what: str, action: Callable[[], None]) -> bool:
    try:
        action()
    except Exception as error:  # a finished run must not fail because of its record
        logger.warning("MLflow did not record %s: %s", what, error)
        return False
    return True

"""MLflow's record of a run: opening, feeding and closing it.

All that MLflow is told about a run goes through the outbox of its folder (service/outbox.py): it is
written there first, and sent from there (service/sending.py), by whoever can. So MLflow may be slow
or away at any time.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from service import sending
from service.outbox import EVENTS_NAME, Outbox
from service.redaction import has_credentials, redact, redacted
from service.sending import SERVERS, DatasetInfo, Sender

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Json = None | bool | int | float | str | list["Json"] | Mapping[str, "Json"]
Status = Literal["FINISHED", "FAILED", "KILLED"]

MAX_PARAM_CHARACTERS = 6000
FINISH_SECONDS = 10.0
STAGED_NAME = "mlflow-artifacts"


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
            "artifacts": None if uri.startswith(SERVERS) else artifact_location(storage),
            "name": run_name,
            "params": {key: _param_text(value) for key, value in _flatten(params).items()},
            "tags": redacted(_source_tags() | dict(tags)),
            "dataset": dataset._asdict(),
            "parent": str(parent) if parent else None,
            "time": time.time(),
        }
    )
    try:
        if sending.may_try(uri):
            sending.deliver(uri, outbox, sending.OPEN_SECONDS)
    except Exception as error:  # whatever MLflow, its HTTP client or its database raises
        said = redact(str(getattr(error, "message", error)))
        opened = outbox.state().get("sent", 0) > size
        if not opened and not sending.is_away(uri, error):
            outbox.cut(size)
            raise ConfigError(
                f"the MLflow store {redact(uri)} could not open run {run_id or run_name!r}: {said};"
                " check that it is up and, when continuing a run, that it is the store it began in "
                "(MLFLOW_TRACKING_URI; unset means mlflow.db in the storage folder)"
            ) from error
        logger.warning(
            "MLflow at %s has not all of it: %s; %s goes on, and what it has to say is kept in %s",
            *(redact(uri), said, run_name, folder / EVENTS_NAME),
        )
    outbox.note(store=redact(uri))
    return outbox.run_id


class RunLogger:
    """Takes metrics of one run from the training loop, in no time, and has them sent by a thread.

    A metric is first added to the run folder's outbox, then sent from there, with its first
    timestamp, if need be by the next process. A key is recorded once a step: what was logged before
    a restart is not logged again.

    Args:
        uri: the store; None for the one that MLFLOW_TRACKING_URI names.
        folder: run folder.
    """

    def __init__(self, uri: str | None, folder: Path) -> None:
        self._outbox = Outbox(folder)
        self._sender = Sender(uri or os.environ["MLFLOW_TRACKING_URI"], self._outbox)
        self._num_not_finite = 0
        self._logged = {
            (key, event["step"])
            for event in self._outbox.events()
            if event["kind"] == "metrics" and event["once"]
            for key in event["metrics"]
        }

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
        self._sender.start()

    def close(self, seconds: float = sending.CLOSE_SECONDS) -> int:
        """Sends what is left, for at most `seconds` or until an attempt fails.

        Returns:
            How many metrics MLflow will never have: refused, or not finite. What it just does not
            have yet stays in the outbox.
        """
        self._outbox.put()
        self._sender.close(seconds)
        return self._sender.num_refused + self._num_not_finite

    def _finite(self, metrics: Mapping[str, float]) -> dict[str, float]:
        finite = _finite(metrics)
        if len(finite) < len(metrics):
            if self._num_not_finite == 0:
                names = ", ".join(sorted(metrics.keys() - finite.keys()))
                logger.warning("Metrics that are not finite are not sent to MLflow: %s", names)
            self._num_not_finite += len(metrics) - len(finite)
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
    done = sending.attempt(uri, outbox, patience)
    if not done and outbox.has_unwritten and outbox.run_id:
        sending.end(uri, outbox.run_id, status)
    return done and complete


def set_tags(uri: str, folder: Path, tags: Mapping[str, str]) -> bool:
    """Sets tags of a run; False if MLflow does not have them yet."""
    outbox = Outbox(folder)
    outbox.put({"kind": "tags", "tags": redacted(tags)})
    return sending.attempt(uri, outbox, patience=0.0)


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

    A run that began in another store is left as it is, with a warning; a store that has the run is
    the same one under another address.

    Returns:
        How many events were sent, and how many are left.
    """
    outbox = Outbox(folder)
    before = outbox.num_due()
    store = outbox.state().get("store", redact(uri))
    if store != redact(uri) and not _is_there(uri, outbox):
        logger.warning(
            "Run %s began in the MLflow store %s, not in %s; set MLFLOW_TRACKING_URI to that store",
            *(folder.name, store, redact(uri)),
        )
        return 0, before
    sending.attempt(uri, outbox, patience=0.0, seconds=math.inf)
    left = outbox.num_due()
    return before - left, left


def _is_there(uri: str, outbox: Outbox) -> bool:
    """Whether a store has the run that was made for this folder."""
    state = outbox.state()
    if not (state.get("run_id") and state.get("key")):
        return False
    try:
        return sending.has_run(uri, state["run_id"], state["key"])
    except Exception as error:  # whatever MLflow, its HTTP client or its database raises
        logger.warning("MLflow at %s does not answer: %s", redact(uri), redact(str(error)))
        return False


def artifact_location(storage: Path) -> str:
    """Where artifacts go without a server; a server decides that itself."""
    return (storage.resolve() / "mlartifacts").as_uri()


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

"""What is to be told MLflow about a run, on disk until MLflow has it.

Two files in the run folder: `mlflow.jsonl` has one event a line and only grows; `mlflow.json` says
up to which byte MLflow has it, and which MLflow run it is. Any process may add events; one at a
time sends them. An event is removed from what is due after MLflow took it, so that one may be sent
twice but none is lost; whoever sends sees to it that twice is as good as once.
"""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from service.files import read_json, write_text

log = logging.getLogger(__name__)

EVENTS_NAME = "mlflow.jsonl"
STATE_NAME = "mlflow.json"


class Due(NamedTuple):
    """An event that is to be sent, and the place in the file behind it."""

    event: dict[str, Any]
    end: int


class WriteError(Exception):
    """The folder of a run cannot be written; the message says why."""


class Outbox:
    """The events of one run.

    Args:
        folder: run folder; made when the first event is added.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._unwritten: list[str] = []
        self._problem: OSError | None = None

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; empty until MLflow has made it."""
        return str(self.state().get("run_id", ""))

    def state(self) -> dict[str, Any]:
        """What is known of the run's side in MLflow: `sent` (bytes), `run_id`, `key`, `store`."""
        return read_json(self.folder / STATE_NAME) or {}

    def put(self, *events: Mapping[str, Any]) -> None:
        """Add events. While the folder cannot be written they are kept here, in order."""
        self._unwritten += [json.dumps(event, sort_keys=True) + "\n" for event in events]
        if not self._unwritten:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / EVENTS_NAME).open("ab+") as file:
                text = "".join(self._unwritten)
                if file.tell() and not _ends_line(file):
                    text = "\n" + text  # a power cut took the rest of the line before
                file.write(text.encode())
        except OSError as error:
            if not self._problem:
                log.warning("%s in %s is written later: %s", EVENTS_NAME, self.folder, error)
            self._problem = error
        else:
            self._unwritten, self._problem = [], None

    def check_written(self) -> None:
        """Write what could not be written when it was added.

        Raises:
            WriteError: it still cannot.
        """
        self.put()
        if self._problem:
            raise WriteError(f"{self.folder / EVENTS_NAME} cannot be written: {self._problem}")

    @property
    def has_unwritten(self) -> bool:
        """Whether there are events that are only here, in memory."""
        return bool(self._unwritten)

    def due(self) -> Iterator[Due]:
        """Events that MLflow does not have, oldest first."""
        path = self.folder / EVENTS_NAME
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(self.state().get("sent", 0))
            while (line := file.readline()).endswith(b"\n"):
                event = _parsed(line)
                if event is not None:
                    yield Due(event, file.tell())

    def has_due(self) -> bool:
        """Whether there is something to send."""
        return next(self.due(), None) is not None

    def num_due(self) -> int:
        """How many events MLflow does not have."""
        return sum(1 for _ in self.due()) + len(self._unwritten)

    def events(self) -> Iterator[dict[str, Any]]:
        """All events, also those that MLflow has."""
        path = self.folder / EVENTS_NAME
        if path.is_file():
            with path.open("rb") as file:
                yield from filter(None, map(_parsed, file))

    def note(self, **changes: Any) -> None:
        """Change what is known of MLflow's side."""
        write_text(self.folder / STATE_NAME, json.dumps(self.state() | changes, indent=2) + "\n")

    def confirm(self, due: Due) -> None:
        """MLflow has everything up to this event."""
        with (self.folder / EVENTS_NAME).open("rb") as file:
            os.fsync(file.fileno())  # no power cut may leave less of it than is noted here
        self.note(sent=due.end)

    def size(self) -> int:
        """Bytes of all events."""
        path = self.folder / EVENTS_NAME
        return path.stat().st_size if path.is_file() else 0

    def cut(self, size: int) -> None:
        """Take back what was added behind the first `size` bytes and was not sent."""
        with (self.folder / EVENTS_NAME).open("rb+") as file:
            file.truncate(size)

    def forget(self) -> None:
        """Remove the files: the run begins anew."""
        for name in (EVENTS_NAME, STATE_NAME):
            (self.folder / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Be the one who sends, in the body; False if another process or thread is."""
        path = self.folder / EVENTS_NAME
        if not path.is_file():
            yield True
            return
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True


def _ends_line(file: Any) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """An event; None for a line that was cut off."""
    with contextlib.suppress(ValueError):
        event = json.loads(line)
        if isinstance(event, dict):
            return event
    return None

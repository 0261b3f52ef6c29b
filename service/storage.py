"""Where checkpoints are kept: a folder on any pyarrow or fsspec file system, written in a thread.

    <root>/step_0000000120/model.safetensors ... state.json
    <root>/steps/0000000100.csv                               what steps 100, 101, ... were

A checkpoint is complete or absent: state.json comes last and goes first. Names sort by age. Old
checkpoints go when a new one is safe.
"""

import contextlib
import errno
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from pyarrow import fs

from data.folder import file_system
from training.chain import StepRecord
from training.checkpoint import STATE_NAME, Packed

log = logging.getLogger(__name__)

RETRY_SECONDS = 300.0
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 15.0
# No storage comes back from these by waiting.
FINAL_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
}
# What clients under fsspec raise, beside OSErrors, while their server is away.
AWAY_ERRORS = {
    *("botocore.exceptions.ConnectionError", "botocore.exceptions.HTTPClientError"),
    *("azure.core.exceptions.ServiceRequestError", "azure.core.exceptions.ServiceResponseError"),
    *("aiohttp.client_exceptions.ClientConnectionError", "gcsfs.retry.HttpError"),
}
NAME = re.compile(r"step_\d{10}")
STEPS_NAME = re.compile(r"(\d{10})\.csv")


class StorageError(RuntimeError):
    """A checkpoint could not be written; the message says what is still there."""


def checkpoint_name(steps_done: int) -> str:
    """Folder name of the checkpoint after this many steps of the run."""
    return f"step_{steps_done:010d}"


class CheckpointStore:
    """The checkpoints and step records of one run.

    Args:
        system: any pyarrow file system.
        root: folder in it; need not exist.
    """

    def __init__(self, system: fs.FileSystem, root: str):
        self._fs = system
        self._root = root.rstrip("/")

    @classmethod
    def at(cls, uri: str) -> "CheckpointStore":
        """The store at a path or URI; raises like `file_system`."""
        return cls(*file_system(uri))

    def save(self, name: str, files: dict[str, bytes]) -> None:
        """Write a checkpoint's files in the given order, the marker last."""
        self._remove_marker(name)
        self._fs.create_dir(self._path(name))
        for file, content in files.items():
            self._write(f"{name}/{file}", content)

    def names(self) -> list[str]:
        """Complete checkpoints, oldest first."""
        return [name for name, complete in self.folders().items() if complete]

    def folders(self) -> dict[str, bool]:
        """Folders of checkpoints, oldest first, and whether they are complete.

        The others are what is left where a process ended while it wrote or removed one.
        """
        selector = fs.FileSelector(self._root, allow_not_found=True)
        names = sorted(
            info.base_name
            for info in self._fs.get_file_info(selector)
            if info.type == fs.FileType.Directory and NAME.fullmatch(info.base_name)
        )
        markers = [f"{self._path(name)}/{STATE_NAME}" for name in names]
        found = self._fs.get_file_info(markers) if markers else []
        return {
            name: marker.type == fs.FileType.File for name, marker in zip(names, found, strict=True)
        }

    def load(self, name: str, wanted: Collection[str] | None = None) -> dict[str, bytes]:
        """Content of a checkpoint's files that are there, by file name."""
        selector = fs.FileSelector(self._path(name), allow_not_found=True)
        files = {}
        for info in self._fs.get_file_info(selector):
            if info.type == fs.FileType.File and (wanted is None or info.base_name in wanted):
                with self._fs.open_input_stream(info.path) as stream:
                    files[info.base_name] = stream.read()
        return files

    def where(self, name: str) -> str:
        """What messages call a checkpoint."""
        return self._path(name)

    def remove(self, name: str) -> None:
        """Remove a checkpoint; it stops being one at once."""
        self._remove_marker(name)
        self._fs.delete_dir(self._path(name))

    def save_steps(self, first: int, records: Sequence[StepRecord]) -> None:
        """Write what the steps from number `first` of the run on were.

        Files of later steps are removed: they are from an attempt that went further and was lost.
        """
        self._fs.create_dir(self._path("steps"))
        for later, path in self._step_files().items():
            if later > first:
                self._fs.delete_file(path)
        lines = [f"{r.epoch},{r.step},{r.order},{r.loss!r},{r.workers}\n" for r in records]
        self._write(f"steps/{first:010d}.csv", "".join(lines).encode())

    def steps(self, start: int, stop: int) -> list[StepRecord]:
        """Records of steps [start, stop) of the run, as far as they are there without a gap.

        Where files overlap, after a run had to go back to an older checkpoint, those of the later
        file are taken. A last line that was cut off is left out.
        """
        records: dict[int, StepRecord] = {}
        for first, path in self._step_files().items():
            if first < stop:
                with self._fs.open_input_stream(path) as stream:
                    lines = stream.read().decode().split("\n")[:-1]
                records |= {first + i: _parse(line) for i, line in enumerate(lines)}
        known = []
        while start < stop and start in records:
            known.append(records[start])
            start += 1
        return known

    def num_steps(self) -> int:
        """Steps of the run that are recorded, counted from its start without a gap."""
        return len(self.steps(0, sys.maxsize))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _step_files(self) -> dict[int, str]:
        """Number of the first step -> path, in order."""
        selector = fs.FileSelector(self._path("steps"), allow_not_found=True)
        found = [
            (STEPS_NAME.fullmatch(info.base_name), info.path)
            for info in self._fs.get_file_info(selector)
        ]
        return dict(sorted((int(match[1]), path) for match, path in found if match))

    def _remove_marker(self, name: str) -> None:
        marker = f"{self._path(name)}/{STATE_NAME}"
        if self._fs.get_file_info(marker).type == fs.FileType.File:
            self._fs.delete_file(marker)

    def _write(self, name: str, content: bytes) -> None:
        path = self._path(name)
        with self._fs.open_output_stream(path) as stream:
            stream.write(content)
        if isinstance(self._fs, fs.LocalFileSystem):  # others keep what they have accepted
            _sync(path)
            _sync(os.path.dirname(path))


def _sync(path: str) -> None:
    """Have a file, or the names in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse(line: str) -> StepRecord:
    epoch, step, order, loss, workers = line.split(",")
    return StepRecord(int(epoch), int(step), order, float(loss), int(workers))


class CheckpointWriter:
    """Writes checkpoints one after the other in a thread, and removes old ones.

    An error that waiting may cure is retried for RETRY_SECONDS; training goes on meanwhile.

    Args:
        store: where to.
        num_kept: newest checkpoints to keep, besides the one named with each.
    """

    def __init__(self, store: CheckpointStore, num_kept: int):
        self.error: StorageError | None = None
        self._store = store
        self._num_kept = num_kept
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def submit(
        self, name: str, packed: Packed, first: int, records: list[StepRecord], keep: str | None
    ) -> None:
        """Start to write a checkpoint, when the one before is done.

        Args:
            name: from `checkpoint_name`.
            first: number of the first of `records`, the steps since the checkpoint before.
            keep: a checkpoint that must stay, however old.
        """
        self.wait()
        if self.error is not None:
            return  # the steps before would be missing in the records
        arguments = (name, packed, first, records, keep)
        # Not a daemon: a process that ends finishes its checkpoint first.
        self._thread = threading.Thread(target=self._work, args=arguments, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written; look at `error` then."""
        if self._thread is not None:
            self._thread.join()

    def _work(
        self, name: str, packed: Packed, first: int, records: list[StepRecord], keep: str | None
    ) -> None:
        try:
            files = packed.files()

            def write() -> None:
                self._store.save_steps(first, records)
                self._store.save(name, files)

            retried(write, f"checkpoint {self._store.where(name)}")
        except Exception as error:  # whatever a file system raises; handed to the training thread
            self.error = StorageError(
                f"checkpoint {self._store.where(name)} could not be written: "
                f"{str(error) or repr(error)}; the checkpoints before it are intact; make room or "
                "restore the storage, then the same command continues from the last of them"
            )
            with contextlib.suppress(Exception):  # a full disk gets its room back
                self._store.remove(name)
            return
        try:
            self._prune(name, keep)
        except Exception as error:  # the next checkpoint tries again
            log.warning("old checkpoints could not be removed and fill the storage: %s", error)

    def _prune(self, newest: str, keep: str | None) -> None:
        folders = {name: full for name, full in self._store.folders().items() if name <= newest}
        kept = [name for name, complete in folders.items() if complete][-self._num_kept :]
        for name in folders.keys() - {*kept, keep}:
            self._store.remove(name)


def retried(action: Callable[[], Any], what: str) -> Any:
    """Do it, again and again for RETRY_SECONDS while it raises an error that may go away."""
    pause, began = FIRST_PAUSE_SECONDS, time.monotonic()
    while True:
        try:
            result = action()
        except Exception as error:
            spent = time.monotonic() - began
            if not _may_go_away(error) or spent + pause > RETRY_SECONDS:
                raise
            if pause == FIRST_PAUSE_SECONDS:
                log.warning("%s failed and is tried again: %s", what, error)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        else:
            if pause > FIRST_PAUSE_SECONDS:
                log.info("%s succeeded after %.0f s", what, time.monotonic() - began)
            return result


def _may_go_away(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno not in FINAL_ERRORS
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    return not kinds.isdisjoint(AWAY_ERRORS)

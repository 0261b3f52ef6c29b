"""Warm-ups that trials of a sweep share: a checkpoint, the records of its steps, its history.

    <folder>/<key>/<epochs>/step_0000000120/..., steps/..., history.jsonl

A warm-up depends on the data, the model, the seed, batches and optimizer, and not on eta, lambda or
any other setting of the main phase; those it depends on are in its key. Nor does it depend on its
own length: a longer one begins like a shorter one, so a trial goes on from the longest that is not
too long. Resuming is exact, so a trial that did gives the result it would have given.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from service.config import RunConfig
from service.files import HISTORY_NAME, read_history, write_text
from service.storage import CheckpointStore
from training.checkpoint import STATE_NAME
from training.methods.midas import resolve

# Settings of MIDAS that warm-up looks at, but its length.
MIDAS_WARMUP = ("uni_reduction",)
# Sections that do not decide what a warm-up computes, or enter in another way.
APART = ("midas", "scaling", "checkpoint", "feed", "storage", "name", "experiment")


def warmup_key(config: RunConfig, data_digest: str) -> str:
    """32 hexadecimal digits: equal for configs whose warm-ups begin alike."""
    values = {name: value for name, value in config.resolved().items() if name not in APART}
    values["optim"] = {k: v for k, v in values["optim"].items() if k != "epochs"}
    values["data"] = data_digest
    midas = resolve(config.midas)
    values["midas"] = {name: getattr(midas, name) for name in MIDAS_WARMUP}
    text = json.dumps(values, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


class Warmups:
    """The shared warm-ups of one key.

    Args:
        folder: on storage that all nodes see.
    """

    def __init__(self, folder: Path, key: str):
        self._folder = folder / key

    def fork(self, store: CheckpointStore, run_folder: Path, most_epochs: int) -> tuple[int, float]:
        """Give a run that has no checkpoint the longest warm-up of at most `most_epochs` epochs.

        Returns:
            Epochs of the warm-up that the run need not train, and seconds they took; 0 if there is
            none, or the run has begun.
        """
        found = [path for path in self._folder.glob("[0-9]*") if int(path.name) <= most_epochs]
        if not found or store.names():
            return 0, 0.0
        return int(max(found).name), take_over(max(found), store, run_folder)

    def publish(self, store: CheckpointStore, run_folder: Path, epochs: int) -> None:
        """Put down the newest checkpoint of a run, which is at the end of its warm-up."""
        put_down(self._folder / f"{epochs:04d}", store, run_folder)


def put_down(place: Path, store: CheckpointStore, run_folder: Path) -> None:
    """Copy a run's newest checkpoint, the records of its steps and its history; once."""
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.parent / f".part-{uuid.uuid4().hex}"
    copy, name = CheckpointStore.at(str(part)), store.names()[-1]
    copy.save_steps(0, store.steps(0, store.num_steps()))
    copy.save(name, _marker_last(store.load(name)))
    shutil.copy(run_folder / HISTORY_NAME, part / HISTORY_NAME)
    with contextlib.suppress(OSError):  # another process was faster, with the same content
        os.rename(part, place)
    shutil.rmtree(part, ignore_errors=True)


def take_over(place: Path, store: CheckpointStore, run_folder: Path) -> float:
    """Make a run go on from what was put down; returns the seconds that it took to train."""
    source = CheckpointStore.at(str(place))
    name = source.names()[-1]
    rows = read_history(place / HISTORY_NAME)
    store.save_steps(0, source.steps(0, source.num_steps()))
    history = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    write_text(run_folder / HISTORY_NAME, history)
    store.save(name, _marker_last(source.load(name)))  # last: now the run has begun
    return sum(row["time/epoch_seconds"] for row in rows)


def _marker_last(files: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in files.items() if k != STATE_NAME} | {STATE_NAME: files[STATE_NAME]}

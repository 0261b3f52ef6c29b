"""How far a worker's reader reads ahead, chosen from what reading and training were measured to
take. It changes no result: the rows of a step are a function of its number.
"""

import math
import os
import time
from dataclasses import dataclass
from statistics import median

import numpy as np

from data.order import Read
from data.pipeline import ReadAhead
from data.reader import ShardReader
from service.config import FeedConfig

# A reader process also hands over what it read, which takes about as long again.
READING_MARGIN = 2.0
STEPS_MEASURED = 10
STORE_SHARE = 0.5


@dataclass(frozen=True)
class Node:
    """What the workers of this node share.

    Attributes:
        cpus: all cores.
        store_bytes: object store.
        workers: workers on this node, with `cpus_per_worker` cores each.
    """

    cpus: int
    store_bytes: int
    workers: int
    cpus_per_worker: int


def local_workers() -> int:
    """Workers on this node, as Ray Train tells its workers."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Feed:
    """What was measured, and what follows.

    Attributes:
        reader_rows: rows a second that one reader gives.
        training_rows: rows a second that training takes from this worker; None is not known yet.
        ahead: how far the stream reads ahead.
    """

    reader_rows: float
    training_rows: float | None
    ahead: ReadAhead

    def __str__(self) -> str:
        takes = "is not measured yet"
        if self.training_rows is not None:
            takes = f"takes {self.training_rows:,.0f}"
        return (
            f"feed: one reader gives {self.reader_rows:,.0f} rows/s, training {takes}: "
            f"{_counted(self.ahead.readers, 'reader')}, "
            f"{_counted(self.ahead.windows, 'window')} ahead"
        )


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'s' if count != 1 else ''}"


def choose(
    reader_rows: float,
    training_rows: float | None,
    *,
    window_nbytes: int,
    node: Node,
    config: FeedConfig,
) -> Feed:
    """As many readers as training needs, and a window more than they are busy with.

    Readers keep to the cores that no worker owns, windows to this worker's part of half of the
    object store; there is always one of each. What `config` fixes is taken.

    Args:
        reader_rows, training_rows: see `Feed`.
        window_nbytes: of the table of one read task.
    """
    spare = max(1, (node.cpus - node.workers * node.cpus_per_worker) // node.workers)
    in_store = int(STORE_SHARE * node.store_bytes / node.workers / window_nbytes)
    fitting = max(1, in_store - 1)  # the one in use is in the store too
    needed = math.ceil(READING_MARGIN * (training_rows or 0.0) / reader_rows)
    readers = config.readers or max(1, min(needed, spare, fitting))
    windows = config.windows_ahead or min(readers + 1, fitting)
    return Feed(reader_rows, training_rows, ReadAhead(readers, windows))


def reader_rows_per_second(reader: ShardReader) -> float:
    """Rows a second of reading one row group in this process, after another one."""
    rate = 0.0
    for group, rows in list(enumerate(reader.group_rows))[:2]:
        began = time.perf_counter()
        reader.gather([Read(group, 0, rows)], np.arange(rows), epoch=0)
        rate = rows / (time.perf_counter() - began)
    return rate


class FeedMeter:
    """Chooses how far to read ahead, at the start and again when the pace of training is known.

    Attributes:
        feed: what holds now. Every rank has its own: no other depends on it.
    """

    def __init__(self, reader: ShardReader, window_nbytes: int, node: Node, config: FeedConfig):
        self._window_nbytes, self._node, self._config = window_nbytes, node, config
        self._row_seconds: list[float] = []
        self.feed = self._choose(reader_rows_per_second(reader), None)

    def _choose(self, reader_rows: float, training_rows: float | None) -> Feed:
        return choose(
            reader_rows,
            training_rows,
            window_nbytes=self._window_nbytes,
            node=self._node,
            config=self._config,
        )

    def step(self, rows: int, seconds: float) -> None:
        """Count a step of training with `rows` of this worker, without the wait for them."""
        if self.feed.training_rows is not None:
            return
        self._row_seconds.append(seconds / rows)
        # The first steps compile, tune and allocate: not in the median.
        if len(self._row_seconds) == STEPS_MEASURED:
            self.feed = self._choose(self.feed.reader_rows, 1 / median(self._row_seconds))

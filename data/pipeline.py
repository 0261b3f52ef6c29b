"""Ray Data carries the order: one read task per window of the plan, blocks in plan order.

`train_stream` and `eval_stream` yield Arrow tables that are exactly this rank's part of a global
batch, or one evaluation chunk; `columns` turns a table into numpy arrays without copying.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import Datasource, ReadTask
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata

from data.order import Order, Read, chunk_reads
from data.schema import Manifest, Split

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

LANE = "lane"


@dataclass(frozen=True)
class ShardReader:
    """Reads slices of row groups of one split of a prepared folder."""

    folder: str
    manifest: Manifest
    split: Split

    @property
    def group_rows(self) -> tuple[int, ...]:
        """Rows of every row group of the split, in shard order."""
        return tuple(n for shard in self.manifest.splits[self.split] for n in shard.row_groups)

    def read(self, reads: Iterable[Read]) -> pa.Table:
        """Read slices and concatenate them; whole row groups, memory mapped, one thread."""
        where = [
            (shard.path, index)
            for shard in self.manifest.splits[self.split]
            for index in range(len(shard.row_groups))
        ]
        names = ["sample_id", "label", *(m.name for m in self.manifest.modalities)]
        tables = []
        for path, part in groupby(reads, key=lambda read: where[read.row_group][0]):
            with pq.ParquetFile(Path(self.folder) / path, memory_map=True) as file:
                for read in part:
                    group = file.read_row_group(where[read.row_group][1], names, use_threads=False)
                    tables.append(group.slice(read.start, read.stop - read.start))
        return pa.concat_tables(tables)


def read_window(
    reader: ShardReader, order: Order, lanes: range, epoch: int, index: int
) -> list[pa.Table]:
    """One window of `lanes` as a table in batch order, with a `lane` column."""
    window = order.window(epoch, index, lanes)
    table = reader.read(window.reads).take(pa.array(window.take))
    return [table.append_column(LANE, pa.array(window.lane))]


def read_chunks(reader: ShardReader, chunk_rows: int, first: int, last: int) -> list[pa.Table]:
    """Evaluation chunks [first, last) in shard order; `lane` is the chunk index."""
    start, stop = first * chunk_rows, min(last * chunk_rows, reader.manifest.rows(reader.split))
    table = reader.read(chunk_reads(reader.group_rows, start, stop))
    return [table.append_column(LANE, pa.array(np.arange(start, stop) // chunk_rows))]


class _Pace(ExecutionCallback):
    """Lets Ray Data's scheduling loop run 50 times a second.

    The loop does not wait while its output is full: it would spin, in a thread of the training
    process, and take half of a one-core worker's time (step time 0.25 s against 0.07 s).
    """

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        time.sleep(0.02)


class _PlannedReads(Datasource):
    """Read tasks that were planned outside: Ray schedules them, we decide what is in them."""

    def __init__(self, reads: list[Callable[[], list[pa.Table]]], rows: list[int], row_nbytes: int):
        super().__init__()
        self._reads = reads
        self._rows = rows
        self._row_nbytes = row_nbytes

    def estimate_inmemory_data_size(self) -> int:
        return sum(self._rows) * self._row_nbytes

    def get_read_tasks(self, parallelism, per_task_row_limit=None, data_context=None):
        return [
            ReadTask(read, BlockMetadata(rows, rows * self._row_nbytes, None, None))
            for read, rows in zip(self._reads, self._rows, strict=True)
        ]


def train_stream(
    reader: ShardReader, order: Order, *, rank: int, world_size: int, epochs: range, step: int = 0
) -> Iterator[pa.Table]:
    """This rank's part of every global batch of `epochs`, in order.

    Args:
        step: first step wanted of the first epoch; the rows before it are not delivered.
    """
    lanes = order.lanes_of(rank, world_size)
    first = order.window_of(step)
    plan = [
        (epoch, window)
        for epoch in epochs
        for window in range(first if epoch == epochs.start else 0, order.num_windows)
    ]
    steps = range(order.num_steps)
    rows = [
        [order.batch_rows(i, lanes) for i in steps[start : start + order.window_batches]]
        for start in steps[:: order.window_batches]
    ]
    reads = [partial(read_window, reader, order, lanes, *item) for item in plan]
    tables = _execute(reads, [sum(rows[w]) for _, w in plan], reader.manifest.row_nbytes)
    batches = cut(tables, (count for _, window in plan for count in rows[window]))
    for _ in range(step - first * order.window_batches):
        next(batches)
    yield from batches


def eval_stream(
    reader: ShardReader, *, chunk_rows: int, rank: int, world_size: int, task_rows: int
) -> Iterator[pa.Table]:
    """This rank's chunks of at most `chunk_rows` rows; all ranks together have each row once.

    Args:
        task_rows: rows per read task, at least one chunk.
    """
    rows = reader.manifest.rows(reader.split)
    num_chunks = -(-rows // chunk_rows)
    first, last = rank * num_chunks // world_size, (rank + 1) * num_chunks // world_size
    if first == last:
        return
    per_task = max(1, task_rows // chunk_rows)
    starts = range(first, last, per_task)
    reads = [
        partial(read_chunks, reader, chunk_rows, start, min(start + per_task, last))
        for start in starts
    ]
    counts = [min(chunk_rows, rows - chunk * chunk_rows) for chunk in range(first, last)]
    sizes = [sum(counts[start - first :][:per_task]) for start in starts]
    yield from cut(_execute(reads, sizes, reader.manifest.row_nbytes), iter(counts))


def _execute(
    reads: list[Callable[[], list[pa.Table]]], rows: list[int], row_nbytes: int
) -> Iterator[pa.Table]:
    """Run read tasks on Ray Data and yield their blocks in task order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [_Pace]
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    dataset = ray.data.read_datasource(
        _PlannedReads(reads, rows, row_nbytes),
        # More blocks than tasks would make Ray split every table again.
        override_num_blocks=len(reads),
        num_cpus=1,
    )
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


def cut(tables: Iterable[pa.Table], counts: Iterator[int]) -> Iterator[pa.Table]:
    """Cut a stream of tables into tables of exactly `counts` rows; slices share memory."""
    source = iter(tables)
    held: list[pa.Table] = []
    for count in counts:
        have = sum(table.num_rows for table in held)
        while have < count:
            table = next(source)
            held.append(table)
            have += table.num_rows
        joined = pa.concat_tables(held) if len(held) > 1 else held[0]
        yield joined.slice(0, count)
        held = [joined.slice(count)] if joined.num_rows > count else []


def columns(table: pa.Table, manifest: Manifest) -> dict[str, np.ndarray]:
    """Numpy columns of a table: int64 `sample_id`, `label`, `lane`, and one array per modality.

    Modality arrays are (rows, *shape) views of the Arrow buffers: read only.
    """
    result = {name: table.column(name).to_numpy() for name in ("sample_id", "label", LANE)}
    for modality in manifest.modalities:
        column = table.column(modality.name)
        chunk = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        data = chunk.buffers()[1]
        flat = np.frombuffer(
            data,
            dtype=modality.dtype,
            count=len(chunk) * int(np.prod(modality.shape)),
            offset=chunk.offset * modality.nbytes,
        )
        result[modality.name] = flat.reshape(len(chunk), *modality.shape)
    return result

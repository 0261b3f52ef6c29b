"""Ray Data carries the order: one read task per window of the plan, blocks in plan order.

`train_stream` and `eval_stream` yield Arrow tables that are exactly this rank's part of a global
batch, or one evaluation chunk; `columns` turns a table into numpy arrays without copying.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from pydantic import BaseModel
from ray.data import DataContext, Datasource, ExecutionResources, ReadTask
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata

from data.draws import uniform
from data.folder import Folder
from data.order import Entries, Order, Read, chunk_reads
from data.pictures import decode_jpeg
from data.schema import DataError, Manifest, Modality, Split

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

LANE = "lane"
KEEP = "keep"
PRESENT = "present"
# Read tasks of one stream that run at a time, and tables that they may be ahead of the one in use.
CONCURRENT_READS = 2
TABLES_AHEAD = 3
# Ray Data stores all tasks of an execution before the first runs (20,000 took half a minute).
READS_PER_EXECUTION = 1000
RESULT_BYTES = 1 << 20
ITEMS_PER_EXECUTION = 512  # items are stored like tasks, and may hold arrays


@dataclass(frozen=True)
class ShardReader:
    """Reads slices of row groups of one split of a prepared folder.

    Attributes:
        folder: path or URI.
        seed: of training; with the epoch it says which candidates of a clip are delivered.
    """

    folder: str
    manifest: Manifest
    split: Split
    seed: int = 0

    @property
    def group_rows(self) -> tuple[int, ...]:
        """Rows of every row group of the split, in shard order."""
        return tuple(n for shard in self.manifest.splits[self.split] for n in shard.row_groups)

    def gather(
        self,
        reads: Iterable[Read],
        take: np.ndarray,
        *,
        entries: Entries | None = None,
        epoch: int | None = None,
    ) -> pa.Table:
        """Rows `take`, a permutation, of the concatenated slices, as they are delivered.

        Rows are copied to their places, one row group at a time. To concatenate first and use
        Arrow's `take` needs twice the memory, and touching it took longer than the reading.

        Args:
            entries: if given, slices are of a row group's entries, and a column `keep` is added.
            epoch: of training, to draw candidates of clips; None takes the middle ones.
        """
        schema = self._schema
        if entries is not None:
            schema = schema.append(pa.field(KEEP, pa.int64()))
        gathered = {field.name: _empty(field.type, len(take)) for field in schema}
        modalities = {modality.name: modality for modality in self.manifest.modalities}
        place = np.argsort(take)  # the inverse permutation
        start = 0
        for part in self._parts(reads, entries):
            where = place[start : start + part.num_rows]
            for name, values in gathered.items():
                modality = modalities.get(name)
                if modality is None or self._is_plain(modality):
                    values[where] = _values(part.column(name))
                else:
                    values[where] = self._delivered(modality, part, epoch)
            start += part.num_rows
        return pa.Table.from_arrays([_array(v) for v in gathered.values()], schema=schema)

    @property
    def _schema(self) -> pa.Schema:
        """Columns as they are delivered."""
        widths = {m.name: m.nbytes(self.split) for m in self.manifest.modalities}
        return pa.schema(
            [
                field.with_type(pa.binary(widths[field.name])) if field.name in widths else field
                for field in self.manifest.arrow_schema(self.split)
                if field.name not in ("key", "group")
            ]
        )

    def _is_plain(self, modality: Modality) -> bool:
        """Whether rows are delivered as they are stored."""
        drawn = self.split == "train" and modality.candidates > 1
        return modality.storage == "tensor" and not drawn

    def _delivered(self, modality: Modality, part: pa.Table, epoch: int | None) -> np.ndarray:
        """(rows, bytes) uint8: frames chosen, pictures decoded."""
        column, shape = part.column(modality.name), modality.delivered(self.split)
        candidates = modality.candidates if self.split == "train" else 1
        frames = shape[0] if candidates > 1 else int(np.prod(shape[:-3]))
        chosen = np.full((part.num_rows, frames), candidates // 2)
        if epoch is not None and candidates > 1:
            purpose = f"candidates/{modality.name}"
            sample_id = part.column("sample_id").to_numpy()
            draw = uniform(self.seed, purpose, epoch, sample_id, frames)
            chosen = (draw * candidates).astype(np.int64)
        wanted = np.arange(frames) * candidates + chosen
        if modality.storage == "tensor":
            stored = _values(column).reshape(
                part.num_rows, frames * candidates, math.prod(shape[1:])
            )
            rows = np.arange(part.num_rows)[:, None]
            return stored[rows, wanted].reshape(part.num_rows, modality.nbytes(self.split))
        out = np.empty((part.num_rows, frames, *shape[-3:]), dtype=np.uint8)
        for data, numbers, row in zip(column, wanted.tolist(), out, strict=True):
            decode_jpeg(data.as_py(), numbers, row)
        return out.reshape(part.num_rows, modality.nbytes(self.split))

    def _parts(self, reads: Iterable[Read], entries: Entries | None) -> Iterator[pa.Table]:
        """The slices, one by one; whole row groups are read by one thread, mapped if local."""
        where = [
            (shard.path, index)
            for shard in self.manifest.splits[self.split]
            for index in range(len(shard.row_groups))
        ]
        names, folder = self._schema.names, Folder.at(self.folder)
        for path, part in groupby(reads, key=lambda read: where[read.row_group][0]):
            with folder.open(path) as source, pq.ParquetFile(source) as file:
                for read in part:
                    group = file.read_row_group(where[read.row_group][1], names, use_threads=False)
                    yield _part(group, read, entries)


def _part(group: pa.Table, read: Read, entries: Entries | None) -> pa.Table:
    if entries is None:
        return group.slice(read.start, read.stop - read.start)
    row, keep = entries.part(read)
    return group.take(pa.array(row)).append_column(KEEP, pa.array(keep))


def _empty(type_: pa.DataType, rows: int) -> np.ndarray:
    if isinstance(type_, pa.FixedSizeBinaryType):
        return np.empty((rows, type_.byte_width), dtype=np.uint8)
    return np.empty(rows, dtype=type_.to_pandas_dtype())


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers, or the bytes of every row as (rows, bytes); shares memory where it can."""
    chunk = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if not isinstance(chunk.type, pa.FixedSizeBinaryType):
        return chunk.to_numpy()
    nbytes = chunk.type.byte_width
    start, count = chunk.offset * nbytes, len(chunk) * nbytes
    return np.frombuffer(chunk.buffers()[1], np.uint8, count, start).reshape(-1, nbytes)


def _array(values: np.ndarray) -> pa.Array:
    """The opposite of `_values`."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(values.shape[1]), len(values), [None, pa.py_buffer(values)]
    )


@dataclass(frozen=True)
class SampleIndex:
    """Where every sample of a split is, for `locate`.

    Attributes:
        sample_id: (N,) int64, ascending.
        position: (N,) int64 row number of each sample in shard order.
        offsets: (G + 1,) int64 row number where each row group begins, and N.
    """

    sample_id: np.ndarray
    position: np.ndarray
    offsets: np.ndarray


def sample_index(reader: ShardReader) -> SampleIndex:
    """Read the sample ids of a split; costs 8 bytes a row of reading, 16 of memory."""
    folder, parts = Folder.at(reader.folder), []
    for shard in reader.manifest.splits[reader.split]:
        with folder.open(shard.path) as file:
            parts.append(pq.read_table(file, columns=["sample_id"]).column(0).to_numpy())
    sample_id = np.concatenate(parts)
    position = np.argsort(sample_id, kind="stable")
    return SampleIndex(sample_id[position], position, np.cumsum([0, *reader.group_rows]))


def locate(index: SampleIndex, sample_id: np.ndarray, keep: np.ndarray) -> Entries:
    """Entries of an epoch that has each of these samples, with these modalities kept.

    The result does not depend on the order of the arguments' rows.

    Args:
        sample_id: (n,) int64; repeats allowed.
        keep: (n,) int64 bit masks, see `Entries`.

    Raises:
        DataError: a sample is not in the split.
    """
    found = np.searchsorted(index.sample_id, sample_id).clip(max=len(index.sample_id) - 1)
    unknown = sample_id[index.sample_id[found] != sample_id]
    if len(unknown):
        raise DataError(
            f"{len(unknown)} of {len(sample_id)} resampled rows are not in the split, the first is "
            f"sample_id={unknown[0]}; resample only rows of this prepared set's split"
        )
    position = index.position[found]
    order = np.lexsort((keep, position))
    position = position[order]
    offsets = np.searchsorted(position, index.offsets)
    group = np.searchsorted(index.offsets, position, side="right") - 1
    return Entries(offsets, position - index.offsets[group], keep[order].astype(np.int64))


def read_window(
    reader: ShardReader, order: Order, entries: Entries | None, lanes: range, epoch: int, index: int
) -> list[pa.Table]:
    """One window of `lanes` as a table in batch order, with a `lane` column."""
    window = order.window(epoch, index, lanes)
    table = reader.gather(window.reads, window.take, entries=entries, epoch=epoch)
    return [table.append_column(LANE, pa.array(window.lane))]


def read_chunks(reader: ShardReader, chunk_rows: int, first: int, last: int) -> list[pa.Table]:
    """Evaluation chunks [first, last) in shard order; `lane` is the chunk index."""
    start, stop = first * chunk_rows, min(last * chunk_rows, reader.manifest.rows(reader.split))
    reads = chunk_reads(reader.group_rows, start, stop)
    table = reader.gather(reads, np.arange(stop - start))
    return [table.append_column(LANE, pa.array(np.arange(start, stop) // chunk_rows))]


class _Pace(ExecutionCallback):
    """Lets Ray Data's scheduling loop run 50 times a second while nobody waits for its output.

    The loop does not wait while its output is full: it would spin, in a thread of the training
    process, and take half of a one-core worker's time (step time 0.25 s against 0.07 s).
    """

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        assert executor._output_node is not None
        _, state = executor._output_node
        if state.num_waiting_consumers == 0:
            time.sleep(0.02)


class _PlannedReads(Datasource):
    """Read tasks that were planned outside: Ray schedules them, we decide what is in them."""

    def __init__(
        self, reads: list[Callable[[], list[pa.Table]]], rows: Sequence[int], row_nbytes: int
    ):
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
    reader: ShardReader,
    order: Order,
    *,
    rank: int,
    world_size: int,
    epochs: range,
    step: int = 0,
    entries: Entries | None = None,
) -> Iterator[pa.Table]:
    """This rank's part of every global batch of `epochs`, in order.

    Args:
        order: order of the split's rows, or of `entries` if they are given.
        step: first step wanted of the first epoch; the rows before it are not delivered.
        entries: resampled rows to read instead of the split's; the tables get a column `keep`.
    """
    lanes = order.lanes_of(rank, world_size)
    first = order.window_of(step)
    plan = [
        (epoch, window)
        for epoch in epochs
        for window in range(first if epoch == epochs.start else 0, order.num_windows)
    ]
    tables = run_reads(
        read_window,
        (reader, order, entries),
        [(lanes, *item) for item in plan],
        [order.window_rows(window, lanes) for _, window in plan],
        reader.manifest.row_nbytes(reader.split),
    )
    skipped = first * order.window_batches
    steps = range(skipped, len(epochs) * order.num_steps)
    batches = cut(tables, (order.batch_rows(i % order.num_steps, lanes) for i in steps))
    for _ in range(step - skipped):
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
    spans = [(start, min(start + per_task, last)) for start in range(first, last, per_task)]
    tables = run_reads(
        read_chunks,
        (reader, chunk_rows),
        spans,
        [min(stop * chunk_rows, rows) - start * chunk_rows for start, stop in spans],
        reader.manifest.row_nbytes(reader.split),
    )
    yield from cut(tables, (min(chunk_rows, rows - i * chunk_rows) for i in range(first, last)))


def run_reads(
    read: Callable[..., list[pa.Table]],
    shared: tuple[Any, ...],
    items: Sequence[tuple[Any, ...]],
    rows: Sequence[int],
    row_nbytes: int,
) -> Iterator[pa.Table]:
    """Run `read(*shared, *item)` for every item on Ray Data; yield its tables in item order.

    One task makes one block whatever its size, so it always ends and never waits, half done, for
    somebody to take its output. Tasks ask for no CPU: a stream that is paused, or workers that use
    all CPUs, cannot keep another stream from reading. Their number and memory are bounded instead.

    Args:
        shared: stored once; a task holds a reference to it.
        rows: rows of every item's table.
    """
    reads = small_reads(read, shared, items)
    for first in range(0, len(reads), READS_PER_EXECUTION):
        part = slice(first, first + READS_PER_EXECUTION)
        dataset = _dataset(
            reads[part], rows[part], row_nbytes, num_cpus=0, concurrency=CONCURRENT_READS
        )
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def work_anywhere(
    function: Callable[[Any], BaseModel], items: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """Run `function(item)` for every item on all nodes, one CPU each; yield results as they come.

    Args:
        function: sent once; returns a model, which comes back as its JSON values.
    """
    for first in range(0, len(items), ITEMS_PER_EXECUTION):
        part = items[first : first + ITEMS_PER_EXECUTION]
        stored = [ray.put(item) for item in part]  # an item may hold arrays; a task must be small
        reads = small_reads(_work, (function,), [(reference,) for reference in stored])
        dataset = _dataset(reads, [1] * len(reads), RESULT_BYTES, num_cpus=1, concurrency=None)
        tables: Any = dataset.iter_batches(batch_size=1, batch_format="pyarrow")
        for table in tables:
            yield json.loads(table.column("result")[0].as_py())


def _work(function: Callable[[Any], BaseModel], item: "ray.ObjectRef[Any]") -> list[pa.Table]:
    return [pa.table({"result": [function(ray.get(item)).model_dump_json()]})]


def small_reads(
    read: Callable[..., list[pa.Table]], shared: tuple[Any, ...], items: Sequence[tuple[Any, ...]]
) -> list[Callable[[], list[pa.Table]]]:
    """`read(*shared, *item)` for every item; each holds a reference to the one stored `shared`."""
    stored = ray.put(shared)
    return [partial(_fetch_and_read, stored, read, item) for item in items]


def _fetch_and_read(
    stored: "ray.ObjectRef[tuple[Any, ...]]",
    read: Callable[..., list[pa.Table]],
    item: tuple[Any, ...],
) -> list[pa.Table]:
    return read(*ray.get(stored), *item)


def _dataset(
    reads: list[Callable[[], list[pa.Table]]],
    rows: Sequence[int],
    row_nbytes: int,
    *,
    num_cpus: int,
    concurrency: int | None,
) -> ray.data.Dataset:
    with DataContext.current(_context(TABLES_AHEAD * max(rows) * row_nbytes)):
        return ray.data.read_datasource(
            _PlannedReads(reads, rows, row_nbytes),
            # More blocks than tasks would make Ray split every table again.
            override_num_blocks=len(reads),
            num_cpus=num_cpus,
            concurrency=min(concurrency or len(reads), len(reads)),
        )


def _context(ahead_bytes: int) -> DataContext:
    """A copy of Ray Data's settings with ours; the process's own stay as they are."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = None
    context.execution_options.preserve_order = True
    # Without it every stream would take half of the object store, and there are several per worker.
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=ahead_bytes
    )
    context.custom_execution_callback_classes = [_Pace]
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return context


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


def columns(table: pa.Table, manifest: Manifest, split: Split) -> dict[str, np.ndarray]:
    """Numpy columns of a table: int64 `sample_id`, `label`, `lane`, and one array per modality.

    Resampled tables have int64 `keep`, sets with optional modalities int64 `present`. Modality
    arrays are (rows, *shape) views of the Arrow buffers: read only.
    """
    names = ["sample_id", "label", LANE, *({KEEP, PRESENT} & set(table.column_names))]
    result = {name: table.column(name).to_numpy() for name in names}
    for modality in manifest.modalities:
        values = _values(table.column(modality.name)).view(modality.dtype)
        result[modality.name] = values.reshape(len(values), *modality.delivered(split))
    return result

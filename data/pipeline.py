"""Ray Data carries the order: one read task per window of the plan, blocks in plan order.

`train_stream` and `eval_stream` yield Arrow tables that are exactly this rank's part of a global
batch, or one evaluation chunk.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from pydantic import BaseModel
from ray.data import DataContext, Datasource, ExecutionResources, ReadTask
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata

from data.order import Entries, Order
from data.reader import ShardReader, cut, read_chunks, read_window

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

# Ray Data stores all tasks of an execution before the first runs (20,000 took half a minute).
READS_PER_EXECUTION = 1000
RESULT_BYTES = 1 << 20
ITEMS_PER_EXECUTION = 512  # items are stored like tasks, and may hold arrays

# Seconds that Ray Data's scheduler rests, and between looks at whether it should go on.
SHORTEST_REST, LONGEST_REST, POLL = 0.1, 1.0, 0.05


@dataclass(frozen=True)
class ReadAhead:
    """How far a stream reads ahead; what it yields does not depend on it.

    Attributes:
        readers: read tasks that run at a time.
        windows: tables beyond the one in use that are in memory or being read.
    """

    readers: int = 1
    windows: int = 2


def node_resources() -> tuple[int, int]:
    """CPUs, and bytes of the object store, that Ray has on this node."""
    here = ray.get_runtime_context().get_node_id()
    found = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return int(found.get("CPU", 0)), int(found["object_store_memory"])


class _Pace(ExecutionCallback):
    """Rests Ray Data's scheduling loop while nobody waits for its output: a tenth of a second, and
    twice as long each time it finds nothing new, up to a second, until a table is taken.

    The loop does not wait while its output is full: it would spin, in a thread of the training
    process, and take half of a one-core worker's time (step time 0.25 s against 0.07 s). At 50
    rounds a second it still took 7 % of a core, at ten 2.5 %.
    """

    def __init__(self) -> None:
        self._seen: list[int] = []
        self._rest = SHORTEST_REST

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        assert executor._output_node is not None
        assert executor._topology is not None
        _, state = executor._output_node
        ready = len(state.output_queue)
        found = [ready, *(operator.num_active_tasks() for operator in executor._topology)]
        self._rest = min(2 * self._rest, LONGEST_REST) if found == self._seen else SHORTEST_REST
        self._seen = found
        until = time.monotonic() + self._rest
        while len(state.output_queue) == ready and time.monotonic() < until:
            if state.num_waiting_consumers or executor._shutdown:
                return
            time.sleep(POLL)


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
    ahead: ReadAhead,
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
        ahead,
    )
    skipped = first * order.window_batches
    steps = range(skipped, len(epochs) * order.num_steps)
    batches = cut(tables, (order.batch_rows(i % order.num_steps, lanes) for i in steps))
    for _ in range(step - skipped):
        next(batches)
    yield from batches


def eval_stream(
    reader: ShardReader,
    *,
    chunk_rows: int,
    rank: int,
    world_size: int,
    task_rows: int,
    ahead: ReadAhead,
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
        ahead,
    )
    yield from cut(tables, (min(chunk_rows, rows - i * chunk_rows) for i in range(first, last)))


def run_reads(
    read: Callable[..., list[pa.Table]],
    shared: tuple[Any, ...],
    items: Sequence[tuple[Any, ...]],
    rows: Sequence[int],
    row_nbytes: int,
    ahead: ReadAhead,
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
        # The table in use counts as well.
        store_bytes = (1 + ahead.windows) * max(rows[part]) * row_nbytes
        dataset = _dataset(
            *(reads[part], rows[part], row_nbytes, store_bytes),
            num_cpus=0,
            concurrency=ahead.readers,
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
        dataset = _dataset(
            *(reads, [1] * len(reads), RESULT_BYTES, 3 * RESULT_BYTES),
            num_cpus=1,
            concurrency=len(reads),
        )
        tables: Any = dataset.iter_batches(batch_size=1, batch_format="pyarrow")
        for table in tables:
            yield json.loads(table.column("result")[0].as_py())


def map_parts(
    read: Callable[..., list[pa.Table]],
    shared: tuple[Any, ...],
    items: Sequence[tuple[Any, ...]],
    rows: Sequence[int],
    row_nbytes: int,
    make: Callable[[], Callable[[pa.Table], pa.Table]],
    workers: "Workers",
) -> Iterator[pa.Table]:
    """The tables of `read(*shared, *item)`, changed by functions that live in actors, in order.

    Args:
        shared: stored once, like `make`.
        rows: of every item's table; all have as many as the first but the last.
        make: makes the function, once in every actor.
    """
    maker = ray.put(make)
    for first in range(0, len(items), READS_PER_EXECUTION):
        part = slice(first, first + READS_PER_EXECUTION)
        stored = [(ray.put(item),) for item in items[part]]  # an item may hold arrays
        reads = small_reads(_read_stored, (read, shared), stored)
        in_use = workers.readers + 2 * workers.count
        dataset = _dataset(
            *(reads, rows[part], row_nbytes, 2 * in_use * rows[0] * row_nbytes),
            num_cpus=0,
            concurrency=workers.readers,
        )
        changed = dataset.map_batches(
            _Mapper,
            fn_constructor_args=([maker],),  # in a list it stays a reference
            batch_size=rows[0],
            batch_format="pyarrow",
            num_cpus=workers.cpus,
            num_gpus=workers.gpus,
            compute=ray.data.ActorPoolStrategy(size=workers.count),
            max_restarts=workers.max_restarts,
        )
        tables: Any = changed.iter_batches(batch_size=None, batch_format="pyarrow")
        yield from tables


@dataclass(frozen=True)
class Workers:
    """Actors of `map_parts`, and the tasks that read for them.

    Attributes:
        count: actors.
        cpus, gpus: of each.
        readers: read tasks that run at a time; they ask for no CPU.
        max_restarts: of each that dies; -1 for any number.
    """

    count: int
    cpus: int
    gpus: int
    readers: int
    max_restarts: int


class _Mapper:
    """An actor that holds one function."""

    def __init__(self, maker: "list[ray.ObjectRef[Any]]"):
        self._function = ray.get(maker[0])()

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._function(table)


def _read_stored(
    read: Callable[..., list[pa.Table]],
    shared: tuple[Any, ...],
    item: "ray.ObjectRef[tuple[Any, ...]]",
) -> list[pa.Table]:
    return read(*shared, *ray.get(item))


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
    store_bytes: int,
    *,
    num_cpus: int,
    concurrency: int,
) -> ray.data.Dataset:
    with DataContext.current(_context(store_bytes)):
        return ray.data.read_datasource(
            _PlannedReads(reads, rows, row_nbytes),
            # More blocks than tasks would make Ray split every table again.
            override_num_blocks=len(reads),
            num_cpus=num_cpus,
            concurrency=min(concurrency, len(reads)),
        )


def _context(store_bytes: int) -> DataContext:
    """A copy of Ray Data's settings with ours; the process's own stay as they are."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = None
    context.execution_options.preserve_order = True
    # Without it every stream would take half of the object store, and there are several per worker.
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=store_bytes
    )
    context.custom_execution_callback_classes = [_Pace]
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # that it is off
    return context

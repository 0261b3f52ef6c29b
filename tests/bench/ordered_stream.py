"""Rows a second of the ordered stream against pyarrow and against plain, unshuffled Ray Data;
prints one JSON line.

    python tests/bench/ordered_stream.py [--files 20] [--epochs 3] [--rounds 5] [--window-mib 256]

All sides read the same Parquet files epoch after epoch, alone and in turn, and hand out batches of
128 rows as torch tensors without a copy. From each tensor the sum is taken over its bytes read as
int64, so that all touch every byte once. The clock includes the start of Ray Data's execution, one
for all epochs of `ordered`, as in training, and one an epoch of `plain`.

- `ordered`: `train_stream`, through Ray Data;
- `pyarrow`: the same rows in the same order by pyarrow alone, in this process, one thread: the row
  groups of a window from memory-mapped files (`read_row_group(use_threads=False)`), `take` of the
  window's permutation;
- `pyarrow_groups`: the same, but rows change places inside their row group only, which needs less
  memory;
- `plain`: Ray Data at its best on this data: the old Parquet reader, one block per file, an Arrow
  collate function without a copy, and the bounds that the ordered stream has (tasks at a time,
  memory, no CPU asked for); not shuffled.

The order of the sides is reversed in every other round, so that whatever else the machine does hits
them all; ratios are taken round by round.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from service.environment import configure_ray  # noqa: E402

configure_ray()  # before Ray is imported

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import ray  # noqa: E402
import ray.data  # noqa: E402
import torch  # noqa: E402
from method_step import machine  # noqa: E402
from ray.data import DataContext, ExecutionResources  # noqa: E402
from ray.data.collate_fn import ArrowBatchCollateFn  # noqa: E402
from shards import GLOBAL_BATCH_SIZE, make_order, write_shards  # noqa: E402
from torch import Tensor  # noqa: E402

from data.order import Order  # noqa: E402
from data.pipeline import ReadAhead, train_stream  # noqa: E402
from data.reader import LANE, ShardReader, columns, cut  # noqa: E402
from data.schema import Manifest  # noqa: E402

OBJECT_STORE_BYTES = 3 << 30
AHEAD = ReadAhead()
Tensors = dict[str, Tensor]


class ZeroCopyCollate(ArrowBatchCollateFn):
    """Arrow table to torch tensors that share its memory."""

    def __init__(self, manifest: Manifest):
        self._manifest = manifest

    def __call__(self, batch: pa.Table) -> Tensors:
        # Plain tables have no lanes; any int64 column stands in for them.
        return tensors(batch.append_column(LANE, batch.column("label")), self._manifest)


def tensors(table: pa.Table, manifest: Manifest) -> Tensors:
    return {
        name: torch.from_numpy(array) for name, array in columns(table, manifest, "train").items()
    }


def ordered_batches(reader: ShardReader, order: Order, epochs: range) -> Iterator[Tensors]:
    for table in train_stream(reader, order, rank=0, world_size=1, epochs=epochs, ahead=AHEAD):
        yield tensors(table, reader.manifest)


def pyarrow_batches(reader: ShardReader, order: Order, epoch: int) -> Iterator[Tensors]:
    lanes = range(order.lanes)
    counts = (order.batch_rows(step, lanes) for step in range(order.num_steps))
    for table in cut(permuted_windows(reader, order, epoch), counts):
        yield tensors(table.append_column(LANE, table.column("label")), reader.manifest)


def permuted_windows(reader: ShardReader, order: Order, epoch: int) -> Iterator[pa.Table]:
    groups = row_groups(reader)
    for index in range(order.num_windows):
        window = order.window(epoch, index, range(order.lanes))
        parts = [
            groups[read.row_group]().slice(read.start, read.stop - read.start)
            for read in window.reads
        ]
        yield pa.concat_tables(parts).take(pa.array(window.take))


def pyarrow_groups_batches(reader: ShardReader, epoch: int) -> Iterator[Tensors]:
    rows = reader.manifest.rows("train")
    counts = (min(GLOBAL_BATCH_SIZE, rows - first) for first in range(0, rows, GLOBAL_BATCH_SIZE))
    for table in cut(permuted_groups(reader, epoch), counts):
        yield tensors(table.append_column(LANE, table.column("label")), reader.manifest)


def permuted_groups(reader: ShardReader, epoch: int) -> Iterator[pa.Table]:
    rng = np.random.default_rng(epoch)
    groups = row_groups(reader)
    for place in rng.permutation(len(groups)):
        table = groups[place]()
        yield table.take(pa.array(rng.permutation(table.num_rows)))


def row_groups(reader: ShardReader) -> list[Callable[[], pa.Table]]:
    """Reads of every row group, by one thread."""
    names = ["sample_id", "label", *(m.name for m in reader.manifest.modalities)]
    files = [
        pq.ParquetFile(Path(reader.folder) / shard.path, memory_map=True)
        for shard in reader.manifest.splits["train"]
    ]
    return [
        partial(file.read_row_group, index, names, use_threads=False)
        for file in files
        for index in range(file.num_row_groups)
    ]


def plain_batches(reader: ShardReader, ahead_bytes: int) -> Iterator[Tensors]:
    paths = [str(Path(reader.folder) / shard.path) for shard in reader.manifest.splits["train"]]
    names = ["sample_id", "label", *(m.name for m in reader.manifest.modalities)]
    with DataContext.current(plain_context(ahead_bytes)):
        dataset = ray.data.read_parquet(
            paths,
            columns=names,
            override_num_blocks=len(paths),
            num_cpus=0,
            concurrency=AHEAD.readers,
        )
        yield from dataset.iter_torch_batches(
            batch_size=GLOBAL_BATCH_SIZE,
            collate_fn=ZeroCopyCollate(reader.manifest),
            prefetch_batches=2,
        )


def plain_context(ahead_bytes: int) -> DataContext:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.use_datasource_v2 = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=ahead_bytes
    )
    return context


def rows_per_second(batches: Iterator[Tensors], expected_rows: int) -> float:
    began = time.perf_counter()
    rows = 0
    for batch in batches:
        rows += len(batch["label"])
        for tensor in batch.values():
            tensor.reshape(-1).view(torch.int64).sum()
    seconds = time.perf_counter() - began
    assert rows == expected_rows, (rows, expected_rows)
    return rows / seconds


def measure(
    sides: dict[str, Callable[[], Iterator[Tensors]]], rows: int, rounds: int
) -> dict[str, list[float]]:
    """Rows a second of every side; entries of equal position are neighbours in time."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(1 + rounds):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            rate = rows_per_second(sides[name](), rows)
            if turn > 0:  # the first round warms the page cache and starts Ray's workers
                found[name].append(rate)
    return found


def run(files: int, window_mib: int, num_epochs: int, rounds: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        reader = write_shards(Path(folder), files)
        order = make_order(reader, window_mib)
        row_nbytes = reader.manifest.row_nbytes("train")
        ahead = (1 + AHEAD.windows) * order.window_rows(0, range(order.lanes)) * row_nbytes
        epochs = range(num_epochs)

        def by_epoch(batches: Callable[[int], Iterator[Tensors]]) -> Iterator[Tensors]:
            return chain.from_iterable(map(batches, epochs))

        sides = {
            "ordered": lambda: ordered_batches(reader, order, epochs),
            "pyarrow": lambda: by_epoch(partial(pyarrow_batches, reader, order)),
            "pyarrow_groups": lambda: by_epoch(partial(pyarrow_groups_batches, reader)),
            "plain": lambda: by_epoch(lambda _: plain_batches(reader, ahead)),
        }
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            return measure(sides, num_epochs * order.num_rows, rounds)
        finally:
            ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=20, help="files of 1,024 rows, 39 MB each")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of a round")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each side")
    parser.add_argument("--window-mib", type=int, default=256, help="train.shuffle_window_mib")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    torch.set_num_threads(1)
    about = machine(threads=1)
    found = run(args.files, args.window_mib, args.epochs, args.rounds)
    result: dict[str, object] = {
        "bench": "ordered_stream",
        "machine": about,
        "config": vars(args),
        "rounds": args.rounds,
    }
    for name, rates in found.items():
        result[f"rows_per_second_{name}"] = round(median(rates))
    for other in ("pyarrow", "pyarrow_groups", "plain"):
        ratios = [ours / its for ours, its in zip(found["ordered"], found[other], strict=True)]
        result[f"ordered_over_{other}"] = round(median(ratios), 4)
        result[f"ordered_over_{other}_min"] = round(min(ratios), 4)
        result[f"ordered_over_{other}_max"] = round(max(ratios), 4)
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
    main()

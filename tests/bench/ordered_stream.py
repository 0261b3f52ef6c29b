"""Rows a second of the ordered stream against plain, unshuffled Ray Data; prints one JSON line.

    python tests/bench/ordered_stream.py [--files 20] [--rounds 5] [--window-mib 256]

Both sides read one epoch of the same Parquet files, alone and in turn, and hand out batches of 128
rows as torch tensors that point into the object store. From each tensor the sum is taken over its
bytes read as int64, so that both touch every byte once. The clock includes the start of Ray Data's
execution. Plain is Ray Data at its best on this data: the old Parquet reader, one block per file,
an Arrow collate function without a copy, and the bounds that the ordered stream has (tasks at a
time, memory, no CPU asked for). The order of the sides is reversed in every other round, so that
whatever else the machine does hits both; the ratio is taken round by round.
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
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from service.environment import configure_ray  # noqa: E402

configure_ray()  # before Ray is imported

import pyarrow as pa  # noqa: E402
import ray  # noqa: E402
import ray.data  # noqa: E402
import torch  # noqa: E402
from method_step import machine  # noqa: E402
from ray.data import DataContext, ExecutionResources  # noqa: E402
from ray.data.collate_fn import ArrowBatchCollateFn  # noqa: E402
from shards import GLOBAL_BATCH_SIZE, make_order, write_shards  # noqa: E402
from torch import Tensor  # noqa: E402

from data.order import Order  # noqa: E402
from data.pipeline import (  # noqa: E402
    CONCURRENT_READS,
    LANE,
    TABLES_AHEAD,
    ShardReader,
    columns,
    train_stream,
)
from data.schema import Manifest  # noqa: E402

OBJECT_STORE_BYTES = 3 << 30
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


def ordered_batches(reader: ShardReader, order: Order) -> Iterator[Tensors]:
    for table in train_stream(reader, order, rank=0, world_size=1, epochs=range(1)):
        yield tensors(table, reader.manifest)


def plain_batches(reader: ShardReader, ahead_bytes: int) -> Iterator[Tensors]:
    paths = [str(Path(reader.folder) / shard.path) for shard in reader.manifest.splits["train"]]
    names = ["sample_id", "label", *(m.name for m in reader.manifest.modalities)]
    with DataContext.current(plain_context(ahead_bytes)):
        dataset = ray.data.read_parquet(
            paths,
            columns=names,
            override_num_blocks=len(paths),
            num_cpus=0,
            concurrency=CONCURRENT_READS,
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


def run(files: int, window_mib: int, rounds: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        reader = write_shards(Path(folder), files)
        order = make_order(reader, window_mib)
        row_nbytes = reader.manifest.row_nbytes("train")
        ahead = TABLES_AHEAD * order.window_rows(0, range(order.lanes)) * row_nbytes
        sides = {
            "ordered": lambda: ordered_batches(reader, order),
            "plain": lambda: plain_batches(reader, ahead),
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
            return measure(sides, order.num_rows, rounds)
        finally:
            ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=20, help="files of 1,024 rows, 39 MB each")
    parser.add_argument("--rounds", type=int, default=5, help="timed epochs of each side")
    parser.add_argument("--window-mib", type=int, default=256, help="train.shuffle_window_mib")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    torch.set_num_threads(1)
    about = machine(threads=1)
    found = run(args.files, args.window_mib, args.rounds)
    ratios = [ours / plain for ours, plain in zip(found["ordered"], found["plain"], strict=True)]
    result = {
        "bench": "ordered_stream",
        "machine": about,
        "config": vars(args),
        "rows_per_second_ordered": round(median(found["ordered"])),
        "rows_per_second_plain": round(median(found["plain"])),
        "ratio": round(median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "rounds": args.rounds,
    }
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
    main()

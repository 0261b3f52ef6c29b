"""Peak memory of one streamed epoch over N rows and over ten times N; prints one JSON line.

    python tests/bench/memory.py [--files 6] [--window-mib 32]

Each epoch runs in a fresh process with a fresh Ray session, on the same windows and row groups; the
smaller set is already larger than all that `train_stream` reads ahead. Linux only: `/proc` is read
every 20 ms. Three peaks are printed, each of its own moment:

- `peak_rss_mib`: resident memory of this process (the driver) and of Ray's workers, without the
  shared memory they map. RSS proper counts a page of the object store in every process that has
  touched it, and goes on counting pages whose object is long gone;
- `peak_pss_mib`: proportional set size of the same processes, where the object store's pages are
  counted, each divided by the number of processes that map it;
- `peak_object_store_mib`: bytes of objects in the object store.

Ray removes freed objects from the store once a second. At full speed, which no training has, that
is hundreds of MiB, and the peak would tell how fast the machine is; here it does so every 50 ms.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from service.environment import configure_ray  # noqa: E402

configure_ray()  # before Ray is imported

import numpy as np  # noqa: E402
import ray  # noqa: E402
from ray._private.internal_api import get_memory_info_reply, get_state_from_address  # noqa: E402
from shards import make_order, write_shards  # noqa: E402

from data.pipeline import (  # noqa: E402
    CONCURRENT_READS,
    TABLES_AHEAD,
    ShardReader,
    columns,
    train_stream,
)

OBJECT_STORE_BYTES = 1 << 30
SAMPLE_SECONDS = 0.02
TIMES = 10
Peaks = dict[str, float]


def status_kib(pid: int, file: str, names: tuple[str, ...]) -> int:
    """Sum of some fields of /proc/PID/FILE; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.split(":")[0] in names)


def parents() -> dict[int, int]:
    """Parent of every process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if parent := status_kib(int(folder.name), "status", ("PPid",)):
            found[int(folder.name)] = parent
    return found


def ray_workers() -> list[int]:
    """Processes below this one that run Ray's tasks and actors."""
    parent = parents()
    below = {os.getpid()}
    while more := {pid for pid, above in parent.items() if above in below} - below:
        below |= more
    return [pid for pid in below if is_ray_worker(pid)]


def is_ray_worker(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def sample(state: object) -> Peaks:
    """Memory in MiB, now."""
    own, workers = os.getpid(), ray_workers()
    store = get_memory_info_reply(state).store_stats.object_store_bytes_used
    rss = {pid: status_kib(pid, "status", ("RssAnon", "RssFile")) for pid in [own, *workers]}
    pss = sum(status_kib(pid, "smaps_rollup", ("Pss",)) for pid in [own, *workers])
    return {
        "rss": sum(rss.values()) / 1024,
        "rss_driver": rss[own] / 1024,
        "rss_largest_worker": max((rss[pid] for pid in workers), default=0) / 1024,
        "pss": pss / 1024,
        "object_store": store / 2**20,
    }


def peaks_while(work: Callable[[], None]) -> Peaks:
    """Run `work` in this thread; another one takes samples."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    peaks = sample(state)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            for name, value in sample(state).items():
                peaks[name] = max(peaks[name], value)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return peaks


def stream_epoch(reader: ShardReader, window_mib: int) -> None:
    """Read every byte of one epoch and keep none."""
    order = make_order(reader, window_mib)
    rows = 0
    for table in train_stream(reader, order, rank=0, world_size=1, epochs=range(1)):
        rows += table.num_rows
        for array in columns(table, reader.manifest, "train").values():
            array.reshape(-1).view(np.int64).sum()
    assert rows == order.num_rows, (rows, order.num_rows)


def measure(reader: ShardReader, window_mib: int) -> Peaks:
    """Peaks of one epoch; in a process of its own."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        return peaks_while(lambda: stream_epoch(reader, window_mib))
    finally:
        ray.shutdown()


def first_files(reader: ShardReader, count: int) -> ShardReader:
    shards = reader.manifest.splits["train"][:count]
    manifest = reader.manifest.model_copy(update={"splits": {"train": shards}})
    return replace(reader, manifest=manifest)


def check_larger_than_read_ahead(reader: ShardReader, window_mib: int) -> None:
    order = make_order(reader, window_mib)
    tables = 1 + TABLES_AHEAD + CONCURRENT_READS
    rows = tables * order.window_rows(0, range(order.lanes))
    if order.num_rows < rows:
        raise SystemExit(
            f"the smaller set has {order.num_rows} rows; it must have more than the {rows} that "
            "are read ahead; give more --files or a smaller --window-mib"
        )


def run(files: int, window_mib: int) -> list[Peaks]:
    """Peaks of the smaller set, then of the larger one."""
    with tempfile.TemporaryDirectory() as folder:
        large = write_shards(Path(folder), TIMES * files)
        small = first_files(large, files)
        check_larger_than_read_ahead(small, window_mib)
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            return [pool.submit(measure, reader, window_mib).result() for reader in (small, large)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=6, help="files of 1,024 rows of the small set")
    parser.add_argument("--window-mib", type=int, default=32, help="train.shuffle_window_mib")
    args = parser.parse_args()
    once, ten = run(args.files, args.window_mib)
    result: dict[str, object] = {"bench": "memory", "config": vars(args)}
    for name in once:
        result[f"peak_{name}_mib_1x"] = round(once[name], 1)
        result[f"peak_{name}_mib_10x"] = round(ten[name], 1)
        result[f"ratio_{name.replace('object_', '')}"] = round(ten[name] / once[name], 4)
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
    main()

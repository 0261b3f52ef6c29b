"""Time and peak memory of a streamed epoch over N rows, 4 N and 16 N; prints one JSON line.

    python tests/bench/memory.py [--files 6] [--rounds 5] [--window-mib 32]

Each epoch runs in a fresh process with a fresh Ray session, on the same windows and row groups; the
smallest set is already larger than all that `train_stream` reads ahead. Its time counts over the
second half of the rows, `microseconds_per_row`: at the first, what was read ahead comes for free,
which is a larger part of a small set. The sizes take turns, in reversed order in every other round;
medians are printed, and ratios to the smallest size.

Linux only: `/proc` is read every 20 ms. Three peaks are printed, each of its own moment:

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
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from service.environment import configure_ray  # noqa: E402

configure_ray()  # before Ray is imported

import numpy as np  # noqa: E402
import ray  # noqa: E402
from method_step import machine  # noqa: E402
from ray._private.internal_api import get_memory_info_reply, get_state_from_address  # noqa: E402
from shards import make_order, write_shards  # noqa: E402

from data.pipeline import ReadAhead, train_stream  # noqa: E402
from data.reader import ShardReader, columns  # noqa: E402

OBJECT_STORE_BYTES = 1 << 30
SAMPLE_SECONDS = 0.02
TIMES = (1, 4, 16)
AHEAD = ReadAhead()
Numbers = dict[str, float]


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


def sample(state: object) -> Numbers:
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


def peaks_while(work: Callable[[], Numbers]) -> Numbers:
    """Run `work` in this thread, another one takes samples; returns what both found."""
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
        found = work()
    finally:
        done.set()
        thread.join()
    return found | {f"peak_{name}_mib": value for name, value in peaks.items()}


def stream_epoch(reader: ShardReader, window_mib: int) -> Numbers:
    """Read every byte of one epoch and keep none."""
    order = make_order(reader, window_mib)
    tables = train_stream(reader, order, rank=0, world_size=1, epochs=range(1), ahead=AHEAD)
    rows = rows_before = 0
    began = time.perf_counter()
    for table in tables:
        rows += table.num_rows
        for array in columns(table, reader.manifest, "train").values():
            array.reshape(-1).view(np.int64).sum()
        if not rows_before and 2 * rows >= order.num_rows:
            began, rows_before = time.perf_counter(), rows
    seconds = time.perf_counter() - began
    assert rows == order.num_rows, (rows, order.num_rows)
    return {"microseconds_per_row": 1e6 * seconds / (rows - rows_before)}


def measure(reader: ShardReader, window_mib: int) -> Numbers:
    """Time and peaks of one epoch; in a process of its own."""
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
    tables = 1 + AHEAD.windows + AHEAD.readers
    rows = tables * order.window_rows(0, range(order.lanes))
    if order.num_rows < rows:
        raise SystemExit(
            f"the smallest set has {order.num_rows} rows; it must have more than the {rows} that "
            "are read ahead; give more --files or a smaller --window-mib"
        )


def run(files: int, window_mib: int, rounds: int) -> dict[int, list[Numbers]]:
    """Numbers of every round, by the size of the set."""
    with tempfile.TemporaryDirectory() as folder:
        largest = write_shards(Path(folder), TIMES[-1] * files)
        readers = {times: first_files(largest, times * files) for times in TIMES}
        check_larger_than_read_ahead(readers[1], window_mib)
        found: dict[int, list[Numbers]] = {times: [] for times in TIMES}
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            for turn in range(rounds):
                for times in TIMES[:: 1 if turn % 2 == 0 else -1]:
                    numbers = pool.submit(measure, readers[times], window_mib).result()
                    found[times].append(numbers)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--files", type=int, default=6, help="files of 1,024 rows of the smallest set"
    )
    parser.add_argument("--rounds", type=int, default=5, help="epochs of every size")
    parser.add_argument("--window-mib", type=int, default=32, help="train.shuffle_window_mib")
    args = parser.parse_args()
    about = machine(threads=1)
    found = run(args.files, args.window_mib, args.rounds)
    result: dict[str, object] = {"bench": "memory", "machine": about, "config": vars(args)}
    for name in found[1][0]:
        middle = {times: median(each[name] for each in found[times]) for times in TIMES}
        for times, value in middle.items():
            result[f"{name}_{times}x"] = round(value, 1)
            if times > 1:
                result[f"{name}_ratio_{times}x"] = round(value / middle[1], 4)
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
    main()

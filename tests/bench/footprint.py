"""What the service takes while nobody uses it: memory and processor time of each of its parts.

    uv run python tests/bench/footprint.py --seconds 30

Starts docker/processes.py, lets it come to rest, and prints one JSON line: of each service its
processes, their resident and their proportional memory (pages that several share count once in
all) in MiB, and the share of one core that they take. `--only mlflow` starts less.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.cluster.topology import running

MIB = 1 << 20


def family(pid: int) -> list[psutil.Process]:
    """A process and its descendants."""
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]


@contextlib.contextmanager
def still_there() -> Iterator[None]:
    """Processes may end while they are looked at."""
    with contextlib.suppress(psutil.NoSuchProcess):
        yield


def cpu_seconds(pid: int) -> float:
    total = 0.0
    for process in family(pid):
        with still_there():
            times = process.cpu_times()
            total += times.user + times.system
    return total


def memory(pid: int) -> dict[str, float]:
    found = {"processes": 0, "rss_mib": 0.0, "pss_mib": 0.0}
    for process in family(pid):
        with still_there():
            full = process.memory_full_info()
            found["processes"] += 1
            found["rss_mib"] += full.rss / MIB
            found["pss_mib"] += full.pss / MIB
    return {name: round(value, 1) for name, value in found.items()}


def measure(pids: dict[str, int], seconds: float) -> dict[str, dict[str, float]]:
    """Memory now, and the share of a core over so many seconds, of each service."""
    found = {name: memory(pid) for name, pid in pids.items()}
    before, began = {name: cpu_seconds(pid) for name, pid in pids.items()}, time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - began
    for name, pid in pids.items():
        found[name]["cores"] = round((cpu_seconds(pid) - before[name]) / passed, 4)
    return found


def total(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The sums over all services."""
    columns = next(iter(found.values()))
    return {column: round(sum(part[column] for part in found.values()), 3) for column in columns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="time to measure")
    parser.add_argument("--rest", type=float, default=60.0, help="time to come to rest before")
    parser.add_argument("--only", nargs="*", default=[], help="services (default: all)")
    args = parser.parse_args()
    with running(*args.only) as topology:
        time.sleep(args.rest)
        found = measure(topology.pids, args.seconds)
    machine = {"cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
    print(
        json.dumps({"services": found, "total": total(found), "seconds": args.seconds, **machine})
    )


if __name__ == "__main__":
    main()

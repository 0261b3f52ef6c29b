"""How long a command takes beside training; prints one JSON line.

    python tests/bench/startup.py [--rounds 5] [--epochs 2] [--other CHECKOUT]

In every round, `midas train digits` runs twice in a new storage folder: `cold`, where data are
prepared and the MLflow store is made, and `warm`, where both are there. Medians, in seconds from
the start of the process, of when these were seen (polled 100 times a second):

- `prepared`: the manifest (cold only);
- `opened`: Ray is up, the MLflow run is open, the workers are asked for;
- `first_step`: the first training step is done;
- `trained`: the last epoch is trained and validated;
- `tested`: the test result is recorded;
- `end`: the process is gone.

`report_share` is the share of the steps' time that reporting and checkpointing took, as the run
itself says, over all its epochs. `help` is `midas --help`. With --epochs 30, `cold/end` is the
whole command of the quick start. A second checkout may take turns; its numbers begin with `other/`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from operator import mul
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from method_step import machine  # noqa: E402

from service.files import (  # noqa: E402
    ATTEMPT_NAME,
    HISTORY_NAME,
    PROGRESS_NAME,
    RESULT_NAME,
    read_history,
)

POLL_SECONDS = 0.01
Seconds = dict[str, float]


def seconds_of(command: list[str], tree: Path, events: dict[str, Callable[[], bool]]) -> Seconds:
    """Run a command of a checkout; when each event was first seen, and the end."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "service", *command],
        cwd=tree,  # comes before an installed package
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen: Seconds = {}
    while process.poll() is None:
        for name, happened in events.items():
            if name not in seen and happened():
                seen[name] = time.monotonic() - began
        time.sleep(POLL_SECONDS)
    seen["end"] = time.monotonic() - began
    if process.returncode:
        assert process.stderr
        raise SystemExit(process.stderr.read())
    return seen


def train(tree: Path, storage: Path, name: str, epochs: int) -> Seconds:
    """Times of `midas train digits` in `storage`."""
    folder = storage / name

    prepared = any((storage / "shards").glob("*/manifest.json"))
    events: dict[str, Callable[[], bool]] = {
        "opened": (folder / ATTEMPT_NAME).exists,
        "first_step": (folder / PROGRESS_NAME).exists,
        "trained": lambda: len(read_history(folder / HISTORY_NAME)) == epochs,
        "tested": (folder / RESULT_NAME).exists,
    }
    if not prepared:
        events["prepared"] = lambda: any((storage / "shards").glob("*/manifest.json"))
    flags = ["--optim.epochs", str(epochs)]
    if epochs < 10:
        flags += ["--midas.warmup-epochs", "1"]
    command = ["train", "digits", "--storage", str(storage), "--name", name, *flags]
    times = seconds_of(command, tree, events)
    rows = read_history(folder / HISTORY_NAME)
    weights = [1 / row["speed/samples_per_second"] for row in rows]
    shares = [row["speed/report_share"] for row in rows]
    return times | {"report_share": sum(map(mul, weights, shares)) / sum(weights)}


def measure(tree: Path, epochs: int) -> Seconds:
    """Times of one round, by `<command>/<event>`."""
    found = {"help": seconds_of(["--help"], tree, {})["end"]}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            times = train(tree, Path(folder), name, epochs)
            found |= {f"{name}/{event}": value for event, value in times.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--other", type=Path, help="another checkout, which takes turns")
    args = parser.parse_args()
    trees = {"": ROOT} | ({"other/": args.other.resolve()} if args.other else {})
    found: dict[str, list[float]] = defaultdict(list)
    for turn in range(args.rounds):
        for prefix, tree in list(trees.items())[:: 1 if turn % 2 == 0 else -1]:
            for name, value in measure(tree, args.epochs).items():
                found[prefix + name].append(value)
    print(
        json.dumps(
            {
                "bench": "startup",
                "machine": machine(threads=1),
                "config": {"rounds": args.rounds, "epochs": args.epochs},
                **{name: round(median(values), 4) for name, values in found.items()},
            }
        )
    )


if __name__ == "__main__":
    main()

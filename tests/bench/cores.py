"""What two processes on two cores reach, on their own and in step; prints one JSON line.

    python tests/bench/cores.py [--seconds 60]

The bound of every number of `train_speed.py` about two workers. A round is what takes 20 ms of
a convolution of ResNet-18 when the core is fast. In turn, in slices of 15 rounds:

- `alone`: one process, rounds a second;
- `apart`: two, which do not talk, over `alone` (2 if nothing is shared);
- `in_step`: two, which add up 129 numbers over gloo after every round, as workers do in every layer
  with BatchNorm, over `alone`.

In bf16 and in fp32; medians over the slices.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from method_step import machine  # noqa: E402

from training.distributed import process_group  # noqa: E402

ROWS, CHANNELS, SIDE = 16, 128, 28  # second stage of ResNet-18 at 224 pixels, a batch of 16
ROUND_SECONDS, ROUNDS = 0.02, 15
MODES = ("alone", "apart", "in_step")
PRECISIONS = (torch.bfloat16, torch.float32)


def convolution(precision: torch.dtype) -> Callable[[], object]:
    """One forward call of a 3x3 convolution, channels last."""
    layout = torch.channels_last
    images = torch.randn(ROWS, CHANNELS, SIDE, SIDE, dtype=precision).to(memory_format=layout)
    layer = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, dtype=precision)
    layer = layer.to(memory_format=layout)
    return lambda: layer(images)


def calls_a_round(kernel: Callable[[], object]) -> int:
    """How many calls take ROUND_SECONDS; the same number on both ranks."""
    times = []
    for _ in range(500):
        began = time.perf_counter()
        kernel()
        times.append(time.perf_counter() - began)
    calls = torch.tensor([max(1, round(ROUND_SECONDS / min(times)))])
    dist.broadcast(calls, src=0)
    return int(calls)


def rate(mode: str, rank: int, kernel: Callable[[], object], calls: int) -> float:
    """Rounds a second of this rank in a slice."""
    if mode == "alone" and rank:
        return 0.0
    numbers = torch.zeros(129, dtype=torch.float64)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for _ in range(calls):
            kernel()
        if mode == "in_step":
            dist.all_reduce(numbers)
    return ROUNDS / (time.perf_counter() - began)


def of_both(own: float) -> float:
    """Sum over the ranks, when both have ended."""
    total = torch.tensor([own], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def measure(rank: int, precision: torch.dtype, seconds: float) -> dict[str, float]:
    """The numbers of this script in one precision."""
    kernel = convolution(precision)
    calls, ends = calls_a_round(kernel), time.monotonic() + seconds
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    while of_both(float(time.monotonic() < ends)) > 0:
        for mode in MODES:
            dist.barrier()
            found[mode].append(of_both(rate(mode, rank, kernel, calls)))
    alone = median(found["alone"])
    over = {mode: round(median(found[mode]) / alone, 2) for mode in MODES[1:]}
    return {"alone": round(alone, 2), **over, "slices": len(found["alone"])}


def contend(rank: int, folder: str, seconds: float) -> None:
    """One of the two processes; rank 0 prints."""
    torch.set_num_threads(1)
    report: dict[str, object] = {"bench": "cores", "machine": machine(threads=1)}
    device = torch.device("cpu")
    with process_group(rank, 2, f"file://{folder}/group", device), torch.inference_mode():
        for precision in PRECISIONS:
            name = str(precision).removeprefix("torch.")
            report[name] = measure(rank, precision, seconds / len(PRECISIONS))
    if rank == 0:
        print(json.dumps(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rank", type=int, help="used inside")
    parser.add_argument("--folder", help="used inside")
    args = parser.parse_args()
    if args.rank is not None:
        contend(args.rank, args.folder, args.seconds)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--seconds", str(args.seconds), "--folder", folder]
        ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(2)]
        for process in ranks:
            process.wait()


if __name__ == "__main__":
    main()

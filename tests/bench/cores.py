"""How steady two cores are: a convolution of ResNet-18, in slices of 0.1 s; prints one JSON line.

    python tests/bench/cores.py [--seconds 30]

The bound of every number of `train_speed.py` about two workers. One process on each core calls the
kernel for the whole time, both at once, and neither waits for the other. In bf16 and in fp32:

- `calls_per_second`: the median slice of both cores; `fast_calls_per_second`: the 95th percentile;
- `slow_share`: slices that are slower than half of that. A machine of its own has none;
- `free`: mean rate of both cores together, over that of one core (2 if nothing is shared);
- `lockstep`: the same if both had to wait for each other after every slice, as workers do that
  exchange something in each layer: twice the slower core's rate, over the mean of one.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

import numpy as np
import torch

ROWS, CHANNELS, SIDE = 16, 128, 28  # second stage of ResNet-18 at 224 pixels, a batch of 16
SLICE_SECONDS = 0.1


def convolution(precision: torch.dtype) -> Callable[[], object]:
    """One forward call of a 3x3 convolution, channels last."""
    layout = torch.channels_last
    images = torch.randn(ROWS, CHANNELS, SIDE, SIDE, dtype=precision).to(memory_format=layout)
    layer = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, dtype=precision)
    layer = layer.to(memory_format=layout)
    return lambda: layer(images)


def call(core: int, precision: torch.dtype, slices: int, start: Barrier, out: Connection) -> None:
    """Send the calls a second of each slice, measured on `core`, in step with the wall clock."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    with torch.inference_mode():
        kernel = convolution(precision)
        for _ in range(3):
            kernel()
        start.wait()
        ends = [time.perf_counter()]
        borders = ends[0] + SLICE_SECONDS * np.arange(slices + 1)
        while ends[-1] < borders[-1]:
            kernel()
            ends.append(time.perf_counter())
    calls = np.interp(borders, ends, np.arange(len(ends)))
    out.send(np.diff(calls) / SLICE_SECONDS)


def rates(precision: torch.dtype, seconds: float, cores: list[int]) -> np.ndarray:
    """Calls a second, shape (cores, slices)."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(len(cores))
    ends, workers = [], []
    for core in cores:
        end, out = context.Pipe(duplex=False)
        arguments = (core, precision, round(seconds / SLICE_SECONDS), start, out)
        workers.append(context.Process(target=call, args=arguments))
        workers[-1].start()
        ends.append(end)
    table = np.stack([end.recv() for end in ends])
    for worker in workers:
        worker.join()
    return table


def summary(alone: np.ndarray, together: np.ndarray) -> dict[str, float]:
    """The numbers of this script from the rates of one core after the other and of both."""
    fast = np.percentile(together, 95)
    one = alone.mean()
    numbers = {
        "calls_per_second": np.median(together),
        "fast_calls_per_second": fast,
        "slow_share": (together < fast / 2).mean(),
        "free": together.sum(0).mean() / one,
        "lockstep": len(together) * together.min(0).mean() / one,
    }
    return {name: round(float(value), 2) for name, value in numbers.items()}


def main() -> None:
    """Measure bf16 and fp32."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="for each kernel")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    report = {}
    for precision in (torch.bfloat16, torch.float32):
        alone = np.stack([rates(precision, options.seconds / 4, [core])[0] for core in cores])
        together = rates(precision, options.seconds / 2, cores)
        report[str(precision).removeprefix("torch.")] = summary(alone, together)
    print(json.dumps(report))


if __name__ == "__main__":
    main()

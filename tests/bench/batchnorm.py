"""What BatchNorm over the rows of two workers costs; prints one JSON line.

    python tests/bench/batchnorm.py [--seconds 240] [--rows 16] [--precision bf16]

Steps of MIDAS on CREMA-D's shapes (3 frames of 224 pixels, 1024 x 128 filter banks, two ResNet-18)
in two processes of one thread, on batches in memory. In turn, two steps each, in reversed order in
every other round:

- `in_turns`: statistics of one encoder travel while the other computes, as in training;
- `one_by_one`: every layer waits for its statistics;
- `local`: statistics of a worker's own rows, nothing to wait for but gradients.

Ratios are taken within a round; medians over the rounds. `exchange_share` is the share of the time
that was spent waiting inside of forward and backward passes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from method_step import machine  # noqa: E402

import training.model  # noqa: E402
from training.batch import Batch, Progress  # noqa: E402
from training.config import ModelConfig  # noqa: E402
from training.distributed import data_parallel, exchanges, process_group  # noqa: E402
from training.encoders import build_model  # noqa: E402
from training.methods import MidasConfig, build_method  # noqa: E402
from training.methods.base import Method  # noqa: E402
from training.modality import ModalitySpec  # noqa: E402
from training.optim import OptimConfig, build_optimizer  # noqa: E402
from training.turns import in_turns  # noqa: E402

WORKERS, NUM_CLASSES, STEPS = 2, 6, 2
SHAPES = {"image": (3, 3, 224, 224), "audio": (1, 1024, 128)}
KINDS = {"image": "frames", "audio": "audio"}
MODES = ("in_turns", "one_by_one", "local")


def one_by_one(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What `in_turns` does, without turns."""
    return [call() for call in calls]


class Trainee:
    """A method with its optimizer, in DDP."""

    def __init__(self, batchnorm: str, precision: Any):
        encoders = {name: {"kind": "resnet18"} for name in SHAPES}
        model = build_model(
            ModelConfig.model_validate({"encoders": encoders, "batchnorm": batchnorm}),
            [ModalitySpec(name, KINDS[name], shape) for name, shape in SHAPES.items()],
            NUM_CLASSES,
            seed=0,
        )
        self.method: Method = build_method("midas", model, {"midas": MidasConfig(warmup_epochs=0)})
        self.method.use(precision)
        self.method.set_phase(0)
        self.method.train()
        self.optimizer = build_optimizer(OptimConfig(), self.method)
        self.wrapped: nn.Module = data_parallel(
            self.method, in_rank_order=False, compression="none", launched=lambda: None
        )

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        start = Progress(seed=0, epoch=0, step=0, num_epochs=1)
        self.method.train_step(self.wrapped, batch, self.optimizer, start)


def own_batch(rank: int, rows: int) -> Batch:
    generator = torch.Generator().manual_seed(rank)
    inputs = {
        name: torch.randn(rows, *shape, generator=generator) for name, shape in SHAPES.items()
    }
    label = torch.arange(rows) % NUM_CLASSES
    place, lane = torch.arange(rows) + rank * rows, torch.full_like(label, rank)
    return Batch(inputs, label, place, lane, WORKERS, global_rows=WORKERS * rows)


def measure(rank: int, args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of this script; rounds go on until time is up on some rank."""
    batch = own_batch(rank, args.rows)
    trainees = {name: Trainee(name, args.precision) for name in ("sync", "local")}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    waited: dict[str, list[float]] = {mode: [] for mode in MODES}
    ends, rounds, late = time.monotonic() + args.seconds, 0, torch.zeros(())
    while not late:
        for mode in MODES if rounds % 2 else MODES[::-1]:
            training.model.in_turns = one_by_one if mode == "one_by_one" else in_turns
            trainee = trainees["local" if mode == "local" else "sync"]
            dist.barrier()
            began, exchanged = time.perf_counter(), exchanges.seconds
            for _ in range(STEPS):
                trainee.step(batch)
            dist.barrier()
            took = time.perf_counter() - began
            if rounds:  # the first allocates
                seconds[mode].append(took / STEPS)
                waited[mode].append((exchanges.seconds - exchanged) / took)
        rounds += 1
        late.fill_(float(time.monotonic() > ends and rounds > 1))
        dist.all_reduce(late)

    def ratio(slow: str, fast: str) -> float:
        return round(median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)), 3)

    return {
        "step_seconds": {mode: round(median(seconds[mode]), 3) for mode in MODES},
        "exchange_share": {mode: round(median(waited[mode]), 3) for mode in MODES},
        "one_by_one_over_in_turns": ratio("one_by_one", "in_turns"),
        "one_by_one_over_local": ratio("one_by_one", "local"),
        "in_turns_over_local": ratio("in_turns", "local"),
        "rounds": len(seconds["local"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--rows", type=int, default=16, help="of a worker")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--rank", type=int, help="used inside")
    parser.add_argument("--folder", help="used inside")
    args = parser.parse_args()
    if args.rank is None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *sys.argv, "--folder", folder]
            ranks = [subprocess.Popen([*command, "--rank", str(r)]) for r in range(WORKERS)]
            sys.exit(max(process.wait() for process in ranks))
    torch.set_num_threads(1)
    about = machine(threads=1)
    meeting = f"file://{args.folder}/group"
    with process_group(args.rank, WORKERS, meeting, torch.device("cpu")):
        measured = measure(args.rank, args)
    if args.rank == 0:
        given = {"rows": args.rows, "precision": args.precision}
        print(json.dumps({"bench": "batchnorm", "machine": about, "config": given, **measured}))


if __name__ == "__main__":
    main()

"""Time of a MIDAS step (main phase) against steps of the controls; prints one JSON line.

    python tests/bench/method_step.py [--encoder resnet18] [--rows 16] [--size 112] [--steps 10]

One process, no DDP, the methods' own `train_step` with SGD on the same random batch: an image
(3, size, size) and a log-mel spectrogram (1, 128, size) per row. The methods take their steps in
turn, in reversed order in every other round, so that whatever else the machine does hits all of
them alike. The ratio is taken pair by pair, between steps that stand next to each other in time.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from service.tracking import git_commit  # noqa: E402
from training.batch import Batch, Progress  # noqa: E402
from training.config import ModelConfig  # noqa: E402
from training.encoders import build_model  # noqa: E402
from training.methods import MidasConfig, build_method  # noqa: E402
from training.modality import ModalitySpec  # noqa: E402
from training.optim import OptimConfig, build_optimizer  # noqa: E402

METHODS = ("midas", "joint_uni", "joint")
NUM_CLASSES = 6  # CREMA-D
NUM_MELS = 128
WARMUP_STEPS = 2


class Stepper:
    """A method with its own model and optimizer, and the seconds of its steps."""

    def __init__(self, name: str, encoder: str, batch: Batch):
        kinds = {modality: {"kind": encoder} for modality in batch.inputs}
        image, audio = (tuple(rows.shape[1:]) for rows in batch.inputs.values())
        model = build_model(
            ModelConfig.model_validate({"encoders": kinds}),
            [ModalitySpec("image", "image", image), ModalitySpec("audio", "audio", audio)],
            NUM_CLASSES,
            seed=0,
        )
        self.method = build_method(name, model, {"midas": MidasConfig(warmup_epochs=0)})
        self.method.set_phase(0)
        self.method.train()
        self.optimizer = build_optimizer(OptimConfig(), self.method)
        self.batch = batch
        self.seconds: list[float] = []

    def step(self, number: int) -> None:
        """One timed optimizer step."""
        began = time.perf_counter()
        progress = Progress(seed=0, epoch=0, step=number, num_epochs=1)
        self.method.train_step(self.method, self.batch, self.optimizer, progress)
        self.seconds.append(time.perf_counter() - began)


def random_batch(rows: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "image": torch.randn(rows, 3, size, size, generator=generator),
        "audio": torch.randn(rows, 1, NUM_MELS, size, generator=generator),
    }
    label = torch.arange(rows) % NUM_CLASSES
    return Batch(inputs, label, torch.arange(rows), torch.zeros_like(label), 1, global_rows=rows)


def measure(encoder: str, rows: int, size: int, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every timed step, by method; entries of equal position are neighbours in time."""
    batch = random_batch(rows, size)
    steppers = {name: Stepper(name, encoder, batch) for name in METHODS}
    for stepper in steppers.values():
        for number in range(WARMUP_STEPS):
            stepper.step(number)
        stepper.seconds.clear()
    for turn in range(rounds):
        order = METHODS[:: 1 if turn % 2 == 0 else -1]
        for number in range(steps):
            for name in order:
                steppers[name].step(WARMUP_STEPS + turn * steps + number)
    return {name: stepper.seconds for name, stepper in steppers.items()}


def ratio(seconds: dict[str, list[float]], baseline: str) -> dict[str, float]:
    """Step time of MIDAS over the baseline's, pair by pair."""
    pairs = zip(seconds["midas"], seconds[baseline], strict=True)
    found = [midas / other for midas, other in pairs]
    return {"median": median(found), "min": min(found), "max": max(found)}


def machine(threads: int) -> dict[str, str | int | float]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    products = {
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512": torch.cpu._is_avx512_bf16_supported(),
    }
    return {
        "cpu": models[0] if models else platform.processor(),
        "bf16": next((name for name, has in products.items() if has), "none"),
        "cores": os.cpu_count() or 0,
        "threads": threads,
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 2),
        "commit": git_commit(ROOT) or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--encoder", choices=["resnet18", "small_cnn"], default="resnet18")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--size", type=int, default=112, help="side of the image, frames of audio")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a method and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = machine(args.threads)
    seconds = measure(args.encoder, args.rows, args.size, args.steps, args.rounds)
    over_joint_uni, over_joint = ratio(seconds, "joint_uni"), ratio(seconds, "joint")
    result = {
        "bench": "method_step",
        "machine": about,
        "config": {k: v for k, v in vars(args).items() if k != "threads"},
        "step_seconds": {name: round(median(values), 5) for name, values in seconds.items()},
        "midas_over_joint_uni": round(over_joint_uni["median"], 4),
        "midas_over_joint_uni_min": round(over_joint_uni["min"], 4),
        "midas_over_joint_uni_max": round(over_joint_uni["max"], 4),
        "midas_over_joint": round(over_joint["median"], 4),
        "pairs": len(seconds["midas"]),
    }
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
    main()

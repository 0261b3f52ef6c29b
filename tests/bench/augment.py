"""Milliseconds of a clip's augmentation on one CPU thread; prints one JSON line.

    python tests/bench/augment.py [--clips 16] [--rounds 15]

Clips are three frames of bytes of 256 pixels in training, of 224 in evaluation, as CREMA-D's are
delivered; results are what the encoder reads: float32, 224 pixels, channels last.

- `bytes`: `augment` of the bytes, plane by plane;
- `batched`: `augment` of the same numbers as float32, which takes one batched resampling, as on a
  GPU; the conversion of the bytes is in its time.

Each with a crop and a flip (`train`), and with neither (`eval`). The sides take turns, in reversed
order in every other round; ratios are taken round by round. A spectrogram of 1024 x 128 float16
numbers that is normalised is measured as well (`audio`).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from method_step import machine  # noqa: E402
from torch import Tensor  # noqa: E402

from training.augment import RowSpec, augment, num_uniform  # noqa: E402

FRAMES, DELIVERED, SIZE = 3, 256, 224
TRAIN = RowSpec(
    "frames",
    (FRAMES, 3, SIZE, SIZE),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    scale=255.0,
    crop=True,
    flip=True,
)
EVAL = replace(TRAIN, crop=False, flip=False)
AUDIO = RowSpec("audio", (1, 1024, 128), mean=(-4.5,), std=(10.0,))
Side = Callable[[], Tensor]


def encoder_input(rows: Tensor) -> Tensor:
    return rows.reshape(-1, *rows.shape[-3:]).contiguous(memory_format=torch.channels_last)


def make_sides(clips: int) -> dict[str, Side]:
    generator = torch.Generator().manual_seed(0)

    def picture_bytes(side: int) -> Tensor:
        shape = (clips, FRAMES, 3, side, side)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    uniform = torch.rand(clips, num_uniform(TRAIN), dtype=torch.float64, generator=generator)
    large, exact = picture_bytes(DELIVERED), picture_bytes(SIZE)
    audio = torch.randn(clips, *AUDIO.shape, generator=generator).half()
    return {
        "train_bytes": lambda: encoder_input(augment(large, TRAIN, uniform)),
        "train_batched": lambda: encoder_input(augment(large.float(), TRAIN, uniform)),
        "eval_bytes": lambda: encoder_input(augment(exact, EVAL, None)),
        "eval_batched": lambda: encoder_input(augment(exact.float(), EVAL, None)),
        "audio": lambda: augment(audio, AUDIO, None),
    }


def measure(clips: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a clip; entries of equal position are neighbours in time."""
    sides = make_sides(clips)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(1 + rounds):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            began = time.perf_counter()
            sides[name]()
            if turn > 0:  # the first round imports, and makes tables
                found[name].append((time.perf_counter() - began) / clips * 1e3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=16, help="clips of a batch")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = machine(threads=1)
    found = measure(args.clips, args.rounds)
    result: dict[str, object] = {"bench": "augment", "machine": about, "config": vars(args)}
    for name, values in found.items():
        result[f"milliseconds_{name}"] = round(median(values), 3)
    for part in ("train", "eval"):
        pairs = zip(found[f"{part}_batched"], found[f"{part}_bytes"], strict=True)
        ratios = [batched / ours for batched, ours in pairs]
        result[f"{part}_batched_over_bytes"] = round(median(ratios), 2)
        result[f"{part}_batched_over_bytes_min"] = round(min(ratios), 2)
        result[f"{part}_batched_over_bytes_max"] = round(max(ratios), 2)
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
    main()

"""What bf16 gains over fp32 on this processor, encoder by encoder; prints one JSON line.

    python tests/bench/precision.py [--rows 8] [--rounds 10] [--scale 1.0] [--threads 1]

Forward and backward pass of encoders as training builds and runs them, in turn with both precisions
on the same random rows. `fp32_over_bf16` is the time of fp32 over that of bf16, medians; `auto` is
what `train.precision: auto` takes for the encoder here. --scale shortens the sides of images and
texts.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from method_step import machine  # noqa: E402

from training.config import EncoderConfig, ModelConfig  # noqa: E402
from training.encoders import build_model  # noqa: E402
from training.modality import ModalitySpec  # noqa: E402
from training.precision import Precision, best_precision  # noqa: E402

CPU = torch.device("cpu")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
WIDTHS = (64, 128, 192, 256, 384)
TOKENS, WORDS = 128, 1000


def encoders(scale: float) -> dict[str, tuple[EncoderConfig, ModalitySpec]]:
    picture, texts = round(224 * scale), round(TOKENS * scale)
    found = {
        "resnet18": (
            EncoderConfig(kind="resnet18"),
            ModalitySpec("rows", "image", (3, picture, picture)),
        ),
        "small_cnn": (EncoderConfig(kind="small_cnn"), ModalitySpec("rows", "image", (1, 28, 28))),
        "mlp": (EncoderConfig(kind="mlp"), ModalitySpec("rows", "vector", (1000,))),
    }
    for width in WIDTHS:
        found[f"transformer_{width}"] = (
            EncoderConfig(kind="transformer", width=width),
            ModalitySpec("rows", "text", (texts,), vocab_size=WORDS),
        )
    return found


def random_rows(spec: ModalitySpec, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if spec.vocab_size:
        return torch.randint(1, spec.vocab_size, (rows, *spec.shape), generator=generator)
    return torch.randn(rows, *spec.shape, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = machine(args.threads)
    times: dict[str, dict[str, float]] = {}
    auto: dict[str, str] = {}
    for name, (config, spec) in encoders(args.scale).items():
        model = build_model(ModelConfig(encoders={"rows": config}), [spec], 2, seed=0)
        inputs = {"rows": random_rows(spec, args.rows)}
        auto[name] = best_precision(CPU, model)
        seconds: dict[Precision, list[float]] = {precision: [] for precision in PRECISIONS}
        for _ in range(args.rounds + 1):
            for precision in PRECISIONS:
                began = time.perf_counter()
                model.precision = precision
                model.encode(inputs)["rows"].square().mean().backward()
                seconds[precision].append(time.perf_counter() - began)
        times[name] = {which: median(found[1:]) for which, found in seconds.items()}
    result = {
        "bench": "precision",
        "machine": about,
        "config": {name: value for name, value in vars(args).items() if name != "threads"},
        "fp32_over_bf16": {n: round(each["fp32"] / each["bf16"], 3) for n, each in times.items()},
        "milliseconds": {
            name: {which: round(1000 * seconds, 2) for which, seconds in each.items()}
            for name, each in times.items()
        },
        "auto": auto,
    }
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
    main()

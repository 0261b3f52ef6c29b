"""What a sweep's parts are worth; prints one JSON line.

    python tests/bench/sweep.py [--trials 16] [--rounds 3] [--epochs 30]

Three comparisons on `digits`, every arm a `midas tune` command of its own:

- `tpe` and `random`: the searchers with the same number of trials and the same pruning, for
  `--rounds` seeds of the sweep, taken in turns. `best` is the best validation accuracy of the
  search, `best_mean` the same configuration's over two seeds, `epochs` what all trials trained.
- `shared` and `own`: the warm-up shared or trained by every trial, where eta, lambda and the length
  of the warm-up are searched; one seed. `equal` says whether every score is the same.
- `wall_over_ideal` of every arm: time of the command's sweep over its training time divided by the
  trials at a time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from method_step import machine  # noqa: E402

from service.config import load_preset  # noqa: E402
from service.record import Record  # noqa: E402

OWN_WARMUP = "--search.no-share-warmup"
# One learning rate, so that warm-ups can be shared.
ONE_RATE = {
    "midas.eta": {"kind": "loguniform", "low": 5e-3, "high": 0.5},
    "midas.lambda_mis": {"kind": "loguniform", "low": 0.3, "high": 3.0},
    "midas.warmup_epochs": {"kind": "int", "low": 4, "high": 8},
}


def sweep(storage: Path, name: str, preset: str, *flags: str) -> tuple[dict[str, Any], Record]:
    """Run a sweep; its summary and its record."""
    command = [sys.executable, "-m", "service", "tune", preset, "--storage", str(storage)]
    command += ["--name", name, "--json", *flags]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), Record(storage / name)


def scores(record: Record) -> list[Any]:
    """What every trial was and scored."""
    return [(entry.name, entry.values, entry.scores) for entry in record.all()]


def epochs(record: Record, warmup: int) -> int:
    """Epochs that all trials trained, `warmup` where it was not searched."""
    lengths = (int(entry.values.get("midas.warmup_epochs", warmup)) for entry in record.all())
    done = (entry.epochs - entry.forked_epochs for entry in record.all())
    return sum(length + own for length, own in zip(lengths, done, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    about = machine(threads=1)
    common = ("--search.trials", str(args.trials), "--optim.epochs", str(args.epochs))
    found: dict[str, Any] = {}
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        for turn in range(args.rounds):
            searchers = ("tpe", "random") if turn % 2 == 0 else ("random", "tpe")
            for searcher in searchers:
                flags = ("--search.searcher", searcher, "--search.seed", str(turn))
                name = f"{searcher}-{turn}"
                result, record = sweep(storage, name, "digits", *common, *flags)
                ratios.append(result["wall_over_ideal"])
                for key, value in (
                    ("best", result["best/val/accuracy"]),
                    ("best_mean", result["top/best_mean"]),
                    ("epochs", epochs(record, 0)),
                    ("wall_seconds", result["wall_seconds"]),
                ):
                    found.setdefault(f"{searcher}/{key}", []).append(value)
        preset = storage / "one_rate.yaml"
        values = load_preset("digits").model_dump(mode="json")
        preset.write_text(json.dumps(values | {"search": {"reseeds": 0, "space": ONE_RATE}}))
        records = {}
        for name, flag in (
            ("shared", "--search.share-warmup"),
            ("own", "--search.no-share-warmup"),
        ):
            result, records[name] = sweep(storage, name, str(preset), *common, flag)
            ratios.append(result["wall_over_ideal"])
            found |= {f"{name}/{key}": result[key] for key in ("wall_seconds", "train_seconds")}
            found[f"{name}/epochs"] = epochs(records[name], 0)
            if name == "shared":
                found["shared/saved_seconds"] = result["warmup/saved_seconds"]
                found["shared/forked_trials"] = result["warmup/forked_trials"]
        found["equal"] = scores(records["shared"]) == scores(records["own"])
    for searcher in ("tpe", "random"):
        for key in ("best", "best_mean", "epochs"):
            found[f"{searcher}/{key}/mean"] = mean(found[f"{searcher}/{key}"])
    found["wall_over_ideal"] = sorted(ratios)
    print(json.dumps({"bench": "sweep", "machine": about, "config": vars(args), **found}))


if __name__ == "__main__":
    main()

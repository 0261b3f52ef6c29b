"""How fast CREMA-D trains, from shards through Ray, against other ways; prints one JSON line.

    python tests/bench/train_speed.py [--clips 192] [--seconds 240] [--released DIR]
        [--rows 16] [--batchnorm local] [--compile]

A tree in CREMA-D's layout is made and prepared with the released recipe: 3 frames of 224 pixels of
9 candidates, and a filter bank of 1024 x 128; two ResNet-18. The contenders of `midas bench` take
turns, and with --released the training step of the authors' code as well, with 16 rows (see
released.py). The names are explained in service/bench.py.
"""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from service.environment import configure_ray  # noqa: E402

configure_ray()  # before Ray is imported

from method_step import machine  # noqa: E402
from reading import write_tree  # noqa: E402

from service import launch  # noqa: E402
from service.bench import bench  # noqa: E402
from service.config import RunConfig, load_preset  # noqa: E402


def configuration(root: Path, storage: Path, args: argparse.Namespace) -> RunConfig:
    """The preset, on this tree, with the released recipe."""
    preset = load_preset("cremad").model_dump(mode="json")
    preset["data"] |= {"root": str(root), "recipe": "official", "modalities": {}}
    preset["model"] |= {"batchnorm": args.batchnorm}
    preset["train"] |= {
        "global_batch_size": args.workers * args.rows,
        "precision": args.precision,
        "compile": args.compile,
    }
    preset["scaling"] |= {"num_workers": args.workers}
    return launch.resolve(RunConfig.model_validate(preset | {"storage": str(storage)}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--clips", type=int, default=192, help="training clips, 2 MB of shards each"
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="time for all turns")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="rows of a worker")
    parser.add_argument("--precision", default="auto", help="train.precision")
    parser.add_argument("--batchnorm", default="sync", help="model.batchnorm")
    parser.add_argument("--compile", action="store_true", help="train.compile")
    parser.add_argument("--released", type=Path, help="a checkout of the authors' repository")
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    about = machine(threads=1)
    others = {}
    if args.released:
        script = str(Path(__file__).with_name("released.py"))
        others["released"] = [sys.executable, script, "--source", str(args.released.resolve())]
    with tempfile.TemporaryDirectory() as folder:
        root, storage = Path(folder) / "clips", Path(folder) / "runs"
        root.mkdir()
        write_tree(root, args.clips)
        config = configuration(root, storage, args)
        prepared = launch.ensure_prepared(config, lambda done, total: None, debug=False)
        measured = bench(config, prepared.folder, seconds=args.seconds, debug=False, others=others)
    names = ("clips", "workers", "rows", "batchnorm", "compile")
    given = {name: getattr(args, name) for name in names}
    print(json.dumps({"bench": "train_speed", "machine": about, "config": given, **measured}))


if __name__ == "__main__":
    main()

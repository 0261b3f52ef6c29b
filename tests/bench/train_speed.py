"""How fast CREMA-D or Food-101 trains, from shards through Ray, against other ways; prints one JSON
line.

    python tests/bench/train_speed.py [--shape food101] [--clips 192] [--seconds 240]
        [--released DIR] [--rows 16] [--batchnorm local] [--compile]

A tree in the data set's layout is made and prepared. `cremad`, with the released recipe: 3 frames
of 224 pixels of 9 candidates, and a filter bank of 1024 x 128; two ResNet-18. `food101`: pictures
cut to 224 pixels and 128 tokens, 101 classes (with as many clips); a ResNet-18, and an ELECTRA of
the size of the preset's (or of --text-layers, --text-width) with weights from the seed. The
contenders of `midas bench` take turns, and with --released, for cremad, the training step of the
authors' code as well, with 16 rows (see released.py). The names are explained in service/bench.py.
"""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from service.environment import configure_ray  # noqa: E402

configure_ray()  # before Ray is imported

import numpy as np  # noqa: E402
from method_step import machine  # noqa: E402
from PIL import Image  # noqa: E402
from reading import write_tree  # noqa: E402

from service import launch  # noqa: E402
from service.bench import bench  # noqa: E402
from service.config import RunConfig, load_preset  # noqa: E402

DISHES, WORDS, PICTURE = 101, 120, (512, 384)


def write_dishes(root: Path, rows: int) -> None:
    """A tree in Food-101's layout: `rows` of train, and one of dev and of test for every eighth."""
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(2000)]
    for split, count in {"train": rows, "dev": -(-rows // 8), "test": -(-rows // 8)}.items():
        lines = []
        for number in range(count):
            dish = f"dish_{number % DISHES}"
            name = f"{dish}/{dish}_{split}_{number}.jpg"
            path = root / "images" / ("test" if split == "test" else "train") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize(PICTURE, Image.Resampling.BICUBIC).save(path)
            text = " ".join(rng.choice(words, WORDS))
            lines.append(json.dumps({"img": name, "label": number % DISHES, "text": text}))
        (root / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def text_network(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """An encoder of the shape of the preset's, whose weights are not to be had here."""
    from transformers import ElectraConfig

    ElectraConfig(
        hidden_size=args.text_width,
        num_hidden_layers=args.text_layers,
        num_attention_heads=4,
        intermediate_size=4 * args.text_width,
        embedding_size=args.text_width // 2,
    ).save_pretrained(folder)
    return {"kind": "pretrained", "name": str(folder), "pretrained": False}


def configuration(folder: Path, args: argparse.Namespace) -> RunConfig:
    """The preset, on a tree made in `folder`."""
    root = folder / "raw"
    root.mkdir()
    preset = load_preset(args.shape).model_dump(mode="json")
    preset["data"] |= {"root": str(root)}
    if args.shape == "cremad":
        write_tree(root, args.clips)
        preset["data"] |= {"recipe": "official", "modalities": {}}
    else:
        write_dishes(root, args.clips)
        preset["data"]["modalities"]["text"]["tokenizer"] = "fit"
        preset["model"]["encoders"]["text"] = text_network(folder / "network", args)
        preset["model"]["encoders"]["image"]["weights"] = "none"
    preset["model"] |= {"batchnorm": args.batchnorm}
    preset["train"] |= {
        "global_batch_size": args.workers * args.rows,
        "precision": args.precision,
        "compile": args.compile,
    }
    preset["scaling"] |= {"num_workers": args.workers}
    preset["storage"] = str(folder / "runs")
    return launch.resolve(RunConfig.model_validate(preset))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=["cremad", "food101"], default="cremad")
    parser.add_argument(
        "--clips", type=int, default=192, help="training samples; a clip takes 2 MB of shards"
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="time for all turns")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="rows of a worker")
    parser.add_argument("--precision", default="auto", help="train.precision")
    parser.add_argument("--batchnorm", default="sync", help="model.batchnorm")
    parser.add_argument("--compile", action="store_true", help="train.compile")
    parser.add_argument("--text-layers", type=int, default=12)
    parser.add_argument("--text-width", type=int, default=256)
    parser.add_argument("--released", type=Path, help="a checkout of the authors' repository")
    args = parser.parse_args()
    if args.released and args.shape != "cremad":
        parser.error("--released is for --shape cremad")
    logging.basicConfig(level=logging.ERROR)
    about = machine(threads=1)
    others = {}
    if args.released:
        script = str(Path(__file__).with_name("released.py"))
        others["released"] = [sys.executable, script, "--source", str(args.released.resolve())]
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder), args)
        prepared = launch.ensure_prepared(config, lambda done, total: None, debug=False)
        measured = bench(config, prepared.folder, seconds=args.seconds, debug=False, others=others)
    names = ("shape", "clips", "workers", "rows", "batchnorm", "compile")
    given = {name: getattr(args, name) for name in names}
    print(json.dumps({"bench": "train_speed", "machine": about, "config": given, **measured}))


if __name__ == "__main__":
    main()

"""Bytes, rate and error of each form in which a modality can be stored; prints one JSON line.

    python tests/bench/storage.py [--clips 96] [--rounds 7]

A CREMA-D tree (see reading.py) is prepared twice, with frames as `tensor` and sound as `float32`,
then as `jpeg` and `float16`; the rows and their order are the same. Of each form:

- `bytes_per_row`: of its column in the training shards (Parquet's own sizes);
- `rows_per_second`: `ShardReader.gather` of an epoch's windows in the training order, this column
  alone, with the random frame of each third chosen, in this process and one thread; the forms take
  turns, in reversed order in every other round, and the median is taken;
- `max_error`, `mean_error`: of delivered rows against the exact form (tensor, float32): in grey
  levels for frames, in normalised units for sound.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from method_step import machine  # noqa: E402
from reading import BATCH_SIZE, LANES, write_tree  # noqa: E402

from data.order import Order  # noqa: E402
from data.prepare import prepare  # noqa: E402
from data.reader import ShardReader, columns, read_window  # noqa: E402
from service.config import RunConfig  # noqa: E402
from service.rows import make_order  # noqa: E402

# Storage of frames and of sound; the first pair is exact.
PREPARED = (("tensor", "float32"), ("jpeg", "float16"))
GROUP_ROWS, SHARD_ROWS = 8, 48  # the defaults depend on the size of rows, too
EXACT = {"jpeg": "tensor", "float16": "float32"}


@dataclass(frozen=True)
class Form:
    """A column of a prepared set, alone.

    Attributes:
        reader: its manifest has this modality only.
        order: of training; the same for all forms.
    """

    modality: str
    reader: ShardReader
    order: Order

    @property
    def bytes_per_row(self) -> float:
        """Of the column in the files."""
        shards = self.reader.manifest.splits["train"]
        nbytes = 0
        for shard in shards:
            metadata = pq.read_metadata(Path(self.reader.folder) / shard.path)
            place = metadata.schema.names.index(self.modality)
            for group in range(metadata.num_row_groups):
                nbytes += metadata.row_group(group).column(place).total_compressed_size
        return nbytes / self.reader.manifest.rows("train")

    def read(self, epoch: int) -> list[np.ndarray]:
        """Delivered rows of the windows of an epoch."""
        lanes = range(self.order.lanes)
        manifest, tables = self.reader.manifest, []
        for index in range(self.order.num_windows):
            tables += read_window(self.reader, self.order, None, lanes, epoch, index)
        return [columns(table, manifest, "train")[self.modality] for table in tables]


def make_forms(folder: Path, num_clips: int) -> dict[str, Form]:
    """Name of a storage -> its column."""
    root = folder / "raw"
    root.mkdir()
    write_tree(root, num_clips)
    forms: dict[str, Form] = {}
    order: Order | None = None  # of the first set, for all: windows depend on the size of rows
    for visual, audio in PREPARED:
        modalities = {"visual": {"storage": visual}, "audio": {"storage": audio}}
        config = RunConfig.model_validate(
            {
                "data": {
                    "name": "cremad",
                    "root": str(root),
                    "modalities": modalities,
                    "rows_per_group": GROUP_ROWS,
                    "rows_per_shard": SHARD_ROWS,
                },
                "train": {"global_batch_size": BATCH_SIZE, "lanes": LANES},
            }
        )
        place = folder / f"{visual}-{audio}"
        manifest = prepare(config.data, place).manifest
        order = order or make_order(config, manifest)
        for storage, modality in zip((audio, visual), manifest.modalities, strict=True):
            alone = manifest.model_copy(update={"modalities": (modality,)})
            reader = ShardReader(str(place), alone, "train", config.train.seed)
            forms[storage] = Form(modality.name, reader, order)
    return forms


def errors(rows: list[np.ndarray], exact: list[np.ndarray]) -> tuple[float, float]:
    """Largest and mean absolute difference."""
    largest, total, count = 0.0, 0.0, 0
    for ours, other in zip(rows, exact, strict=True):
        for row, exact_row in zip(ours, other, strict=True):
            difference = np.abs(row.astype(np.float32) - exact_row.astype(np.float32))
            largest = max(largest, float(difference.max()))
            total, count = total + float(difference.sum(dtype=np.float64)), count + row.size
    return largest, total / count


def measure(forms: dict[str, Form], rounds: int) -> dict[str, list[float]]:
    """Rows a second of every form; entries of equal position are neighbours in time."""
    found: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(1 + rounds):
        for name in list(forms)[:: 1 if turn % 2 == 0 else -1]:
            began = time.perf_counter()
            rows = sum(len(part) for part in forms[name].read(turn))
            rate = rows / (time.perf_counter() - began)
            if turn > 0:  # the first round warms the page cache
                found[name].append(rate)
    return found


def run(num_clips: int, rounds: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        forms = make_forms(Path(folder), num_clips)
        rates = measure(forms, rounds)
        result: dict[str, dict[str, float]] = {}
        for name, form in forms.items():
            exact = forms[EXACT.get(name, name)]
            largest, mean = errors(form.read(0), exact.read(0))
            result[name] = {
                "bytes_per_row": round(form.bytes_per_row),
                "rows_per_second": round(median(rates[name]), 1),
                "max_error": round(largest, 6),
                "mean_error": round(mean, 6),
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=96, help="training clips")
    parser.add_argument("--rounds", type=int, default=7, help="timed epochs of each form")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = machine(threads=1)
    forms = run(args.clips, args.rounds)
    result = {"bench": "storage", "machine": about, "config": vars(args), "forms": forms}
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
    main()

"""Samples a second of a training epoch of CREMA-D, from files and from shards; prints a JSON line.

    python tests/bench/reading.py [--clips 160] [--rounds 5] [--ray]

The tree is made here: clips of 2.5 s at 16 kHz with eight JPEG frames of 480 x 360 pixels.

- `files_W`: a PyTorch DataLoader with W worker processes (0: none) over a Dataset as training codes
  write it: Kaldi filter banks of the WAV file; of each third of the clip a random frame, decoded,
  RandomResizedCrop(224), mirrored half of the time, normalised.
- `shards`: what the read tasks of `train_stream` do, window after window in the training order, in
  this process: rows as they are delivered to the device, the random frame of each third chosen.
- `shards_augmented`: these, then crop, flip and normalisation by training/augment.py, here on the
  CPU; in training that is the device's work.
- `shards_ray` (with --ray): `train_stream` itself, without augmentation.

One thread a process. The sides read an epoch in turn, in reversed order in every other round, so
that whatever else the machine does hits them all; ratios are taken round by round, of seconds and,
where no other process works, of CPU seconds. The files are in the page cache on all sides. The bar:
`shards` at least 10 times `files_0`.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from service.environment import configure_ray  # noqa: E402

configure_ray()  # before Ray is imported

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import ray  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from method_step import machine  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchaudio.compliance import kaldi  # noqa: E402
from torchvision import transforms  # noqa: E402

from data.config import DataConfig  # noqa: E402
from data.draws import uniform  # noqa: E402
from data.order import Order  # noqa: E402
from data.pipeline import ReadAhead, train_stream  # noqa: E402
from data.prepare import prepare  # noqa: E402
from data.reader import ShardReader, columns, cut, read_window  # noqa: E402
from service.config import RunConfig  # noqa: E402
from service.rows import make_order, row_spec  # noqa: E402
from training.augment import augment, num_uniform  # noqa: E402

EMOTIONS = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")
FRAMES, FRAME_SIZE = 8, (360, 480)
SECONDS, RATE = 2.5, 16_000
NUM_PARTS = 3
SPECTROGRAM = (1024, 128)
FBANK_MEAN, FBANK_STD = -4.503877, 5.141276
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH_SIZE, LANES = 32, 8
OBJECT_STORE_BYTES = 1 << 30
# Sides that leave no work to other processes.
IN_PROCESS = ("files_0", "shards", "shards_augmented")
Tensors = dict[str, Tensor]


def write_tree(root: Path, num_clips: int) -> list[str]:
    """A tree in CREMA-D's layout with `num_clips` training clips and one each for val and test.

    Returns:
        The training clips, as `id,emotion`.
    """
    rng = np.random.default_rng(0)
    rows = []
    for number in range(num_clips + 2):
        emotion = EMOTIONS[number % len(EMOTIONS)]
        rows.append(f"{1000 + number}_IEO_{emotion}_XX,{emotion}")
        write_clip(root, rows[-1].split(",")[0], rng)
    lists = {"train_split": rows[:-2], "val": rows[-2:-1], "test": rows[-1:]}
    for name, part in lists.items():
        (root / f"{name}.csv").write_text("\n".join(["clip_id,label", *part]) + "\n")
    return rows[:-2]


def write_clip(root: Path, clip: str, rng: np.random.Generator) -> None:
    """Noise as sound; frames with soft shapes and grain, about 25 kB each."""
    (root / "AudioWAV").mkdir(exist_ok=True)
    wave = 0.1 * rng.standard_normal(int(SECONDS * RATE))
    soundfile.write(root / "AudioWAV" / f"{clip}.wav", wave, RATE, subtype="PCM_16")
    folder = root / "visual_frames" / clip
    folder.mkdir(parents=True)
    height, width = FRAME_SIZE
    for place in range(FRAMES):
        coarse = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        grain = rng.integers(-6, 7, (height, width, 1), dtype=np.int16)
        frame = np.clip(soft.astype(np.int16) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(frame).save(folder / f"{place:05d}.jpg", quality=90)


class Clips(Dataset[Tensors]):
    """Samples decoded from the files each time they are asked for."""

    def __init__(self, root: Path, rows: list[str]):
        self._root = root
        self._rows = [tuple(row.split(",")) for row in rows]
        self._transform: Callable[[Image.Image], Any] = transforms.Compose(
            [
                transforms.RandomResizedCrop(224),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensors:
        clip, emotion = self._rows[index]
        label = torch.tensor(EMOTIONS.index(emotion))
        return {"audio": self._audio(clip), "visual": self._visual(clip), "label": label}

    def _audio(self, clip: str) -> Tensor:
        samples, rate = soundfile.read(self._root / "AudioWAV" / f"{clip}.wav", dtype="float32")
        return filter_banks(samples, rate)

    def _visual(self, clip: str) -> Tensor:
        paths = sorted((self._root / "visual_frames" / clip).iterdir())
        part = len(paths) // NUM_PARTS
        drawn = torch.randint(part, (NUM_PARTS,)).tolist()
        chosen = [paths[number * part + place] for number, place in enumerate(drawn)]
        return torch.stack([self._transform(Image.open(path).convert("RGB")) for path in chosen])


def filter_banks(samples: np.ndarray, rate: int) -> Tensor:
    """float32 (1, 1024, 128) of a mono sound, as the released code of CREMA-D makes them."""
    wave = torch.from_numpy(samples)[None]
    features = kaldi.fbank(
        wave - wave.mean(),
        htk_compat=True,
        sample_frequency=rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=SPECTROGRAM[1],
        dither=0.0,
        frame_shift=10,
    )
    padded = torch.nn.functional.pad(features, (0, 0, 0, SPECTROGRAM[0] - len(features)))
    return ((padded - FBANK_MEAN) / (2 * FBANK_STD))[None]


def make_loader(root: Path, rows: list[str], num_workers: int) -> DataLoader[Tensors]:
    # Workers stay: to start them is no part of an epoch.
    return DataLoader(
        Clips(root, rows),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


def windows(reader: ShardReader, order: Order, epoch: int) -> Iterator[pa.Table]:
    """Global batches of an epoch, read in this process."""
    lanes = range(order.lanes)
    tables = (
        table
        for index in range(order.num_windows)
        for table in read_window(reader, order, None, lanes, epoch, index)
    )
    return cut(tables, (order.batch_rows(step, lanes) for step in range(order.num_steps)))


def tensors(table: pa.Table, reader: ShardReader) -> Tensors:
    arrays = columns(table, reader.manifest, reader.split)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Augmentation:
    """Delivered batches to what the model reads, as service/rows.py does it."""

    def __init__(self, reader: ShardReader, config: RunConfig):
        self._specs = {m.name: row_spec(m, config) for m in reader.manifest.modalities}
        self._seed = config.train.seed

    def __call__(self, batch: Tensors, epoch: int) -> Tensors:
        result = dict(batch)
        for name, spec in self._specs.items():
            assert spec is not None
            count = num_uniform(spec)
            draw = uniform(self._seed, f"augment/{name}", epoch, batch["sample_id"].numpy(), count)
            result[name] = augment(batch[name], spec, torch.from_numpy(draw) if count else None)
        return result


Side = Callable[[int], Iterator[Tensors]]


def make_sides(
    root: Path, rows: list[str], reader: ShardReader, config: RunConfig, with_ray: bool
) -> dict[str, Side]:
    """Name -> epoch -> its batches."""
    order = make_order(config, reader.manifest)
    augmentation = Augmentation(reader, config)
    loaders = {number: make_loader(root, rows, number) for number in (0, 2)}

    def from_shards(epoch: int) -> Iterator[Tensors]:
        return (tensors(table, reader) for table in windows(reader, order, epoch))

    def from_ray(epoch: int) -> Iterator[Tensors]:
        epochs = range(epoch, epoch + 1)
        tables = train_stream(reader, order, rank=0, world_size=1, epochs=epochs, ahead=ReadAhead())
        return (tensors(table, reader) for table in tables)

    sides: dict[str, Side] = {
        "files_0": lambda epoch: iter(loaders[0]),
        "files_2": lambda epoch: iter(loaders[2]),
        "shards": from_shards,
        "shards_augmented": lambda epoch: (augmentation(b, epoch) for b in from_shards(epoch)),
    }
    return sides | ({"shards_ray": from_ray} if with_ray else {})


class Rate(NamedTuple):
    """Samples of an epoch by its seconds, and by the CPU seconds of this process."""

    wall: float
    cpu: float


def read_epoch(batches: Iterator[Tensors], expected: int) -> Rate:
    """Read all batches; every byte of them is written here, by a worker or by a copy."""
    began, cpu_began = time.perf_counter(), time.process_time()
    samples = sum(len(batch["label"]) for batch in batches)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    assert samples == expected, (samples, expected)
    return Rate(samples / seconds, samples / cpu_seconds)


def measure(sides: dict[str, Side], samples: int, rounds: int) -> dict[str, list[Rate]]:
    """Rates of every side; entries of equal position are neighbours in time."""
    found: dict[str, list[Rate]] = {name: [] for name in sides}
    for turn in range(1 + rounds):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            rate = read_epoch(sides[name](turn), samples)
            if turn > 0:  # the first round warms the page cache and starts the workers
                found[name].append(rate)
    return found


def run(num_clips: int, rounds: int, with_ray: bool) -> dict[str, list[Rate]]:
    with ExitStack() as stack:
        root, shards = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{name}-")))
            for name in ("clips", "shards")
        )
        rows = write_tree(root, num_clips)
        data = DataConfig(name="cremad", root=str(root))
        manifest = prepare(data, shards).manifest
        config = RunConfig.model_validate(
            {"data": data, "train": {"global_batch_size": BATCH_SIZE, "lanes": LANES}}
        )
        if with_ray:
            start_ray()
            stack.callback(ray.shutdown)
        reader = ShardReader(str(shards), manifest, "train", config.train.seed)
        return measure(make_sides(root, rows, reader, config, with_ray), len(rows), rounds)


def start_ray() -> None:
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def summary(found: dict[str, list[Rate]]) -> dict[str, float]:
    """Medians of rates and of the ratios of each round."""
    result: dict[str, float] = {}
    for name, rates in found.items():
        result[f"samples_per_second_{name}"] = round(median(rate.wall for rate in rates), 1)
    for base, side in product(("files_0", "files_2"), list(found)[2:]):
        pairs = list(zip(found[side], found[base], strict=True))
        values = [ours.wall / other.wall for ours, other in pairs]
        result[f"{side}_over_{base}"] = round(median(values), 3)
        result[f"{side}_over_{base}_min"] = round(min(values), 3)
        result[f"{side}_over_{base}_max"] = round(max(values), 3)
        if {side, base} <= set(IN_PROCESS):
            values = [ours.cpu / other.cpu for ours, other in pairs]
            result[f"{side}_over_{base}_cpu"] = round(median(values), 3)
    for name in IN_PROCESS:
        seconds = median(1 / rate.cpu for rate in found[name])
        result[f"cpu_milliseconds_per_sample_{name}"] = round(1e3 * seconds, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--clips", type=int, default=160, help="training clips, 2 MB of shards each"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed epochs of each side")
    parser.add_argument("--ray", action="store_true", help="read through Ray Data as well")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    torch.set_num_threads(1)
    about = machine(threads=1)
    found = run(args.clips, args.rounds, args.ray)
    result = {"bench": "reading", "machine": about, "config": vars(args), **summary(found)}
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
    main()

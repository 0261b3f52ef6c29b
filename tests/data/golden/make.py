"""Make the golden arrays again: run the released MIDAS code on the raw files of raw.py.

    python tests/data/golden/make.py CHECKOUT

CHECKOUT is a folder with the code of Seong-HyeonHwang/MIDAS_NeurIPS2025; README.md beside this file
says which commit, and what of its surroundings is replaced here.
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import soundfile
import torch
import torchaudio
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from tests.data.golden import raw  # noqa: E402

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FLOW = ((0.1307,), (0.3081,))
# Below, the release takes a frame twice; see README.md.
FIRST_COUNT = {"cremad": 3, "kinetics": 7, "ucf101": 4}
MAX_COUNT = 40
SPLIT_SEED = 2  # of the release
Arrays = dict[str, np.ndarray]


def stand_in(name: str, **attributes: object) -> ModuleType:
    """A module that is imported by files of the release and not used by what runs here."""
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


def load_sound(path: str) -> tuple[Tensor, int]:
    """What torchaudio.load returned before it needed torchcodec."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T.copy()), rate


@contextmanager
def surroundings() -> Iterator[None]:
    """Sound by soundfile; listings sorted; every draw takes its largest value and nothing flips."""
    listdir = os.listdir
    with (
        mock.patch.object(torchaudio, "load", load_sound),
        mock.patch.object(os, "listdir", lambda path: sorted(listdir(path))),
        mock.patch.object(random, "randint", lambda low, high: high),
        mock.patch.object(torch, "rand", lambda *shape: torch.ones(shape)),
    ):
        yield


def pixels(value: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Grey levels of a normalised tensor: (C, H, W), or (C, K, H, W) as (K, C, H, W)."""
    shape = (-1, *(1,) * (value.ndim - 1))
    level = (value * torch.tensor(std).reshape(shape) + torch.tensor(mean).reshape(shape)) * 255
    assert (level - level.round()).abs().max() < 1e-3
    result = level.round().to(torch.uint8).numpy()
    return result.swapaxes(0, 1) if result.ndim == 4 else result


def add(arrays: Arrays, key: str, label: str, rows: dict[str, np.ndarray]) -> None:
    """Store a sample: its label's name, and its rows thinned out."""
    arrays[f"{key}/label"] = np.array(label)
    for name, row in rows.items():
        arrays[f"{key}/{name}"] = raw.thin(row)
        arrays[f"{key}/{name}/moments"] = raw.moments(row)


def take(dataset: Any) -> list[Any]:
    """All samples; the release's datasets do not end when they are iterated."""
    return [dataset[index] for index in range(len(dataset))]


def cremad_set(root: Path, mode: str) -> Any:
    lists = dict(zip(("train", "val", "test"), raw.CREMAD, strict=True))
    return import_module("datasets.Cremad_dataset").CREMADDataset(
        mode,
        visual_path=str(root / "visual_frames"),
        audio_path=str(root / "AudioWAV"),
        stat_csv=str(root / "stat.csv"),
        **{f"{side}_csv": str(root / name) for side, name in lists.items()},
    )


def cremad(root: Path) -> Arrays:
    """Sound of all clips, frames of those that are evaluated."""
    arrays: Arrays = {"classes": np.array(cremad_set(root, "val").classes)}
    for mode in ("train", "val", "test"):
        dataset = cremad_set(root, mode)
        for key, sample in zip(dataset.data, take(dataset), strict=True):
            rows = {"audio": sample["audio"].numpy()}
            if mode != "train":
                rows["visual"] = pixels(sample["video"], *IMAGENET)
            add(arrays, key, dataset.classes[sample["label"]], rows)
    return arrays


def kinetics_set(root: Path, mode: str) -> Any:
    lists = {"train": "train.txt", "val": "val.txt", "test": "test.txt"}
    path = str(root / "videos" / lists[mode])
    return import_module("datasets.Kinetics_dataset").KineticsDataset(
        mode,
        audio_dir=str(root / "audios"),
        video_dir=str(root / "videos"),
        audio_transform=None,
        video_transform=None,
        train_path=path,
        dev_path=path,
        test_path=path,
    )


def kinetics(root: Path) -> Arrays:
    """Sound of all clips, frames of those that are evaluated."""
    arrays: Arrays = {}
    for mode in ("train", "val", "test"):
        dataset = kinetics_set(root, mode)
        for key, sample in zip(dataset.data, take(dataset), strict=True):
            rows = {"audio": sample["audio"].numpy()}
            if mode != "train":
                rows["visual"] = pixels(sample["video"], *IMAGENET)
            add(arrays, key, str(sample["label"].item()), rows)
    return arrays


def ucf101_set(root: Path, mode: str) -> Any:
    train, test = (str(root / name) for name in raw.UCF)
    return import_module("datasets.Ucf101_dataset").UCF101Dataset(
        mode,
        visual_path=str(root / "frames_rgb"),
        flow_path_u=str(root / "flows_u"),
        flow_path_v=str(root / "flows_v"),
        stat_path=str(root / "classInd.txt"),
        train_path=train,
        test_path=test,
    )


def ucf101(root: Path) -> Arrays:
    """Both modalities of all clips; of training clips the last frame that may be drawn."""
    arrays: Arrays = {"classes": np.array(ucf101_set(root, "test").classes)}
    for mode in ("train", "test"):
        dataset = ucf101_set(root, mode)
        for sample in take(dataset):
            rows = {
                "visual": pixels(sample["visual"], *IMAGENET),
                "flow": pixels(sample["flow"], *FLOW),
            }
            add(arrays, sample["raw"], dataset.classes[sample["label"]], rows)
    return arrays


def food101(root: Path) -> Arrays:
    """Tokens and images of all samples, as in evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        raw.write_tokenizer(Path(folder))
        release = import_module("models.model_midas_food101")
        model, tokenizer = release.MidasModel, release.AutoTokenizer
        load = tokenizer.from_pretrained
        with mock.patch.object(tokenizer, "from_pretrained", return_value=load(folder)):
            owner = SimpleNamespace(clean_text=lambda text: model.clean_text(None, text))
            text_transform = model._build_text_transform(owner)
    image_transform = model._build_image_transform(None, phase="val")
    arrays: Arrays = {}
    for split, rows in raw.FOOD.items():
        frame = release_rows(root / f"{split}.jsonl", "test" if split == "test" else "train")
        dataset = import_module("datasets.Food101_dataset").Food101Dataset(
            frame, str(root / "images"), image_transform, text_transform
        )
        for (name, _, _), sample in zip(rows, take(dataset), strict=True):
            text = sample["text"]["hf_text_text_token_ids"].numpy().astype(np.int32)
            image = pixels(sample["image"], *IMAGENET)
            add(
                arrays, Path(name).name, str(sample["label"].item()), {"text": text, "image": image}
            )
    return arrays


SETS = {"cremad": cremad, "kinetics": kinetics, "ucf101": ucf101, "food101": food101}


def release_rows(path: Path, folder: str) -> str:
    """A copy of the list with the column that the release's split step adds."""
    import pandas as pd

    frame = pd.read_json(path, lines=True).assign(original_split=folder)
    copy = path.with_suffix(".release.jsonl")
    frame.to_json(copy, orient="records", lines=True)
    return str(copy)


def positions(root: Path, name: str, first: int) -> Arrays:
    """Positions, from 0, of the three frames that are evaluated of clips of `first` frames on."""
    make_set, folders = {
        "cremad": (cremad_set, ("visual_frames",)),
        "kinetics": (kinetics_set, ("videos",)),
        "ucf101": (ucf101_set, ("flows_u", "flows_v")),
    }[name]
    dataset = make_set(root, "test")
    clips = [root / folder / dataset.data[0] for folder in folders]
    counts = np.arange(first, MAX_COUNT)
    taken = []
    for count in counts:
        for clip in clips:
            for place in range(1, count + 1):
                image = Image.fromarray(raw.picture(0, 8, 8, 1)[..., 0])
                raw.write_picture(clip / f"frame{place:05d}.jpg", image)
            for path in set(clip.iterdir()) - {
                clip / f"frame{n + 1:05d}.jpg" for n in range(count)
            }:
                path.unlink()
        paths = [path for path in opened(lambda: dataset[0]) if path.parent == clips[0]]
        taken.append([int(path.stem.removeprefix("frame")) - 1 for path in paths])
    return {f"{name}/counts": counts, f"{name}/positions": np.array(taken)}


def opened(read: Callable[[], object]) -> list[Path]:
    """The pictures that are opened, in order."""
    paths: list[Path] = []
    open_picture = Image.open

    def note(path: str) -> Image.Image:
        paths.append(Path(path))
        return open_picture(path)

    with mock.patch.object(Image, "open", note):
        read()
    return paths


def sides(root: Path, name: str) -> Arrays:
    """uint8, per row of the lists one after the other: 0 train, 1 val, 2 test."""
    release = import_module("utils.dataset_utils")
    *frames, _ = release.create_data_splits(name, str(root), seed=SPLIT_SEED, save_splits=False)
    result = np.full(raw.INDEX_ROWS, 255, dtype=np.uint8)
    for side, frame in enumerate(frames):
        result[frame.index] = side
    return {name: result}


def made(work: Callable[[Path], Arrays], write: Callable[[Path], None]) -> Arrays:
    """What `work` makes of a fresh tree."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return work(Path(folder))


def make() -> dict[str, Arrays]:
    """Name of a golden file -> its arrays."""
    golden = {name: made(work, raw.WRITE[name]) for name, work in SETS.items()}
    golden["positions"], golden["splits"] = {}, {}
    for name, first in FIRST_COUNT.items():
        work = partial(positions, name=name, first=first)
        golden["positions"] |= made(work, raw.WRITE[name])
    for name in SETS:
        golden["splits"] |= made(partial(sides, name=name), partial(raw.write_index, name))
    return golden


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path, help="folder with the released code")
    sys.path.insert(0, str(parser.parse_args().checkout))
    lightning = stand_in("pytorch_lightning", LightningModule=object)
    metrics = stand_in("torchmetrics", functional=None, Accuracy=None)
    for module in (lightning, metrics, stand_in("h5py")):
        sys.modules[module.__name__] = module
    with surroundings():
        golden = make()
    for name, arrays in golden.items():
        np.savez_compressed(Path(__file__).parent / f"{name}.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()

"""AV-MNIST: an image of a digit and the spectrogram of a spoken one.

The layout of pliang279/MultiBench: `image/{train,test}_data.npy` (N, 784), `audio/{train,test}_
data.npy` (N, 112, 112), `{train,test}_labels.npy` (N,), values from 0 to 255.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from data.config import DataConfig, Kind, ModalityConfig
from data.schema import DataError, Split
from data.sources.base import raw_folder
from data.sources.raw import RawSample, Values

SHAPES: dict[str, tuple[int, int, int]] = {"image": (1, 28, 28), "audio": (1, 112, 112)}
VAL_ROWS = 5000
FULL_SCALE = 255
NPY_NAMES = tuple(
    f"{stem}.npy"
    for part in ("train", "test")
    for stem in (f"image/{part}_data", f"audio/{part}_data", f"{part}_labels")
)
REMEDY = f"`--data.root DIR` with {', '.join(NPY_NAMES)} inside"


class ScaledValues(Values):
    """Values from 0 to 255 that are divided by 255 when they are asked for.

    What is kept is a view of a memory-mapped file: all samples at once would be 3.7 GB in float32.
    """

    def __init__(self, stored: np.ndarray) -> None:
        object.__setattr__(self, "_stored", stored)
        self._stored: np.ndarray

    @property
    def array(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Values from 0 to 1, float32."""
        return self._stored.astype(np.float32) / FULL_SCALE


class AVMnist:
    """70000 digits; the last 5000 of the 60000 training rows are for validation, as in MultiBench.

    Modalities: image (1, 28, 28) and audio (1, 112, 112), float32 from 0 to 1. A key is
    `train-00017`, file part and row from 0.
    """

    name: ClassVar[str] = "avmnist"
    version: ClassVar[int] = 1
    kinds: Mapping[str, Kind] = {"image": "image", "audio": "audio"}
    classes: tuple[str, ...] = tuple(map(str, range(10)))
    official: ClassVar[Mapping[str, ModalityConfig]] = {}

    def __init__(self, config: DataConfig) -> None:
        self._root = raw_folder(config, NPY_NAMES, REMEDY)

    def samples(self) -> Iterator[RawSample]:
        """Training, validation and test rows in file order.

        Raises:
            DataError: a file is no array of numbers, or has another shape.
        """
        labels = self._labels("train")
        train_rows = len(labels) - VAL_ROWS
        if train_rows <= 0:
            raise DataError(
                f"{self._root / 'train_labels.npy'} has {len(labels)} rows, of which the last "
                f"{VAL_ROWS} are for validation; the whole set has 60000; get the files again"
            )
        for row, (label, media) in enumerate(self._rows("train", labels)):
            split: Split = "train" if row < train_rows else "val"
            yield RawSample(f"train-{row:05d}", label, split, media)
        for row, (label, media) in enumerate(self._rows("test", self._labels("test"))):
            yield RawSample(f"test-{row:05d}", label, "test", media)

    def _labels(self, part: str) -> list[str]:
        return [f"{label:g}" for label in _array(self._root / f"{part}_labels.npy").reshape(-1)]

    def _rows(self, part: str, labels: list[str]) -> Iterator[tuple[str, dict[str, Values]]]:
        stored = {
            name: _shaped(self._root / name / f"{part}_data.npy", (len(labels), *shape))
            for name, shape in SHAPES.items()
        }
        for row, label in enumerate(labels):
            yield label, {name: ScaledValues(rows[row]) for name, rows in stored.items()}


def _array(path: Path) -> np.ndarray:
    """A memory-mapped array of numbers."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is no array of numbers ({error}); get the file again") from error
    if array.dtype.kind not in "biuf":
        raise DataError(f"{path} holds {array.dtype}, not numbers; get the file again")
    return array


def _shaped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    array = _array(path)
    if len(array) != shape[0] or array.size != np.prod(shape):
        raise DataError(
            f"{path} has shape {array.shape}, and {shape} was expected, a row per label; get the "
            "files again"
        )
    return array.reshape(shape)

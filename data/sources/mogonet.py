"""ROSMAP and BRCA: three omics views of a patient.

The layout of txWang/MOGONET (T. Wang et al., Nature Communications 12, 3445, 2021):
`{1,2,3}_{tr,te}.csv` for mRNA expression, DNA methylation and miRNA expression, comma-separated,
no header; `labels_{tr,te}.csv`, numbers from 0, often written as floats. Row i is the same patient
in every file of a part. There is no validation part.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from data.config import DataConfig, Kind, ModalityConfig
from data.schema import DataError, Split
from data.sources.base import raw_folder
from data.sources.index import read_lines
from data.sources.number_rows import NumberRow, number_rows
from data.sources.raw import RawSample, Unreadable, Values

VIEWS: dict[str, int] = {"mrna": 1, "methylation": 2, "mirna": 3}
PARTS: dict[str, Split] = {"tr": "train", "te": "test"}
CSV_NAMES = tuple(
    f"{stem}_{part}.csv" for part in PARTS for stem in (*map(str, VIEWS.values()), "labels")
)
REMEDY = f"`--data.root DIR` with {', '.join(CSV_NAMES)} inside"


class _Mogonet:
    """A key is `tr-017`: file part and row from 0. Views are float64 vectors, as in the files.

    The official recipe scales every column to [0, 1] by minimum and range of the training rows (as
    RaghavSinghal10/M3CoL does); validation and test values can leave it.
    """

    version: ClassVar[int] = 2
    kinds: Mapping[str, Kind] = dict.fromkeys(VIEWS, "vector")
    official: ClassVar[Mapping[str, ModalityConfig]] = dict.fromkeys(
        VIEWS, ModalityConfig(scale="minmax")
    )
    classes: tuple[str, ...]
    widths: ClassVar[Mapping[str, int]]

    def __init__(self, config: DataConfig) -> None:
        self._root = raw_folder(config, CSV_NAMES, REMEDY)

    def samples(self) -> Iterator[RawSample | Unreadable]:
        """Training rows, then test rows, in file order.

        A label that is no class number stays as it is written. A row that is too short or holds
        something else than numbers is unreadable.

        Raises:
            DataError: a file is no text, or the files of a part differ in their number of rows.
        """
        for part, split in PARTS.items():
            labels = self._labels(part)
            paths = {view: self._root / f"{number}_{part}.csv" for view, number in VIEWS.items()}
            views = {view: self._rows(view, path, part, labels) for view, path in paths.items()}
            for row, label in enumerate(labels):
                yield _sample(row, part, split, label, paths, views)

    def _labels(self, part: str) -> list[str]:
        return [self._class_name(cell) for _, cell in read_lines(self._root / f"labels_{part}.csv")]

    def _class_name(self, cell: str) -> str:
        try:
            return self.classes[[*map(float, range(len(self.classes)))].index(float(cell))]
        except ValueError:
            return cell

    def _rows(self, view: str, path: Path, part: str, labels: list[str]) -> list[NumberRow]:
        rows = number_rows(path, self.widths[view])
        if len(rows) != len(labels):
            raise DataError(
                f"{path} ({view}) has {len(rows)} rows and labels_{part}.csv has {len(labels)}; "
                "row i must be one patient in all files; get the files again"
            )
        return rows


class Rosmap(_Mogonet):
    """351 patients, 245 for training: control or Alzheimer's disease; 200 columns a view."""

    name: ClassVar[str] = "rosmap"
    classes: tuple[str, ...] = ("control", "alzheimer")
    widths: ClassVar[Mapping[str, int]] = dict.fromkeys(VIEWS, 200)


class Brca(_Mogonet):
    """875 patients, 612 for training: subtype of breast cancer; 1000, 1000 and 503 columns."""

    name: ClassVar[str] = "brca"
    classes: tuple[str, ...] = (
        *("normal-like", "basal-like", "HER2-enriched", "luminal A", "luminal B"),
    )
    widths: ClassVar[Mapping[str, int]] = {"mrna": 1000, "methylation": 1000, "mirna": 503}


def _sample(
    row: int,
    part: str,
    split: Split,
    label: str,
    paths: Mapping[str, Path],
    views: Mapping[str, list[NumberRow]],
) -> RawSample | Unreadable:
    key = f"{part}-{row:03d}"
    media: dict[str, Values] = {}
    for view, rows in views.items():
        numbers = rows[row]
        if isinstance(numbers, str):
            return Unreadable(key, f"{paths[view].name} row {row + 1}: {numbers}", split)
        media[view] = Values(numbers)
    return RawSample(key, label, split, media)

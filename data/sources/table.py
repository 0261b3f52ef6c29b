"""Bring your own: a table with a row per sample, whose cells are paths, texts, numbers or lists.

Files of a table are read in data/sources/table_rows.py, cells in data/sources/table_cells.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar

import numpy as np

from data.config import DataConfig, Kind, ModalityConfig
from data.kept import columns_json, columns_name
from data.schema import DataError, Split
from data.sources.base import raw_folder
from data.sources.raw import Media, RawSample, Unreadable, Values
from data.sources.table_cells import FORMS, Profile, is_empty, medium, number, word
from data.sources.table_rows import FORMATS, BadRow, Cells, Row, read_columns, read_rows

KEY_COLUMNS = ("id", "key", "sample_id")
SHARD_COLUMNS = ("sample_id", "label", "key", "group", "present")
NUMBERS = "table"
"""The modality that all columns of numbers make together."""
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SPLIT_WORDS: Mapping[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class _Plan:
    """How a modality is made: of one column, or as a vector of several columns of numbers."""

    kind: Kind
    columns: tuple[str, ...]
    profile: Profile  # of the first column

    def medium(self, cells: Cells, root: Path) -> Media:
        if self.kind == "vector" and self.profile.form == "number":
            return Values(np.array([number(cells, column) for column in self.columns]))
        return medium(cells, self.columns[0], self.kind, self.profile.form, root)

    def __str__(self) -> str:
        columns = f"column{'s' if len(self.columns) > 1 else ''} {', '.join(self.columns)}"
        return f"{self.kind} (from {columns}, {self.profile.about(self.kind)})"


class Table:
    """Samples from a table of the user's own.

    Without `config.modalities` every column but those of label, group, split and key (id, key or
    sample_id) is a modality of the kind its cells look like, and the columns of plain numbers are
    one vector together, named table. With it there are the named modalities only; table then
    stands for the columns of numbers that no other uses, unless a column has that name.

    Several paths in a cell (a list, or separated by `;`) are the frames of a clip; of an image the
    first is taken. Vectors and sequences may be lists of numbers (in CSV as JSON) or .npy files,
    which are read here, as float32 if they are that, else as float64.

    An empty cell: the sample lacks the modality. A row is `Unreadable` if it lacks all, or some of
    the numbers of a vector, if it has no label or an unknown split, or if a cell does not fit.

    Attributes:
        root: resolved folder that paths are relative to.
        kinds: modality -> kind, in the order of the columns or of the settings.
        classes: all labels of the table, sorted; by value if all are integers.
    """

    name: ClassVar[str] = "table"
    version: ClassVar[int] = 1
    official: ClassVar[Mapping[str, ModalityConfig]] = {}
    min_modalities: ClassVar[int] = 2

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._path = _table_path(config)
        self.root = _root(config, self._path)
        columns = read_columns(self._path)
        self._named = {name: own.column or name for name, own in config.modalities.items()}
        self._check_settings(columns)
        self._key_column = next((c for c in columns if c.lower() in KEY_COLUMNS), None)
        profiles, labels = self._survey(self._candidates(columns))
        self._plans = self._planned(profiles)
        self._check_plans(columns)
        self.kinds: Mapping[str, Kind] = {name: plan.kind for name, plan in self._plans.items()}
        self.classes = _in_order(labels)

    @property
    def files(self) -> dict[str, str]:
        """To be kept with the prepared set: columns of numbers that are a vector, in order."""
        vectors = {
            name: plan.columns
            for name, plan in self._plans.items()
            if plan.columns != (self._named.get(name, name),)
        }
        return {columns_name(name): columns_json(columns) for name, columns in vectors.items()}

    def describe(self) -> list[str]:
        """A line per modality: `photo: image (from column photo, 136 paths .webp)`."""
        return [f"{name}: {plan}" for name, plan in self._plans.items()]

    def samples(self) -> Iterator[RawSample | Unreadable]:
        """Rows of train, then val, then test, each in the table's order; without a split column all
        are train. A row that names no split comes with train."""
        used = (column for plan in self._plans.values() for column in plan.columns)
        rows = read_rows(self._path, {*self._roles(), *used})
        samples = [self._sample(position, row) for position, row in enumerate(rows, start=1)]
        yield from sorted(samples, key=lambda sample: SPLITS.index(sample.split))

    def _sample(self, position: int, row: Row) -> RawSample | Unreadable:
        split: Split = "train"
        try:
            split = self._split(row.cells)
            return RawSample(
                key=word(row.cells, self._key_column) or f"row {position}",
                label=self._label(row.cells),
                split=split,
                media=self._media(row.cells),
                group=word(row.cells, self._config.group_column) or None,
            )
        except BadRow as error:
            return Unreadable(f"{self._path.name} {row.where}", str(error), split)

    def _label(self, cells: Cells) -> str:
        if label := word(cells, self._config.label_column):
            return label
        raise BadRow(f"column {self._config.label_column} is empty; a label is needed")

    def _split(self, cells: Cells) -> Split:
        column = self._config.split_column
        if column is None:
            return "train"
        side = word(cells, column)
        if split := SPLIT_WORDS.get(side.lower()):
            return split
        found = f"holds {side!r}" if side else "is empty"
        raise BadRow(f"column {column} {found}; use train, val or test")

    def _media(self, cells: Cells) -> dict[str, Media]:
        media: dict[str, Media] = {}
        for name, plan in self._plans.items():
            empty = [column for column in plan.columns if is_empty(cells.get(column))]
            if not empty:
                media[name] = plan.medium(cells, self.root)
            elif len(empty) < len(plan.columns):
                raise BadRow(f"column {empty[0]} is empty, and others of {name} are not")
        if not media:
            raise BadRow(f"all modalities are empty ({', '.join(self._plans)})")
        return media

    def _roles(self) -> list[str]:
        """Columns that say what a sample is, not what it looks or sounds like."""
        config = self._config
        roles = (config.label_column, config.group_column, config.split_column, self._key_column)
        return [column for column in roles if column]

    def _check_settings(self, columns: Sequence[str]) -> None:
        label = self._config.label_column
        for setting, column in self._columns_set().items():
            if column not in columns:
                close = get_close_matches(column, columns, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise DataError(
                    f"{self._path.name} has no column {column!r}{hint}; its columns are "
                    f"{', '.join(columns)} (the first line of a CSV names them, separated by "
                    f"commas); give one as `--data.{setting} COLUMN`"
                )
            if column == label and setting.startswith("modalities."):
                raise DataError(
                    f"data.{setting}={column} is the column of the label, and a modality must not "
                    "tell the answer; give another column"
                )

    def _columns_set(self) -> dict[str, str]:
        """Setting -> column that it names."""
        roles = ("label_column", "group_column", "split_column")
        named = {role: column for role in roles if (column := getattr(self._config, role))}
        for name, column in self._named.items():
            if (name, column) != (NUMBERS, NUMBERS):
                named[f"modalities.{name}.column"] = column
        return named

    def _candidates(self, columns: Sequence[str]) -> list[str]:
        """Columns that modalities may be made of: those named, and all if others may be."""
        named = [column for column in self._named.values() if column in columns]
        if named and len(named) == len(self._named):
            return named
        roles = self._roles()
        return [*named, *(c for c in columns if c not in roles and c.lower() not in KEY_COLUMNS)]

    def _survey(self, columns: Sequence[str]) -> tuple[dict[str, Profile], set[str]]:
        """Look at all rows once: profile of each column, and the labels."""
        profiles = {column: Profile() for column in columns}
        labels: set[str] = set()
        fault = "it has no rows"
        for row in read_rows(self._path, {*self._roles(), *columns}):
            try:
                labels.add(self._label(row.cells))
            except BadRow as error:
                fault = f"{row.where}: {error}"
                continue
            for column, profile in profiles.items():
                profile.add(row.cells.get(column))
        if not labels:
            raise DataError(
                f"{self._path} has no row with a label ({fault}); fill in column "
                f"{self._config.label_column}, or give another `--data.label_column COLUMN`"
            )
        return profiles, labels

    def _planned(self, profiles: Mapping[str, Profile]) -> dict[str, _Plan]:
        """The modalities, each of the kind that is set or that its cells look like."""
        plans: dict[str, _Plan] = {}
        unclear: dict[str, str] = {}
        for name, columns in self._grouped(profiles).items():
            profile = profiles[columns[0]]
            own = self._config.modalities.get(name, ModalityConfig())
            if kind := own.kind or profile.kind(self.root):
                self._check_kind(name, kind, columns[0], profile)
                plans[name] = _Plan(kind, columns, profile)
            else:
                unclear[name] = f"{columns[0]} ({profile.shown()})"
        if unclear:
            raise self._unclear(unclear, plans)
        return plans

    def _unclear(self, unclear: Mapping[str, str], plans: Mapping[str, _Plan]) -> DataError:
        known = "".join(f"--data.modalities.{n}.kind {p.kind} " for n, p in plans.items())
        return DataError(
            f"what these columns of {self._path.name} hold cannot be told: "
            f"{'; '.join(unclear.values())}; name the columns to be used and their kinds "
            f"({', '.join(FORMS)}), the others are left out: `{known}--data.modalities."
            f"{next(iter(unclear))}.kind KIND`; a column of splits or groups is named by "
            "data.split_column or data.group_column"
        )

    def _grouped(self, profiles: Mapping[str, Profile]) -> dict[str, tuple[str, ...]]:
        """Modality -> columns: those that the settings name; else each alone, numbers together."""
        named = self._named
        numbers = tuple(c for c, p in profiles.items() if p.is_numbers and c not in named.values())
        if named:
            if named.get(NUMBERS) == NUMBERS and NUMBERS not in profiles:
                self._check_numbers(numbers)
            return {n: (column,) if column in profiles else numbers for n, column in named.items()}
        if numbers and NUMBERS in profiles and NUMBERS not in numbers:
            raise DataError(
                f"{NUMBERS} would be the name of two modalities of {self._path.name}, that of the "
                f"column and that of the numbers in {', '.join(numbers)}; rename the column"
            )
        return dict((NUMBERS, numbers) if c in numbers else (c, (c,)) for c in profiles)

    def _check_numbers(self, numbers: Sequence[str]) -> None:
        if not numbers or self._config.modalities[NUMBERS].kind not in (None, "vector"):
            raise DataError(
                f"data.modalities.{NUMBERS} is a vector of the columns of numbers that no other "
                f"modality uses; {self._path.name} has {', '.join(numbers) or 'none'}; leave "
                "out its kind, or the modality"
            )

    def _check_kind(self, name: str, kind: Kind, column: str, profile: Profile) -> None:
        if profile.form not in FORMS[kind]:
            suited = " or ".join(kind for kind, forms in FORMS.items() if profile.form in forms)
            raise DataError(
                f"data.modalities.{name}.kind={kind} does not suit column {column} of "
                f"{self._path.name}, whose cells are of form {profile.form} ({profile.shown()}); "
                f"use {suited or 'another column'}"
            )

    def _check_plans(self, columns: Sequence[str]) -> None:
        for name, plan in self._plans.items():
            if name in SHARD_COLUMNS or "." in name:
                raise DataError(
                    f"a modality cannot be named {name!r} (no dots, and not "
                    f"{', '.join(SHARD_COLUMNS)}); name the modalities yourself, with their "
                    f"columns: `--data.modalities.NAME.column {plan.columns[0]}`"
                )
        if len(self._plans) < self.min_modalities:
            found = "; ".join(self.describe()) or "none"
            raise DataError(
                f"at least 2 modalities are needed, and of {self._path.name} there is {found}; its "
                f"columns are {', '.join(columns)}; name all that you want, "
                "`--data.modalities.NAME.column COLUMN`: once one is named, no other is used"
            )


class ForModel(Table):
    """Samples from a table for a trained model, read as the table that it was trained on.

    Labels may be missing, in single rows or all, and are then ""; so may optional modalities. What
    is read is not guessed from the cells again: kinds are those of the model, and the columns that
    make a vector are those of training, in that order.

    Args:
        config: with the kind of every modality; `label_column` is "" where there is none.
        vectors: modality -> columns of numbers that it is made of, see `Table.files`.
    """

    min_modalities: ClassVar[int] = 1

    def __init__(
        self, config: DataConfig, vectors: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        self._vectors = vectors or {}
        super().__init__(config)

    def _label(self, cells: Cells) -> str:
        return word(cells, self._config.label_column)

    def _check_settings(self, columns: Sequence[str]) -> None:
        for name, own in self._grouped({}).items():
            if missing := [column for column in own if column not in columns]:
                raise DataError(
                    f"{self._path.name} has no column {missing[0]!r}, of which modality {name} was "
                    f"made in training; its columns are {', '.join(columns)}; name them as the "
                    "model's table does"
                )

    def _candidates(self, columns: Sequence[str]) -> list[str]:
        return [column for own in self._grouped({}).values() for column in own]

    def _grouped(self, profiles: Mapping[str, Profile]) -> dict[str, tuple[str, ...]]:
        return {n: self._vectors.get(n, (column,)) for n, column in self._named.items()}

    def _check_kind(self, name: str, kind: Kind, column: str, profile: Profile) -> None:
        if profile.form != "empty":
            super()._check_kind(name, kind, column, profile)


def _table_path(config: DataConfig) -> Path:
    if config.table is None:
        raise DataError("data.table is not set; give your own table as `--data.table FILE`")
    path = Path(config.table).expanduser()
    if not path.is_file():
        raise DataError(f"data.table={path} is not a file; give a CSV, JSON-lines or Parquet file")
    if path.suffix.lower() not in FORMATS:
        raise DataError(
            f"data.table={path} has the suffix {path.suffix!r}; name the file by what it is: "
            f"{', '.join(FORMATS)}"
        )
    return path


def _root(config: DataConfig, table: Path) -> Path:
    if config.root is None:
        return table.parent.resolve()
    return raw_folder(config, (), "the folder that paths in the table are relative to").resolve()


def _in_order(labels: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(labels, key=lambda label: (label != "", int(label or 0), label)))
    except ValueError:
        return tuple(sorted(labels))

"""Bring your own: a table with a row per sample, whose cells are paths, texts, numbers or lists.

CSV with a header line, separated by commas, quotes doubled inside quotes; JSON lines, an object per
line; or Parquet. UTF-8 with or without a byte order mark. Rows are streamed, never all held.
"""

import csv
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import accumulate, islice
from numbers import Number
from os.path import splitext
from pathlib import Path
from typing import ClassVar, NoReturn, SupportsFloat

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from data.config import DataConfig, Kind, ModalityConfig
from data.media import VIDEO_SUFFIXES, inside
from data.schema import DataError, Split
from data.sources.base import RejectedSample, raw_folder
from data.sources.raw import (
    Media,
    RawSample,
    Sound,
    Stills,
    Text,
    TextFile,
    Unreadable,
    Values,
    Video,
)

KEY_COLUMNS = ("id", "key", "sample_id")
SHARD_COLUMNS = ("sample_id", "label", "key", "group", "present")
NUMBERS = "table"
"""The modality that all columns of numbers make together."""
SPLIT_WORDS: Mapping[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
FORM_OF_SUFFIX: Mapping[str, str] = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".wav", ".flac", ".mp3", ".ogg", ".m4a"), "audio"),
    **dict.fromkeys(VIDEO_SUFFIXES, "video"),
    **dict.fromkeys((".txt", ".md"), "text file"),
    ".npy": "array",
}
SPLITS: tuple[Split, ...] = ("train", "val", "test")
PATH_FORMS = frozenset(FORM_OF_SUFFIX.values())
# What a cell may look like for a kind; a string may be a path without a known suffix.
FORMS: Mapping[Kind, tuple[str, ...]] = {
    "image": ("image", "string"),
    "frames": ("image", "video", "string"),
    "flow": ("video", "string"),
    "audio": ("audio", "video", "string"),
    "text": ("text file", "string", "number"),
    "vector": ("array", "number", "list"),
    "sequence": ("array", "lists", "list"),
}
INFERRED: Mapping[str, Kind] = {
    "audio": "audio",
    "video": "frames",
    "text file": "text",
    "number": "vector",
    "list": "vector",
    "lists": "sequence",
}
MIN_SHARE = 0.9  # of a column's cells must look alike for its kind to be inferred
NUM_EXAMPLES = 3
EXAMPLE_CHARS = 40
WANTED: Mapping[Kind, str] = {
    "vector": "a list of numbers",
    "sequence": "a list of equally long lists of numbers",
}
BATCH_ROWS = 1024
MAX_CELL_CHARS = 1 << 26  # the csv module's own 2^17 is less than a long article

Cells = Mapping[str, object]


class _BadRow(ValueError):
    """A row is no sample; the message is the reason."""


@dataclass
class _Profile:
    """What the cells of a column look like.

    Attributes:
        forms: form (see `_form`) -> cells; empty ones are not counted.
        suffixes: known suffix -> paths.
        several: cells with more than one path.
        sentences: strings of more than one word.
        missing: empty cells.
        examples: the first few others.
    """

    forms: Counter[str] = field(default_factory=Counter)
    suffixes: Counter[str] = field(default_factory=Counter)
    several: int = 0
    sentences: int = 0
    missing: int = 0
    examples: list[object] = field(default_factory=list)

    def add(self, cell: object) -> None:
        """Count one cell."""
        if _is_empty(cell):
            self.missing += 1
            return
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(cell)
        form = _form(cell)
        self.forms[form] += 1
        if form in PATH_FORMS:
            paths = _split(cell)
            self.suffixes.update(map(_suffix, paths))
            self.several += len(paths) > 1
        elif form == "string":
            self.sentences += len(str(cell).split(maxsplit=1)) > 1

    @property
    def main_form(self) -> str:
        """Form of most cells."""
        return self.forms.most_common(1)[0][0] if self.forms else "empty"

    @property
    def is_uniform(self) -> bool:
        """Whether nearly all cells look alike."""
        return self.forms[self.main_form] >= max(1, MIN_SHARE * self.forms.total())

    @property
    def is_numbers(self) -> bool:
        """Whether it is a column of plain numbers."""
        return self.main_form == "number" and self.is_uniform

    def about(self, kind: Kind) -> str:
        """What was found, for people."""
        if self.suffixes:
            suffixes = ", ".join(suffix for suffix, _ in self.suffixes.most_common())
            found = f"{self.suffixes.total()} paths {suffixes}"
            if kind == "image" and self.several:
                found += f", the first of several in {self.several} rows"
        else:
            noun = {"text": "texts", "vector": "rows of numbers", "sequence": "rows of numbers"}
            found = f"{self.forms.total()} {noun.get(kind, 'paths')}"
        return found + (f", none in {self.missing} rows" if self.missing else "")

    def shown(self) -> str:
        """The examples, for people."""
        return ", ".join(map(_shown, self.examples)) or "nothing but empty cells"


@dataclass(frozen=True)
class _Plan:
    """How a modality is made: of one column, or as a vector of several columns of numbers."""

    kind: Kind
    columns: tuple[str, ...]
    form: str
    about: str


@dataclass(frozen=True)
class _Record:
    """A row: its line (in Parquet its number), and its cells or what is wrong with it."""

    where: str
    cells: Cells = field(default_factory=dict)
    fault: str = ""


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
    """

    name: ClassVar[str] = "table"
    version: ClassVar[int] = 1
    official: ClassVar[Mapping[str, ModalityConfig]] = {}

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._path = _table_path(config)
        self.root = _root(config, self._path)
        columns = _columns(self._path)
        self._check_columns(columns)
        self._key_column = next((c for c in columns if c.lower() in KEY_COLUMNS), None)
        profiles, labels = self._survey(self._candidates(columns))
        self._plans = self._chosen(profiles) if config.modalities else self._inferred(profiles)
        self._check_plans(columns)
        self._classes = _in_order(labels)

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """Modality -> kind, in the order of the columns or of the settings."""
        return {name: plan.kind for name, plan in self._plans.items()}

    @property
    def classes(self) -> tuple[str, ...]:
        """All labels of the table, sorted; by value if all are integers."""
        return self._classes

    def describe(self) -> list[str]:
        """A line per modality: `photo: image (from column photo, 136 paths .webp)`."""
        return [
            f"{name}: {plan.kind} (from column{'s' if len(plan.columns) > 1 else ''} "
            f"{', '.join(plan.columns)}, {plan.about})"
            for name, plan in self._plans.items()
        ]

    def samples(self) -> Iterator[RawSample | Unreadable]:
        """Rows of train, then val, then test, each in the table's order; without a split column all
        are train. A row that names no split comes with train."""
        used = [column for plan in self._plans.values() for column in plan.columns]
        columns = dict.fromkeys((*self._roles(), *used))
        for split in SPLITS if self._config.split_column else SPLITS[:1]:
            for number, record in enumerate(_records(self._path, columns), start=1):
                if (self._split(record) or "train") == split:
                    yield self._sample(number, record, split)

    def _sample(self, number: int, record: _Record, split: Split) -> RawSample | Unreadable:
        cells, config = record.cells, self._config
        try:
            label = self._label(record)
            if self._split(record) is None:
                raise _BadRow(f"{_named(cells, config.split_column)}; use train, val or test")
            return RawSample(
                key=_word(cells, self._key_column) or f"row {number}",
                label=label,
                split=split,
                media=self._media(cells),
                group=_word(cells, config.group_column) or None,
            )
        except _BadRow as error:
            return Unreadable(f"{self._path.name} {record.where}", str(error), split)

    def _label(self, record: _Record) -> str:
        if record.fault:
            raise _BadRow(record.fault)
        if label := _word(record.cells, self._config.label_column):
            return label
        raise _BadRow(f"{_named(record.cells, self._config.label_column)}; a label is needed")

    def _split(self, record: _Record) -> Split | None:
        """Split that the row names; None: no known one."""
        if self._config.split_column is None:
            return "train"
        try:
            return SPLIT_WORDS.get(_word(record.cells, self._config.split_column).lower())
        except _BadRow:
            return None

    def _media(self, cells: Cells) -> dict[str, Media]:
        media: dict[str, Media] = {}
        for name, plan in self._plans.items():
            filled = {c: cells[c] for c in plan.columns if not _is_empty(cells.get(c))}
            if not filled:
                continue
            if lacking := [column for column in plan.columns if column not in filled]:
                raise _BadRow(f"column {lacking[0]} is empty, and others of {name} are not")
            if plan.form == "number" and plan.kind == "vector":
                media[name] = Values(np.array([_float(*item) for item in filled.items()]))
                continue
            column, cell = next(iter(filled.items()))
            try:
                media[name] = _medium(plan, cell, self.root)
            except (_BadRow, RejectedSample) as error:
                raise _BadRow(f"column {column}: {error}") from error
        if not media:
            raise _BadRow(f"all modalities are empty ({', '.join(self._plans)})")
        return media

    def _roles(self) -> tuple[str, ...]:
        """Columns that say what a sample is, not what it looks or sounds like."""
        config = self._config
        roles = (config.label_column, config.group_column, config.split_column, self._key_column)
        return tuple(column for column in roles if column)

    def _candidates(self, columns: Sequence[str]) -> list[str]:
        """Columns that modalities may be made of."""
        settings = self._config.modalities
        named = [setting.column or name for name, setting in settings.items()]
        if settings and all(column in columns for column in named):
            return list(dict.fromkeys(named))
        free = [c for c in columns if c not in self._roles() and c.lower() not in KEY_COLUMNS]
        return list(dict.fromkeys([*(c for c in named if c in columns), *free]))

    def _check_columns(self, columns: Sequence[str]) -> None:
        """Whether all columns that the settings name are there."""
        config = self._config
        fields = ("label_column", "group_column", "split_column")
        named = {name: column for name in fields if (column := getattr(config, name))}
        for name, modality in config.modalities.items():
            if modality.column or name != NUMBERS:
                named[f"modalities.{name}.column"] = modality.column or name
        for setting, column in named.items():
            if column not in columns:
                raise DataError(
                    f"{self._path.name} has no column {column!r}{_nearest(column, columns)}; its "
                    f"columns are {', '.join(columns)} (the first line of a CSV names them, "
                    f"separated by commas); give one as `--data.{setting} COLUMN`"
                )
            if setting not in fields and column == config.label_column:
                raise DataError(
                    f"data.{setting}={column} is the column of the label, and a modality must not "
                    "tell the answer; give another column"
                )

    def _survey(self, columns: Sequence[str]) -> tuple[dict[str, _Profile], set[str]]:
        """Look at all rows once: profile of each column, and the labels."""
        profiles = {column: _Profile() for column in columns}
        labels: set[str] = set()
        fault = "it has no rows"
        for record in _records(self._path, dict.fromkeys((self._config.label_column, *columns))):
            try:
                labels.add(self._label(record))
            except _BadRow as error:
                fault = f"{record.where}: {error}"
                continue
            for column, profile in profiles.items():
                profile.add(record.cells.get(column))
        if not labels:
            raise DataError(
                f"{self._path} has no row with a label ({fault}); fill in column "
                f"{self._config.label_column}, or give another `--data.label_column COLUMN`"
            )
        return profiles, labels

    def _inferred(self, profiles: Mapping[str, _Profile]) -> dict[str, _Plan]:
        """A modality per column, of the kind that its cells look like."""
        numbers = tuple(column for column, profile in profiles.items() if profile.is_numbers)
        plans: dict[str, _Plan] = {}
        unknown: dict[str, str] = {}
        for column, profile in profiles.items():
            if column in numbers:
                plans[NUMBERS] = _Plan("vector", numbers, "number", profile.about("vector"))
            elif kind := self._kind(profile):
                plans[column] = _Plan(kind, (column,), profile.main_form, profile.about(kind))
            else:
                unknown[column] = profile.shown()
        if unknown:
            self._refuse(unknown, plans)
        if numbers and NUMBERS in profiles and NUMBERS not in numbers:
            raise DataError(
                f"{NUMBERS} would be the name of two modalities of {self._path.name}, that of the "
                f"column and that of the numbers in {', '.join(numbers)}; rename the column"
            )
        return plans

    def _refuse(self, unknown: Mapping[str, str], plans: Mapping[str, _Plan]) -> NoReturn:
        known = "".join(f"--data.modalities.{n}.kind {p.kind} " for n, p in plans.items())
        columns = "; ".join(f"{column} ({shown})" for column, shown in unknown.items())
        raise DataError(
            f"what these columns of {self._path.name} hold cannot be told: {columns}; name the "
            f"columns to be used and their kinds ({', '.join(FORMS)}), the others are left out: "
            f"`{known}--data.modalities.{next(iter(unknown))}.kind KIND`; a column of splits or "
            "groups is named by data.split_column or data.group_column"
        )

    def _chosen(self, profiles: Mapping[str, _Profile]) -> dict[str, _Plan]:
        """The modalities that the settings name."""
        settings = self._config.modalities
        used = {setting.column or name for name, setting in settings.items()}
        plans: dict[str, _Plan] = {}
        for name, setting in settings.items():
            if (column := setting.column or name) in profiles:
                profile = profiles[column]
                kind = self._chosen_kind(name, column, profile)
                plans[name] = _Plan(kind, (column,), profile.main_form, profile.about(kind))
                continue
            numbers = tuple(c for c, p in profiles.items() if p.is_numbers and c not in used)
            if not numbers or setting.kind not in (None, "vector"):
                raise DataError(
                    f"data.modalities.{name} is a vector of the columns of numbers that no other "
                    f"modality uses; {self._path.name} has {', '.join(numbers) or 'none'}; leave "
                    "out its kind, or the modality"
                )
            about = profiles[numbers[0]].about("vector")
            plans[name] = _Plan("vector", numbers, "number", about)
        return plans

    def _chosen_kind(self, name: str, column: str, profile: _Profile) -> Kind:
        kind, form = self._config.modalities[name].kind or self._kind(profile), profile.main_form
        if kind is None:
            raise DataError(
                f"what column {column} of {self._path.name} holds cannot be told "
                f"({profile.shown()}); give `--data.modalities.{name}.kind KIND`, one of "
                f"{', '.join(FORMS)}"
            )
        if form not in FORMS[kind]:
            suited = " or ".join(kind for kind, forms in FORMS.items() if form in forms)
            raise DataError(
                f"data.modalities.{name}.kind={kind} does not suit column {column} of "
                f"{self._path.name}, whose cells are of form {form} ({profile.shown()}); use "
                f"{suited or 'another column'}"
            )
        return kind

    def _kind(self, profile: _Profile) -> Kind | None:
        """Kind that cells look like; None: like no one kind."""
        form, num_cells = profile.main_form, profile.forms.total()
        if not profile.is_uniform:
            return None
        if form == "image":
            return "frames" if profile.several > num_cells / 2 else "image"
        if form == "string":
            return "text" if profile.sentences >= num_cells / 2 else None
        if form == "array":
            return self._array_kind(profile)
        return INFERRED.get(form)

    def _array_kind(self, profile: _Profile) -> Kind | None:
        """By the header of the first file that has one."""
        for cell in profile.examples:
            try:
                num_dims = _open_array(self.root, _path(cell)).ndim
            except (_BadRow, RejectedSample):
                continue
            return "vector" if num_dims == 1 else "sequence" if num_dims == 2 else None
        return None

    def _check_plans(self, columns: Sequence[str]) -> None:
        for name, plan in self._plans.items():
            if name in SHARD_COLUMNS or "." in name:
                raise DataError(
                    f"a modality cannot be named {name!r} (no dots, and not "
                    f"{', '.join(SHARD_COLUMNS)}); name the modalities yourself, with their "
                    f"columns: `--data.modalities.NAME.column {plan.columns[0]}`"
                )
        if len(self._plans) < 2:
            found = "; ".join(self.describe()) or "none"
            raise DataError(
                f"at least 2 modalities are needed, and of {self._path.name} there is {found}; its "
                f"columns are {', '.join(columns)}; name all that you want, "
                "`--data.modalities.NAME.column COLUMN`: once one is named, no other is used"
            )


def _table_path(config: DataConfig) -> Path:
    if config.table is None:
        raise DataError("data.table is not set; give your own table as `--data.table FILE`")
    path = Path(config.table).expanduser()
    if not path.is_file():
        raise DataError(f"data.table={path} is not a file; give a CSV, JSON-lines or Parquet file")
    if path.suffix.lower() not in _READERS:
        raise DataError(
            f"data.table={path} has the suffix {path.suffix!r}; name the file by what it is: "
            f"{', '.join(_READERS)}"
        )
    return path


def _root(config: DataConfig, table: Path) -> Path:
    if config.root is None:
        return table.parent.resolve()
    return raw_folder(config, (), "the folder that paths in the table are relative to").resolve()


def _nearest(name: str, names: Sequence[str]) -> str:
    folded = {other.casefold(): other for other in names}
    close = get_close_matches(name.casefold(), folded, n=1)
    return f" (did you mean {folded[close[0]]!r}?)" if close else ""


def _in_order(labels: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def _medium(plan: _Plan, cell: object, root: Path) -> Media:
    """What to load for a modality of one column.

    Raises:
        _BadRow, RejectedSample: the cell does not fit the kind.
    """
    match plan.kind:
        case "image":
            return Stills(_paths(cell)[:1])
        case "frames":
            paths = _paths(cell)
            return Video(_path(cell)) if _is_video(paths[0]) else Stills(paths)
        case "flow":
            return Video(_path(cell))
        case "audio":
            path = _path(cell)
            return Video(path) if _is_video(path) else Sound(path)
        case "text":
            return TextFile(_path(cell)) if plan.form == "text file" else Text(_string(cell))
        case _:
            return Values(_numbers(plan, cell, root))


def _numbers(plan: _Plan, cell: object, root: Path) -> np.ndarray:
    """float32 or float64: (D,) for a vector, (T, D) for a sequence; a flat list is (T, 1)."""
    values = _open_array(root, _path(cell)) if plan.form == "array" else _unpacked(cell)
    is_float32 = isinstance(values, np.ndarray) and values.dtype == np.float32
    try:
        numbers = np.array(values, dtype=np.float32 if is_float32 else np.float64)
    except (TypeError, ValueError, OverflowError):
        raise _BadRow(f"{_shown(cell)} is not {WANTED[plan.kind]}") from None
    if plan.kind == "sequence" and numbers.ndim == 1:
        numbers = numbers[:, None]
    if numbers.size == 0 or numbers.ndim != (1 if plan.kind == "vector" else 2):
        raise _BadRow(f"{_shown(cell)} has shape {numbers.shape} and is not {WANTED[plan.kind]}")
    return numbers


def _float(column: str, cell: object) -> float:
    try:
        if isinstance(cell, str | SupportsFloat):
            return float(cell)
    except (ValueError, OverflowError):
        pass
    raise _BadRow(f"column {column}: {_shown(cell)} is no number")


def _open_array(root: Path, relative: str) -> np.ndarray:
    """A .npy file as a memory map: a header may claim any size."""
    path = inside(root, relative)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise _BadRow(f"{relative} is no whole .npy file of numbers ({error})") from error
    if array.dtype.kind not in "biuf":
        raise _BadRow(f"{relative} holds {array.dtype}, not numbers")
    return array


def _form(cell: object) -> str:
    """What a cell looks like: a form of `FORMS` or "other"."""
    if isinstance(cell, str):
        if form := FORM_OF_SUFFIX.get(_suffix(cell)):
            return form
        values = _unpacked(cell)
        if isinstance(values, str):
            return "number" if _is_number(values) else "string"
        return _form(values)
    if isinstance(cell, list | np.ndarray) and len(cell):
        return _form_of_list(cell)
    return "number" if isinstance(cell, Number) else "other"


def _form_of_list(cell: list[object] | np.ndarray) -> str:
    first = next(iter(cell))
    if isinstance(first, list):
        return "lists" if _form(first) == "list" else "other"
    if all(isinstance(element, str) for element in cell):
        form = _form(first)
        return form if form in PATH_FORMS else "other"
    return "list" if isinstance(first, Number) else "other"


def _is_empty(cell: object) -> bool:
    if isinstance(cell, str):
        return not cell or cell.isspace()
    if isinstance(cell, list | np.ndarray):
        return len(cell) == 0
    return cell is None or cell != cell  # NaN


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unpacked(cell: object) -> object:
    """The list that a string holds as JSON, or the cell as it is."""
    if isinstance(cell, str) and cell.lstrip()[:1] == "[":
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _paths(cell: object) -> tuple[str, ...]:
    """Paths of a cell, at least one."""
    if paths := tuple(map(_utf8, _split(cell))):
        return paths
    raise _BadRow(f"{_shown(cell)} is no path or list of paths")


def _split(cell: object) -> list[str]:
    values = _unpacked(cell)
    parts = values.split(";") if isinstance(values, str) else values
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return []
    return [part.strip() for part in parts if part.strip()]


def _path(cell: object) -> str:
    path, *others = _paths(cell)
    if others:
        raise _BadRow(f"{_shown(cell)} holds {len(others) + 1} paths, and one is needed")
    return path


def _suffix(path: str) -> str:
    """Suffix of the last path of a cell; of a text only the end is looked at."""
    return splitext(path.rstrip(" ;")[-16:])[1].lower()


def _is_video(path: str) -> bool:
    return FORM_OF_SUFFIX.get(_suffix(path)) == "video"


def _word(cells: Cells, column: str | None) -> str:
    """A label, key, group or split; empty if there is none."""
    cell = cells.get(column) if column else None
    try:
        return "" if _is_empty(cell) else _string(cell).strip()
    except _BadRow as error:
        raise _BadRow(f"column {column}: {error}") from error


def _named(cells: Cells, column: str | None) -> str:
    cell = cells.get(column) if column else None
    return f"column {column} " + ("is empty" if _is_empty(cell) else f"holds {_shown(cell)}")


def _string(cell: object) -> str:
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # integers with gaps come as floats
    if not isinstance(cell, str | Number):
        raise _BadRow(f"{_shown(cell)} is no text or number")
    return _utf8(str(cell))


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"{_shown(text)} is not UTF-8; save the table as UTF-8") from None
    return text


def _shown(cell: object) -> str:
    text = repr(cell)
    return text if len(text) <= EXAMPLE_CHARS else f"{text[:EXAMPLE_CHARS]}..."


def _columns(path: Path) -> list[str]:
    """Names of the columns.

    Raises:
        DataError: one has no name, or one stands twice; or the file cannot be read.
    """
    with _readable(path):
        columns = _READERS[path.suffix.lower()].columns(path)
    if "" in columns:
        raise DataError(
            f"column {columns.index('') + 1} of {path} has no name; name it, or write the table "
            "without it (pandas: index=False)"
        )
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise DataError(f"{path} has several columns {twice[0]!r}; give each a name of its own")
    return columns


def _records(path: Path, columns: Iterable[str]) -> Iterator[_Record]:
    """All rows but empty ones, with at least these columns.

    Raises:
        DataError: the file cannot be read.
    """
    with _readable(path):
        yield from _READERS[path.suffix.lower()].records(path, list(columns))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error}); write the table again") from error


class _Lines:
    """Lines for the csv reader that can be given back: an open quote runs into the next rows."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.number = 0  # of the last line taken
        self._lines = iter(lines)
        self._returned: deque[str] = deque()
        self._taken: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else next(self._lines)
        self._taken.append(line)
        self.number += 1
        return line

    def start_row(self) -> int:
        """Number of the line where the next row starts."""
        self._taken.clear()
        return self.number + 1

    def give_back(self) -> None:
        """Return all lines of the row but its first."""
        self._returned.extendleft(reversed(self._taken[1:]))
        self.number -= len(self._taken) - 1


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str] | str]]:
    """Line where a row starts, and its cells or what is wrong with it; no empty lines."""
    csv.field_size_limit(MAX_CELL_CHARS)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, strict=True)
        while True:
            line = lines.start_row()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                lines.give_back()
                yield line, f"quotes do not match ({error}); double those inside quotes"
                continue
            if cells:
                yield line, cells


def _csv_columns(path: Path) -> list[str]:
    _, header = next(_csv_rows(path), (1, "no header line"))
    try:
        if isinstance(header, str):
            raise _BadRow(header)
        return [_utf8(name.strip()) for name in header]
    except _BadRow as error:
        raise DataError(
            f"{path} has no header ({error}); a CSV is UTF-8 text whose first line names the "
            "columns, separated by commas"
        ) from error


def _csv_records(path: Path, _: list[str]) -> Iterator[_Record]:
    names = _csv_columns(path)
    for line, cells in islice(_csv_rows(path), 1, None):
        if isinstance(cells, str):
            yield _Record(f"line {line}", fault=cells)
        elif len(cells) != len(names):
            fault = f"{len(cells)} cells, and the header has {len(names)}; put commas in quotes"
            yield _Record(f"line {line}", fault=fault)
        else:
            yield _Record(f"line {line}", dict(zip(names, cells, strict=True)))


def _json_columns(path: Path) -> list[str]:
    """Names in order of their first use."""
    names: dict[str, None] = {}
    for record in _json_records(path, []):
        names.update(dict.fromkeys(record.cells))
    return list(names)


def _json_records(path: Path, _: list[str]) -> Iterator[_Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                cells = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield _Record(f"line {number}", fault=f"no JSON in UTF-8 ({error})")
                continue
            if isinstance(cells, dict):
                yield _Record(f"line {number}", cells)
            else:
                yield _Record(f"line {number}", fault=f"{_shown(cells)} is no JSON object")


def _parquet_columns(path: Path) -> list[str]:
    return pq.read_schema(path).names


def _parquet_records(path: Path, columns: list[str]) -> Iterator[_Record]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            names = batch.schema.names
            for cells in zip(*map(_plain, batch.columns), strict=True):
                number += 1
                yield _Record(f"row {number}", dict(zip(names, cells, strict=True)))


def _plain(column: pa.Array) -> list[object]:
    """Cells of a column; lists of numbers as arrays, which saves an object per number."""
    kind = column.type
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not is_list or not (types.is_integer(kind.value_type) or types.is_floating(kind.value_type)):
        return column.to_pylist()
    numbers = column.flatten().to_numpy(zero_copy_only=False)
    lengths = column.value_lengths().fill_null(0).to_pylist()  # no list is an empty one
    stops = list(accumulate(lengths))
    return [numbers[stop - length : stop] for length, stop in zip(lengths, stops, strict=True)]


@dataclass(frozen=True)
class _Reader:
    columns: Callable[[Path], list[str]]
    records: Callable[[Path, list[str]], Iterator[_Record]]


_READERS: Mapping[str, _Reader] = {
    ".csv": _Reader(_csv_columns, _csv_records),
    ".jsonl": _Reader(_json_columns, _json_records),
    ".ndjson": _Reader(_json_columns, _json_records),
    ".parquet": _Reader(_parquet_columns, _parquet_records),
}

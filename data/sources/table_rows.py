"""Rows of a table: CSV, JSON lines or Parquet. A malformed row costs itself, not the table.

CSV has a header line, commas between cells, and quotes doubled inside quotes; JSON lines hold an
object each. UTF-8 with or without a byte order mark.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from data.schema import DataError

BATCH_ROWS = 1024
MAX_CELL_CHARS = 1 << 26  # the csv module's own 2^17 is less than a long article
SHOWN_CHARS = 40

Cells = Mapping[str, object]


class BadRow(ValueError):
    """A row is no sample; the message is the reason."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        where: its line, in Parquet its number.
        content: column -> cell, or what is wrong with the row.
    """

    where: str
    content: Cells | str

    @property
    def cells(self) -> Cells:
        """Column -> cell.

        Raises:
            BadRow: the row is malformed.
        """
        if isinstance(self.content, str):
            raise BadRow(self.content)
        return self.content


def read_columns(path: Path) -> list[str]:
    """Names of the columns; in JSON lines, in order of their first use.

    Raises:
        DataError: one has no name, or one stands twice; or the file cannot be read.
    """
    with _readable(path):
        columns = FORMATS[path.suffix.lower()].columns(path)
    if "" in columns:
        raise DataError(
            f"column {columns.index('') + 1} of {path} has no name; name it, or write the table "
            "without it (pandas: index=False)"
        )
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise DataError(f"{path} has several columns {twice[0]!r}; give each a name of its own")
    return columns


def read_rows(path: Path, columns: Iterable[str]) -> Iterator[Row]:
    """All rows but empty ones, with at least these columns.

    Raises:
        DataError: the file cannot be read.
    """
    with _readable(path):
        yield from FORMATS[path.suffix.lower()].rows(path, list(columns))


def utf8(text: str) -> str:
    """The text as it is.

    Raises:
        BadRow: it was not UTF-8 in the file.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{shown(text)} is not UTF-8; save the table as UTF-8") from None
    return text


def shown(cell: object) -> str:
    """The start of a cell, for messages."""
    text = repr(cell)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error}); write the table again") from error


def _csv_columns(path: Path) -> list[str]:
    return _header(path, _csv_lines(path))


def _csv_rows(path: Path, _: list[str]) -> Iterator[Row]:
    lines = _csv_lines(path)
    names = _header(path, lines)
    for number, cells in lines:
        if isinstance(cells, str):
            content = cells
        elif len(cells) != len(names):
            content = f"{len(cells)} cells, and the header has {len(names)}; put commas in quotes"
        else:
            content = dict(zip(names, cells, strict=True))
        yield Row(f"line {number}", content)


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str] | str]]:
    """Line where a row starts, and its cells or what is wrong with it; no empty lines.

    After quotes that do not match, reading goes on with the next line: an open quote runs far.
    """
    csv.field_size_limit(MAX_CELL_CHARS)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = file.readlines()
    start = 0
    while start < len(lines):
        first = start
        reader = csv.reader((lines[i] for i in range(first, len(lines))), strict=True)
        try:
            for cells in reader:
                if cells:
                    yield start + 1, cells
                start = first + reader.line_num
        except csv.Error as error:
            yield start + 1, f"quotes do not match ({error}); double those inside quotes"
            start += 1


def _header(path: Path, lines: Iterator[tuple[int, list[str] | str]]) -> list[str]:
    _, names = next(lines, (1, "no header line"))
    try:
        if isinstance(names, str):
            raise BadRow(names)
        return [utf8(name.strip()) for name in names]
    except BadRow as error:
        raise DataError(
            f"{path} has no header ({error}); a CSV is UTF-8 text whose first line names the "
            "columns, separated by commas"
        ) from error


def _json_columns(path: Path) -> list[str]:
    names: dict[str, None] = {}
    for row in _json_rows(path, []):
        if isinstance(row.content, dict):
            names.update(dict.fromkeys(row.content))
    return list(names)


def _json_rows(path: Path, _: list[str]) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Row(f"line {number}", _json_object(line))


def _json_object(line: bytes) -> Cells | str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON in UTF-8 ({error})"
    return value if isinstance(value, dict) else f"{shown(value)} is no JSON object"


def _parquet_columns(path: Path) -> list[str]:
    try:
        schema = pq.read_schema(path)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # An extension type reads metadata of its own, and raises what it likes.
        raise pa.ArrowInvalid(str(error)) from error
    if odd := [field for field in schema if _has_extension(field.type)]:
        raise DataError(
            f"column {odd[0].name!r} of {path} is of the extension type {odd[0].type}; only plain "
            "columns are read: numbers, texts and lists of numbers"
        )
    return schema.names


def _has_extension(kind: pa.DataType) -> bool:
    parts = (kind.field(i).type for i in range(kind.num_fields))
    return isinstance(kind, pa.BaseExtensionType) or any(map(_has_extension, parts))


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[Row]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            names = batch.schema.names
            for cells in zip(*map(_parquet_cells, batch.columns), strict=True):
                number += 1
                yield Row(f"row {number}", dict(zip(names, cells, strict=True)))


def _parquet_cells(column: pa.Array) -> Sequence[object]:
    """Lists of numbers come as arrays, which keeps float32 and saves an object per number."""
    element = getattr(column.type, "value_type", pa.null())
    if types.is_integer(element) or types.is_floating(element):
        return column.to_numpy(zero_copy_only=False)
    return column.to_pylist()


@dataclass(frozen=True)
class _Format:
    columns: Callable[[Path], list[str]]
    rows: Callable[[Path, list[str]], Iterator[Row]]


FORMATS: Mapping[str, _Format] = {
    ".csv": _Format(_csv_columns, _csv_rows),
    ".jsonl": _Format(_json_columns, _json_rows),
    ".parquet": _Format(_parquet_columns, _parquet_rows),
}
"""Suffix -> how such a file is read."""

"""Reading index files: lists of samples as CSV, blank- or tab-separated text, JSON lines or JSON.

All readers take UTF-8 with or without a byte order mark, LF or CRLF, skip blank lines and give the
number of every line (or position in a list) from 1 on. A row that is no record does not end the
reading: it comes as a str, the reason, in place of a dict, and is worth an `Unreadable`:

    for line, row in read_json_lines(path):
        if isinstance(row, str):
            yield Unreadable(where(path, line), row, split)
"""

import csv
import json
import os
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

from data.config import DataConfig
from data.schema import DataError

HEADER_WORDS = frozenset([  # usual column names
    "class", "clip", "clip_id", "emotion", "end", "file", "filename", "id", "image", "image_id",
    "image_path", "img", "label", "name", "path", "start", "text", "video", "youtube_id",
])  # fmt: skip
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

Row = tuple[int, list[str]]
Record = tuple[int, dict[str, object] | str]


def where(path: Path, line: int) -> str:
    """Key of a row that has no id: `train.csv line 17`."""
    return f"{path.name} line {line}"


def read_text(path: Path) -> str:
    """Text of a file, without byte order mark, lines ended by LF.

    Raises:
        DataError: there is no such file, or it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as UTF-8 text ({error}); get the file again"
        ) from error


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Line number and line, as it is but for the line end.

    Raises:
        DataError: see `read_text`.
    """
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [(number, line) for number, line in lines if line.strip()]


def read_rows(path: Path, separators: str) -> list[Row]:
    """Line number and stripped cells of every row, also of a header; see `without_header`.

    Args:
        path: the file.
        separators: what may separate cells, a character each; the one that most lines hold does.
            A comma: CSV with quotes. A blank: runs of blanks and tabs. A tab: no quotes.

    Raises:
        DataError: see `read_text`; or quotes do not match.
    """
    lines = read_lines(path)
    counts = [sum(mark in line for _, line in lines) for mark in separators]
    separator = separators[counts.index(max(counts))] if any(counts) else separators[-1]
    if separator == ",":
        return list(_csv_rows(path))
    mark = None if separator == " " else separator
    return [(number, _stripped(line.split(mark))) for number, line in lines]


def without_header(rows: list[Row]) -> list[Row]:
    """The rows less the first, if that is a header: if one of its cells is a usual column name.

    An unusual header stays, and will be reported as a row that is no sample: nothing is lost.
    """
    is_header = bool(rows) and not HEADER_WORDS.isdisjoint(cell.lower() for cell in rows[0][1])
    return rows[1:] if is_header else rows


def read_records(path: Path, separators: str) -> list[Record]:
    """Line number and column -> cell of every row below the header line.

    A row that has not as many cells as the header is a str, the reason.

    Raises:
        DataError: see `read_rows`.
    """
    rows = read_rows(path, separators)
    names = rows[0][1] if rows else []
    return [
        (
            number,
            dict(zip(names, cells, strict=True))
            if len(cells) == len(names)
            else f"{len(cells)} cells, and the header has {len(names)}",
        )
        for number, cells in rows[1:]
    ]


def read_json_lines(path: Path) -> list[Record]:
    """Line number and object of every line; a line that is no JSON object is a str, the reason.

    Raises:
        DataError: see `read_text`.
    """
    return [(number, _json_object(line)) for number, line in read_lines(path)]


def read_json_list(path: Path) -> list[Record]:
    """Position from 1 and object of every element; one that is no object is a str, the reason.

    Raises:
        DataError: see `read_text`; or the file is no JSON list.
    """
    try:
        items = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error}); get the file again") from error
    if not isinstance(items, list):
        raise DataError(f"{path} holds a JSON {type(items).__name__}; a list of objects is needed")
    return [(number, _as_object(item)) for number, item in enumerate(items, start=1)]


def takes_extracted(config: DataConfig, root: Path, *names: str) -> bool:
    """Whether `config.media` asks for extracted frames or sounds, which lie in `names`.

    "auto" asks for them where all of these files or folders are there.
    """
    there = all((root / name).exists() for name in names)
    return config.media == "extracted" or (config.media == "auto" and there)


def list_images(root: Path, folder: str) -> tuple[str, ...]:
    """Image files of a folder, sorted by name as text, relative to the root.

    Hidden files are left out. A folder that is not there, cannot be read or has a name that no
    file system takes has no images.
    """
    try:
        names = sorted(os.listdir(root / folder))
    except (OSError, ValueError):
        return ()
    return tuple(
        f"{folder}/{name}"
        for name in names
        if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
    )


def _stripped(cells: list[str]) -> list[str]:
    return [cell.strip() for cell in cells]


def _csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.reader(StringIO(read_text(path)), strict=True)
    number = 1
    try:
        for cells in reader:
            if any(cells := _stripped(cells)):
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path} is no CSV from line {number} on ({error}); put cells with quotes or line "
            "ends in quotes, and double the quotes inside"
        ) from error


def _json_object(line: str) -> dict[str, object] | str:
    try:
        return _as_object(json.loads(line))
    except (ValueError, RecursionError) as error:
        return f"no JSON ({error})"


def _as_object(item: object) -> dict[str, object] | str:
    return item if isinstance(item, dict) else f"a JSON {type(item).__name__}, no object"

"""Cells of a table: what those of a column look like, and what to load for one."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Number
from os.path import splitext
from pathlib import Path
from typing import SupportsFloat

import numpy as np

from data.config import Kind
from data.media import VIDEO_SUFFIXES, inside
from data.sources.base import RejectedSample
from data.sources.raw import Media, Sound, Stills, Text, TextFile, Values, Video
from data.sources.table_rows import BadRow, Cells, shown, utf8

FORM_OF_SUFFIX: Mapping[str, str] = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".wav", ".flac", ".mp3", ".ogg", ".m4a"), "audio"),
    **dict.fromkeys(VIDEO_SUFFIXES, "video"),
    **dict.fromkeys((".txt", ".md"), "text file"),
    ".npy": "array",
}
PATH_FORMS = frozenset(FORM_OF_SUFFIX.values())
FORMS: Mapping[Kind, tuple[str, ...]] = {
    "image": ("image", "string"),
    "frames": ("video", "image", "string"),
    "flow": ("video", "string"),
    "audio": ("audio", "video", "string"),
    "vector": ("number", "list", "array"),
    "sequence": ("lists", "list", "array"),
    "text": ("text file", "string", "number"),
}
"""What a cell may look like for a kind; the first that has a form is the one inferred from it, but
for strings, which may be paths without a known suffix."""
MIN_SHARE = 0.9  # of a column's cells must look alike for its kind to be inferred
NUM_EXAMPLES = 3


@dataclass
class Profile:
    """What the cells of a column look like.

    Attributes:
        forms: form (see `form_of`) -> cells; empty ones are not counted.
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
        if is_empty(cell):
            self.missing += 1
            return
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(cell)
        form = form_of(cell)
        self.forms[form] += 1
        if form in PATH_FORMS:
            paths = _split(cell)
            self.suffixes.update(map(_suffix, paths))
            self.several += len(paths) > 1
        elif form == "string":
            self.sentences += len(str(cell).split(maxsplit=1)) > 1

    @property
    def form(self) -> str:
        """Form of most cells."""
        return self.forms.most_common(1)[0][0] if self.forms else "empty"

    @property
    def is_uniform(self) -> bool:
        """Whether nearly all cells look alike."""
        return self.forms[self.form] >= max(1, MIN_SHARE * self.forms.total())

    @property
    def is_numbers(self) -> bool:
        """Whether it is a column of plain numbers."""
        return self.form == "number" and self.is_uniform

    def kind(self, root: Path) -> Kind | None:
        """Kind that the cells look like; None: like no one kind."""
        if not self.is_uniform:
            return None
        if self.form == "image" and self.several > self.forms.total() / 2:
            return "frames"
        if self.form == "string":
            return "text" if self.sentences >= self.forms.total() / 2 else None
        if self.form == "array":
            return self._array_kind(root)
        return next((kind for kind, forms in FORMS.items() if self.form in forms), None)

    def _array_kind(self, root: Path) -> Kind | None:
        """By the header of the first file that has one."""
        for cell in self.examples:
            try:
                num_dims = _open_array(root, _path(cell)).ndim
            except (BadRow, RejectedSample):
                continue
            return "vector" if num_dims == 1 else "sequence" if num_dims == 2 else None
        return None

    def about(self, kind: Kind) -> str:
        """What was found, for people."""
        if self.form in PATH_FORMS:
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
        return ", ".join(map(shown, self.examples)) or "nothing but empty cells"


def is_empty(cell: object) -> bool:
    """Whether a cell holds nothing: null, NaN, blanks, or a list without elements."""
    if isinstance(cell, str):
        return not cell.strip()
    if isinstance(cell, list | np.ndarray):
        return len(cell) == 0
    return cell is None or cell != cell


def form_of(cell: object) -> str:
    """What a cell looks like: a form of `FORMS`, or "other"."""
    if isinstance(cell, str):
        return FORM_OF_SUFFIX.get(_suffix(cell)) or _form_of_text(cell)
    if isinstance(cell, list | np.ndarray):
        return _form_of_list(cell)
    return "number" if isinstance(cell, Number) else "other"


def word(cells: Cells, column: str | None) -> str:
    """A label, key, group or split; empty if there is none.

    Raises:
        BadRow: the cell is neither text nor number.
    """
    cell = cells.get(column) if column else None
    if is_empty(cell):
        return ""
    with _naming(column):
        return _string(cell).strip()


def number(cells: Cells, column: str) -> float:
    """A number, also where it is written as text.

    Raises:
        BadRow: the cell is no number.
    """
    cell = cells[column]
    try:
        return float(cell if isinstance(cell, SupportsFloat) else str(cell))
    except (ValueError, OverflowError):
        raise BadRow(f"column {column}: {shown(cell)} is no number") from None


def medium(cells: Cells, column: str, kind: Kind, form: str, root: Path) -> Media:
    """What to load for a modality of one column.

    Args:
        cells: a row; its cell of the column is not empty.
        form: form of most cells of the column.
        root: resolved folder that paths are relative to.

    Raises:
        BadRow: the cell does not fit the kind, or is no .npy file that can be read.
    """
    cell = cells[column]
    with _naming(column):
        match kind:
            case "image":
                return Stills(_paths(cell)[:1])
            case "frames":
                paths = _paths(cell)
                return Video(_path(cell)) if form_of(paths[0]) == "video" else Stills(paths)
            case "flow":
                return Video(_path(cell))
            case "audio":
                path = _path(cell)
                return Video(path) if form_of(path) == "video" else Sound(path)
            case "text":
                return TextFile(_path(cell)) if form == "text file" else Text(_string(cell))
            case _:
                values = _open_array(root, _path(cell)) if form == "array" else _unpacked(cell)
                return Values(_numbers(values, kind, cell))


@contextmanager
def _naming(column: str | None) -> Iterator[None]:
    try:
        yield
    except (BadRow, RejectedSample) as error:
        raise BadRow(f"column {column}: {error}") from error


def _form_of_text(text: str) -> str:
    values = _unpacked(text)
    if not isinstance(values, str):
        return form_of(values)
    try:
        float(text)
    except ValueError:
        return "string"
    return "number"


def _form_of_list(cell: list[object] | np.ndarray) -> str:
    first = next(iter(cell), None)
    form = form_of(first)
    if isinstance(first, str):
        return form if form in PATH_FORMS else "other"
    return {"number": "list", "list": "lists"}.get(form, "other")


def _unpacked(cell: object) -> object:
    """The list that a string holds as JSON, or the cell as it is."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _numbers(values: object, kind: Kind, cell: object) -> np.ndarray:
    """float32 or float64: (D,) for a vector, (T, D) for a sequence; a flat list is (T, 1)."""
    wanted = "a list of numbers" if kind == "vector" else "a list of equally long lists of numbers"
    is_float32 = isinstance(values, np.ndarray) and values.dtype == np.float32
    try:
        numbers = np.array(values, dtype=np.float32 if is_float32 else np.float64)
    except (TypeError, ValueError, OverflowError):
        raise BadRow(f"{shown(cell)} is not {wanted}") from None
    if kind == "sequence" and numbers.ndim == 1:
        numbers = numbers[:, None]
    if numbers.size == 0 or numbers.ndim != (1 if kind == "vector" else 2):
        raise BadRow(f"{shown(cell)} has shape {numbers.shape} and is not {wanted}")
    return numbers


def _open_array(root: Path, relative: str) -> np.ndarray:
    """A .npy file as a memory map: a header may claim any size."""
    path = inside(root, relative)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise BadRow(f"{relative} is no whole .npy file of numbers ({error})") from error
    if array.dtype.kind not in "biuf":
        raise BadRow(f"{relative} holds {array.dtype}, not numbers")
    return array


def _string(cell: object) -> str:
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # integers with gaps come as floats
    if not isinstance(cell, str | Number):
        raise BadRow(f"{shown(cell)} is no text or number")
    return utf8(str(cell))


def _path(cell: object) -> str:
    path, *others = _paths(cell)
    if others:
        raise BadRow(f"{shown(cell)} holds {len(others) + 1} paths, and one is needed")
    return path


def _paths(cell: object) -> tuple[str, ...]:
    """Paths of a cell, at least one."""
    if paths := tuple(map(utf8, _split(cell))):
        return paths
    raise BadRow(f"{shown(cell)} is no path or list of paths")


def _split(cell: object) -> list[str]:
    """Paths of a cell: a list, also as JSON, or separated by semicolons."""
    values = _unpacked(cell)
    parts = values.split(";") if isinstance(values, str) else values
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return []
    return [part.strip() for part in parts if part.strip()]


def _suffix(paths: str) -> str:
    """Suffix of the last path."""
    return splitext(paths.rstrip(" ;"))[1].lower()

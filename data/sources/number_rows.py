"""Numbers from comma-separated text files without quotes, a row per sample."""

from pathlib import Path

import numpy as np

from data.sources.index import read_lines

NumberRow = np.ndarray | str
"""Numbers of a row, float64; or what is wrong with it."""


def number_rows(path: Path, width: int) -> list[NumberRow]:
    """Rows of a file without header, (width,) each. "nan" and "inf" are numbers here.

    Raises:
        DataError: the file cannot be read as text.
    """
    return [_number_row(line, width) for _, line in read_lines(path)]


def _number_row(line: str, width: int) -> NumberRow:
    cells = line.split(",")
    if len(cells) != width:
        return f"{len(cells)} cells, {width} expected"
    row = np.empty(width)
    for column, cell in enumerate(cells):
        try:
            row[column] = float(cell)
        except ValueError:
            return f"column {column + 1} holds {cell!r}, which is not a number"
    return row

"""Files of a prepared set that keep what was learnt from its training samples, so that other raw
files can be treated alike: tokenizers, numbers that vectors and sounds are scaled by, and columns
of a table that make a vector."""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from data.schema import DataError

PREFIXES = ("tokenizer-", "scale-", "columns-")
Scale = tuple[np.ndarray, np.ndarray]
"""What to subtract and to divide by, per column, (D,) float64 each."""


def tokenizer_name(modality: str) -> str:
    """Name of the file that keeps the tokenizer of a modality."""
    return f"tokenizer-{modality}.json"


def scale_name(modality: str) -> str:
    """Name of the file that keeps the scale of a modality."""
    return f"scale-{modality}.json"


def scale_json(scale: Scale) -> str:
    """A scale as JSON, exact."""
    shift, factor = (np.asarray(numbers, np.float64).tolist() for numbers in scale)
    return json.dumps({"shift": shift, "factor": factor}) + "\n"


def read_scale(text: str) -> Scale:
    """The opposite of `scale_json`."""
    values = json.loads(text)
    return np.asarray(values["shift"], np.float64), np.asarray(values["factor"], np.float64)


def columns_name(modality: str) -> str:
    """Name of the file that keeps the columns of a modality."""
    return f"columns-{modality}.json"


def columns_json(columns: Sequence[str]) -> str:
    """Names of columns as JSON."""
    return json.dumps(list(columns)) + "\n"


def read_columns(text: str) -> tuple[str, ...]:
    """The opposite of `columns_json`."""
    return tuple(json.loads(text))


def kept(files: Mapping[str, str], name: str) -> str:
    """Content of a file, by name.

    Raises:
        DataError: the set does not keep it.
    """
    if name not in files:
        raise DataError(
            f"{name} is not kept with the prepared set, so raw files cannot be treated as its "
            "training samples were; prepare the set again (delete its folder first) and train on "
            "it, or give prepared shards as input"
        )
    return files[name]

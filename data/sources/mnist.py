"""MNIST in its original files: gzipped idx, big endian (Y. LeCun et al., Proc. IEEE 86(11), 1998).

Images: magic 2051, count, rows, columns, then one byte a pixel. Labels: magic 2049, count, then
one byte each.
"""

import struct
import zlib
from pathlib import Path

import numpy as np

from data.schema import DataError

IMAGE_MAGIC, LABEL_MAGIC = 2051, 2049
SIDE = 28
GZIP_WBITS = 31


def read_labels(path: Path) -> np.ndarray:
    """Labels of an idx1 file, uint8 (N,).

    Raises:
        DataError: not such a file, damaged or shorter than its header says.
    """
    data = _unpack(path)
    (count,) = _header(path, data, LABEL_MAGIC, num_sizes=1)
    labels = np.frombuffer(data, np.uint8, offset=8)
    if len(labels) != count:
        raise DataError(
            f"{path} holds {len(labels)} labels and its header says {count}; the file is cut off; "
            "download it again"
        )
    return labels


def read_images(path: Path) -> np.ndarray:
    """Images of an idx3 file, uint8 (n, 28, 28); n is less than the header's count in a cut file.

    Raises:
        DataError: not such a file, or damaged.
    """
    data = _unpack(path)
    count, rows, columns = _header(path, data, IMAGE_MAGIC, num_sizes=3)
    if (rows, columns) != (SIDE, SIDE):
        raise DataError(f"{path} holds {rows} x {columns} images; MNIST has {SIDE} x {SIDE}")
    whole = min(count, (len(data) - 16) // SIDE**2)
    return np.frombuffer(data, np.uint8, count=whole * SIDE**2, offset=16).reshape(-1, SIDE, SIDE)


def _unpack(path: Path) -> bytes:
    """Contents of a gzip file, as far as they go if the file is cut off."""
    try:
        return zlib.decompressobj(GZIP_WBITS).decompress(path.read_bytes())
    except (OSError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as gzip ({error}); download it again or check data.root"
        ) from error


def _header(path: Path, data: bytes, magic: int, num_sizes: int) -> tuple[int, ...]:
    length = 4 * (1 + num_sizes)
    found, *sizes = struct.unpack(f">{1 + num_sizes}I", data[:length].ljust(length, b"\0"))
    if found != magic:
        raise DataError(
            f"{path} starts with {found}, idx magic {magic} expected; download it again"
        )
    return tuple(sizes)

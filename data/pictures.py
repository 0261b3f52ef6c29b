"""Pictures on disk: JPEG rows of a shard, and back."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data.schema import DataError

JPEG_QUALITY = 92
LENGTH = np.dtype("<u4")


def encode_jpeg(pictures: np.ndarray) -> bytes:
    """uint8 (K, 3, H, W) or (3, H, W) -> per picture its length (uint32, little endian) and its
    JPEG bytes."""
    parts: list[bytes] = []
    for picture in pictures.reshape(-1, *pictures.shape[-3:]):
        file = io.BytesIO()
        Image.fromarray(picture.transpose(1, 2, 0)).save(file, "JPEG", quality=JPEG_QUALITY)
        parts += [LENGTH.type(file.tell()).tobytes(), file.getvalue()]
    return b"".join(parts)


def decode_jpeg(data: bytes, wanted: Sequence[int], out: np.ndarray) -> None:
    """Decode pictures of a row by their numbers into `out`, uint8 (len(wanted), 3, H, W)."""
    starts: list[tuple[int, int]] = []
    position = 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "little")
        starts.append((position + 4, position + 4 + length))
        position += 4 + length
    for picture, number in zip(out, wanted, strict=True):
        start, stop = starts[number]
        with Image.open(io.BytesIO(data[start:stop]), formats=("JPEG",)) as image:
            if image.size != out.shape[:-3:-1]:  # before it is decoded: it may claim any size
                raise DataError(
                    f"a picture of a shard claims {image.size} pixels, {out.shape[:-3:-1]} "
                    "expected; prepare the set again"
                )
            picture[:] = np.asarray(image).transpose(2, 0, 1)

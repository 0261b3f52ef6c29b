"""Pictures in shards: JPEG rows and back."""

import io

import numpy as np
import pytest
from PIL import Image

from data.pictures import decode_jpeg, encode_jpeg
from tests.data.media_files import picture

CLIP = np.stack([picture(32, 48, seed=n).transpose(2, 0, 1) for n in range(4)])


def test_pictures_come_back_within_a_few_grey_levels() -> None:
    out = np.empty_like(CLIP)
    decode_jpeg(encode_jpeg(CLIP), range(4), out)
    error = np.abs(out.astype(int) - CLIP)
    assert 0 < error.mean() < 3
    assert error.max() < 40


def test_layout_is_length_and_jpeg() -> None:
    data = encode_jpeg(CLIP[:2])
    first = int.from_bytes(data[:4], "little")
    second = int.from_bytes(data[4 + first : 8 + first], "little")
    assert len(data) == 8 + first + second
    with Image.open(io.BytesIO(data[4 : 4 + first])) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 32))


def test_some_pictures_in_any_order() -> None:
    data, out = encode_jpeg(CLIP), np.empty_like(CLIP)
    decode_jpeg(data, range(4), out)
    chosen = np.empty((3, *CLIP.shape[1:]), np.uint8)
    decode_jpeg(data, [3, 1, 1], chosen)
    np.testing.assert_array_equal(chosen, out[[3, 1, 1]])


def test_one_image_is_a_clip_of_one() -> None:
    assert encode_jpeg(CLIP[0]) == encode_jpeg(CLIP[:1])


def test_one_picture_is_much_smaller_than_its_pixels() -> None:
    pixels = picture(256, 256).transpose(2, 0, 1)
    assert len(encode_jpeg(pixels)) < 0.3 * pixels.size


def test_cut_row() -> None:
    out = np.empty((1, *CLIP.shape[1:]), np.uint8)
    with pytest.raises(OSError, match="truncated"):
        decode_jpeg(encode_jpeg(CLIP[0])[:-50], [0], out)

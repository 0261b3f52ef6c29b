"""Fingerprints: what is kept of an item so that nearly equal ones can be found without reading it
again. One class per way of comparing, all with the methods of `Fingerprints`.

Thresholds were set on real data; what they find and leave alone is in tests/data/test_audit.py.
"""

import hashlib
import zlib
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Protocol

import imagehash
import numpy as np
from PIL import Image

from data.pictures import decode_jpeg
from data.schema import Modality, Split

if TYPE_CHECKING:
    from datasketch import MinHash

SIDE = 32
"""Pixels of a side of a thumbnail, the picture from which phash takes its cosine transform."""
MAX_BITS = 6
"""Largest Hamming distance of two 64-bit phashes. JPEG of quality 50, noise of 25 grey levels or
40 % less light moved photographs by at most 4 bits; unrelated ones were 12 and more apart. But 1 in
1000 pairs of MNIST digits are 6 or less apart: hence the second test."""
MIN_PICTURE_MATCH = 0.99
"""Least correlation of two thumbnails. The same changes left 0.995 and more, JPEG of quality 50 in
MNIST digits 0.991; unrelated photographs reached 0.75. Of the 70,000 MNIST digits 13, all of them
ones, have a twin."""
MIN_SOUND_MATCH = 0.95
"""Least correlation of two spectrograms without the means of their bands and frames. In clips of
2.5 s of FSDD a shift by a frame, mu-law or Ogg Vorbis coding left 0.98 and more, unrelated clips of
one speaker reached 0.77; in single digits of 0.3 s the shift left 0.90 to 0.98, and the same
speaker saying the digit again reached 0.92. MP3 and noise above -30 dB are not recognised."""
PADDING = 0.3
"""Outer frames of a spectrogram whose values deviate by less than this part of the deviation of all
are padding. Padding does not vary at all; the frames of speech and of noise do by half and more."""
FLAT = 0.01
"""A picture with a smaller deviation (white is 1) shows nothing that could be compared."""
STEADY = 0.17
"""A sound whose spectrogram, without the means of its bands and frames, keeps less of its deviation
than this part is a lasting tone or hum, and what is left are its edges; speech keeps 0.19 to 0.77,
dialling tones at most 0.15."""
SHINGLE = 3
"""Tokens of a shingle."""
MIN_TEXT_MATCH = 0.8
"""Least Jaccard index of the shingles: about one token in 30 changed."""
BANDS, BAND_ROWS = 20, 6
"""MinHash values compared at a time: two texts at 0.8 agree in some band with probability 0.998, at
0.3 with 0.014."""
LIKELY_VALUES = 8
MANTISSA_BITS = 10
"""Numbers are compared to three decimal digits: equal up to rounding in how they were computed."""
MIN_SIDE = 8
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as JPEG has it
PAIRS_AT_ONCE = 256  # thumbnails that stay in the cache


class Fingerprints(Protocol):
    """Fingerprints of one modality of all rows.

    Attributes:
        known: bool (N,): the row has the modality, and there is something in it to compare.
    """

    known: np.ndarray

    def add(self, row: int, item: np.ndarray) -> None:
        """Keep the fingerprint of an item, as `comparable` gives it."""
        ...

    def keys(self) -> np.ndarray:
        """(N, K) integers: rows that are nearly the same agree in at least one column."""
        ...

    def likely(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """bool (P,): a quick test that rows `a` and `b`, both known, pass if they are close."""
        ...

    def close(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """bool (P,): whether rows `a` and `b`, both known, are nearly the same."""
        ...


def make_fingerprints(modality: Modality, rows: int) -> Fingerprints:
    """Empty fingerprints of `rows` rows of a modality."""
    if modality.kind == "text":
        return TextFingerprints(rows, modality.pad)
    if _is_picture(modality):
        return PictureFingerprints(rows, modality.scale, is_sound=modality.kind == "audio")
    return ValueFingerprints(rows)


def _is_picture(modality: Modality) -> bool:
    if modality.kind == "audio":
        return len(modality.shape) >= 2 and min(modality.shape[-2:]) >= MIN_SIDE
    return modality.kind in ("image", "frames", "flow")


def shown_frames(modality: Modality, split: Split) -> list[int]:
    """Numbers, in a stored row, of the frames that evaluation would see; [0] for a single picture.

    Of the candidates of each part it is the middle one.
    """
    if modality.kind not in ("frames", "flow"):
        return [0]
    candidates = modality.candidates if split == "train" else 1
    return [k * candidates + candidates // 2 for k in range(modality.shape[0])]


def read_frames(modality: Modality, split: Split, data: bytes, wanted: list[int]) -> np.ndarray:
    """Some pictures of a stored row, (len(wanted), C, H, W)."""
    shape = modality.stored(split)[-3:]
    if modality.storage == "jpeg":
        frames = np.empty((len(wanted), *shape), np.uint8)
        decode_jpeg(data, wanted, frames)
        return frames
    return np.frombuffer(data, modality.dtype).reshape(-1, *shape)[wanted]


def comparable(modality: Modality, split: Split, data: bytes) -> np.ndarray:
    """What is compared of a stored row: (H, W) of the middle frame in grey (of flow: horizontal
    above vertical), (bands, frames) of a spectrogram, or all values (n,)."""
    if not _is_picture(modality):
        return np.frombuffer(data, modality.dtype)
    if modality.kind == "audio":
        return read_spectrogram(modality, data)
    shown = shown_frames(modality, split)
    frame = read_frames(modality, split, data, [shown[len(shown) // 2]])[0]
    if modality.kind == "flow":
        return frame.reshape(-1, frame.shape[-1])
    if len(frame) == len(LUMA):
        return np.tensordot(LUMA, frame, axes=1)
    return frame.mean(axis=0, dtype=np.float32)


def read_spectrogram(modality: Modality, data: bytes) -> np.ndarray:
    """float32 (bands, frames) of a stored row; the mean over channels."""
    values = np.frombuffer(data, modality.dtype).reshape(-1, *modality.shape[-2:])
    mean = values.mean(axis=0, dtype=np.float32)
    return mean if modality.time_axis == -1 else mean.T


class PictureFingerprints:
    """phash of the picture, and a thumbnail of 32 x 32 to check it: 1 kB a row.

    A spectrogram is a picture too, after its padding is cut off.
    """

    def __init__(self, rows: int, white: float, *, is_sound: bool) -> None:
        self.known = np.zeros(rows, bool)
        self._codes = np.zeros((rows, 8), np.uint8)
        self._thumbnails = np.zeros((rows, SIDE * SIDE), np.int8)
        self._lengths = np.ones(rows, np.float32)
        self._flat = FLAT * white
        self._is_sound = is_sound

    def add(self, row: int, item: np.ndarray) -> None:
        """Keep phash and thumbnail of a picture (H, W) or spectrogram (bands, frames)."""
        if self._is_sound:
            item = without_padding(item)
        image = Image.fromarray(np.ascontiguousarray(item, np.float32))
        small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
        pattern, least = small - small.mean(), self._flat
        if self._is_sound:
            pattern = small - small.mean(0) - small.mean(1, keepdims=True) + small.mean()
            least = STEADY * small.std()
        if pattern.std() <= least:
            return
        grey = (small - small.min()) * (255 / np.ptp(small))
        thumbnail = np.rint(pattern.ravel() * (127 / np.abs(pattern).max()))
        self._codes[row] = np.packbits(imagehash.phash(Image.fromarray(grey.astype(np.uint8))).hash)
        self._thumbnails[row] = thumbnail
        self._lengths[row] = np.linalg.norm(thumbnail)
        self.known[row] = True

    def keys(self) -> np.ndarray:
        """Every two of the eight bytes: codes at most 6 bits apart agree in two bytes."""
        wide = self._codes.astype(np.uint16)
        pairs = combinations(range(8), 2)
        return np.stack([wide[:, i] << 8 | wide[:, j] for i, j in pairs], axis=1)

    def likely(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Whether the codes are close."""
        codes = self._codes.view(np.uint64)[:, 0]
        return np.bitwise_count(codes[a] ^ codes[b]) <= MAX_BITS

    def close(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Whether both the codes and the thumbnails are close."""
        is_close = self.likely(a, b)
        a, b = a[is_close], b[is_close]
        match = np.empty(len(a), np.float32)
        for start in range(0, len(a), PAIRS_AT_ONCE):
            part = slice(start, start + PAIRS_AT_ONCE)
            left, right = self._thumbnails[a[part]], self._thumbnails[b[part]]
            match[part] = np.vecdot(left.astype(np.float32), right.astype(np.float32))
        match /= self._lengths[a] * self._lengths[b]
        is_close[is_close] = match >= (MIN_SOUND_MATCH if self._is_sound else MIN_PICTURE_MATCH)
        return is_close


def without_padding(spectrogram: np.ndarray) -> np.ndarray:
    """Cut off the outer frames that hardly vary over the bands, then the outer bands that are
    constant (silent ones; or padding, where the axis of time is given wrongly).

    Args:
        spectrogram: (bands, frames).
    """
    frames = np.flatnonzero(spectrogram.std(axis=0) >= PADDING * spectrogram.std())
    bands = np.flatnonzero(np.ptp(spectrogram, axis=1))
    if not len(frames) or not len(bands):
        return spectrogram
    return spectrogram[bands[0] : bands[-1] + 1, frames[0] : frames[-1] + 1]


class TextFingerprints:
    """MinHash of the shingles of a text's token ids."""

    def __init__(self, rows: int, pad: int) -> None:
        self.known = np.zeros(rows, bool)
        self._values = np.zeros((rows, BANDS * BAND_ROWS), np.uint32)
        self._pad = pad

    def add(self, row: int, item: np.ndarray) -> None:
        """Keep the MinHash of the token ids (L,), padding left out."""
        tokens = item[item != self._pad]
        if not len(tokens):
            return
        windows = np.lib.stride_tricks.sliding_window_view(tokens, min(SHINGLE, len(tokens)))
        minhash = _empty_minhash().copy()
        minhash.update_batch({window.tobytes() for window in windows})
        self._values[row] = minhash.hashvalues
        self.known[row] = True

    def keys(self) -> np.ndarray:
        """Every band of the MinHash, mixed into one number."""
        factors = np.random.default_rng(0).integers(1, 2**63, BAND_ROWS, np.uint64) | np.uint64(1)
        bands = self._values.reshape(-1, BANDS, BAND_ROWS).astype(np.uint64)
        return (bands * factors).sum(axis=2)

    def likely(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Whether any of the first values agree; of texts at 0.8 all but 3 in a million do."""
        first = slice(LIKELY_VALUES)
        return (self._values[a, first] == self._values[b, first]).any(axis=1)

    def close(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Whether the share of equal MinHash values, which estimates the Jaccard index, is high."""
        is_close = self.likely(a, b)
        values = self._values[a[is_close]] == self._values[b[is_close]]
        is_close[is_close] = values.mean(axis=1) >= MIN_TEXT_MATCH
        return is_close


@lru_cache(maxsize=1)
def _empty_minhash() -> "MinHash":
    from datasketch import MinHash  # takes a second

    return MinHash(num_perm=BANDS * BAND_ROWS, hashfunc=zlib.crc32)


class ValueFingerprints:
    """Hash of the rounded values of a vector or sequence."""

    def __init__(self, rows: int) -> None:
        self.known = np.zeros(rows, bool)
        self._codes = np.zeros(rows, np.uint64)

    def add(self, row: int, item: np.ndarray) -> None:
        """Keep the hash of the values, rounded to three digits each."""
        mantissa, exponent = np.frexp(item.astype(np.float64))
        rounded = np.ldexp(np.rint(mantissa * 2**MANTISSA_BITS), exponent) + 0.0  # no -0.0
        self._codes[row] = content_hash(rounded.tobytes())
        self.known[row] = True

    def keys(self) -> np.ndarray:
        """The hash."""
        return self._codes[:, None]

    def likely(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Whether the hashes are equal."""
        return self._codes[a] == self._codes[b]

    close = likely


def content_hash(data: bytes) -> int:
    """64 bits of BLAKE2b. Among a million items two different ones agree by chance once in 30
    million sets."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")

"""CMU-MOSI and CMU-MOSEI: words, voice and face of an utterance, and whether it is positive.

Read is the first of these forms of which a file is there; no other file is opened.

- `features.npz` and `utterances.csv`: one vector per utterance and modality; columns id, video_id,
  clip, split_standard, split_repo, label (0 or 1), text.
- `mosi_{train,valid,test}.npz` (mosei_...): arrays text, audio, vision (N, steps, width), labels
  (N scores), id (N or N x parts). What to save a pickle as that is refused.
- The pickles of MulT, MultiBench and BalanceBenchmark: a dict train, valid, test of dicts with the
  same keys. Zeros stand in front of the words, and stay there.
- The pickles of MMSA, `aligned_50.pkl` and `unaligned_50.pkl`: the same with `regression_labels`
  for the scores. Zeros stand behind the words, and are cut off: the processor pads in front.

Pickles are read by data/pickles.py, which runs nothing.
"""

import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data.config import DataConfig, Kind, ModalityConfig
from data.pickles import MAX_BYTES, read_arrays
from data.schema import DataError, Split
from data.sources.base import raw_folder
from data.sources.index import Record, read_records, where
from data.sources.raw import RawSample, Unreadable, Values

MODALITIES = ("text", "audio", "vision")
SPLITS: dict[str, Split] = {"train": "train", "valid": "val", "test": "test"}
VECTOR_FILES = ("features.npz", "utterances.csv")
MMSA_PICKLES = ("aligned_50.pkl", "unaligned_50.pkl")
MMSA_SCORES = "regression_labels"
CLASS_OF_CELL = {"0": "negative", "1": "positive"}
MAX_SCORE = 3.0
NPZ_ERRORS = (  # of a zip that is damaged, or packed or encrypted otherwise
    *(OSError, ValueError, EOFError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)
CELLS = (str, bytes, int, float, np.generic)
VIDEO_END = re.compile(r"\[|\$_\$")


@dataclass(frozen=True)
class _Part:
    """A split: name and score (N,) of every utterance, modality -> (N, steps, width)."""

    names: list[tuple[str, ...]]
    scores: np.ndarray
    arrays: Mapping[str, np.ndarray]
    zeros_behind: bool


class Mosi:
    """2199 utterances of 93 videos; `group` is the video.

    Classes: positive is a score of 0 or above, as in BalanceBenchmark and in utterances.csv, and as
    the authors of the set count (negative or not). MultiBench calls a score of 0 negative: results
    differ on neutral utterances. A score outside -3 to 3 stays as it is and is no class.

    Values: -inf in audio becomes 0, whatever the recipe: the published files are full of it (the
    logarithm of silence), and all readers do so. Any other number that is not finite stays, and
    leads to rejection. An utterance without any word (text all zero) lacks its text; MultiBench
    leaves it out.

    Splits: the fixed ones, 52, 10 and 31 videos. The vectors were learnt with the labels of 62
    videos, so for them the official partition is `split_repo` (62 and 31 videos, none for
    validation); 558 of the 686 test utterances of the usual one, `split_standard`, are among the
    62. `data.split=given` takes that one all the same, to compare with others who did.

    A key is the id; parts of an id are joined by `_`.
    """

    name: ClassVar[str] = "mosi"
    version: ClassVar[int] = 1
    classes: tuple[str, ...] = ("negative", "positive")
    official: ClassVar[Mapping[str, ModalityConfig]] = {}
    pickles: ClassVar[tuple[str, ...]] = ("mosi_data.pkl", "mosi_raw.pkl", "mosi_data_noalign.pkl")

    def __init__(self, config: DataConfig) -> None:
        npz = tuple(f"{self.name}_{split}.npz" for split in SPLITS)
        one_of = (*self.pickles, *MMSA_PICKLES)
        forms = [VECTOR_FILES, npz, *((name,) for name in one_of)]
        remedy = (
            f"`--data.root DIR` with {', '.join(npz)}; or one of {', '.join(one_of)}; or "
            f"{' and '.join(VECTOR_FILES)} inside"
        )
        self._root = raw_folder(config, (), remedy)
        files = (form for form in forms if any((self._root / name).exists() for name in form))
        self._files = next(files, npz)
        raw_folder(config, self._files, remedy)
        self._split_column = "split_standard" if config.split == "given" else "split_repo"

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """Vectors or sequences, as the form that was found has them."""
        kind: Kind = "vector" if self._files == VECTOR_FILES else "sequence"
        return dict.fromkeys(MODALITIES, kind)

    def samples(self) -> Iterator[RawSample | Unreadable]:
        """Train, val, test; in each in file order (vectors: all in file order).

        Raises:
            DataError: a file cannot be read, is unsafe, lacks an array, or has one of wrong shape.
        """
        if self._files == VECTOR_FILES:
            yield from self._vectors()
            return
        for name, part in self._parts():
            for row in range(len(part.names)):
                yield _utterance(part, row, SPLITS[name])

    def _vectors(self) -> Iterator[RawSample | Unreadable]:
        features, index = (self._root / name for name in VECTOR_FILES)
        arrays = _read_npz(features)
        rows = read_records(index, ",")
        _check_columns(index, rows, ("id", "video_id", self._split_column, "label"))
        for name in MODALITIES:
            _check(features, name, _array(features, arrays, name), (len(rows), None))
        for row, (line, record) in enumerate(rows):
            if isinstance(record, str):
                yield Unreadable(where(index, line), record, "train")
                continue
            cells = {name: str(cell) for name, cell in record.items()}
            if (split := SPLITS.get(cells[self._split_column])) is None:
                reason = f"{self._split_column} is {cells[self._split_column]!r}, no split"
                yield Unreadable(where(index, line), reason, "train")
                continue
            media = {name: Values(_silenced(name, arrays[name][row])) for name in MODALITIES}
            label = CLASS_OF_CELL.get(cells["label"], cells["label"])
            yield RawSample(cells["id"], label, split, media, cells["video_id"])

    def _parts(self) -> Iterator[tuple[str, _Part]]:
        """Split name in the files and its utterances; npz files are read one after the other."""
        paths = [self._root / name for name in self._files]
        if len(paths) > 1:
            for split, path in zip(SPLITS, paths, strict=True):
                yield split, _part(path, _read_npz(path))
            return
        whole = read_arrays(paths[0])
        for split in SPLITS:
            if not isinstance(whole, dict) or not isinstance(whole.get(split), dict):
                raise DataError(
                    f"{paths[0]} has no dict {split!r}; it must be a dict of {', '.join(SPLITS)}, "
                    "each a dict of arrays; get the file again"
                )
            yield split, _part(paths[0], whole.pop(split))


class Mosei(Mosi):
    """About 22856 utterances; in all else as CMU-MOSI."""

    name: ClassVar[str] = "mosei"
    pickles: ClassVar[tuple[str, ...]] = (
        *("mosei_senti_data.pkl", "mosei_raw.pkl", "mosei_senti_data_noalign.pkl"),
    )


def _part(path: Path, arrays: Mapping[str, object]) -> _Part:
    is_mmsa = MMSA_SCORES in arrays
    scores = _array(path, arrays, MMSA_SCORES if is_mmsa else "labels")
    names = _array(path, arrays, "id")
    if scores.size != len(scores) or names.ndim not in (1, 2) or len(names) != len(scores):
        raise DataError(
            f"{path} has scores of shape {scores.shape} and id of shape {names.shape}; one score "
            "and one id (or a row of its parts) per utterance are needed; get the file again"
        )
    sequences = {name: _array(path, arrays, name) for name in MODALITIES}
    for name, array in sequences.items():
        _check(path, name, array, (len(names), None, None))
    parts = [tuple(map(_word, row)) for row in names.reshape(len(names), -1)]
    return _Part(parts, scores.reshape(-1).astype(np.float64), sequences, is_mmsa)


def _utterance(part: _Part, row: int, split: Split) -> RawSample:
    arrays = {name: _silenced(name, array[row]) for name, array in part.arrays.items()}
    if part.zeros_behind:
        arrays = _without_zeros_behind(arrays)
    if not arrays["text"].any():
        del arrays["text"]
    media = {name: Values(array) for name, array in arrays.items()}
    words = part.names[row]
    score = float(part.scores[row])
    return RawSample("_".join(words), _label(score), split, media, VIDEO_END.split(words[0])[0])


def _label(score: float) -> str:
    if not -MAX_SCORE <= score <= MAX_SCORE:
        return f"score {score}"
    return "positive" if score >= 0.0 else "negative"


def _word(cell: object) -> str:
    return cell.decode() if isinstance(cell, bytes) else str(cell)


def _silenced(name: str, array: np.ndarray) -> np.ndarray:
    """Audio with 0 for -inf; a view of what is given where there is none."""
    if name != "audio" or not np.isneginf(array).any():
        return array
    return np.where(np.isneginf(array), array.dtype.type(0), array)


def _without_zeros_behind(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sequences (steps, width) up to the last step that is not zero.

    Sequences of one length are aligned, and are cut at one place.
    """
    behind = {name: _zeros_behind(array) for name, array in arrays.items()}
    if len({len(array) for array in arrays.values()}) == 1:
        behind = dict.fromkeys(arrays, min(behind.values()))
    return {name: array[: len(array) - behind[name]] for name, array in arrays.items()}


def _zeros_behind(array: np.ndarray) -> int:
    used = np.flatnonzero(array.any(axis=1))
    return len(array) - 1 - int(used[-1]) if len(used) else 0


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size <= MAX_BYTES:
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
    except NPZ_ERRORS as error:
        raise DataError(f"{path} is no npz of plain arrays ({error}); get it again") from error
    raise DataError(
        f"{path} has {size} bytes when it is unpacked and at most {MAX_BYTES} are read, since its "
        "arrays have to fit into memory; leave out utterances"
    )


def _check_columns(path: Path, rows: Sequence[Record], columns: Sequence[str]) -> None:
    """Raises: DataError: the file lacks one of the columns."""
    for _, record in rows:
        if isinstance(record, dict) and (missing := set(columns) - record.keys()):
            raise DataError(
                f"{path} lacks the column {', '.join(sorted(missing))}; it has "
                f"{', '.join(record)}; name its columns in the first line"
            )


def _array(path: Path, arrays: Mapping[str, object], name: str) -> np.ndarray:
    if name not in arrays:
        raise DataError(
            f"{path} lacks the array {name!r}; it holds {', '.join(map(str, arrays))}; get the "
            "file again"
        )
    value = arrays[name]
    if isinstance(value, list):  # flat: lists in lists can make any size of a few bytes
        value = np.fromiter(value, object, len(value))
    if not isinstance(value, np.ndarray) or not value.ndim or not _is_flat(value):
        raise DataError(
            f"{path}: {name} is neither a NumPy array nor a flat list of str or numbers with an "
            "entry per utterance; get the file again"
        )
    return value


def _is_flat(array: np.ndarray) -> bool:
    return array.dtype != object or all(isinstance(cell, CELLS) for cell in array.flat)


def _check(path: Path, name: str, array: np.ndarray, shape: tuple[int | None, ...]) -> None:
    """Raises: DataError: not numbers, or another shape; None stands for any size."""
    fits = array.ndim == len(shape) and len(array) == shape[0]
    if not fits or array.dtype.kind not in "biuf":
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise DataError(
            f"{path}: {name} is {array.dtype} of shape {array.shape}; numbers of shape {wanted} "
            "are needed, a row per utterance; get the file again"
        )

"""Manifest: what a prepared data set is. The contract between prepare, the pipeline and the worker.

A prepared set is a folder with `manifest.json` and Parquet shards. Columns of a shard: `sample_id`
int64, `label` int64, `key` string, `group` string, `present` int64 if a modality is optional (bit m
is set if the sample has modality m), and one binary column per modality: of fixed size with the
tensor in C order, little endian, or of JPEG pictures.
"""

import hashlib
import json
import math
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from data.config import Kind
from data.folder import Folder

MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20  # of 300,000 shards
MAX_ROW_BYTES = (1 << 31) - 1  # of a modality; Arrow has no longer rows of fixed size
Split = Literal["train", "val", "test"]


class DataError(ValueError):
    """Something is wrong with the user's data or its folder; the message says what to do."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Augment(_Model):
    """Random changes of a modality's rows in training, drawn per (seed, epoch, sample); applied on
    the training device by training/augment.py. Pictures: crop, rotate, flip, in this order.

    Attributes:
        crop: a random part of 8 to 100 % of the area and of 3/4 to 4/3 in shape, resized.
        flip: mirrored left to right, half of the time; horizontal flow changes its sign.
        rotate_degrees: turned by up to this angle either way.
        per_frame: every frame of a clip draws its own numbers (as the released code does).
        time_mask, frequency_mask: largest width of a masked stripe of a spectrogram (SpecAugment).
    """

    crop: bool = False
    flip: bool = False
    rotate_degrees: float = 0.0
    per_frame: bool = False
    time_mask: int = 0
    frequency_mask: int = 0


class Modality(_Model):
    """One column of tensors: every row has this shape and dtype.

    Attributes:
        name: column name.
        kind: image (C, H, W); frames and flow (K, C, H, W), flow with C = 2, horizontal and
            vertical; audio (1, frames, bands) or (1, bands, frames), see time_axis; text (L,) token
            ids; vector
            (D,); sequence (T, D), padded with zeros in front.
        shape: of a row as the model gets it.
        dtype: of a row as it is delivered.
        storage: tensor (C order, little endian) or jpeg: per picture of K its length as uint32
            and its bytes.
        train_shape: of a row of the training split as it is delivered, if other than `shape`; the
            augmentation cuts `shape` out of it.
        candidates: training rows are stored with K * candidates frames; one of every group of
            `candidates` is drawn each epoch and delivered. 1: all are delivered.
        mean, std: per channel (dimension -3); a delivered row is normalised on the device as
            (x / scale - mean) / std; empty: used as it is.
        scale: 255 for bytes of pixels, else 1.
        augment: random changes in training.
        time_axis: of a spectrogram, dimension of time; the other one is frequency.
        optional: samples may lack it: their bytes are zeros, and their bit in `present` is 0.
        pad, vocab_size: of a text, id of the padding token and number of ids.
        about: how it was made, for people: "Kaldi fbank, 16 kHz, 25/10 ms", "flow: dis".
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: Literal["uint8", "int16", "int32", "float16", "float32"]
    storage: Literal["tensor", "jpeg"] = "tensor"
    train_shape: tuple[int, ...] | None = None
    candidates: int = 1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    scale: float = 1.0
    augment: Augment = Augment()
    time_axis: Literal[-1, -2] = -2
    optional: bool = False
    pad: int = 0
    vocab_size: int = 0
    about: str = ""

    def delivered(self, split: Split) -> tuple[int, ...]:
        """Shape of a row of `split` as the pipeline delivers it."""
        return self.train_shape or self.shape if split == "train" else self.shape

    def stored(self, split: Split) -> tuple[int, ...]:
        """Shape of a row of `split` in the shard, decoded."""
        shape = self.delivered(split)
        return (shape[0] * self.candidates, *shape[1:]) if split == "train" else shape

    def nbytes(self, split: Split) -> int:
        """Bytes of one delivered row."""
        return math.prod(self.delivered(split)) * np.dtype(self.dtype).itemsize

    def stored_nbytes(self, split: Split) -> int:
        """Bytes of one stored row, decoded."""
        return math.prod(self.stored(split)) * np.dtype(self.dtype).itemsize


class Shard(_Model):
    """One Parquet file, in the folder of the manifest."""

    path: str
    rows: int
    row_groups: tuple[int, ...]
    num_bytes: int
    sha256: str


class Manifest(_Model):
    """A prepared data set: modalities, class names, splits with their shards, and their hashes.

    Attributes:
        name: data set name.
        source: the settings that made it (JSON values), so that two preparations can be compared.
        classes: class names; a label is an index into it.
        split_rule: how the samples came to their splits; results over different ones are not
            comparable.
        splits: split -> shards, in order.
        class_counts: split -> rows per class, in the order of `classes`.
        files: other files that belong to the set, such as a tokenizer: name -> SHA-256.
    """

    format_version: Literal[2] = 2
    name: str
    source: dict[str, object]
    split_rule: str
    modalities: tuple[Modality, ...]
    classes: tuple[str, ...]
    splits: dict[Split, tuple[Shard, ...]]
    class_counts: dict[Split, tuple[int, ...]]
    files: dict[str, str] = {}

    def rows(self, split: Split) -> int:
        """Rows of a split."""
        return sum(shard.rows for shard in self.splits[split])

    def row_nbytes(self, split: Split) -> int:
        """Bytes of the tensors of one row as the pipeline delivers them."""
        return sum(modality.nbytes(split) for modality in self.modalities)

    def stored_row_nbytes(self, split: Split) -> int:
        """Bytes of the tensors of one row of a shard, decoded."""
        return sum(modality.stored_nbytes(split) for modality in self.modalities)

    @property
    def has_optional(self) -> bool:
        """Whether samples may lack a modality; the shards then have a column `present`."""
        return any(modality.optional for modality in self.modalities)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form: equal digests mean byte-identical data."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, two-space indent, newline at the end."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"

    def arrow_schema(self, split: Split) -> pa.Schema:
        """Schema of every shard of a split; plain Arrow types only."""
        fields = [
            pa.field("sample_id", pa.int64(), nullable=False),
            pa.field("label", pa.int64(), nullable=False),
            pa.field("key", pa.string(), nullable=False),
            pa.field("group", pa.string(), nullable=False),
        ]
        if self.has_optional:
            fields.append(pa.field("present", pa.int64(), nullable=False))
        for modality in self.modalities:
            width = modality.stored_nbytes(split) if modality.storage == "tensor" else -1
            fields.append(pa.field(modality.name, pa.binary(width), nullable=False))
        return pa.schema(fields)


def load_manifest(place: str | Path | Folder) -> Manifest:
    """Read the manifest of a prepared folder.

    Raises:
        DataError: there is no manifest, or it is not one of ours.
    """
    folder = Folder.at(place)
    if not folder.has(MANIFEST_NAME):
        raise DataError(
            f"{folder} holds no {MANIFEST_NAME}; a prepared data set has one (it is written last); "
            "run `midas prepare` on the raw data first"
        )
    if (size := folder.size(MANIFEST_NAME) or 0) > MAX_MANIFEST_BYTES:
        raise DataError(
            f"{folder}/{MANIFEST_NAME} has {size} bytes; at most {MAX_MANIFEST_BYTES} are read; "
            "get the set from whom you trust, or prepare it"
        )
    try:
        manifest = Manifest.model_validate_json(folder.read(MANIFEST_NAME))
        _check(manifest)
        return manifest
    except ValueError as error:
        raise DataError(
            f"{folder}/{MANIFEST_NAME} is not a manifest of format 2: {error}; delete {folder} and "
            "prepare again"
        ) from error


def _check(manifest: Manifest) -> None:
    """Raise ValueError for what no preparation of ours writes, and an attacker might."""
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    for name in (*manifest.files, *(shard.path for shard in shards)):
        if name in ("", ".", "..") or PurePosixPath(name).name != name or {"\\", "\0"} & set(name):
            raise ValueError(f"{name!r} is no name of a file in the folder itself")
    for modality in manifest.modalities:
        shapes = [modality.shape, modality.train_shape or modality.shape]
        if not all(shapes) or min(*map(min, shapes), modality.candidates) < 1:
            raise ValueError(f"{modality.name} has shapes {shapes}; all numbers must be positive")
        if (size := max(map(modality.stored_nbytes, manifest.splits))) > MAX_ROW_BYTES:
            raise ValueError(
                f"a row of {modality.name} would have {size} bytes; at most {MAX_ROW_BYTES} are "
                "read"
            )
    for shard in shards:
        if shard.rows != sum(shard.row_groups) or min(shard.row_groups, default=1) < 1:
            raise ValueError(f"{shard.path} has {shard.rows} rows in groups {shard.row_groups}")


def verify_shards(manifest: Manifest, place: str | Path | Folder) -> None:
    """Compare size, SHA-256 and columns of every shard, and other files, with the manifest.

    Raises:
        DataError: a shard is missing, truncated, changed, or has other columns.
    """
    folder = Folder.at(place)
    for name, sha256 in manifest.files.items():
        if not folder.has(name) or folder.sha256(name) != sha256:
            raise DataError(
                f"{folder}/{name} is missing or changed; its SHA-256 must equal the manifest's; "
                f"delete {folder} and run `midas prepare` again"
            )
    for split, shards in manifest.splits.items():
        schema = manifest.arrow_schema(split)
        for shard in shards:
            size = folder.size(shard.path)
            if size is None:
                raise DataError(
                    f"shard {folder}/{shard.path} ({split}) is missing; the manifest lists it; "
                    f"delete {folder} and run `midas prepare` again"
                )
            if size != shard.num_bytes or folder.sha256(shard.path) != shard.sha256:
                raise DataError(
                    f"shard {folder}/{shard.path} ({split}) is corrupt: {size} bytes, "
                    f"{shard.num_bytes} expected, and its SHA-256 must equal the manifest's; "
                    f"delete {folder} and run `midas prepare` again"
                )
            if _columns_and_rows(folder, shard) != (schema, shard.row_groups):
                raise DataError(
                    f"shard {folder}/{shard.path} ({split}) has other columns or rows than the "
                    f"manifest says; delete {folder} and run `midas prepare` again"
                )


def _columns_and_rows(folder: Folder, shard: Shard) -> tuple[pa.Schema, tuple[int, ...]]:
    """What a shard says of itself: its schema, and rows of its row groups."""
    try:
        with folder.open(shard.path) as file, pq.ParquetFile(file) as parquet:
            about = parquet.metadata
            groups = tuple(about.row_group(i).num_rows for i in range(about.num_row_groups))
            return parquet.schema_arrow, groups
    except Exception as error:  # also what extension types raise when they read their own metadata
        raise DataError(
            f"shard {folder}/{shard.path} is no Parquet of plain types ({error}); delete {folder} "
            "and run `midas prepare` again"
        ) from error

"""Manifest: what a prepared data set is. The contract between prepare, the pipeline and the worker.

A prepared set is a folder with `manifest.json` and Parquet shards. Columns of a shard: `sample_id`
int64, `label` int64, `key` string and one fixed-size binary column per modality holding the tensor
in C order, little endian.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

MANIFEST_NAME = "manifest.json"
Split = Literal["train", "val", "test"]


class DataError(ValueError):
    """Something is wrong with the user's data or its folder; the message says what to do."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Modality(_Model):
    """One column of tensors: every row has this shape and dtype."""

    name: str
    kind: Literal["image", "audio", "vector"]
    shape: tuple[int, ...]
    dtype: Literal["uint8", "int16", "float16", "float32"]

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class Shard(_Model):
    """One Parquet file, path relative to the manifest."""

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
        splits: split -> shards, in order.
        class_counts: split -> rows per class, in the order of `classes`.
    """

    format_version: Literal[1] = 1
    name: str
    source: dict[str, object]
    modalities: tuple[Modality, ...]
    classes: tuple[str, ...]
    splits: dict[Split, tuple[Shard, ...]]
    class_counts: dict[Split, tuple[int, ...]]

    def rows(self, split: Split) -> int:
        """Rows of a split."""
        return sum(shard.rows for shard in self.splits[split])

    @property
    def row_nbytes(self) -> int:
        """Bytes of the tensors of one row."""
        return sum(modality.nbytes for modality in self.modalities)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form: equal digests mean byte-identical data."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, two-space indent, newline at the end."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"

    def arrow_schema(self) -> pa.Schema:
        """Schema of every shard; plain Arrow types only."""
        return pa.schema(
            [
                pa.field("sample_id", pa.int64(), nullable=False),
                pa.field("label", pa.int64(), nullable=False),
                pa.field("key", pa.string(), nullable=False),
                *(pa.field(m.name, pa.binary(m.nbytes), nullable=False) for m in self.modalities),
            ]
        )


def load_manifest(folder: Path) -> Manifest:
    """Read `folder/manifest.json`.

    Raises:
        DataError: there is no manifest, or it is not one of ours.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DataError(
            f"{folder} holds no {MANIFEST_NAME}; a prepared data set has one (it is written last); "
            "run `midas prepare` on the raw data first"
        )
    try:
        return Manifest.model_validate_json(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not a manifest of format 1: {error}; prepare again") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_shards(manifest: Manifest, folder: Path) -> None:
    """Compare size and SHA-256 of every shard with the manifest.

    Raises:
        DataError: a shard is missing, truncated or changed.
    """
    for split, shards in manifest.splits.items():
        for shard in shards:
            path = folder / shard.path
            if not path.is_file():
                raise DataError(
                    f"shard {path} ({split}) is missing; the manifest lists it; delete {folder} "
                    "and run `midas prepare` again"
                )
            size = path.stat().st_size
            if size != shard.num_bytes or file_sha256(path) != shard.sha256:
                raise DataError(
                    f"shard {path} ({split}) is corrupt: {size} bytes, {shard.num_bytes} expected, "
                    f"and its SHA-256 must equal the manifest's; delete {folder} and run "
                    "`midas prepare` again"
                )

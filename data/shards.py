"""Samples -> one Parquet shard: checked, in small row groups, under its name only when whole.

Which samples make which shard, and what becomes of a set that is cut off, is in `data/prepare.py`.
"""

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from data.schema import Modality, Shard, file_sha256
from data.sources import Item, RejectedSample, Source

# Parquet's own bytes: per row sample_id, label, key and their headers, and some for the footer.
ROW_OVERHEAD_BYTES = 128
SHARD_OVERHEAD_BYTES = 64 * 1024

Row = tuple[int, int, str, dict[str, bytes]]
"""sample_id, label, key and the bytes of every modality."""


class ShardOutcome(BaseModel):
    """What became of the samples of a shard.

    Attributes:
        shard: None if all samples were rejected; there is no file then.
        class_counts: rows per class, in the order of the source's classes.
        rejected: key and reason of every sample left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: Shard | None
    class_counts: tuple[int, ...]
    rejected: tuple[tuple[str, str], ...]


def shard_nbytes(num_rows: int, row_nbytes: int) -> int:
    """About the size of a shard, rather too much; `row_nbytes` are the tensors of one row."""
    return num_rows * (row_nbytes + ROW_OVERHEAD_BYTES) + SHARD_OVERHEAD_BYTES


def write_shard(
    source: Source,
    items: list[Item],
    path: Path,
    temporary: Path,
    *,
    schema: pa.Schema,
    group_rows: int,
    count: Callable[[int], None],
) -> ShardOutcome:
    """Load, check and write the samples of one shard, in the order given.

    Args:
        source: loads the samples.
        items: the samples.
        path: the shard; the file appears there only when it is whole.
        temporary: written until then, on the same disk; a leftover is overwritten.
        schema: columns of the shard, from the manifest.
        group_rows: rows of a row group; the last has what is left.
        count: called with the number of samples done since the last call.

    Returns:
        The shard with its hash, and which samples were rejected.
    """
    rejected: list[tuple[str, str]] = []
    row_groups: list[int] = []
    counts = np.zeros(len(source.classes), dtype=np.int64)
    rows = _rows(source, items, rejected, count)
    with pq.ParquetWriter(
        temporary, schema, compression="none", use_dictionary=False, write_statistics=False
    ) as writer:
        while group := list(islice(rows, group_rows)):
            writer.write_table(_table(group, schema))
            row_groups.append(len(group))
            counts += np.bincount([row[1] for row in group], minlength=len(counts))
    shard = None
    if row_groups:
        shard = Shard(
            path=path.name,
            rows=sum(row_groups),
            row_groups=tuple(row_groups),
            num_bytes=temporary.stat().st_size,
            sha256=file_sha256(temporary),
        )
        os.replace(temporary, path)
    return ShardOutcome(shard=shard, class_counts=tuple(counts.tolist()), rejected=tuple(rejected))


def _rows(
    source: Source,
    items: list[Item],
    rejected: list[tuple[str, str]],
    count: Callable[[int], None],
) -> Iterator[Row]:
    """Sound rows; the others are added to `rejected`."""
    labels = {name: label for label, name in enumerate(source.classes)}
    for item in items:
        try:
            if item.label not in labels:
                known = ", ".join(source.classes)
                raise RejectedSample(f"label {item.label!r} is none of {known}")
            tensors = _tensor_bytes(source.load(item), source.modalities)
            yield item.sample_id, labels[item.label], item.key, tensors
        except RejectedSample as error:
            rejected.append((item.key, str(error)))
        count(1)


def _tensor_bytes(
    arrays: dict[str, np.ndarray], modalities: tuple[Modality, ...]
) -> dict[str, bytes]:
    """Check the tensors of one sample against the modalities and lay them out for the shard."""
    if set(arrays) != {modality.name for modality in modalities}:
        raise RejectedSample(f"modalities {sorted(arrays)} differ from the declared ones")
    tensors: dict[str, bytes] = {}
    for modality in modalities:
        array = arrays[modality.name]
        if array.shape != modality.shape or array.dtype != np.dtype(modality.dtype):
            raise RejectedSample(
                f"{modality.name} is {array.dtype} {array.shape}, "
                f"{modality.dtype} {modality.shape} expected"
            )
        if not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            raise RejectedSample(f"{modality.name} has {bad} values that are not finite")
        tensors[modality.name] = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return tensors


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    sample_ids, labels, keys, tensors = zip(*rows, strict=True)
    columns = [sample_ids, labels, keys]
    columns += [[tensor[name] for tensor in tensors] for name in schema.names[len(columns) :]]
    arrays = [pa.array(column, type_) for column, type_ in zip(columns, schema.types, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)

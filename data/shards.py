"""Samples -> one Parquet shard: checked, in small row groups, under its name only when whole.

Which samples make which shard, and what becomes of a set that is cut off, is in `data/prepare.py`.
"""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from data.folder import Folder
from data.pictures import encode_jpeg
from data.schema import Manifest, Modality, Shard, Split
from data.sources.base import Item, RejectedSample, Source

# Parquet's own bytes: per row sample_id, label, key, group and their headers; some for the footer.
ROW_OVERHEAD_BYTES = 160
SHARD_OVERHEAD_BYTES = 64 * 1024

Row = dict[str, int | str | bytes]


class ShardOutcome(BaseModel):
    """What became of the samples of a shard.

    Attributes:
        path: name of the shard.
        shard: None if all samples were rejected; there is no file then.
        class_counts: rows per class, in the order of the source's classes.
        rejected: key and reason of every sample left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    shard: Shard | None
    class_counts: tuple[int, ...]
    rejected: tuple[tuple[str, str], ...]


def shard_nbytes(num_rows: int, row_nbytes: int) -> int:
    """About the size of a shard, rather too much; `row_nbytes` are the tensors of one row."""
    return num_rows * (row_nbytes + ROW_OVERHEAD_BYTES) + SHARD_OVERHEAD_BYTES


def write_shard(
    source: Source,
    items: list[Item],
    folder: Folder,
    name: str,
    *,
    draft: Manifest,
    split: Split,
    group_rows: int,
    count: Callable[[int], None],
) -> ShardOutcome:
    """Load, check and write the samples of one shard, in the order given.

    Args:
        source: loads the samples.
        items: the samples.
        folder: of the prepared set; the shard appears there only when it is whole.
        name: of the shard.
        draft: manifest of the set, as far as it is known.
        split: what the samples are for.
        group_rows: rows of a row group; the last has what is left.
        count: called with the number of samples done since the last call.

    Returns:
        The shard with its hash, and which samples were rejected.
    """
    rejected: list[tuple[str, str]] = []
    rows = _rows(source, items, draft, split, rejected, count)
    first = list(islice(rows, group_rows))
    counts = np.zeros(len(draft.classes), dtype=np.int64)
    if not first:
        none = tuple(counts.tolist())
        return ShardOutcome(path=name, shard=None, class_counts=none, rejected=tuple(rejected))
    schema = draft.arrow_schema(split)
    row_groups: list[int] = []
    with folder.new_file(name) as path:
        with pq.ParquetWriter(
            path, schema, compression="none", use_dictionary=False, write_statistics=False
        ) as writer:
            group = first
            while group:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                row_groups.append(len(group))
                counts += np.bincount([row["label"] for row in group], minlength=len(counts))
                group = list(islice(rows, group_rows))
        sha256, num_bytes = Folder.at(path.parent).sha256(path.name), path.stat().st_size
    shard = Shard(
        path=name,
        rows=sum(row_groups),
        row_groups=tuple(row_groups),
        num_bytes=num_bytes,
        sha256=sha256,
    )
    return ShardOutcome(
        path=name,
        shard=shard,
        class_counts=tuple(counts.tolist()),
        rejected=tuple(rejected),
    )


def _rows(
    source: Source,
    items: list[Item],
    draft: Manifest,
    split: Split,
    rejected: list[tuple[str, str]],
    count: Callable[[int], None],
) -> Iterator[Row]:
    """Sound rows; the others are added to `rejected`."""
    labels = {name: label for label, name in enumerate(draft.classes)}
    for item in items:
        try:
            if item.label not in labels:
                known = ", ".join(draft.classes)
                raise RejectedSample(f"label {item.label!r} is none of {known}")
            if not item.key.isprintable():
                raise RejectedSample("its key has characters that cannot be printed")
            arrays = source.load(item)
            row: Row = {
                "sample_id": item.sample_id,
                "label": labels[item.label],
                "key": item.key,
                "group": item.group,
            }
            if draft.has_optional:
                present = (m.name in arrays for m in draft.modalities)
                row["present"] = sum(1 << place for place, here in enumerate(present) if here)
            yield row | tensor_bytes(arrays, draft.modalities, split)
        except RejectedSample as error:
            key = item.key.encode(errors="backslashreplace").decode()  # it may not be UTF-8
            rejected.append((key, str(error)))
        count(1)


def tensor_bytes(
    arrays: dict[str, np.ndarray], modalities: tuple[Modality, ...], split: Split
) -> dict[str, bytes]:
    """Check the tensors of one sample against the modalities and lay them out for the shard.

    Raises:
        RejectedSample: modalities, a shape, a dtype or a value is not as it should be.
    """
    names = {modality.name for modality in modalities}
    needed = {modality.name for modality in modalities if not modality.optional}
    if not arrays or not needed <= set(arrays) <= names:
        raise RejectedSample(f"modalities {sorted(arrays)} differ from the declared ones")
    tensors: dict[str, bytes] = {}
    for modality in modalities:
        shape, dtype = modality.stored(split), np.dtype(modality.dtype)
        array = arrays.get(modality.name)
        if array is None:
            array = np.zeros(shape, dtype)
        if array.shape != shape or array.dtype != dtype:
            raise RejectedSample(
                f"{modality.name} is {array.dtype} {array.shape}, {dtype} {shape} expected"
            )
        if dtype.kind == "f" and not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            raise RejectedSample(f"{modality.name} has {bad} values that are not finite")
        tensors[modality.name] = (
            encode_jpeg(array)
            if modality.storage == "jpeg"
            else array.astype(dtype.newbyteorder("<")).tobytes()
        )
    return tensors

"""Synthetic shards for the benches: image and audio columns as `midas prepare` writes them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.order import Order
from data.reader import ShardReader
from data.schema import Manifest, Modality, Shard

MODALITIES = (
    Modality(name="image", kind="image", shape=(3, 64, 64), dtype="uint8"),
    Modality(name="audio", kind="audio", shape=(1, 128, 100), dtype="float16"),
)
CLASSES = tuple("abcdef")
GROUP_ROWS = 256
GROUPS_PER_FILE = 4
GLOBAL_BATCH_SIZE = 128
LANES = 8


def write_shards(folder: Path, num_files: int) -> ShardReader:
    """Write files of 1,024 rows of 37,888 bytes; every row group has the same random tensors."""
    rng = np.random.default_rng(0)
    tensors = {
        m.name: rng.integers(0, 100, size=(GROUP_ROWS, m.nbytes("train")), dtype=np.uint8)
        for m in MODALITIES
    }
    manifest = Manifest(
        name="synthetic",
        source={},
        split_rule="",
        modalities=MODALITIES,
        classes=CLASSES,
        splits={},
        class_counts={},
    )
    schema = manifest.arrow_schema("train")
    shards = tuple(_write_shard(folder, index, tensors, schema) for index in range(num_files))
    manifest = manifest.model_copy(update={"splits": {"train": shards}})
    return ShardReader(str(folder), manifest, "train")


def make_order(reader: ShardReader, window_mib: int) -> Order:
    """The training order, with windows of the size `train.shuffle_window_mib` gives."""
    window_rows = (window_mib << 20) // reader.manifest.row_nbytes("train")
    window_batches = max(1, window_rows // GLOBAL_BATCH_SIZE)
    return Order(reader.group_rows, GLOBAL_BATCH_SIZE, LANES, window_batches, seed=0)


def _write_shard(
    folder: Path, index: int, tensors: dict[str, np.ndarray], schema: pa.Schema
) -> Shard:
    path = folder / f"train-{index:05d}.parquet"
    with pq.ParquetWriter(
        path, schema, compression="none", use_dictionary=False, write_statistics=False
    ) as writer:
        for group in range(GROUPS_PER_FILE):
            first = (index * GROUPS_PER_FILE + group) * GROUP_ROWS
            writer.write_table(_group(np.arange(first, first + GROUP_ROWS), tensors, schema))
    return Shard(
        path=path.name,
        rows=GROUPS_PER_FILE * GROUP_ROWS,
        row_groups=(GROUP_ROWS,) * GROUPS_PER_FILE,
        num_bytes=path.stat().st_size,
        sha256="0" * 64,  # no bench verifies it
    )


def _group(sample_id: np.ndarray, tensors: dict[str, np.ndarray], schema: pa.Schema) -> pa.Table:
    arrays = [
        pa.array(sample_id),
        pa.array(sample_id % len(CLASSES)),
        pa.array([str(number) for number in sample_id]),
        pa.array([""] * len(sample_id)),
        *(
            pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(rows)]
            )
            for rows in tensors.values()
        ),
    ]
    return pa.Table.from_arrays(arrays, schema=schema)

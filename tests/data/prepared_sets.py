"""Small prepared sets, written without data/prepare.py: any rows in any split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.schema import Manifest, Modality, Shard, Split

ROWS_PER_GROUP, GROUPS_PER_SHARD = 7, 3


@dataclass(frozen=True)
class Row:
    """One row; an item that is absent is missing."""

    key: str
    label: int
    items: Mapping[str, np.ndarray | bytes] = field(default_factory=dict)
    group: str = ""


def write_set(
    folder: Path,
    modalities: Sequence[Modality],
    splits: Mapping[Split, Sequence[Row]],
    classes: tuple[str, ...] = ("cat", "dog"),
    files: Mapping[str, str] | None = None,
) -> Manifest:
    """Write shards of 21 rows in row groups of 7, and give their manifest."""
    empty = Manifest(
        name="toy",
        source={"name": "table", "seed": 3},
        split_rule="official",
        modalities=tuple(modalities),
        classes=classes,
        splits={"train": (), "val": (), "test": ()},
        class_counts={},
        files=dict(files or {}),
    )
    shards = {split: _write(folder, empty, split, splits.get(split, ())) for split in empty.splits}
    return empty.model_copy(update={"splits": shards})


def _write(
    folder: Path, manifest: Manifest, split: Split, rows: Sequence[Row]
) -> tuple[Shard, ...]:
    shards: list[Shard] = []
    step = ROWS_PER_GROUP * GROUPS_PER_SHARD
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        path = folder / f"{split}-{start:05d}.parquet"
        entries = [_entry(manifest, split, row, start + i) for i, row in enumerate(part)]
        table = pa.Table.from_pylist(entries, schema=manifest.arrow_schema(split))
        pq.write_table(table, path, row_group_size=ROWS_PER_GROUP)
        counts = [len(part[i : i + ROWS_PER_GROUP]) for i in range(0, len(part), ROWS_PER_GROUP)]
        shards.append(
            Shard(
                path=path.name,
                rows=len(part),
                row_groups=tuple(counts),
                num_bytes=path.stat().st_size,
                sha256="",
            )
        )
    return tuple(shards)


def _entry(manifest: Manifest, split: Split, row: Row, number: int) -> dict[str, object]:
    entry: dict[str, object] = {
        "sample_id": number,
        "label": row.label,
        "key": row.key,
        "group": row.group,
    }
    if manifest.has_optional:
        present = (modality.name in row.items for modality in manifest.modalities)
        entry["present"] = sum(1 << place for place, here in enumerate(present) if here)
    for modality in manifest.modalities:
        item = row.items.get(modality.name, np.zeros(modality.stored(split), modality.dtype))
        entry[modality.name] = item if isinstance(item, bytes) else item.tobytes()
    return entry


def smooth_picture(rng: np.random.Generator, side: int, channels: int = 3) -> np.ndarray:
    """uint8 (C, S, S): noise whose power falls with the frequency, as that of photographs does."""
    fy, fx = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side))
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = 1.0
    planes = np.fft.ifft2(np.fft.fft2(rng.standard_normal((channels + 1, side, side))) / frequency)
    mixed = planes.real[:1] * 2 + planes.real[1:]
    scaled = (mixed - mixed.min()) / np.ptp(mixed)
    return (scaled * 235 + 10).astype(np.uint8)


def spectrogram(rng: np.random.Generator, frames: int, bands: int, used: int) -> np.ndarray:
    """float32 (1, T, F): the slope that all speech has and blobs of its own, padded behind."""
    picture = smooth_picture(rng, 128, 1)[0, :used, :bands] / 255.0
    slope = np.linspace(0.5, -0.5, bands)
    padded = np.full((1, frames, bands), 0.438, np.float32)
    padded[0, :used] = picture + slope + 0.02 * rng.standard_normal((used, bands))
    return padded


def token_ids(rng: np.random.Generator, length: int, used: int) -> np.ndarray:
    """int32 (L,): words as frequent as in a language, between two marks, padded with 0 behind."""
    ids = np.zeros(length, np.int32)
    ids[:used] = [2, *np.minimum(rng.zipf(1.3, used - 2) + 3, 8000), 3]
    return ids

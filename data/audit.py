"""Audit of a prepared set: what is on both sides of the split, what is there twice, under which
label.

Shards are read once, a row group at a time. Of every row and modality a hash of its stored bytes
and a fingerprint (data/fingerprints.py) are kept, about 1 kB.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from data.fingerprints import comparable, content_hash, make_fingerprints
from data.folder import Folder
from data.schema import Manifest, Split
from data.twins import (
    MAX_EXAMPLES,
    SPLITS,
    Likeness,
    Overlap,
    Rows,
    Twins,
    find_twins,
    overlap,
    per_split,
)

MAX_LINES = 6
# A row of the first split with a partner in the second one is known to the model, or to the choice
# of the model, before it is tested.
LEAKS: tuple[tuple[Split, Split], ...] = (("test", "train"), ("val", "train"), ("test", "val"))
FORMS = {
    "identical": ("are byte for byte also in", "a copy"),
    "near": ("are nearly the same as one in", "a near copy"),
}
Grade = Literal["good", "note", "bad"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Groups(_Model):
    """Groups (actors, speakers, source videos) and the splits they are in.

    Attributes:
        total: named groups; a row without one stands for itself and is not counted.
        shared: groups that are in more than one split.
        rows: rows[a][b]: rows of split a whose group is also in split b; rows[a][a] is 0.
        examples: names of some shared groups.
    """

    total: int
    shared: int
    rows: Overlap
    examples: tuple[str, ...]


class Audit(_Model):
    """What was found.

    Attributes:
        rows: split -> rows.
        class_counts: split -> rows per class, in the order of the manifest's classes.
        missing: optional modality -> split -> rows that lack it.
        stored_bytes: modality -> split -> bytes in the shards.
        groups: groups that are on both sides.
        samples: twins among whole samples.
        modalities: twins among the items of single modalities.
    """

    rows: dict[Split, int]
    class_counts: dict[Split, tuple[int, ...]]
    missing: dict[str, dict[Split, int]]
    stored_bytes: dict[str, dict[Split, int]]
    groups: Groups
    samples: Likeness
    modalities: dict[str, Likeness]

    @property
    def grade(self) -> Grade:
        """bad: test numbers are too good or labels contradict each other; note: single modalities
        or the samples of one split repeat."""
        if _problems(self):
            return "bad"
        return "note" if _remarks(self) else "good"


def audit(place: str | Path | Folder, manifest: Manifest) -> Audit:
    """Look for leaks between the splits, duplicates and contradicting labels.

    Takes about 1 ms a row with one picture.

    Args:
        place: folder of the prepared set.
        manifest: its manifest.
    """
    rows, sizes, groups = _read(Folder.at(place), manifest)
    samples, modalities = find_twins(rows)
    names = [modality.name for modality in manifest.modalities]
    counts = np.zeros((len(SPLITS), len(manifest.classes)), np.int64)
    np.add.at(counts, (rows.split, rows.label), 1)
    return Audit(
        rows=per_split(counts.sum(axis=1)),
        class_counts={s: tuple(c) for s, c in zip(SPLITS, counts.tolist(), strict=True)},
        missing={
            modality.name: per_split(np.bincount(rows.split[content == 0], minlength=len(SPLITS)))
            for modality, content in zip(manifest.modalities, rows.contents, strict=True)
            if modality.optional
        },
        stored_bytes={name: per_split(size) for name, size in zip(names, sizes, strict=True)},
        groups=_groups(groups),
        samples=samples,
        modalities=dict(zip(names, modalities, strict=True)),
    )


def _read(folder: Folder, manifest: Manifest) -> tuple[Rows, np.ndarray, dict[str, np.ndarray]]:
    """All rows; bytes per modality and split (M, 3); rows per group and split."""
    modalities = manifest.modalities
    count = sum(manifest.rows(split) for split in manifest.splits)
    contents = np.zeros((len(modalities), count), np.uint64)
    sizes = np.zeros((len(modalities), len(SPLITS)), np.int64)
    prints = tuple(make_fingerprints(modality, count) for modality in modalities)
    splits, labels = np.zeros(count, np.int8), np.zeros(count, np.int64)
    keys: list[pa.Array] = []
    groups: dict[str, np.ndarray] = {}
    start = 0
    for split, table in _tables(folder, manifest):
        part = slice(start, start + table.num_rows)
        splits[part], labels[part] = SPLITS.index(split), table["label"].to_numpy()
        keys += table["key"].chunks
        _count_groups(groups, table["group"], split)
        for number, modality in enumerate(modalities):
            present = _present(table, number)
            for row, scalar in enumerate(table[modality.name]):
                data = scalar.as_buffer()
                sizes[number, SPLITS.index(split)] += len(data)
                if present[row]:
                    contents[number, start + row] = content_hash(data)
                    prints[number].add(start + row, comparable(modality, split, data))
        start += table.num_rows
    names = pa.chunked_array(keys, pa.string())
    return Rows(splits, labels, names, manifest.classes, contents, prints), sizes, groups


def _tables(folder: Folder, manifest: Manifest) -> Iterator[tuple[Split, pa.Table]]:
    """Row groups of all shards."""
    for split in SPLITS:
        for shard in manifest.splits[split]:
            with folder.open(shard.path) as source, pq.ParquetFile(source) as file:
                for number in range(file.num_row_groups):
                    yield split, file.read_row_group(number, use_threads=False)


def _present(table: pa.Table, modality: int) -> np.ndarray:
    if "present" not in table.column_names:
        return np.ones(table.num_rows, bool)
    return (table["present"].to_numpy() >> modality & 1).astype(bool)


def _count_groups(groups: dict[str, np.ndarray], column: pa.ChunkedArray, split: Split) -> None:
    for entry in column.value_counts().to_pylist():
        if entry["values"]:
            counts = groups.setdefault(entry["values"], np.zeros(len(SPLITS), np.int64))
            counts[SPLITS.index(split)] += entry["counts"]


def _groups(groups: dict[str, np.ndarray]) -> Groups:
    counts = np.array(list(groups.values()), np.int64).reshape(-1, len(SPLITS))
    inside = counts > 0
    rows = counts.T @ inside
    np.fill_diagonal(rows, 0)
    names = [name for name, row in zip(groups, inside, strict=True) if row.sum() > 1]
    return Groups(
        total=len(groups),
        shared=len(names),
        rows=overlap(rows),
        examples=tuple(names[:MAX_EXAMPLES]),
    )


def summary_lines(audit: Audit) -> list[str]:
    """One to six lines for the terminal, the gravest finding first."""
    lines = findings(audit)
    if len(lines) > MAX_LINES:
        rest = len(lines) - MAX_LINES + 1
        lines[MAX_LINES - 1 :] = [f"{rest} more findings are in the data card."]
    return lines


def findings(audit: Audit) -> list[str]:
    """What was found, a sentence each, the gravest first; never empty."""
    return [*(_problems(audit) or [_all_clear(audit)]), *_remarks(audit)]


def _all_clear(audit: Audit) -> str:
    if audit.groups.total:
        return "No group, no sample and no near copy of one is on two sides of the split."
    return (
        "No sample and no near copy of one is on two sides of the split; groups (speakers, source "
        "videos) are not known."
    )


def _problems(audit: Audit) -> list[str]:
    """Shared groups, and samples that are on two sides of the split or have two labels."""
    lines = _shared_groups(audit)
    for form, (how, copy) in FORMS.items():
        twins: Twins = getattr(audit.samples, form)
        lines += _leaks(audit, twins.rows, "samples", how)
        if twins.conflicts:
            lines.append(f"{twins.conflicts:,} samples have {copy} with another label.")
    return lines


def _remarks(audit: Audit) -> list[str]:
    """Copies of single modalities, where they are more than those of samples, and copies within a
    split. They may be harmless: one picture with two texts, short vectors that agree by chance."""
    lines: list[str] = []
    for form, (how, copy) in FORMS.items():
        whole: Twins = getattr(audit.samples, form)
        for name, likeness in audit.modalities.items():
            twins: Twins = getattr(likeness, form)
            if any(twins.rows[a][b] > whole.rows[a][b] for a, b in LEAKS):
                lines += _leaks(audit, twins.rows, f"items of {name}", how)
            if twins.conflicts > whole.conflicts:
                lines.append(f"{twins.conflicts:,} items of {name} have {copy} with another label.")
    rows = audit.samples.identical.rows
    return lines + [
        f"{rows[split][split]:,} of {audit.rows[split]:,} {split} samples are there more than once."
        for split in SPLITS
        if rows[split][split]
    ]


def _shared_groups(audit: Audit) -> list[str]:
    groups = audit.groups
    if not groups.shared:
        return []
    of_all = f"{groups.shared:,} of {groups.total:,}"
    who = f"All {groups.total:,}" if groups.shared == groups.total else of_all
    split, other = next(leak for leak in LEAKS if groups.rows[leak[0]][leak[1]])
    affected, rows = groups.rows[split][other], audit.rows[split]
    effect = (
        f"{split} accuracy says nothing about unseen groups (actors, speakers, source videos)"
        if affected == rows
        else f"{affected:,} of {rows:,} {split} samples are of a group that is also in {other}"
    )
    return [f"{who} groups are on both sides of the split: {effect}. Use --data.split grouped."]


def _leaks(audit: Audit, rows: Overlap, what: str, how: str) -> list[str]:
    parts = [
        f"{rows[a][b]:,} of {audit.rows[a]:,} {a} {what} ({_percent(rows[a][b], audit.rows[a])}) "
        f"{how} {b}"
        for a, b in LEAKS
        if rows[a][b]
    ]
    return [f"{'; '.join(parts)}."] if parts else []


def _percent(count: int, total: int) -> str:
    share = 100 * count / total
    return f"{share:.1f} %" if share >= 0.1 else "under 0.1 %"

"""Rows for a trained model: prepared shards, or raw files that are shaped as its training samples
were; in parts that any process can read, with what is wrong with a sample in its row.

A table of rows has `key`, `label` (class name, null if none is known), `reason` (why the sample
cannot be used, else null), `present` (bit m is set if the row has modality m) and a binary column
per modality, as it is delivered for evaluation; null in rows that cannot be used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.config import DataConfig, ModalityConfig
from data.folder import Folder
from data.kept import columns_name, read_columns
from data.media_source import load_media, root_of, sound
from data.order import chunk_reads
from data.pictures import decode_jpeg
from data.processors import Place, rebuild
from data.reader import PRESENT, ShardReader, read_chunks
from data.recipes import modality_settings
from data.schema import (
    MANIFEST_NAME,
    DataError,
    Manifest,
    Modality,
    Split,
    load_manifest,
    verify_shards,
)
from data.shards import tensor_bytes
from data.sources import TENSOR_SOURCES, Item, RejectedSample, Rejection, build_source, source_class
from data.sources.raw import Adapter
from data.sources.table import ForModel
from data.sources.table_rows import FORMATS
from data.sources.table_rows import read_columns as columns_of
from data.splits import assign

CHUNK = 64
PART_BYTES = 16 << 20
MAX_CHUNKS = 8
# Raw files are read in the form of this split: no candidates, no margin for crops.
RAW_SPLIT: Split = "test"
# How shards keep a modality, and what is random in training; the model reads the same.
FORM = ("storage", "train_shape", "candidates", "augment")
Loadable = tuple[list[Item], list[Rejection], Callable[[Item], dict[str, np.ndarray]]]


@dataclass(frozen=True)
class Requests:
    """Rows to be read part by part: `read(*shared, *item)` gives the tables of an item.

    Attributes:
        rows: of every item; all have `part_rows` but the last.
        rejected: samples that are not in any part, and why.
        split: whose form the rows have.
    """

    read: Callable[..., list[pa.Table]]
    shared: tuple[Any, ...]
    items: Sequence[tuple[Any, ...]]
    rows: Sequence[int]
    part_rows: int
    rejected: Sequence[Rejection]
    split: Split


def requests(
    place: str,
    config: DataConfig,
    manifest: Manifest,
    files: Mapping[str, str],
    split: Split | None,
) -> list[Requests]:
    """What there is to predict at a place.

    Args:
        place: folder or URI of a prepared set; raw folder in the layout of the model's data set;
            or a table, if the model was trained on one.
        config: data settings of the run.
        manifest: of the data that the run was trained on.
        files: of that data, by name; see data/kept.py.
        split: only this one of the place's own splits; None takes all rows.

    Raises:
        DataError: the place holds nothing of this kind, or was prepared in another way.
    """
    path = Path(place).expanduser()
    if "://" in place or (path / MANIFEST_NAME).is_file():
        return _of_shards(Folder.at(place), manifest, split)
    if not path.exists():
        raise DataError(
            f"{place} does not exist; give a folder of shards, or raw files as {manifest.name} has"
        )
    return [_of_raw(config, manifest, files, path, split)]


def _of_shards(folder: Folder, manifest: Manifest, split: Split | None) -> list[Requests]:
    own = load_manifest(folder)
    _check_alike(own, manifest, folder)
    verify_shards(own, folder)
    splits: list[Split] = [split] if split else [name for name in own.splits if own.rows(name)]
    return [_of_split(ShardReader(str(folder), own, name)) for name in splits]


def _of_split(reader: ShardReader) -> Requests:
    rows = reader.manifest.rows(reader.split)
    part_rows = _part_rows(reader.manifest, reader.split)
    starts = range(0, rows, part_rows)
    return Requests(
        read_shards,
        (reader,),
        [(start, min(start + part_rows, rows)) for start in starts],
        [min(part_rows, rows - start) for start in starts],
        part_rows,
        (),
        reader.split,
    )


def _part_rows(manifest: Manifest, split: Split) -> int:
    """Whole chunks, so that a model sees rows together as evaluation does."""
    chunks = PART_BYTES // (CHUNK * manifest.row_nbytes(split))
    return CHUNK * min(max(chunks, 1), MAX_CHUNKS)


def _check_alike(own: Manifest, wanted: Manifest, folder: Folder) -> None:
    """Raise DataError unless both sets were shaped alike."""

    def form(manifest: Manifest) -> Any:
        drop: Any = {"modalities": {"__all__": set(FORM)}}
        return manifest.model_dump(include={"modalities", "files"}, exclude=drop)

    if form(own) != form(wanted):
        raise DataError(
            f"{folder} was prepared in another way than the data of the model (modalities "
            f"{_about(own)}; the model's {_about(wanted)}; or with another tokenizer or scale); "
            "give raw files, which are shaped as the model needs them"
        )


def _about(manifest: Manifest) -> str:
    return ", ".join(f"{m.name} {m.kind} {m.shape} {m.about}".rstrip() for m in manifest.modalities)


def read_shards(reader: ShardReader, start: int, stop: int) -> list[pa.Table]:
    """Rows [start, stop) of a split in shard order."""
    manifest = reader.manifest
    [table] = read_chunks(reader, 1, start, stop)
    number = table.column("label").to_pylist()
    everything = (1 << len(manifest.modalities)) - 1
    present = (
        table.column(PRESENT)
        if PRESENT in table.column_names
        else pa.array([everything] * table.num_rows, pa.int64())
    )
    columns = {
        "key": reader.keys(chunk_reads(reader.group_rows, start, stop)),
        "label": pa.array([manifest.classes[label] for label in number], pa.string()),
        "reason": pa.nulls(table.num_rows, pa.string()),
        PRESENT: present,
        **{m.name: table.column(m.name) for m in manifest.modalities},
    }
    return [pa.table(columns, schema=request_schema(manifest, reader.split))]


def request_schema(manifest: Manifest, split: Split) -> pa.Schema:
    """Columns of a table of rows."""
    fields = [(name, pa.string()) for name in ("key", "label", "reason")]
    tensors = [(m.name, pa.binary(m.nbytes(split))) for m in manifest.modalities]
    return pa.schema([*fields, (PRESENT, pa.int64()), *tensors])


def _of_raw(
    config: DataConfig,
    manifest: Manifest,
    files: Mapping[str, str],
    path: Path,
    split: Split | None,
) -> Requests:
    items, rejected, load = _items(config, manifest, files, path, split)
    if split:
        rejected = [rejection for rejection in rejected if rejection.split == split]
    if not items and not rejected:
        raise DataError(f"there is no sample{f' of {split}' if split else ''} in the raw files")
    part_rows = _part_rows(manifest, RAW_SPLIT)
    parts = [items[start : start + part_rows] for start in range(0, len(items), part_rows)]
    return Requests(
        read_raw,
        (load, manifest),
        [(part,) for part in parts],
        [len(part) for part in parts],
        part_rows,
        rejected,
        RAW_SPLIT,
    )


def _items(
    config: DataConfig,
    manifest: Manifest,
    files: Mapping[str, str],
    path: Path,
    split: Split | None,
) -> Loadable:
    """Items, what is wrong with others, and how to load one."""
    if config.name == "digits":
        raise DataError(
            f"{path} holds no {MANIFEST_NAME}, and digits has no raw files; give the folder that "
            "`midas prepare digits` wrote"
        )
    if config.name == "table":
        if path.suffix.lower() not in FORMATS:
            raise DataError(
                f"{path} is no table; the model was trained on one; give a file with suffix "
                f"{', '.join(FORMATS)}, or a folder of shards"
            )
        vectors = _vectors(manifest, files)
        config = _for_table(config, manifest, vectors, path)
        return _of_adapter(ForModel(config, vectors), config, manifest, files, split)
    if not path.is_dir():
        raise DataError(
            f"{path} is no folder; the model was trained on {config.name}; give a folder in its "
            "layout, or one of shards"
        )
    config = config.model_copy(update={"root": str(path)})
    if config.name not in TENSOR_SOURCES:
        return _of_adapter(source_class(config.name)(config), config, manifest, files, split)
    source: Any = build_source(config)
    source.restore(files)
    items = [item for item in source.items() if split in (None, item.split)]
    return items, list(source.rejected), source.load


def _vectors(manifest: Manifest, files: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Modality -> columns of numbers that it is made of."""
    names = [m.name for m in manifest.modalities if columns_name(m.name) in files]
    return {name: read_columns(files[columns_name(name)]) for name in names}


def _for_table(
    config: DataConfig, manifest: Manifest, vectors: Mapping[str, tuple[str, ...]], path: Path
) -> DataConfig:
    """The settings of the run, for another table: it has the kinds of the model; columns of roles
    and of optional modalities may be missing."""
    columns = columns_of(path)
    modalities = {}
    for m in manifest.modalities:
        own = config.modalities.get(m.name, ModalityConfig())
        read = vectors.get(m.name, (own.column or m.name,))
        if not m.optional or any(column in columns for column in read):
            modalities[m.name] = own.model_copy(update={"kind": m.kind})
    roles = ("label_column", "group_column", "split_column")
    absent: dict[str, Any] = {role: None for role in roles if getattr(config, role) not in columns}
    if "label_column" in absent:
        absent["label_column"] = ""
    same = config.table is not None and Path(config.table).resolve() == path.resolve()
    places = {"table": str(path.resolve()), "root": config.root if same else None}
    return config.model_copy(update={"modalities": modalities, **absent, **places})


def _of_adapter(
    adapter: Adapter,
    config: DataConfig,
    manifest: Manifest,
    files: Mapping[str, str],
    split: Split | None,
) -> Loadable:
    _check_kinds(adapter, manifest)
    samples, rejected = sound(adapter)
    splits: list[Split] = [RAW_SPLIT] * len(samples)
    if split:
        samples = [sample for sample in samples if sample.label]  # the others are in no split
        present = {sample.label for sample in samples}
        splits, _ = assign(samples, [c for c in adapter.classes if c in present], config)
    items = [
        Item(number, sample.key, sample.label, RAW_SPLIT, sample.group or "", sample.media)
        for number, (sample, own) in enumerate(zip(samples, splits, strict=True))
        if split in (None, own)
    ]
    settings = modality_settings(config, adapter)
    place = Place(root_of(adapter, config), config.recipe == "official")
    processors = {
        m.name: rebuild(m, settings[m.name], place, files)
        for m in manifest.modalities
        if m.name in adapter.kinds
    }
    return items, rejected, partial(_load, processors)


def _check_kinds(adapter: Adapter, manifest: Manifest) -> None:
    """Raise DataError unless there is all that the model needs, and nothing else."""
    kinds = {m.name: m.kind for m in manifest.modalities}
    needed = {m.name for m in manifest.modalities if not m.optional}
    found = dict(adapter.kinds)
    if not (found.items() <= kinds.items() and needed <= found.keys()):
        raise DataError(
            f"these raw files have modalities {found}, the model reads {kinds}; give files of the "
            "layout that it was trained on"
        )


def _load(processors: Mapping[str, Any], item: Item) -> dict[str, np.ndarray]:
    return load_media(processors, item.media, item.split)


def read_raw(
    load: Callable[[Item], dict[str, np.ndarray]], manifest: Manifest, items: Sequence[Item]
) -> list[pa.Table]:
    """Rows of raw samples; one that cannot be used has a reason in place of its tensors."""
    rows = [_raw_row(load, manifest, item) for item in items]
    return [pa.Table.from_pylist(rows, schema=request_schema(manifest, RAW_SPLIT))]


def _raw_row(
    load: Callable[[Item], dict[str, np.ndarray]], manifest: Manifest, item: Item
) -> dict[str, object]:
    key = item.key.encode(errors="backslashreplace").decode()  # it may not be UTF-8
    row: dict[str, object] = {"key": key, "label": item.label or None}
    try:
        arrays = load(replace(item, split=RAW_SPLIT))
        stored = tensor_bytes(arrays, manifest.modalities, RAW_SPLIT)
    except RejectedSample as error:
        return row | {"reason": str(error)}
    present = sum(1 << place for place, m in enumerate(manifest.modalities) if m.name in arrays)
    tensors = {m.name: _delivered(m, stored[m.name]) for m in manifest.modalities}
    return row | {PRESENT: present} | tensors


def _delivered(modality: Modality, stored: bytes) -> bytes:
    """As the reader of shards delivers it."""
    if modality.storage == "tensor":
        return stored
    shape = modality.delivered(RAW_SPLIT)
    pictures = np.empty((int(np.prod(shape[:-3])), *shape[-3:]), np.uint8)
    decode_jpeg(stored, range(len(pictures)), pictures)
    return pictures.tobytes()

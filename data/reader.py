"""Rows of a prepared split by their place in the plan, read in this process; no Ray.

A `ShardReader` gathers slices of row groups into one table; `locate` finds the rows of a resampled
epoch, `cut` makes batches of tables, and `columns` turns a table into numpy arrays without copying.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.draws import uniform
from data.folder import Folder
from data.order import Entries, Order, Read, chunk_reads
from data.pictures import decode_jpeg
from data.schema import DataError, Manifest, Modality, Split

LANE = "lane"
KEEP = "keep"
PRESENT = "present"


@dataclass(frozen=True)
class ShardReader:
    """Reads slices of row groups of one split of a prepared folder.

    Attributes:
        folder: path or URI.
        seed: of training; with the epoch it says which candidates of a clip are delivered.
    """

    folder: str
    manifest: Manifest
    split: Split
    seed: int = 0

    @property
    def group_rows(self) -> tuple[int, ...]:
        """Rows of every row group of the split, in shard order."""
        return tuple(n for shard in self.manifest.splits[self.split] for n in shard.row_groups)

    def gather(
        self,
        reads: Iterable[Read],
        take: np.ndarray,
        *,
        entries: Entries | None = None,
        epoch: int | None = None,
    ) -> pa.Table:
        """Rows `take`, a permutation, of the concatenated slices, as they are delivered.

        Rows are copied to their places, one row group at a time. To concatenate first and use
        Arrow's `take` needs twice the memory, and touching it took longer than the reading.

        Args:
            entries: if given, slices are of a row group's entries, and a column `keep` is added.
            epoch: of training, to draw candidates of clips; None takes the middle ones.
        """
        schema = self._schema
        if entries is not None:
            schema = schema.append(pa.field(KEEP, pa.int64()))
        gathered = {field.name: _empty(field.type, len(take)) for field in schema}
        modalities = {modality.name: modality for modality in self.manifest.modalities}
        place = np.argsort(take)  # the inverse permutation
        start = 0
        for part in self._parts(reads, entries):
            where = place[start : start + part.num_rows]
            for name, values in gathered.items():
                modality = modalities.get(name)
                if modality is None or self._is_plain(modality):
                    values[where] = _values(part.column(name))
                else:
                    self._deliver(modality, part, epoch, values, where)
            start += part.num_rows
        return pa.Table.from_arrays([_array(v) for v in gathered.values()], schema=schema)

    def keys(self, reads: Iterable[Read]) -> pa.Array:
        """Keys of the rows of the slices, one after the other."""
        return pa.concat_tables(self._parts(reads, None, ("key",))).column("key").combine_chunks()

    @property
    def _schema(self) -> pa.Schema:
        """Columns as they are delivered."""
        widths = {m.name: m.nbytes(self.split) for m in self.manifest.modalities}
        return pa.schema(
            [
                field.with_type(pa.binary(widths[field.name])) if field.name in widths else field
                for field in self.manifest.arrow_schema(self.split)
                if field.name not in ("key", "group")
            ]
        )

    def _is_plain(self, modality: Modality) -> bool:
        """Whether rows are delivered as they are stored."""
        drawn = self.split == "train" and modality.candidates > 1
        return modality.storage == "tensor" and not drawn

    def _deliver(
        self,
        modality: Modality,
        part: pa.Table,
        epoch: int | None,
        values: np.ndarray,
        where: np.ndarray,
    ) -> None:
        """Rows `where` of `values`, (rows, bytes) uint8: frames chosen, pictures decoded."""
        column, shape = part.column(modality.name), modality.delivered(self.split)
        candidates = modality.candidates if self.split == "train" else 1
        frames = shape[0] if candidates > 1 else int(np.prod(shape[:-3]))
        chosen = np.full((part.num_rows, frames), candidates // 2)
        if epoch is not None and candidates > 1:
            purpose = f"candidates/{modality.name}"
            sample_id = part.column("sample_id").to_numpy()
            draw = uniform(self.seed, purpose, epoch, sample_id, frames)
            chosen = (draw * candidates).astype(np.int64)
        wanted = np.arange(frames) * candidates + chosen
        if modality.storage == "tensor":
            stored = _values(column).reshape(part.num_rows, frames * candidates, -1)
            for row, numbers, place in zip(stored, wanted, where, strict=True):
                out = values[place].reshape(frames, -1)
                for picture, number in zip(out, numbers, strict=True):
                    picture[:] = row[number]
            return
        for data, numbers, place in zip(column, wanted.tolist(), where, strict=True):
            decode_jpeg(data.as_py(), numbers, values[place].reshape(frames, *shape[-3:]))

    def _parts(
        self,
        reads: Iterable[Read],
        entries: Entries | None,
        names: Sequence[str] | None = None,
    ) -> Iterator[pa.Table]:
        """The slices, one by one; whole row groups are read by one thread, mapped if local."""
        where = [
            (shard.path, index)
            for shard in self.manifest.splits[self.split]
            for index in range(len(shard.row_groups))
        ]
        names, folder = list(names or self._schema.names), Folder.at(self.folder)
        for path, part in groupby(reads, key=lambda read: where[read.row_group][0]):
            with folder.open(path) as source, pq.ParquetFile(source) as file:
                for read in part:
                    group = file.read_row_group(where[read.row_group][1], names, use_threads=False)
                    yield _part(group, read, entries)


def _part(group: pa.Table, read: Read, entries: Entries | None) -> pa.Table:
    if entries is None:
        return group.slice(read.start, read.stop - read.start)
    row, keep = entries.part(read)
    return group.take(pa.array(row)).append_column(KEEP, pa.array(keep))


def _empty(type_: pa.DataType, rows: int) -> np.ndarray:
    if isinstance(type_, pa.FixedSizeBinaryType):
        # Arrow's pool keeps memory; touching new pages took half of the time of `gather`.
        buffer = pa.allocate_buffer(rows * type_.byte_width)
        return np.frombuffer(buffer, np.uint8).reshape(rows, type_.byte_width)
    return np.empty(rows, dtype=type_.to_pandas_dtype())


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers, or the bytes of every row as (rows, bytes); shares memory where it can."""
    chunk = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if not isinstance(chunk.type, pa.FixedSizeBinaryType):
        return chunk.to_numpy()
    nbytes = chunk.type.byte_width
    start, count = chunk.offset * nbytes, len(chunk) * nbytes
    return np.frombuffer(chunk.buffers()[1], np.uint8, count, start).reshape(-1, nbytes)


def _array(values: np.ndarray) -> pa.Array:
    """The opposite of `_values`."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(values.shape[1]), len(values), [None, pa.py_buffer(values)]
    )


@dataclass(frozen=True)
class SampleIndex:
    """Where every sample of a split is, for `locate`.

    Attributes:
        sample_id: (N,) int64, ascending.
        position: (N,) int64 row number of each sample in shard order.
        offsets: (G + 1,) int64 row number where each row group begins, and N.
    """

    sample_id: np.ndarray
    position: np.ndarray
    offsets: np.ndarray


def sample_index(reader: ShardReader) -> SampleIndex:
    """Read the sample ids of a split; costs 8 bytes a row of reading, 16 of memory."""
    folder, parts = Folder.at(reader.folder), []
    for shard in reader.manifest.splits[reader.split]:
        with folder.open(shard.path) as file:
            parts.append(pq.read_table(file, columns=["sample_id"]).column(0).to_numpy())
    sample_id = np.concatenate(parts)
    position = np.argsort(sample_id, kind="stable")
    return SampleIndex(sample_id[position], position, np.cumsum([0, *reader.group_rows]))


def locate(index: SampleIndex, sample_id: np.ndarray, keep: np.ndarray) -> Entries:
    """Entries of an epoch that has each of these samples, with these modalities kept.

    The result does not depend on the order of the arguments' rows.

    Args:
        sample_id: (n,) int64; repeats allowed.
        keep: (n,) int64 bit masks, see `Entries`.

    Raises:
        DataError: a sample is not in the split.
    """
    found = np.searchsorted(index.sample_id, sample_id).clip(max=len(index.sample_id) - 1)
    unknown = sample_id[index.sample_id[found] != sample_id]
    if len(unknown):
        raise DataError(
            f"{len(unknown)} of {len(sample_id)} resampled rows are not in the split, the first is "
            f"sample_id={unknown[0]}; resample only rows of this prepared set's split"
        )
    position = index.position[found]
    order = np.lexsort((keep, position))
    position = position[order]
    offsets = np.searchsorted(position, index.offsets)
    group = np.searchsorted(index.offsets, position, side="right") - 1
    return Entries(offsets, position - index.offsets[group], keep[order].astype(np.int64))


def read_window(
    reader: ShardReader, order: Order, entries: Entries | None, lanes: range, epoch: int, index: int
) -> list[pa.Table]:
    """One window of `lanes` as a table in batch order, with a `lane` column."""
    window = order.window(epoch, index, lanes)
    table = reader.gather(window.reads, window.take, entries=entries, epoch=epoch)
    return [table.append_column(LANE, pa.array(window.lane))]


def read_chunks(reader: ShardReader, chunk_rows: int, first: int, last: int) -> list[pa.Table]:
    """Evaluation chunks [first, last) in shard order; `lane` is the chunk index."""
    start, stop = first * chunk_rows, min(last * chunk_rows, reader.manifest.rows(reader.split))
    reads = chunk_reads(reader.group_rows, start, stop)
    table = reader.gather(reads, np.arange(stop - start))
    return [table.append_column(LANE, pa.array(np.arange(start, stop) // chunk_rows))]


def cut(tables: Iterable[pa.Table], counts: Iterator[int]) -> Iterator[pa.Table]:
    """Cut a stream of tables into tables of exactly `counts` rows; slices share memory."""
    source = iter(tables)
    held: list[pa.Table] = []
    for count in counts:
        have = sum(table.num_rows for table in held)
        while have < count:
            table = next(source)
            held.append(table)
            have += table.num_rows
        joined = pa.concat_tables(held) if len(held) > 1 else held[0]
        yield joined.slice(0, count)
        held = [joined.slice(count)] if joined.num_rows > count else []


def columns(table: pa.Table, manifest: Manifest, split: Split) -> dict[str, np.ndarray]:
    """Numpy columns of a table: int64 `sample_id`, `label`, `lane`, and one array per modality.

    Resampled tables have int64 `keep`, sets with optional modalities int64 `present`. Modality
    arrays are (rows, *shape) views of the Arrow buffers: read only.
    """
    names = ["sample_id", "label", LANE, *({KEEP, PRESENT} & set(table.column_names))]
    result = {name: table.column(name).to_numpy() for name in names}
    return result | tensors(table, manifest.modalities, split)


def tensors(table: pa.Table, modalities: Sequence[Modality], split: Split) -> dict[str, np.ndarray]:
    """Modality -> (rows, *shape) views of the Arrow buffers of delivered rows: read only."""
    result = {}
    for modality in modalities:
        values = _values(table.column(modality.name)).view(modality.dtype)
        result[modality.name] = values.reshape(len(values), *modality.delivered(split))
    return result

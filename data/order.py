"""The order of training rows: a pure function of (row groups, seed, epoch, global batch size).

One epoch of a split with N rows is laid out like this; nothing depends on the number of workers,
on the process, or on which task finished first:

1. the row groups of all shards, shuffled by (seed, epoch), form one sequence of N positions;
2. the sequence is dealt to L lanes: lane l holds positions [l*N//L, (l+1)*N//L), so lane sizes
   differ by at most one row;
3. a global batch takes the next B/L rows of every lane, lane by lane. The last batch takes what is
   left; if that is less than two rows a lane, it is merged into the batch before, so that no rank
   ever sees an empty or single-row batch;
4. inside a lane, rows are shuffled within windows of `window_batches` batches.

Rank r of W owns lanes [r*L//W, (r+1)*L//W): it reads only their row groups, and the parts of all
ranks, concatenated, are the global batch.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.schema import DataError


@dataclass(frozen=True)
class Read:
    """A slice of one row group: rows [start, stop)."""

    row_group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """What one read task produces: rows of some lanes for consecutive global batches.

    Attributes:
        reads: slices to read and concatenate, in this order.
        take: (n,) indices into the concatenation; the rows in batch order, lane by lane.
        lane: (n,) lane of each row.
        batch_rows: rows of each of the window's batches, sums to n.
    """

    reads: tuple[Read, ...]
    take: np.ndarray
    lane: np.ndarray
    batch_rows: tuple[int, ...]


@dataclass(frozen=True)
class Entries:
    """What an epoch of resampled rows takes from each row group; rows may repeat.

    Attributes:
        offsets: (G + 1,) int64, where the entries of each row group begin, and n.
        row: (n,) int64 row of each entry, counted from the start of its row group.
        keep: (n,) int64 bit masks; bit m is set where modality m of the manifest is kept.
    """

    offsets: np.ndarray
    row: np.ndarray
    keep: np.ndarray

    @cached_property
    def group_rows(self) -> tuple[int, ...]:
        """Entries of every row group, for `Order`."""
        return tuple(np.diff(self.offsets).tolist())

    def part(self, read: Read) -> tuple[np.ndarray, np.ndarray]:
        """Rows and masks of a slice of one row group's entries."""
        base = self.offsets[read.row_group]
        where = slice(base + read.start, base + read.stop)
        return self.row[where], self.keep[where]


@dataclass(frozen=True)
class Order:
    """The order of one split.

    Args:
        group_rows: rows of every row group, in shard order.
        global_batch_size: rows of a global batch, over all workers.
        lanes: number of lanes L; divides `global_batch_size`.
        window_batches: batches per shuffle window.
        seed: order seed.

    Raises:
        DataError: the batch does not divide into lanes, or the split is too small for the lanes.
    """

    group_rows: tuple[int, ...]
    global_batch_size: int
    lanes: int
    window_batches: int
    seed: int

    def __post_init__(self) -> None:
        if self.global_batch_size % self.lanes:
            low = self.global_batch_size // self.lanes * self.lanes
            raise DataError(
                f"global_batch_size={self.global_batch_size} is not divisible by "
                f"lanes={self.lanes}; every lane gives the same number of rows to a batch; use "
                f"{low or self.lanes} or {low + self.lanes}, or change lanes"
            )
        if self.num_rows < 2 * self.lanes:
            raise DataError(
                f"the split has {self.num_rows} rows; {self.lanes} lanes need at least two rows "
                f"each; use at most {max(1, self.num_rows // 2)} lanes or more data"
            )

    @cached_property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return sum(self.group_rows)

    @cached_property
    def num_steps(self) -> int:
        """Global batches of an epoch."""
        full, rest = divmod(self.num_rows, self.global_batch_size)
        keep_rest = rest >= 2 * self.lanes or (rest > 0 and full == 0)
        return full + int(keep_rest)

    @property
    def num_windows(self) -> int:
        """Shuffle windows of an epoch."""
        return -(-self.num_steps // self.window_batches)

    def window_of(self, step: int) -> int:
        """Window that holds global batch `step`."""
        return step // self.window_batches

    def lanes_of(self, rank: int, world_size: int) -> range:
        """Lanes of a rank; where they do not divide evenly, shares differ by one lane.

        Raises:
            DataError: there are more workers than lanes.
        """
        if world_size > self.lanes:
            raise DataError(
                f"scaling.num_workers={world_size} is more than train.lanes={self.lanes}; every "
                f"worker owns at least one lane; use at most {self.lanes} workers, or set "
                f"train.lanes to {world_size} or more"
            )
        return range(rank * self.lanes // world_size, (rank + 1) * self.lanes // world_size)

    def batch_rows(self, step: int, lanes: range) -> int:
        """Rows that neighbouring `lanes` give to global batch `step`."""
        return self._rows_until(step + 1, lanes) - self._rows_until(step, lanes)

    def window_rows(self, index: int, lanes: range) -> int:
        """Rows that neighbouring `lanes` give to window `index`."""
        first = index * self.window_batches
        stop = min(first + self.window_batches, self.num_steps)
        return self._rows_until(stop, lanes) - self._rows_until(first, lanes)

    def window(self, epoch: int, index: int, lanes: range) -> Window:
        """The rows of `lanes` in window `index` of `epoch`, in final order."""
        steps = range(
            index * self.window_batches, min((index + 1) * self.window_batches, self.num_steps)
        )
        groups, offsets = self._layout(epoch)
        reads: list[Read] = []
        orders: list[np.ndarray] = []
        base = 0
        for lane in lanes:
            start, stop = self._lane_batch(lane, steps[0])[0], self._lane_batch(lane, steps[-1])[1]
            reads += _slices(groups, offsets, self._lane_start(lane) + start, stop - start)
            rng = np.random.default_rng([self.seed, epoch, 1, lane, index])
            orders.append(base + rng.permutation(stop - start))
            base += stop - start
        take: list[np.ndarray] = []
        lane_of: list[np.ndarray] = []
        for step in steps:
            for lane, order in zip(lanes, orders, strict=True):
                first = self._lane_batch(lane, steps[0])[0]
                start, stop = self._lane_batch(lane, step)
                take.append(order[start - first : stop - first])
                lane_of.append(np.full(stop - start, lane, dtype=np.int64))
        return Window(
            reads=tuple(reads),
            take=np.concatenate(take),
            lane=np.concatenate(lane_of),
            batch_rows=tuple(self.batch_rows(step, lanes) for step in steps),
        )

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Row groups in epoch order, and the position where each begins (one longer)."""
        groups = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.group_rows))
        offsets = np.concatenate([[0], np.cumsum(np.asarray(self.group_rows)[groups])])
        return groups, offsets

    def _rows_until(self, step: int, lanes: range) -> int:
        """Rows of `lanes` in the global batches before `step`."""
        if step == self.num_steps:
            return self._lane_start(lanes.stop) - self._lane_start(lanes.start)
        return step * (self.global_batch_size // self.lanes) * len(lanes)

    def _lane_start(self, lane: int) -> int:
        return lane * self.num_rows // self.lanes

    def _lane_batch(self, lane: int, step: int) -> tuple[int, int]:
        """Rows of `lane`, counted from its start, that belong to batch `step`."""
        share = self.global_batch_size // self.lanes
        size = self._lane_start(lane + 1) - self._lane_start(lane)
        last = step == self.num_steps - 1
        return step * share, size if last else (step + 1) * share


def chunk_reads(group_rows: tuple[int, ...], start: int, stop: int) -> list[Read]:
    """Slices that hold rows [start, stop) of a split in shard order, for evaluation."""
    offsets = np.concatenate([[0], np.cumsum(group_rows)])
    return _slices(np.arange(len(group_rows)), offsets, start, stop - start)


def _slices(groups: np.ndarray, offsets: np.ndarray, start: int, length: int) -> list[Read]:
    """Slices of the row groups laid out at `offsets` that cover [start, start + length)."""
    reads = []
    stop = start + length
    position = int(np.searchsorted(offsets, start, side="right")) - 1
    while start < stop:
        begin, end = int(offsets[position]), int(offsets[position + 1])
        upto = min(stop, end)
        if upto > start:
            reads.append(Read(int(groups[position]), start - begin, upto - begin))
        start = max(start, upto)
        position += 1
    return reads

"""The order as arithmetic: no Ray, compared with what the definition promises."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Entries, Order, Read, chunk_reads
from data.schema import DataError


def epoch_batches(order: Order, epoch: int, rank: int, world: int) -> list[np.ndarray]:
    """Global row numbers of this rank's part of every batch."""
    starts = np.concatenate([[0], np.cumsum(order.group_rows)])
    batches = []
    lanes = order.lanes_of(rank, world)
    for index in range(order.num_windows):
        window = order.window(epoch, index, lanes)
        rows = np.concatenate(
            [starts[r.row_group] + np.arange(r.start, r.stop) for r in window.reads]
        )
        rows = rows[window.take]
        assert (np.sort(window.take) == np.arange(len(rows))).all()
        assert len(rows) == order.window_rows(index, lanes)
        batches += np.split(rows, np.cumsum(window.batch_rows)[:-1])
    assert [len(rows) for rows in batches] == [
        order.batch_rows(step, lanes) for step in range(order.num_steps)
    ]
    return batches


@st.composite
def orders(draw) -> Order:
    lanes = draw(st.sampled_from([1, 2, 4, 6, 12]))
    share = draw(st.integers(2, 5))
    groups = draw(st.lists(st.integers(0, 40), min_size=1, max_size=30))
    groups[draw(st.integers(0, len(groups) - 1))] += 2 * lanes
    return Order(
        tuple(groups), lanes * share, lanes, draw(st.integers(1, 7)), draw(st.integers(0, 99))
    )


@settings(max_examples=200, deadline=None)
@given(orders(), st.integers(0, 3))
def test_every_row_once_and_no_dependence_on_the_world_size(order: Order, epoch: int):
    alone = epoch_batches(order, epoch, 0, 1)
    assert len(alone) == order.num_steps
    assert np.sort(np.concatenate(alone)).tolist() == list(range(order.num_rows))
    for world in (w for w in (2, 3, 4) if order.lanes % w == 0):
        parts = [epoch_batches(order, epoch, rank, world) for rank in range(world)]
        for step, whole in enumerate(alone):
            assert np.concatenate([part[step] for part in parts]).tolist() == whole.tolist()
            assert min(len(part[step]) for part in parts) >= 1


@settings(max_examples=100, deadline=None)
@given(orders())
def test_all_batches_but_the_last_are_full_and_the_last_is_never_tiny(order: Order):
    sizes = [len(rows) for rows in epoch_batches(order, 0, 0, 1)]
    assert all(size == order.global_batch_size for size in sizes[:-1])
    assert 2 * order.lanes <= sizes[-1] < order.global_batch_size + 2 * order.lanes


def test_lanes_do_not_decrease_inside_a_batch():
    order = Order((16,) * 10, 32, 8, 2, 0)
    window = order.window(0, 0, order.lanes_of(0, 1))
    for lane in np.split(window.lane, np.cumsum(window.batch_rows)[:-1]):
        assert (np.diff(lane) >= 0).all()


def test_epochs_and_seeds_differ_and_repeat():
    order = Order((16,) * 20, 32, 8, 100, 0)
    first = np.concatenate(epoch_batches(order, 0, 0, 1))
    assert (first == np.concatenate(epoch_batches(order, 0, 0, 1))).all()
    other = Order((16,) * 20, 32, 8, 100, 1)
    for rows in (epoch_batches(order, 1, 0, 1), epoch_batches(other, 0, 0, 1)):
        assert (first != np.concatenate(rows)).mean() > 0.9


def test_shuffle_separates_neighbours_like_a_random_permutation():
    order = Order((16,) * 64, 64, 8, 100, 3)
    together = random = 0
    rng = np.random.default_rng(0)
    for epoch in range(10):
        place = np.empty(order.num_rows, dtype=int)
        place[np.concatenate(epoch_batches(order, epoch, 0, 1))] = np.arange(order.num_rows) // 64
        together += int((place[1:] == place[:-1]).sum())
        shuffled = rng.permutation(order.num_rows)
        random += int((shuffled[1:] // 64 == shuffled[:-1] // 64).sum())
    assert together < 1.5 * random  # neighbours on disk share a batch about as often as by chance


def test_errors_name_value_rule_and_remedy():
    with pytest.raises(
        DataError, match=r"global_batch_size=30 is not divisible by lanes=8.*24 or 32"
    ):
        Order((100,), 30, 8, 1, 0)
    with pytest.raises(DataError, match=r"15 rows.*8 lanes.*at most 7 lanes"):
        Order((15,), 32, 8, 1, 0)
    with pytest.raises(DataError, match=r"train\.lanes=8 .* scaling\.num_workers=3"):
        Order((100,), 32, 8, 1, 0).lanes_of(0, 3)


def test_planning_a_long_epoch_is_arithmetic():
    order = Order((512,) * 40_000, 128, 8, 416, 0)
    start = time.monotonic()
    rows = sum(order.batch_rows(step, range(4)) for step in range(order.num_steps))
    assert 2 * rows == order.num_rows
    assert sum(order.window_rows(i, range(8)) for i in range(order.num_windows)) == order.num_rows
    assert time.monotonic() - start < 5  # 160,000 steps


def test_entries_are_cut_by_row_group():
    entries = Entries(np.array([0, 2, 2, 5]), np.array([1, 1, 0, 3, 3]), np.arange(5))
    assert entries.group_rows == (2, 0, 3)
    row, keep = entries.part(Read(2, 1, 3))
    assert (row.tolist(), keep.tolist()) == ([3, 3], [3, 4])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=10), st.data())
def test_chunk_reads_cover_a_range_in_order(groups: list[int], draw):
    total = sum(groups)
    start = draw.draw(st.integers(0, total - 1))
    stop = draw.draw(st.integers(start + 1, total))
    starts = np.concatenate([[0], np.cumsum(groups)])
    rows = [
        starts[read.row_group] + i
        for read in chunk_reads(tuple(groups), start, stop)
        for i in range(read.start, read.stop)
    ]
    assert rows == list(range(start, stop))

"""The order as arithmetic: no Ray, compared with what the definition promises."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Entries, Order, Read, chunk_reads
from data.schema import DataError


def epoch_batches(
    order: Order, epoch: int, rank: int, world: int, step: int = 0
) -> list[np.ndarray]:
    """Global row numbers of this rank's part of every batch from `step` on.

    As `train_stream` does, it begins with the window that holds `step` and drops what is before.
    """
    starts = np.concatenate([[0], np.cumsum(order.group_rows)])
    batches = []
    lanes = order.lanes_of(rank, world)
    first = order.window_of(step)
    for index in range(first, order.num_windows):
        window = order.window(epoch, index, lanes)
        rows = np.concatenate(
            [starts[r.row_group] + np.arange(r.start, r.stop) for r in window.reads]
        )
        rows = rows[window.take]
        assert (np.sort(window.take) == np.arange(len(rows))).all()
        assert len(rows) == order.window_rows(index, lanes)
        batches += np.split(rows, np.cumsum(window.batch_rows)[:-1])
    skipped = first * order.window_batches
    assert [len(rows) for rows in batches] == [
        order.batch_rows(i, lanes) for i in range(skipped, order.num_steps)
    ]
    return batches[step - skipped :]


def global_batches(order: Order, epoch: int, world: int, step: int = 0) -> list[list[int]]:
    """Every global batch from `step` on: the parts of all ranks, concatenated in rank order."""
    parts = [epoch_batches(order, epoch, rank, world, step) for rank in range(world)]
    return [np.concatenate(part).tolist() for part in zip(*parts, strict=True)]


def epoch_rows(order: Order, epoch: int) -> np.ndarray:
    """Row numbers of a whole epoch, in order."""
    return np.concatenate(epoch_batches(order, epoch, 0, 1))


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
    alone = global_batches(order, epoch, 1)
    assert len(alone) == order.num_steps
    assert sorted(i for rows in alone for i in rows) == list(range(order.num_rows))
    for world in range(2, order.lanes + 1):
        parts = [epoch_batches(order, epoch, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {order.num_steps}
        for step, whole in enumerate(alone):
            assert np.concatenate([part[step] for part in parts]).tolist() == whole
            assert min(len(part[step]) for part in parts) >= 1


@settings(max_examples=300, deadline=None)
@given(orders(), st.integers(0, 3), st.data())
def test_a_killed_run_sees_the_unbroken_sequence_whatever_its_world_sizes(
    order: Order, epoch: int, draw
):
    unbroken = global_batches(order, epoch, 1)
    kills = draw.draw(st.lists(st.integers(0, order.num_steps), min_size=1, max_size=4))
    seen: list[list[int]] = []
    for kill in [*kills, order.num_steps]:
        checkpoint = draw.draw(st.integers(0, len(seen)))
        world = draw.draw(st.integers(1, order.lanes))
        rest = global_batches(order, epoch, world, checkpoint)
        assert rest == unbroken[checkpoint:]
        seen[checkpoint:] = rest[: max(0, kill - checkpoint)]
    assert seen == unbroken


def test_lanes_are_dealt_in_order_and_as_evenly_as_possible():
    for lanes in range(1, 17):
        order = Order((100,), lanes, lanes, 1, 0)
        for world in range(1, lanes + 1):
            shares = [order.lanes_of(rank, world) for rank in range(world)]
            assert [lane for share in shares for lane in share] == list(range(lanes))
            assert {len(share) for share in shares} <= {lanes // world, -(-lanes // world)}


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


@settings(max_examples=100, deadline=None, derandomize=True)
@given(orders().filter(lambda order: order.num_rows >= 100), st.integers(0, 99))
def test_epochs_and_seeds_differ_and_repeat(order: Order, epoch: int):
    rows = epoch_rows(order, epoch).tolist()
    assert epoch_rows(replace(order), epoch).tolist() == rows
    assert epoch_rows(order, epoch + 1).tolist() != rows
    assert epoch_rows(replace(order, seed=order.seed + 1), epoch).tolist() != rows


def test_epochs_and_seeds_share_hardly_a_place():
    order = Order((16,) * 20, 32, 8, 100, 0)
    rows = epoch_rows(order, 0)
    for other in (epoch_rows(order, 1), epoch_rows(replace(order, seed=1), 0)):
        assert (rows != other).mean() > 0.9


def test_epochs_and_seeds_deal_other_row_groups_to_a_lane():
    order = Order((16,) * 80, 32, 8, 100, 0)
    first, *others = (
        set(np.concatenate(epoch_batches(other, epoch, 0, 8)).tolist())
        for other, epoch in ((order, 0), (order, 1), (replace(order, seed=1), 0))
    )
    assert all(len(first & other) < len(first) // 2 for other in others)  # an eighth by chance


# Row groups of 16 rows, 64 rows a batch, 8 lanes; a window holds the whole epoch, or an eighth.
WHOLE = Order((16,) * 512, 64, 8, 128, 3)
EIGHTH = replace(WHOLE, window_batches=16)


def places(sequence: np.ndarray) -> np.ndarray:
    """Place of every row in the sequence."""
    place = np.empty(len(sequence), dtype=np.int64)
    place[sequence] = np.arange(len(sequence))
    return place


def gaps(sequence: np.ndarray) -> np.ndarray:
    """Distance in the sequence of rows that are neighbours in the shards."""
    return np.abs(np.diff(places(sequence)))


def run_length(label: np.ndarray) -> float:
    """Mean length of the runs of equal labels."""
    return len(label) / (1 + np.count_nonzero(np.diff(label)))


def epochs_and_permutations(order: Order) -> list[tuple[np.ndarray, np.ndarray]]:
    """Some epochs, each with a random permutation to compare with; the same at every call."""
    rng = np.random.default_rng(0)
    return [(epoch_rows(order, epoch), rng.permutation(order.num_rows)) for epoch in range(10)]


def test_neighbours_are_as_far_apart_as_in_a_random_permutation():
    pairs = epochs_and_permutations(WHOLE)
    ours = np.mean([gaps(rows).mean() for rows, _ in pairs])
    random = np.mean([gaps(permutation).mean() for _, permutation in pairs])
    assert 0.95 * random < ours < 1.05 * random


@pytest.mark.parametrize("order", [WHOLE, EIGHTH])
def test_hardly_a_row_stays_next_to_its_neighbour(order: Order):
    share = np.mean([(gaps(rows) == 1).mean() for rows, _ in epochs_and_permutations(order)])
    rows_per_lane_window = order.window_rows(0, range(1))
    assert share < 2.5 / rows_per_lane_window  # a random permutation of the window has 2 / rows


def test_neighbours_share_a_batch_about_as_often_as_by_chance():
    pairs = epochs_and_permutations(WHOLE)
    size = WHOLE.global_batch_size
    ours, random = (
        sum(np.count_nonzero(np.diff(places(sequence) // size) == 0) for sequence in sequences)
        for sequences in zip(*pairs, strict=True)
    )
    assert ours < 1.2 * random


@pytest.mark.parametrize(("order", "longer"), [(WHOLE, 1.05), (EIGHTH, 1.3)])
def test_label_runs_of_sorted_data_are_about_as_long_as_random_ones(order: Order, longer: float):
    label = np.arange(order.num_rows) * 10 // order.num_rows
    pairs = epochs_and_permutations(order)
    ours = np.mean([run_length(label[rows]) for rows, _ in pairs])
    random = np.mean([run_length(label[permutation]) for _, permutation in pairs])
    assert run_length(label) > 800
    assert ours < longer * random


def test_errors_name_value_rule_and_remedy():
    with pytest.raises(
        DataError, match=r"global_batch_size=30 is not divisible by lanes=8.*24 or 32"
    ):
        Order((100,), 30, 8, 1, 0)
    with pytest.raises(DataError, match=r"15 rows.*8 lanes.*at most 7 lanes"):
        Order((15,), 32, 8, 1, 0)
    with pytest.raises(
        DataError, match=r"num_workers=9 is more than train\.lanes=8.*at most 8 workers, or .* to 9"
    ):
        Order((100,), 32, 8, 1, 0).lanes_of(0, 9)


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

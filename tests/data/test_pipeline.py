"""Ray Data carries the planned order: compared with the plan itself, for every rank."""

import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.data import DataContext
from ray.experimental import get_local_object_locations

from data import pipeline
from data.order import Order, chunk_reads
from data.pipeline import (
    ReadAhead,
    _Pace,
    eval_stream,
    node_resources,
    run_reads,
    small_reads,
    train_stream,
)
from data.prepare import prepare
from data.reader import ShardReader, columns, cut, locate, read_window, sample_index
from data.schema import DataError, Manifest, Modality, Shard
from data.sources import DataConfig

pytestmark = pytest.mark.ray

AHEAD = ReadAhead(readers=2, windows=3)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, one_cpu_ray: None) -> ShardReader:
    folder = tmp_path_factory.mktemp("digits")
    report = prepare(DataConfig(name="digits", rows_per_shard=500), folder)
    return ShardReader(str(folder), report.manifest, "train")


def ids(table: pa.Table) -> list[int]:
    return table.column("sample_id").to_pylist()


def pairs(table: pa.Table) -> list[tuple[int, int]]:
    """Sample id and keep mask of every row."""
    return list(zip(ids(table), table.column("keep").to_pylist(), strict=True))


def make_order(reader: ShardReader) -> Order:
    return Order(reader.group_rows, 64, 8, 6, seed=3)


def whole(reader: ShardReader) -> pa.Table:
    """All rows in the order of the shards."""
    rows = reader.manifest.rows(reader.split)
    return reader.gather(chunk_reads(reader.group_rows, 0, rows), np.arange(rows))


def plan_rows(order: Order, epoch: int) -> np.ndarray:
    """Row numbers, counted over all row groups, of an epoch as the plan has it."""
    starts = np.concatenate([[0], np.cumsum(order.group_rows)])
    found = []
    for index in range(order.num_windows):
        window = order.window(epoch, index, range(order.lanes))
        rows = [starts[r.row_group] + np.arange(r.start, r.stop) for r in window.reads]
        found.append(np.concatenate(rows)[window.take])
    return np.concatenate(found)


def test_stream_is_the_plan_and_ranks_add_up(reader: ShardReader):
    order = make_order(reader)
    stored = ids(whole(reader))
    planned = [stored[i] for epoch in range(2) for i in plan_rows(order, epoch)]
    alone = list(train_stream(reader, order, rank=0, world_size=1, epochs=range(2), ahead=AHEAD))
    assert len(alone) == 2 * order.num_steps
    assert [i for table in alone for i in ids(table)] == planned
    assert "keep" not in alone[0].column_names
    parts = [
        list(train_stream(reader, order, rank=r, world_size=2, epochs=range(2), ahead=AHEAD))
        for r in range(2)
    ]
    for both, first, second in zip(alone, *parts, strict=True):
        assert ids(both) == ids(first) + ids(second)


def test_starting_in_the_middle_gives_the_rest(reader: ShardReader):
    order = make_order(reader)
    every = list(train_stream(reader, order, rank=1, world_size=2, epochs=range(3, 5), ahead=AHEAD))
    rest = list(
        train_stream(reader, order, rank=1, world_size=2, epochs=range(3, 5), step=8, ahead=AHEAD)
    )
    assert [ids(table) for table in rest] == [ids(table) for table in every[8:]]


@pytest.mark.parametrize("ahead", [ReadAhead(1, 1), ReadAhead(4, 6)])
def test_how_far_is_read_ahead_changes_nothing(reader: ShardReader, ahead: ReadAhead):
    order = make_order(reader)
    some, other = (
        list(train_stream(reader, order, rank=0, world_size=1, epochs=range(2), ahead=each))
        for each in (AHEAD, ahead)
    )
    assert all(a.equals(b) for a, b in zip(some, other, strict=True))


def test_resources_of_this_node():
    cpus, store_bytes = node_resources()
    assert cpus == 1
    assert store_bytes > 1 << 20


def test_long_plans_run_as_several_executions(reader: ShardReader, monkeypatch: pytest.MonkeyPatch):
    order = make_order(reader)
    once = [
        ids(t)
        for t in train_stream(reader, order, rank=0, world_size=1, epochs=range(2), ahead=AHEAD)
    ]
    monkeypatch.setattr(pipeline, "READS_PER_EXECUTION", 3)
    again = [
        ids(t)
        for t in train_stream(reader, order, rank=0, world_size=1, epochs=range(2), ahead=AHEAD)
    ]
    assert again == once


def test_resampled_stream_is_the_plan_and_ranks_add_up(reader: ShardReader):
    stored = whole(reader)
    every_id = stored.column("sample_id").to_numpy()
    rng = np.random.default_rng(0)
    sample_id = np.concatenate([rng.choice(every_id, 700), rng.choice(every_id[:40], 200)])
    keep = rng.integers(1, 4, size=len(sample_id))
    entries = locate(sample_index(reader), sample_id, keep)
    order = Order(entries.group_rows, 64, 8, 6, seed=3)
    alone, *parts = [
        list(
            train_stream(
                reader, order, rank=r, world_size=w, epochs=range(2), entries=entries, ahead=AHEAD
            )
        )
        for r, w in ((0, 1), (0, 2), (1, 2))
    ]
    for both, first, second in zip(alone, *parts, strict=True):
        assert pairs(both) == pairs(first) + pairs(second)

    epochs = [
        pa.concat_tables(alone[: order.num_steps]),
        pa.concat_tables(alone[order.num_steps :]),
    ]
    assert pairs(epochs[0]) != pairs(epochs[1])
    starts = np.cumsum([0, *reader.group_rows[:-1]])
    rows = np.repeat(starts, entries.group_rows) + entries.row
    for epoch, table in enumerate(epochs):
        assert Counter(pairs(table)) == Counter(zip(sample_id.tolist(), keep.tolist(), strict=True))
        plan = plan_rows(order, epoch)
        assert table.drop_columns(["keep", "lane"]).equals(stored.take(pa.array(rows[plan])))
        assert (
            columns(table, reader.manifest, "train")["keep"].tolist() == entries.keep[plan].tolist()
        )


def test_entries_do_not_depend_on_the_order_of_the_samples(reader: ShardReader):
    index = sample_index(reader)
    rng = np.random.default_rng(1)
    sample_id = rng.choice(index.sample_id, 2000)
    keep = rng.integers(1, 4, size=2000)
    shuffle = rng.permutation(2000)
    first = locate(index, sample_id, keep)
    second = locate(index, sample_id[shuffle], keep[shuffle])
    for name in ("offsets", "row", "keep"):
        assert (getattr(first, name) == getattr(second, name)).all()
    assert len(first.group_rows) == len(reader.group_rows)


def test_unknown_samples_are_named(reader: ShardReader):
    index = sample_index(reader)
    sample_id = np.append(index.sample_id[:3], [10**6, -1])
    with pytest.raises(DataError, match=r"2 of 5 resampled rows .* sample_id=1000000; resample"):
        locate(index, sample_id, np.ones(5, dtype=np.int64))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_has_every_row_once_in_fixed_chunks(reader: ShardReader, world_size: int):
    parts = [
        table
        for rank in range(world_size)
        for table in eval_stream(
            reader, chunk_rows=64, rank=rank, world_size=world_size, task_rows=200, ahead=AHEAD
        )
    ]
    assert [i for part in parts for i in ids(part)] == ids(whole(reader))
    chunks = [columns(part, reader.manifest, "train")["lane"] for part in parts]
    assert [set(lane.tolist()) for lane in chunks] == [{i} for i in range(len(parts))]
    assert all(len(lane) == 64 for lane in chunks[:-1])


def test_a_task_makes_one_block_whatever_its_size(
    reader: ShardReader, monkeypatch: pytest.MonkeyPatch
):
    order = Order(reader.group_rows, 64, 8, 1000, seed=3)
    assert order.num_windows == 1
    row_nbytes = reader.manifest.row_nbytes("train")
    target = order.num_rows * row_nbytes // 3
    monkeypatch.setattr(DataContext.get_current(), "target_max_block_size", target)
    items = [(range(8), epoch, 0) for epoch in range(3)]
    tables = run_reads(
        read_window, (reader, order, None), items, [order.num_rows] * 3, row_nbytes, AHEAD
    )
    assert [table.num_rows for table in tables] == [order.num_rows] * 3
    assert DataContext.get_current().target_max_block_size == target


@ray.remote(num_cpus=1)
class Worker:
    """Holds the only CPU, as a training worker does."""

    def ready(self) -> None: ...


def test_evaluation_runs_while_training_is_paused_and_no_cpu_is_free(
    reader: ShardReader, monkeypatch: pytest.MonkeyPatch
):
    small = 20 * reader.manifest.row_nbytes("train")
    monkeypatch.setattr(DataContext.get_current(), "target_max_block_size", small)
    worker = Worker.remote()
    ray.get(worker.ready.remote())  # pyright: ignore[reportFunctionMemberAccess]
    order = make_order(reader)
    training = train_stream(reader, order, rank=0, world_size=1, epochs=range(5), ahead=AHEAD)
    steps = [ids(next(training)) for _ in range(8)]
    chunks = list(
        eval_stream(reader, chunk_rows=64, rank=0, world_size=1, task_rows=200, ahead=AHEAD)
    )
    assert sum(chunk.num_rows for chunk in chunks) == order.num_rows
    steps += [ids(table) for table in training]
    assert len(steps) == 5 * order.num_steps
    ray.kill(worker)  # pyright: ignore[reportArgumentType]


def test_a_paused_stream_does_not_read_on(reader: ShardReader, tmp_path_factory):
    folder = tmp_path_factory.mktemp("started")

    def read(name: int) -> list[pa.Table]:
        (folder / str(name)).touch()
        return [pa.table({"name": np.full(1 << 17, name)})]

    tables = run_reads(read, (), [(i,) for i in range(40)], [1 << 17] * 40, 8, AHEAD)
    next(tables)
    time.sleep(3)
    assert len(list(folder.iterdir())) <= 2 + AHEAD.windows + AHEAD.readers
    assert [table["name"][0].as_py() for table in tables] == list(range(1, 40))


def test_the_scheduler_of_a_paused_stream_rests(
    reader: ShardReader, monkeypatch: pytest.MonkeyPatch
):
    rounds, rest = [], _Pace.on_execution_step
    monkeypatch.setattr(
        *(_Pace, "on_execution_step"), lambda pace, executor: rounds.append(rest(pace, executor))
    )
    order = make_order(reader)
    training = train_stream(reader, order, rank=0, world_size=1, epochs=range(5), ahead=AHEAD)
    next(training)
    time.sleep(2)  # it reads what it may
    before = len(rounds)
    time.sleep(3)
    assert len(rounds) - before <= 6
    assert len(list(training)) == 5 * order.num_steps - 1


def test_tasks_of_a_large_set_are_small(reader: ShardReader):
    shard = Shard(
        path="train-00000.parquet", rows=2000, row_groups=(16,) * 125, num_bytes=1, sha256="0" * 64
    )
    shards = tuple(shard.model_copy(update={"path": f"train-{i:05d}.parquet"}) for i in range(300))
    manifest = Manifest(
        name="large",
        source={},
        split_rule="",
        modalities=(Modality(name="x", kind="vector", shape=(3,), dtype="float32"),),
        classes=("a", "b"),
        splits={"train": shards, "val": (), "test": ()},
        class_counts={},
    )
    large = ShardReader("nowhere", manifest, "train")
    order = Order(large.group_rows, 128, 8, 400, seed=0)
    items = [(range(8), epoch, 1) for epoch in range(3)]
    stored = [ray.put(read) for read in small_reads(read_window, (large, order, None), items)]
    sizes = [where["object_size"] for where in get_local_object_locations(stored).values()]
    assert len(sizes) == 3
    assert max(sizes) < 4000


def test_columns_are_views_with_the_right_values(reader: ShardReader):
    table = next(
        eval_stream(reader, chunk_rows=64, rank=0, world_size=1, task_rows=64, ahead=AHEAD)
    )
    for piece in (table, table.slice(5, 7)):
        arrays = columns(piece, reader.manifest, "train")
        for modality in reader.manifest.modalities:
            array = arrays[modality.name]
            assert array.shape == (piece.num_rows, *modality.shape)
            raw = piece.column(modality.name).to_pylist()
            assert [row.tobytes() for row in array] == raw


def test_cut_joins_and_splits(reader: ShardReader):
    table = whole(reader)
    pieces = [table.slice(0, 10), table.slice(10, 3), table.slice(13, 20)]
    assert [ids(t) for t in cut(pieces, iter([12, 2, 19]))] == [
        ids(table.slice(0, 12)),
        ids(table.slice(12, 2)),
        ids(table.slice(14, 19)),
    ]

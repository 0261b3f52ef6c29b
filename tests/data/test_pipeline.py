"""Ray Data carries the planned order: compared with the plan itself, for every rank."""

from collections.abc import Iterator

import numpy as np
import pytest
import ray

from data.order import Order
from data.pipeline import ShardReader, columns, cut, eval_stream, train_stream
from data.prepare import prepare
from data.sources import DataConfig

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardReader]:
    folder = tmp_path_factory.mktemp("digits")
    report = prepare(DataConfig(name="digits", rows_per_shard=500), folder)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=256 << 20,
        log_to_driver=False,
    )
    yield ShardReader(str(folder), report.manifest, "train")
    ray.shutdown()


def ids(table) -> list[int]:
    return table.column("sample_id").to_pylist()


def make_order(reader: ShardReader) -> Order:
    return Order(reader.group_rows, 64, 8, 6, seed=3)


def test_stream_is_the_plan_and_ranks_add_up(reader: ShardReader):
    order = make_order(reader)
    stored = ids(reader.read([read for read in _whole(reader)]))

    def planned(epoch: int) -> list[int]:
        starts = np.concatenate([[0], np.cumsum(reader.group_rows)])
        found = []
        for index in range(order.num_windows):
            window = order.window(epoch, index, range(order.lanes))
            rows = [starts[r.row_group] + np.arange(r.start, r.stop) for r in window.reads]
            found += [stored[i] for i in np.concatenate(rows)[window.take]]
        return found

    alone = list(train_stream(reader, order, rank=0, world_size=1, epochs=range(2)))
    assert len(alone) == 2 * order.num_steps
    assert [i for table in alone for i in ids(table)] == planned(0) + planned(1)
    parts = [
        list(train_stream(reader, order, rank=r, world_size=2, epochs=range(2))) for r in range(2)
    ]
    for whole, first, second in zip(alone, *parts, strict=True):
        assert ids(whole) == ids(first) + ids(second)


def test_starting_in_the_middle_gives_the_rest(reader: ShardReader):
    order = make_order(reader)
    whole = list(train_stream(reader, order, rank=1, world_size=2, epochs=range(1)))
    rest = list(train_stream(reader, order, rank=1, world_size=2, epochs=range(1), step=8))
    assert [ids(table) for table in rest] == [ids(table) for table in whole[8:]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_has_every_row_once_in_fixed_chunks(reader: ShardReader, world_size: int):
    parts = [
        table
        for rank in range(world_size)
        for table in eval_stream(
            reader, chunk_rows=64, rank=rank, world_size=world_size, task_rows=200
        )
    ]
    assert [i for part in parts for i in ids(part)] == ids(reader.read(list(_whole(reader))))
    chunks = [columns(part, reader.manifest)["lane"] for part in parts]
    assert [set(lane.tolist()) for lane in chunks] == [{i} for i in range(len(parts))]
    assert all(len(lane) == 64 for lane in chunks[:-1])


def test_columns_are_views_with_the_right_values(reader: ShardReader):
    table = next(eval_stream(reader, chunk_rows=64, rank=0, world_size=1, task_rows=64))
    for piece in (table, table.slice(5, 7)):
        arrays = columns(piece, reader.manifest)
        for modality in reader.manifest.modalities:
            array = arrays[modality.name]
            assert array.shape == (piece.num_rows, *modality.shape)
            raw = piece.column(modality.name).to_pylist()
            assert [row.tobytes() for row in array] == raw


def test_cut_joins_and_splits(reader: ShardReader):
    table = reader.read(list(_whole(reader)))
    pieces = [table.slice(0, 10), table.slice(10, 3), table.slice(13, 20)]
    assert [ids(t) for t in cut(pieces, iter([12, 2, 19]))] == [
        ids(table.slice(0, 12)),
        ids(table.slice(12, 2)),
        ids(table.slice(14, 19)),
    ]


def _whole(reader: ShardReader):
    from data.order import chunk_reads

    return chunk_reads(reader.group_rows, 0, reader.manifest.rows(reader.split))

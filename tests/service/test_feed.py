"""How far is read ahead: worked out by hand from rates, cores and memory."""

from pathlib import Path

import pytest

from data.pipeline import ReadAhead
from data.prepare import prepare
from data.reader import ShardReader
from service.capacity import store_share
from service.config import FeedConfig, load_preset
from service.feed import STEPS_MEASURED, FeedMeter, Node, choose, reader_rows_per_second

GPU_NODE = Node(cpus=16, store_bytes=64 << 30, workers=1, cpus_per_worker=1)
LAPTOP = Node(cpus=2, store_bytes=2 << 30, workers=2, cpus_per_worker=1)
WINDOW = 256 << 20
GIB = 1 << 30


def ahead(
    reader: float, training: float | None, node: Node, config: FeedConfig | None = None
) -> ReadAhead:
    feed = choose(reader, training, window_nbytes=WINDOW, node=node, config=config or FeedConfig())
    return feed.ahead


@pytest.mark.parametrize(
    ("reader", "training", "node", "expected"),
    [
        (1500.0, None, GPU_NODE, ReadAhead(1, 2)),
        (1500.0, 9.0, GPU_NODE, ReadAhead(1, 2)),
        (1500.0, 700.0, GPU_NODE, ReadAhead(1, 2)),
        (1500.0, 4000.0, GPU_NODE, ReadAhead(6, 7)),
        (1500.0, 1e9, GPU_NODE, ReadAhead(15, 16)),
        (1500.0, 1e9, LAPTOP, ReadAhead(1, 1)),
        (1500.0, 1e9, Node(16, 4 << 30, 2, 2), ReadAhead(3, 3)),
        (1500.0, 1e9, Node(1, 1 << 20, 1, 1), ReadAhead(1, 1)),
    ],
)
def test_readers_follow_the_need_and_keep_to_cores_and_memory(reader, training, node, expected):
    """Half of the store, divided by the workers and the window, less the window in use."""
    assert ahead(reader, training, node) == expected


@pytest.mark.parametrize(
    ("shm", "memory", "expected"),
    [  # GiB free in /dev/shm, of the machine, of the store
        (4, 8, 1),  # a laptop
        (23, 23, 4),
        (64, 128, 16),
        (8, 128, 6),  # of a container
        (0.0625, 8, 0.25),
    ],
)
def test_the_store_grows_with_the_machine_and_fits_its_shared_memory(shm, memory, expected):
    found = store_share(int(shm * GIB), memory * GIB)
    assert found == expected * GIB
    assert found <= max(shm * GIB, GIB // 4)


def test_a_large_machine_has_room_for_as_many_readers_as_it_has_cores():
    node = Node(cpus=16, store_bytes=store_share(64 * GIB, 128 * GIB), workers=1, cpus_per_worker=1)
    assert ahead(1500.0, 1e9, node) == ReadAhead(15, 16)


def test_what_is_fixed_is_taken():
    assert ahead(1500.0, 9.0, LAPTOP, FeedConfig(readers=3)) == ReadAhead(3, 1)
    assert ahead(1500.0, 9.0, GPU_NODE, FeedConfig(readers=3)) == ReadAhead(3, 4)
    assert ahead(1500.0, 4000.0, GPU_NODE, FeedConfig(windows_ahead=2)) == ReadAhead(6, 2)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    folder = tmp_path_factory.mktemp("digits")
    report = prepare(load_preset("digits").data, Path(folder))
    return ShardReader(str(folder), report.manifest, "train")


def test_training_is_measured_once_and_slow_first_steps_do_not_count(reader: ShardReader):
    meter = FeedMeter(reader, WINDOW, GPU_NODE, FeedConfig())
    assert meter.feed.training_rows is None
    assert meter.feed.ahead == ReadAhead(1, 2)
    assert "training is not measured yet: 1 reader, 2 windows ahead" in str(meter.feed)
    rate = 3.9 * meter.feed.reader_rows  # times the margin: between 7 and 8 readers
    for seconds in (*[1e3] * 3, *[16 / rate] * (STEPS_MEASURED - 3)):
        assert meter.feed.training_rows is None
        meter.step(16, seconds)
    assert meter.feed.training_rows == pytest.approx(rate)
    assert meter.feed.ahead == ReadAhead(8, 9)
    meter.step(16, 1e3)
    assert meter.feed.training_rows == pytest.approx(rate)
    assert f"training takes {rate:,.0f}: 8 readers, 9 windows ahead" in str(meter.feed)


def test_a_reader_has_a_rate(reader: ShardReader):
    assert reader_rows_per_second(reader) > 0

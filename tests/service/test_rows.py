"""The bridge between the reader and the loop: columns become batches, from any step on."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.pipeline import ReadAhead
from data.prepare import prepare
from data.schema import Manifest
from service.config import load_preset
from service.feed import STEPS_MEASURED, Feed, FeedMeter
from service.rows import WorkerRows, make_order, one_ahead
from training.batch import Batch
from training.methods.base import Resampling

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, one_cpu_ray: None) -> tuple[Manifest, Path]:
    folder = tmp_path_factory.mktemp("digits")
    report = prepare(load_preset("digits").data, folder)
    return report.manifest, folder


def rows_of(prepared: tuple[Manifest, Path]) -> WorkerRows:
    manifest, folder = prepared
    return WorkerRows(load_preset("digits"), manifest, str(folder), torch.device("cpu"))


def test_an_epoch_has_every_training_row_once(prepared: tuple[Manifest, Path]):
    manifest, _ = prepared
    rows = rows_of(prepared)
    for epoch in (0, 1):
        batches = list(rows.train(epoch, None, 0))
        assert len(batches) == make_order(load_preset("digits"), manifest).num_steps
        ids = torch.cat([batch.sample_id for batch in batches])
        assert len(ids.unique()) == len(ids) == manifest.rows("train")
        assert all(len(batch.label) == batch.global_rows for batch in batches)
        assert batches[0].keep is None
        assert batches[0].inputs["audio"].shape == (64, 1, 40, 25)


def test_a_resampled_epoch_has_the_asked_rows_and_masks(prepared: tuple[Manifest, Path]):
    rows = rows_of(prepared)
    everyone = torch.cat([batch.sample_id for batch in rows.evaluation("train")])
    twice = everyone[:100]
    sample_id = torch.cat([everyone, twice])
    keep = torch.ones(len(sample_id), 2, dtype=torch.bool)
    keep[len(everyone) :, 1] = False  # the copies keep the first modality only
    batches = list(rows.train(3, Resampling(sample_id, keep), 0))
    got = torch.cat([batch.sample_id for batch in batches])
    masks = torch.cat([batch.keep for batch in batches if batch.keep is not None])
    assert sorted(got.tolist()) == sorted(sample_id.tolist())
    assert sorted(got[~masks[:, 1]].tolist()) == sorted(twice.tolist())
    assert masks[:, 0].all()


def test_a_plain_epoch_after_a_resampled_one_has_its_own_order(prepared: tuple[Manifest, Path]):
    def ids(batches: Iterator[Batch]) -> list[int]:
        return torch.cat([batch.sample_id for batch in batches]).tolist()

    straight, rows = rows_of(prepared), rows_of(prepared)
    expected = ids(straight.train(2, None, 0))
    everyone = torch.tensor(ids(rows.train(0, None, 0)))
    keep = torch.ones(len(everyone), 2, dtype=torch.bool)
    assert sorted(ids(rows.train(1, Resampling(everyone, keep), 0))) == sorted(expected)
    assert ids(rows.train(2, None, 0)) == expected


@pytest.mark.parametrize("step", [1, 7, 19, 20])
def test_an_epoch_goes_on_from_any_step(prepared: tuple[Manifest, Path], step: int):
    def ids(batches: Iterator[Batch]) -> list[list[int]]:
        return [batch.sample_id.tolist() for batch in batches]

    whole, resumed = rows_of(prepared), rows_of(prepared)
    first, second = ids(whole.train(0, None, 0)), ids(whole.train(1, None, 0))
    assert ids(resumed.train(0, None, step)) == first[step:]
    assert ids(resumed.train(1, None, 0)) == second
    everyone = torch.tensor(sum(first, []))
    keep = torch.ones(len(everyone), 2, dtype=torch.bool)
    resampled = ids(whole.train(2, Resampling(everyone, keep), 0))
    assert ids(resumed.train(2, Resampling(everyone, keep), step)) == resampled[step:]


def test_validation_is_the_same_from_the_cache(prepared: tuple[Manifest, Path]):
    rows = rows_of(prepared)
    first, second = (list(rows.evaluation("val")) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a.sample_id == b.sample_id).all()
        assert (a.inputs["image"] == b.inputs["image"]).all()


def test_the_stream_begins_again_to_read_further_ahead_and_rows_stay(
    prepared: tuple[Manifest, Path], monkeypatch: pytest.MonkeyPatch
):
    def ids(rows: WorkerRows) -> list[list[int]]:
        return [batch.sample_id.tolist() for e in range(2) for batch in rows.train(e, None, 0)]

    expected = ids(rows_of(prepared))
    further = ReadAhead(3, 4)

    def choose(meter: FeedMeter, reader_rows: float, training_rows: float | None) -> Feed:
        return Feed(reader_rows, training_rows, further if training_rows else ReadAhead())

    monkeypatch.setattr(FeedMeter, "_choose", choose)
    rows = rows_of(prepared)
    assert rows.feed is None
    assert ids(rows) == expected
    assert len(expected) > STEPS_MEASURED
    assert rows.feed is not None
    assert rows.feed.ahead == further
    assert rows.feed.training_rows is not None
    assert rows.prepare_seconds > 0


def test_one_item_is_made_ahead():
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    source = one_ahead(items(), torch.device("cpu"))
    assert made == []
    assert next(source) == 0
    deadline = time.monotonic() + 20
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [0, 1]
    assert list(source) == [1, 2, 3, 4]


def test_an_error_comes_out_where_its_item_was_due():
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise ValueError("broken row")

    source = one_ahead(items(), torch.device("cpu"))
    assert [next(source), next(source)] == [0, 1]
    with pytest.raises(ValueError, match="broken row"):
        next(source)
    assert next(source, None) is None


def test_the_thread_ends_when_training_stops_early():
    before = set(threading.enumerate())
    source = one_ahead(iter(range(100)), torch.device("cpu"))
    assert next(source) == 0
    (thread,) = set(threading.enumerate()) - before
    del source
    thread.join(20)
    assert not thread.is_alive()

"""The step around a method: micro-batches, numbers read late, and where its time went."""

import time
from dataclasses import replace

import pytest
import torch

from tests.training.toys import START, random_batch, tiny_method
from training.clock import STEP, Clock, gpu_utilization, percentiles
from training.delayed import Delayed
from training.distributed import exchanges, reduce_sums
from training.methods import pairing
from training.optim import OptimConfig, build_optimizer


def with_lane_rows(batch):
    rows = tuple(torch.bincount(batch.lane, minlength=batch.num_lanes).tolist())
    return replace(batch, lane_rows=rows)


@pytest.mark.parametrize("rows", [16, 13])
def test_micro_batches_share_every_lane_evenly_and_lose_no_row(rows):
    batch = with_lane_rows(random_batch(0, rows))
    parts = batch.micro_batches(2)
    assert sum(part.global_rows for part in parts) == rows
    found = torch.cat([part.sample_id for part in parts])
    assert sorted(found.tolist()) == sorted(batch.sample_id.tolist())
    for part in parts:
        counts = torch.bincount(part.lane, minlength=part.num_lanes).tolist()
        assert tuple(counts) == part.lane_rows
        assert part.global_rows == len(part.label)
        for name, value in part.inputs.items():
            places = [batch.sample_id.tolist().index(i) for i in part.sample_id.tolist()]
            assert torch.equal(value, batch.inputs[name][places])


def test_more_micro_batches_than_rows_leaves_empty_ones_out():
    batch = with_lane_rows(random_batch(0, 4))
    assert [part.global_rows for part in batch.micro_batches(3)] == [4]


def test_micro_batches_have_the_gradient_of_the_whole_batch():
    """For a method whose loss is a mean over rows."""
    batch = with_lane_rows(random_batch(0, 16))
    grads, sums = [], []
    for count in (1, 4):
        method = tiny_method("joint_uni")
        method.micro_batches = count
        optimizer = build_optimizer(OptimConfig(), method)
        carried = replace(batch, carried={"asked": torch.ones(())})
        sums.append(method.train_step(method, carried, optimizer, START))
        grads.append([p.grad for p in method.parameters()])
    for whole, parts in zip(*grads, strict=True):
        torch.testing.assert_close(parts, whole)
    for name, value in sums[0].items():
        torch.testing.assert_close(sums[1][name], value)


def test_micro_batches_of_midas_pair_inside_themselves_and_move_alpha_once():
    batch = with_lane_rows(random_batch(0, 16))
    method = tiny_method("midas", eta=0.5)
    method.micro_batches = 2
    optimizer = build_optimizer(OptimConfig(), method)
    sums = method.train_step(method, batch, optimizer, START)
    alone = tiny_method("midas", eta=0.5)
    optimizer = build_optimizer(OptimConfig(), alone)
    half = batch.micro_batches(2)[0]
    first = alone.train_step(alone, half, optimizer, START)
    assert sums["n_valid"] > first["n_valid"] > 0
    assert float((method.alpha - 1).abs().max()) in (0.0, 0.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("pair_groups", [1, 2, 4])
def test_pool_knows_its_groups_without_looking(pair_groups):
    batch = random_batch(0, 13)
    known = pairing.make_pool(with_lane_rows(batch), pair_groups)
    assert known.sizes is not None
    assert pairing.make_pool(batch, pair_groups).sizes is None
    drawn = [pairing.draw_uniforms(known.group_G, 3, START, s) for s in (known.sizes, None)]
    assert torch.equal(*drawn)


def test_numbers_are_late_on_a_gpu_only_and_none_is_lost():
    at_once = Delayed()
    assert at_once.put(torch.tensor([1.0])) == [1.0]
    assert at_once.flush() is None
    late = Delayed(late=True)
    assert late.put(torch.tensor([1.0])) is None
    assert late.peek() == [1.0]
    assert late.put(torch.tensor([2.0])) == [1.0]
    assert late.flush() == [2.0]
    assert late.flush() is None


def test_one_process_waits_for_nobody():
    before = exchanges.seconds
    reduce_sums({"rows": torch.ones(1_000_000)})
    assert exchanges.seconds == before


def test_a_gpu_that_cannot_be_watched_ends_nothing(monkeypatch):
    """Here the library that torch asks is installed, and finds no driver."""
    assert torch.cuda._HAS_PYNVML
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    percent = gpu_utilization()
    assert percent is None or 0 <= percent <= 100


def test_clock_gives_all_time_to_names_and_steps():
    clock = Clock()
    for _ in range(3):
        time.sleep(0.01)
        clock.mark("wait")
        time.sleep(0.02)
        clock.mark(STEP)
    assert len(clock.steps) == 3
    assert sum(clock.steps) == pytest.approx(sum(clock.seconds.values()))
    assert clock.seconds["wait"] >= 0.03
    assert clock.seconds[STEP] >= 0.06
    clock.reset()
    assert not clock.steps
    assert not clock.seconds


def test_preparing_is_not_waiting():
    clock = Clock()
    time.sleep(0.03)
    clock.mark("wait")
    clock.move("wait", "prepare", 0.02)
    clock.mark(STEP)
    assert clock.seconds["prepare"] == 0.02
    assert clock.seconds["wait"] >= 0.01
    assert sum(clock.steps) == pytest.approx(sum(clock.seconds.values()))


def test_percentiles():
    assert percentiles([3.0]) == (3.0, 3.0)
    assert percentiles([float(i) for i in range(101)]) == (50.0, 95.0)

"""Two gloo ranks equal one process on the same global batches, for every method (2.7)."""

from typing import Any

import pytest
import torch
import torch.multiprocessing

from tests.training import parity_worker
from tests.training.parity_worker import CASES, ROWS_A
from training.chain import order_text
from training.loop import LOSS, ORDER
from training.methods import METHODS

TIMINGS = ("time/", "speed/", "memory/")


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    threads = torch.get_num_threads()
    results = parity_worker.run_cases()
    torch.set_num_threads(threads)
    return results


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(parity_worker.main, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_every_method_has_a_case():
    assert {case["name"] for case in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(case, one, two):
    """20 steps with a change from warm-up to main phase, uneven and unpairable batches."""
    alone = one[case]
    for ranks in two:
        assert ranks[case]["state"].keys() == alone["state"].keys()
        for key, value in alone["state"].items():
            torch.testing.assert_close(
                ranks[case]["state"][key],
                value,
                atol=1e-6,
                rtol=0,
                msg=lambda m, k=key: f"{k}: {m}",
            )
        assert len(ranks[case]["steps"]) == 20
        for got, want in zip(ranks[case]["steps"], alone["steps"], strict=True):
            assert float(got[LOSS]) == pytest.approx(float(want[LOSS]), abs=1e-6)
            assert order_text(got[ORDER]) == order_text(want[ORDER])
            assert (float(got["ranks"]), float(want["ranks"])) == (2, 1)
        for got, want in zip(ranks[case]["metrics"], alone["metrics"], strict=True):
            comparable = {k: v for k, v in want.items() if not k.startswith(TIMINGS)}
            assert {k: got[k] for k in comparable} == pytest.approx(comparable, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_exactly(case, two):
    for key, value in two[0][case]["state"].items():
        assert torch.equal(value, two[1][case]["state"][key]), key


@pytest.mark.parametrize("case", CASES)
def test_the_runs_did_something(case, one):
    """Parameters moved, and alpha left 1 at some time, so that equality means something."""
    run = one[case]
    moved = [k for k, v in run["state"].items() if not torch.equal(v, run["before"][k])]
    assert any(".encoders." in key for key in moved)
    if case.startswith("midas"):
        assert any(".fusion." in key for key in moved)
        means = [v for m in run["metrics"] for k, v in m.items() if k.startswith("alpha_mean/")]
        assert max(means) > 1


def test_gradients_that_travel_in_half_precision(one, two):
    exact = one["compressed"]["none"]
    for ranks in two:
        got = ranks["compressed"]
        torch.testing.assert_close(got["none"], exact)
        for kind, tolerance in (("bf16", 2**-7), ("fp16", 2**-9)):
            assert not torch.equal(got[kind], exact)
            torch.testing.assert_close(got[kind], exact, rtol=tolerance, atol=1e-3)


def test_gathered_rows_pass_gradients_back(one, two):
    """Rank-dependent losses: each rank gets its rows' gradient of the sum of both losses."""
    alone = one["gather"]
    for ranks, own in zip(two, (slice(0, ROWS_A), slice(ROWS_A, None)), strict=True):
        assert torch.equal(ranks["gather"]["rows"], alone["rows"])
        torch.testing.assert_close(ranks["gather"]["grad"], alone["grad"][own], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_batchnorm_sees_the_global_batch(dtype, atol, one, two):
    """Ranks with 2 and 3 images against torch's BatchNorm on all five, forward and backward."""
    alone = one["batchnorm"][dtype]
    for ranks, own in zip(two, (slice(0, ROWS_A), slice(ROWS_A, None)), strict=True):
        for name, value in ranks["batchnorm"][dtype].items():
            want = alone[name][own] if name in ("output", "input") else alone[name]
            torch.testing.assert_close(value, want, atol=atol, rtol=0)


def test_gradients_are_views_of_the_buckets_that_travel(one, two):
    pieces, count = one["gradient_storages"]
    assert pieces == count > 2
    for ranks in two:
        assert ranks["gradient_storages"] == (1, count)


def test_statistics_of_one_encoder_travel_while_the_other_computes(one, two):
    """Three encoders, of which one needs no exchange in the backward pass; the loss's sums travel
    beside all of that."""
    assert one["travels"] == []
    forward = ["all_gather"] * 3 + ["wait"] * 3
    backward = ["all_reduce", "all_reduce", "wait", "wait"]
    for ranks in two:
        assert ranks["travels"] == [*forward, "all_reduce", *backward, "wait"]


def test_few_collectives_in_a_step(one, two):
    """Counts, labels, features and their gradient, sums; or valid pairs and sums."""
    assert one["collectives"] == {1: [], 2: []}
    for ranks in two:
        assert ranks["collectives"] == {
            1: ["all_reduce", "all_gather", "all_gather", "all_reduce", "all_reduce"],
            2: ["all_reduce", "all_reduce"],
        }


@pytest.mark.parametrize(
    ("labels", "total", "mis", "num_misaligned", "alpha"),
    [
        ((0, 1, 2, 1), 3.808434, 13.884789, 8, 1.25),
        ((0, 0, 2, 1), 4.710623, 4 * 1.587787, 4, 1.15),  # rank 0 has no valid pair
    ],
)
def test_vector_c_on_two_ranks(labels, total, mis, num_misaligned, alpha, two):
    """The numbers of methods.md 2.10, each rank holding two of the four rows."""
    for ranks in two:
        got = ranks["vector_c"][labels]
        assert got["loss_sum"] / 4 == pytest.approx(total, abs=1e-6)
        assert got["loss_mis"] == pytest.approx(mis, abs=4e-6)
        assert 2 * got["n_valid"] == num_misaligned
        assert got["alpha"].tolist() == pytest.approx([1, alpha], abs=1e-6)

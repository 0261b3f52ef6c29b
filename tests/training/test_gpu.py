"""What only a GPU can show; left out where there is none."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.training.toys import START, random_batch, tiny_method
from training.batch import Batch
from training.batchnorm import _Arrival, _Arrive, _Normalise, _own_statistics, _pooled
from training.chain import order_digest
from training.clock import Clock
from training.delayed import Delayed
from training.evaluation import evaluated_subsets, local_sums
from training.loop import Position, _seed
from training.optim import OptimConfig, build_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

GPU = torch.device("cuda:0")


def gpu_batch(rows: int = 32) -> Batch:
    batch = random_batch(0, rows)
    return replace(
        batch,
        inputs={name: value.to(GPU) for name, value in batch.inputs.items()},
        label=batch.label.to(GPU),
        sample_id=batch.sample_id.to(GPU),
        lane=batch.lane.to(GPU),
        lane_rows=tuple(batch.lane.bincount(minlength=batch.num_lanes).tolist()),
        chunk=0,
    )


@pytest.fixture
def no_waiting():
    """Call it: from then on an operation that waits for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_of_midas_does_not_wait_for_the_device(precision, micro_batches, no_waiting):
    method = tiny_method("midas", batchnorm=True).to(GPU)
    method.use(precision)
    method.micro_batches, method.clock = micro_batches, Clock(GPU)
    optimizer = build_optimizer(OptimConfig(), method)
    batch, position, delayed = gpu_batch(), Position(), Delayed()
    for number in range(5):
        if number == 3:
            no_waiting()
        progress = replace(START, step=number)
        _seed(progress.stream_seed("torch", 0), GPU)
        carried = {"order": order_digest(batch), "stop": torch.full((), 0.0, device=GPU)}
        sums = method.train_step(method, replace(batch, carried=carried), optimizer, progress)
        position.add(sums)
        delayed.put(torch.stack([sums["stop"], sums["loss_sum"]]))
    torch.cuda.set_sync_debug_mode("default")
    assert float(position.totals["rows"]) == 5 * 32
    assert bool(position.totals["loss_sum"].isfinite())


def test_an_evaluated_chunk_does_not_wait_for_the_device(no_waiting):
    method, batch = tiny_method("midas").to(GPU).eval(), gpu_batch()
    kept = evaluated_subsets(method.model.modalities, all_subsets=False)

    def evaluated() -> dict[str, Tensor]:
        with torch.no_grad():
            return local_sums(method, [batch], seed=0, kept=kept, device=GPU)[0]

    evaluated()
    no_waiting()
    sums = evaluated()
    torch.cuda.set_sync_debug_mode("default")
    assert float(sums["rows"]) == 32


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batchnorm_of_many_ranks_is_the_same_on_the_device(layout, dtype):
    """Output and gradients, against those of the CPU in float64."""
    generator = torch.Generator().manual_seed(0)
    images = (torch.randn(6, 4, 5, 5, generator=generator) * 3 + 1).to(dtype)
    slopes = torch.randn(6, 4, 5, 5, generator=generator).to(dtype)

    def normalised(device: torch.device | str, as_type: torch.dtype) -> list[Tensor]:
        own = images.to(device, as_type, memory_format=layout).requires_grad_()
        weight = torch.linspace(0.5, 2, 4, device=device, dtype=_weights(as_type)).requires_grad_()
        bias = torch.zeros_like(weight).requires_grad_()
        arrival = _Arrival()
        found = _pooled(_own_statistics(own)[None])
        output = _Normalise.apply(_Arrive.apply(own, arrival), weight, bias, *found, 1e-5, arrival)
        assert isinstance(output, Tensor)
        (output * slopes.to(device, as_type)).sum().backward()
        found = (output, own.grad, weight.grad, bias.grad)
        return [value.detach().cpu().double() for value in found if value is not None]

    got, want = normalised(GPU, dtype), normalised("cpu", torch.float64)
    assert len(got) == 4
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine, exact, rtol=tolerance, atol=tolerance)


def _weights(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def test_an_overflow_in_float16_leaves_the_step_out_on_the_device():
    method = tiny_method("joint").to(GPU)
    method.use("fp16")
    assert method.loss_scale is not None
    optimizer = build_optimizer(OptimConfig(), method)
    method.loss_scale.factor.fill_(2.0**126)
    before = [p.clone() for p in method.parameters()]
    sums = method.train_step(method, gpu_batch(), optimizer, START)
    assert (float(sums["finite"]), float(method.loss_scale.factor)) == (0, 2.0**125)
    assert all(map(torch.equal, before, method.parameters()))
    method.loss_scale.factor.fill_(2.0**10)
    assert float(method.train_step(method, gpu_batch(), optimizer, START)["finite"]) == 1
    assert not all(map(torch.equal, before, method.parameters()))

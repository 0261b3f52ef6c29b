"""Batch normalisation over the global batch, so that the number of workers changes nothing.

Torch's own SyncBatchNorm refuses CPU tensors, and DDP refuses it on CPUs. Shapes: B rows of this
rank, C channels, N elements per channel over all ranks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from training.distributed import PendingSums, PendingTable, exchanges, world_size
from training.turns import pause


class SyncBatchNorm(_BatchNorm):
    """BatchNorm by the statistics of all ranks' rows, on any device; alone it is torch's BatchNorm.

    Ranks may have different numbers of rows, also none. Costs one exchange of 2C + 1 numbers in
    the forward pass and one of 2C in the backward pass; among calls that take turns (`in_turns`)
    both travel while another call's layers compute, in the backward pass too.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) to the same shape, normalised by the statistics of all ranks' rows."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        arrival = _Arrival()
        input = _Arrive.apply(input, arrival)
        statistics = PendingTable(_own_statistics(input))
        pause()
        mean_C, var_C, count = _pooled(statistics.wait())
        if self.track_running_stats:
            self._track(mean_C, var_C * (count / (count - 1).clamp_min(1)))
        weight = torch.ones_like(mean_C) if self.weight is None else self.weight
        bias = torch.zeros_like(mean_C) if self.bias is None else self.bias
        return _Normalise.apply(input, weight, bias, mean_C, var_C, count, self.eps, arrival)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any input with channels is taken."""

    def _track(self, mean_C: Tensor, unbiased_var_C: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased_var_C.to(self.running_var.dtype), factor)


def synchronise(module: nn.Module) -> None:
    """Replace every BatchNorm inside `module` by a SyncBatchNorm with the same state."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            settings = (child.num_features, child.eps, child.momentum, child.affine)
            layer = SyncBatchNorm(*settings, child.track_running_stats)
            layer.load_state_dict(child.state_dict())
            setattr(module, name, layer)
        else:
            synchronise(child)


def _own_statistics(input: Tensor) -> Tensor:
    """Mean, biased variance and number of this rank's elements per channel, (2C + 1,) float64."""
    own = torch.zeros(2 * input.shape[1] + 1, dtype=torch.float64, device=input.device)
    if not input.numel():
        return own
    # Much faster than var_mean on CPUs; it answers in the type of what it tracks.
    tracked = input.new_zeros(2, input.shape[1], dtype=_wide(input))
    mean_C, var_C = torch.ops.aten.batch_norm_update_stats(input.detach(), *tracked, 0.0)
    count = own.new_full((1,), input.numel() // input.shape[1])
    return torch.cat([mean_C.double(), var_C.double(), count])


def _pooled(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,) and biased variance (C,) over all ranks' elements, and N, (), from what every rank
    has found, (W, 2C + 1)."""
    num_channels = table.shape[1] // 2
    mean_WC, var_WC, count_W1 = table.split([num_channels, num_channels, 1], dim=1)
    count = count_W1.sum()
    mean_C = (mean_WC * count_W1).sum(dim=0) / count
    var_C = ((var_WC + (mean_WC - mean_C).square()) * count_W1).sum(dim=0) / count
    return mean_C, var_C, count


class _Arrival:
    """What `_Normalise` leaves to `_Arrive` in a backward pass."""

    sums: PendingSums
    saved: tuple[Tensor, ...]


class _Arrive(torch.autograd.Function):
    """The identity. Its backward pass is the second half of that of `_Normalise`, so that between
    them, while sums travel, the backward pass of another encoder can go on."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, arrival: _Arrival) -> Tensor:
        ctx.arrival = arrival
        return input.view_as(input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradient of the input from that of the output, which `_Normalise` hands through."""
        arrival: _Arrival = ctx.arrival
        input, mean_C, weight_C, invstd_C, count = arrival.saved
        with exchanges.counted(input.device):
            sums = arrival.sums.wait()
        del arrival.saved, arrival.sums
        slope_C = -sums["dot"] * invstd_C / count
        shift_C = -sums["plain"] / count - slope_C * mean_C
        slope, shift, scale = (
            _per_channel(value, input)
            for value in (slope_C, shift_C * weight_C * invstd_C, weight_C * invstd_C)
        )
        grad = torch.addcmul(grads[0], input, slope)
        torch.addcmul(shift, grad, scale, out=grad)
        return grad, None


class _Normalise(torch.autograd.Function):
    """Normalise by given statistics; the backward pass knows that they come from all ranks' rows.

    With xhat = (x - mean) * invstd, the gradient of x is
    weight * invstd * (dy - sum(dy) / N - xhat * sum(dy * xhat) / N), sums over all ranks. This
    rank's sums are what torch's kernel computes for fixed statistics.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean_C: Tensor,
        var_C: Tensor,
        count: Tensor,
        eps: float,
        arrival: _Arrival,
    ) -> Tensor:
        fixed = [value.to(_wide(input)) for value in (mean_C, var_C, weight, bias)]
        ctx.save_for_backward(input, *fixed[:3])
        ctx.count, ctx.eps, ctx.arrival = count, eps, arrival
        return functional.batch_norm(input, *fixed, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        input, mean_C, var_C, weight_C = ctx.saved_tensors
        grad_weight_C, grad_bias_C = mean_C.new_zeros(2, len(mean_C))
        if input.numel():  # torch's kernel divides by the number of rows
            # CPUs read mean and variance, GPUs mean and inverse deviation.
            read = (mean_C, var_C, mean_C, (var_C + ctx.eps).rsqrt())
            _, grad_weight_C, grad_bias_C = torch.ops.aten.native_batch_norm_backward(
                *(grads[0], input, weight_C, *read, False, ctx.eps), [False, True, True]
            )
        if ctx.needs_input_grad[0]:
            ctx.arrival.sums = PendingSums({"dot": grad_weight_C, "plain": grad_bias_C})
            invstd_C = (var_C.double() + ctx.eps).rsqrt()
            # Detached, or it would hold what holds it until its other half has run.
            ctx.arrival.saved = (input.detach(), mean_C, weight_C, invstd_C, ctx.count)
        return grads[0], grad_weight_C, grad_bias_C, None, None, None, None, None


def _per_channel(value_C: Tensor, input: Tensor) -> Tensor:
    """`value_C` in the type of `input`, shaped to go with it: (1, C, 1, ...); on CPUs spread over
    one row, (1, C, ...), as torch's loops over a broadcast operand are only C elements long there.
    """
    value = value_C.to(input.dtype).reshape(1, -1, *[1] * (input.dim() - 2))
    return torch.empty_like(input[:1]).copy_(value) if input.device.type == "cpu" else value


def _wide(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32

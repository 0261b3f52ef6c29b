"""The one place that talks to torch.distributed; alone, everything here is the identity."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank, 0 when alone."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Number of data-parallel processes, 1 when alone."""
    return dist.get_world_size() if _active() else 1


def reduce_sums(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add tensors over ranks in a single fp64 all-reduce.

    Args:
        sums: name -> tensor of any shape; the same names, order and shapes on every rank.

    Returns:
        name -> fp64 tensor of the same shape, equal on every rank.
    """
    if not sums:
        return {}
    flat = torch.cat([value.detach().double().reshape(-1) for value in sums.values()])
    if world_size() > 1:
        dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in sums.values()])
    return {
        name: part.reshape(value.shape)
        for (name, value), part in zip(sums.items(), parts, strict=True)
    }


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value, on every rank; for small things that torch can pickle, not for tensors."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool) -> bool:
    """Whether it is so on some rank; the same answer on every rank."""
    if world_size() == 1:
        return flag
    flags: list[bool] = [False] * world_size()
    dist.all_gather_object(flags, flag)
    return any(flags)


def sync_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0.

    Running statistics of BatchNorm differ between ranks after a step; validation and checkpoint
    must see one model.
    """
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


class _Gather(torch.autograd.Function):
    """Concatenate rows of all ranks; backward adds the gradients of all ranks and cuts out ours."""

    @staticmethod
    def forward(ctx, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, *grads: Tensor):
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.split(ctx.counts)[rank()], None


def row_counts(count: int, device: torch.device) -> list[int]:
    """Rows that each rank holds, in rank order."""
    if world_size() == 1:
        return [count]
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = count
    dist.all_reduce(counts)
    return counts.tolist()


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """Concatenate `rows` (n_r, ...) of all ranks to (sum n_r, ...) in rank order; differentiable.

    Args:
        rows: this rank's rows; ranks may hold different numbers of rows, also none.
        counts: rows per rank, from `row_counts`.

    The backward pass adds the gradients that all ranks computed for a row, so with losses scaled as
    in `StepOutput` the averaged gradient equals that of one process (methods.md 2.7).
    """
    return rows if world_size() == 1 else _Gather.apply(rows, counts)


def add_in_rank_order(wrapped: DistributedDataParallel) -> None:
    """Make DDP add the gradients of ranks 0, 1, 2, ... in this order.

    An all-reduce over more than two ranks adds in an order that depends on where a gradient lies
    in its bucket, and DDP lays the buckets out anew after the first step of a process: a resumed
    run would round differently. Costs the traffic of an all-gather.
    """

    def hook(state: None, bucket: Any) -> torch.futures.Future[Tensor]:
        own = bucket.buffer()
        parts = [torch.empty_like(own) for _ in range(world_size())]
        work = dist.all_gather(parts, own, async_op=True)
        assert work is not None

        def mean(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            total = parts[0]
            for part in parts[1:]:
                total += part
            return total.div_(world_size())

        return work.get_future().then(mean)

    wrapped.register_comm_hook(None, hook)

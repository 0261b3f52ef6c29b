"""The one place that talks to torch.distributed; alone, everything here is the identity."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank, 0 when alone."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Number of data-parallel processes, 1 when alone."""
    return dist.get_world_size() if _active() else 1


class Exchanges:
    """Time that this process has waited for others inside forward and backward passes.

    Collectives on a GPU return at once, and nothing is counted; nor is one process's own work.

    Attributes:
        seconds: since the process began.
    """

    seconds = 0.0

    @contextlib.contextmanager
    def counted(self, device: torch.device) -> Iterator[None]:
        """Count the body, which exchanges what is on `device`."""
        began = time.perf_counter()
        yield
        if device.type == "cpu" and world_size() > 1:
            self.seconds += time.perf_counter() - began


exchanges = Exchanges()


class PendingSums:
    """Sums on their way through an all-reduce that goes on beside other work.

    Args:
        sums: name -> tensor of any shape; the same names, order and shapes on every rank.
    """

    def __init__(self, sums: dict[str, Tensor]):
        self._shapes = {name: value.shape for name, value in sums.items()}
        self._flat = torch.cat([value.detach().double().reshape(-1) for value in sums.values()])
        alone = world_size() == 1
        self._work = None if alone else dist.all_reduce(self._flat, async_op=True)

    def wait(self) -> dict[str, Tensor]:
        """name -> fp64 tensor of the same shape, added over ranks, equal on every rank."""
        if self._work is not None:
            self._work.wait()
        parts = self._flat.split([shape.numel() for shape in self._shapes.values()])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }


class PendingTable:
    """Rows on their way through an all-gather that goes on beside other work.

    Args:
        row: (N,), of the same length and dtype on every rank.
    """

    def __init__(self, row: Tensor):
        self._device = row.device
        self._rows = [torch.empty_like(row) for _ in range(world_size())]
        self._work = dist.all_gather(self._rows, row, async_op=True)

    def wait(self) -> Tensor:
        """(W, N), a row for each rank, in rank order."""
        assert self._work is not None
        with exchanges.counted(self._device):
            self._work.wait()
        return torch.stack(self._rows)


def reduce_sums(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add tensors over ranks in a single fp64 all-reduce; see `PendingSums`."""
    if not sums:
        return {}
    with exchanges.counted(next(iter(sums.values())).device):
        return PendingSums(sums).wait()


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value, on every rank; for small things that torch can pickle, not for tensors."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_ranks(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank; for small things that torch can pickle."""
    values = [value]
    if world_size() > 1:
        values *= world_size()
        dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether it is so on some rank; the same answer on every rank."""
    return any(from_ranks(flag))


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
        with exchanges.counted(rows.device):
            dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, *grads: Tensor):
        total = grads[0].contiguous().clone()
        with exchanges.counted(total.device):
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


def without_exchange(wrapped: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Context in which the backward pass adds to gradients without averaging them over ranks."""
    alone = not isinstance(wrapped, DistributedDataParallel)
    return contextlib.nullcontext() if alone else wrapped.no_sync()


@contextlib.contextmanager
def process_group(rank: int, world_size: int, meeting: str, device: torch.device) -> Iterator[None]:
    """A process group for the body; `meeting` is a URL: tcp://, or file:// and a shared path."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


Compression = Literal["none", "bf16", "fp16"]
COMPRESSIONS = {
    "none": default_hooks.allreduce_hook,
    "bf16": default_hooks.bf16_compress_hook,
    "fp16": default_hooks.fp16_compress_hook,
}


def data_parallel(
    module: nn.Module,
    *,
    in_rank_order: bool,
    compression: Compression,
    launched: Callable[[], None],
) -> nn.Module:
    """`module` inside DDP, if there are other ranks.

    Buffers are not broadcast in every step: running statistics are not read in training, the loop
    synchronises them every epoch, and what steers a method is equal on every rank by construction.

    Args:
        module: on its device.
        in_rank_order: add the gradients of ranks 0, 1, 2, ... in this order. An all-reduce over
            more than two ranks adds in an order that depends on where a gradient lies in its
            bucket, and DDP lays the buckets out anew after the first step of a process: a resumed
            run would round differently. Costs the traffic of an all-gather.
        compression: type in which gradients travel and are added; not with `in_rank_order`.
        launched: called when a bucket of gradients is full and about to travel.
    """
    if world_size() == 1:
        return module
    device = next(module.parameters()).device
    wrapped = DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
    plain, group = COMPRESSIONS[compression], wrapped.process_group
    assert group is not None

    def hook(state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        launched()
        return _add_in_rank_order(bucket) if in_rank_order else plain(group, bucket)

    wrapped.register_comm_hook(None, hook)
    return wrapped


def _add_in_rank_order(bucket: GradBucket) -> torch.futures.Future[Tensor]:
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

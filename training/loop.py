"""The training loop, written once: epochs of steps, validation, and a report after each epoch.

Knows nothing of Ray, files or MLflow; it is handed callables and calls them in order.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from training.batch import Batch, Progress
from training.distributed import rank, sync_buffers
from training.methods.base import EpochData, Method, Resampling


@dataclass(frozen=True)
class Hooks:
    """What the surroundings provide.

    Attributes:
        wrap: method -> module to call in a step (DDP, or the method itself).
        train_batches: (epoch, resampling) -> this rank's batches, the same number on every rank.
        data: fresh passes over train and validation rows for `Method.before_epoch`.
        validate: -> metrics of the validation split, equal on every rank.
        on_step: called after every step with the sums of the epoch so far (reduced over ranks).
        on_epoch: called after every epoch with the epoch and its metrics, on every rank.
    """

    wrap: Callable[[Method], nn.Module]
    train_batches: Callable[[int, Resampling | None], Iterator[Batch]]
    data: EpochData
    validate: Callable[[], dict[str, float]]
    on_step: Callable[[Progress, dict[str, Tensor]], None]
    on_epoch: Callable[[int, dict[str, float]], None]


def fit(
    method: Method,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    hooks: Hooks,
    *,
    seed: int,
    start_epoch: int,
    num_epochs: int,
    eval_every_epochs: int,
) -> None:
    """Train epochs [start_epoch, num_epochs).

    Validation runs every `eval_every_epochs` epochs and after the last one.

    Raises:
        NonFiniteError: on every rank, before the optimizer moved.
    """
    wrapped: nn.Module = method
    trainable = None
    for epoch in range(start_epoch, num_epochs):
        began = time.monotonic()
        method.set_phase(epoch)
        if trainable != (now := [p.requires_grad for p in method.parameters()]):
            if wrapped is not method:
                wrapped = method
                gc.collect()  # DDP is in a reference cycle; its reducer must let go of gradients
            wrapped, trainable = hooks.wrap(method), now
        start = Progress(seed, epoch, 0, num_epochs)
        resampling = method.before_epoch(hooks.data, start)
        metrics = {
            "lr": scheduler.get_last_lr()[0],
            "main_phase": float(method.is_main_phase(epoch)),
        }
        batches = hooks.train_batches(epoch, resampling)
        metrics |= _train_epoch(method, wrapped, batches, optimizer, hooks, start)
        scheduler.step()
        sync_buffers(method)
        if (epoch + 1) % eval_every_epochs == 0 or epoch + 1 == num_epochs:
            metrics |= hooks.validate()
        metrics["time/epoch_seconds"] = time.monotonic() - began
        hooks.on_epoch(epoch, metrics)


def _train_epoch(
    method: Method,
    wrapped: nn.Module,
    batches: Iterator[Batch],
    optimizer: Optimizer,
    hooks: Hooks,
    start: Progress,
) -> dict[str, float]:
    """One epoch of steps; metrics from sums that were reduced once per step."""
    method.train()
    totals: dict[str, Tensor] = {}
    waited, began = 0.0, time.monotonic()
    step = 0
    while True:
        asked = time.monotonic()
        batch = next(batches, None)
        waited += time.monotonic() - asked
        if batch is None:
            break
        progress = Progress(start.seed, start.epoch, step, start.num_epochs)
        torch.manual_seed(progress.stream_seed("torch", rank()))  # dropout and the like
        sums = method.train_step(wrapped, batch, optimizer, progress)
        totals = {name: totals[name] + value if totals else value for name, value in sums.items()}
        hooks.on_step(progress, totals)
        step += 1
    seconds = time.monotonic() - began
    return {
        "train/loss": float(totals["loss_sum"] / totals["rows"]),
        **method.epoch_metrics(totals),
        "data/rows_per_second": float(totals["rows"]) / seconds,
        "data/wait_share": waited / seconds,
        "time/step_seconds": (seconds - waited) / step,
    }

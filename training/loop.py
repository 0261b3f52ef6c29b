"""The training loop, written once: epochs of steps, validation, and a report after each epoch.

Knows nothing of Ray, files or MLflow; it is handed callables and calls them in order. It can start
between any two steps: a `Position`, with the state of method, optimizer and schedule, is all that
the steps after it depend on.
"""

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from training.batch import Batch, Progress
from training.chain import order_digest
from training.distributed import rank, sync_buffers
from training.methods.base import EpochData, Method, Resampling

ORDER = "step/order"
LOSS = "step/loss"


@dataclass
class Position:
    """Where training stands between two steps.

    Attributes:
        epoch: 0-based epoch.
        step: steps of it that are done.
        steps_done: steps of the whole run that are done.
        totals: sums over the steps of the epoch, reduced over ranks.
        seconds: time these steps took, and `waited` seconds of it for data.
        resampling: the epoch's rows, if they are not every row once.
    """

    epoch: int = 0
    step: int = 0
    steps_done: int = 0
    totals: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0
    resampling: Resampling | None = None

    def add(self, sums: dict[str, Tensor]) -> None:
        """Count one more step."""
        self.totals = {
            name: self.totals[name] + value if self.totals else value
            for name, value in sums.items()
        }
        self.step += 1
        self.steps_done += 1


@dataclass(frozen=True)
class Hooks:
    """What the surroundings provide.

    Attributes:
        wrap: method -> module to call in a step (DDP, or the method itself).
        train_batches: (epoch, resampling, first step) -> this rank's batches from that step on;
            the same number on every rank.
        data: fresh passes over train and validation rows for `Method.before_epoch`.
        signals: -> this rank's numbers that a step is to add over ranks, by name.
        on_step: called after every step with the position behind it and the step's reduced
            signals, with ORDER (see chain.order_digest) and LOSS, the mean over the batch.
        on_trained: called when the steps of an epoch are done, before `validate` if it is due.
        validate: -> metrics of the validation split, equal on every rank.
        on_epoch: called after every epoch with the epoch and its metrics, on every rank.
    """

    wrap: Callable[[Method], nn.Module]
    train_batches: Callable[[int, Resampling | None, int], Iterator[Batch]]
    data: EpochData
    signals: Callable[[], dict[str, Tensor]]
    on_step: Callable[[Position, dict[str, Tensor]], None]
    on_trained: Callable[[Position, bool], None]
    validate: Callable[[], dict[str, float]]
    on_epoch: Callable[[int, dict[str, float]], None]


def fit(
    method: Method,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    hooks: Hooks,
    position: Position,
    *,
    seed: int,
    num_epochs: int,
    eval_every_epochs: int,
) -> None:
    """Train from `position` to the end of `num_epochs` epochs.

    Validation runs every `eval_every_epochs` epochs and after the last one.

    Raises:
        NonFiniteError: on every rank, before the optimizer moved.
    """
    wrapped: nn.Module = method
    trainable = None
    while position.epoch < num_epochs:
        epoch = position.epoch
        method.set_phase(epoch)
        if trainable != (now := [p.requires_grad for p in method.parameters()]):
            if wrapped is not method:
                wrapped = method
                gc.collect()  # DDP is in a reference cycle; its reducer must let go of gradients
            wrapped, trainable = hooks.wrap(method), now
        start = Progress(seed, epoch, 0, num_epochs)
        if position.step == 0:
            position.resampling = method.before_epoch(hooks.data, start)
        metrics = {
            "lr": scheduler.get_last_lr()[0],
            "main_phase": float(method.is_main_phase(epoch)),
        }
        _train_steps(method, wrapped, optimizer, hooks, position, start)
        metrics |= _epoch_metrics(method, position)
        validates = (epoch + 1) % eval_every_epochs == 0 or epoch + 1 == num_epochs
        hooks.on_trained(position, validates)
        with warnings.catch_warnings():  # a run resumed here has not stepped its optimizer yet
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            scheduler.step()
        sync_buffers(method)
        began = time.monotonic()
        if validates:
            metrics |= hooks.validate()
        metrics["time/epoch_seconds"] = position.seconds + time.monotonic() - began
        hooks.on_epoch(epoch, metrics)
        position = Position(epoch + 1, steps_done=position.steps_done)


def _train_steps(
    method: Method,
    wrapped: nn.Module,
    optimizer: Optimizer,
    hooks: Hooks,
    position: Position,
    start: Progress,
) -> None:
    """The steps of an epoch that are left."""
    method.train()
    batches = hooks.train_batches(position.epoch, position.resampling, position.step)
    while True:
        asked = time.monotonic()
        batch = next(batches, None)
        waited = time.monotonic() - asked
        if batch is None:
            break
        progress = replace(start, step=position.step)
        torch.manual_seed(progress.stream_seed("torch", rank()))  # dropout and the like
        carried = hooks.signals() | {ORDER: order_digest(batch)}
        batch = replace(batch, carried=carried)
        sums = method.train_step(wrapped, batch, optimizer, progress)
        reduced = {name: sums.pop(name) for name in carried}
        position.add(sums)
        position.waited += waited
        position.seconds += time.monotonic() - asked
        hooks.on_step(position, reduced | {LOSS: sums["loss_sum"] / sums["rows"]})


def _epoch_metrics(method: Method, position: Position) -> dict[str, float]:
    """Metrics of an epoch's steps, from sums that were reduced once per step."""
    totals, seconds = position.totals, position.seconds
    return {
        "train/loss": float(totals["loss_sum"] / totals["rows"]),
        **method.epoch_metrics(totals),
        "data/rows_per_second": float(totals["rows"]) / seconds,
        "data/wait_share": position.waited / seconds,
        "time/step_seconds": (seconds - position.waited) / position.step,
    }

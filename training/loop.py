"""The training loop, written once: epochs of steps, validation, and a report after each epoch.

Knows nothing of Ray, files or MLflow; it is handed callables and calls them in order. It can start
between any two steps: a `Position`, with the state of method, optimizer and schedule, is all that
the steps after it depend on.
"""

import gc
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from training.batch import Batch, Progress
from training.chain import order_digest
from training.clock import STEP, Clock, percentiles
from training.distributed import exchanges, from_ranks, rank, sync_buffers
from training.methods.base import FINITE, HOPELESS, EpochData, Method, Resampling

ORDER = "step/order"
LOSS = "step/loss"
TRAINED = "trained"
# Share of the steps' time -> marks of the clock.
SHARES = {
    "wait": ("wait",),
    "prepare": ("prepare",),
    "exchange": ("exchange",),
    "optimizer": ("optimizer",),
    "report": (STEP, TRAINED),
}
# Of one rank: what the others do meanwhile is to wait for it. All else is a mean over ranks.
OF_THE_WORST = ("speed/report_share", "memory/")


@dataclass
class Position:
    """Where training stands between two steps.

    Attributes:
        epoch: 0-based epoch.
        step: steps of it that are done.
        steps_done: steps of the whole run that are done.
        totals: sums over the steps of the epoch, reduced over ranks.
        seconds: time these steps took.
        resampling: the epoch's rows, if they are not every row once.
    """

    epoch: int = 0
    step: int = 0
    steps_done: int = 0
    totals: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    resampling: Resampling | None = None

    def add(self, sums: dict[str, Tensor]) -> None:
        """Count one more step."""
        totals = list(sums.values())
        if self.totals:
            before = [self.totals[name] for name in sums]
            totals = torch._foreach_add(before, totals)  # pyright: ignore[reportPrivateImportUsage]
        self.totals = dict(zip(sums, totals, strict=True))
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
            signals, with ORDER (see chain.order_digest), LOSS, the mean over the batch, and
            HOPELESS (see Method.train_step).
        on_trained: called when the steps of an epoch are done, before `validate` if it is due.
        validate: -> metrics of the validation split, equal on every rank.
        on_epoch: called after every epoch with the epoch and its metrics, on every rank.
        prepare_seconds: -> seconds that train_batches has worked on batches, so far, in the
            thread that asked for them; the rest of the time they take is waiting.
    """

    wrap: Callable[[Method], nn.Module]
    train_batches: Callable[[int, Resampling | None, int], Iterator[Batch]]
    data: EpochData
    signals: Callable[[], dict[str, Tensor]]
    on_step: Callable[[Position, dict[str, Tensor]], None]
    on_trained: Callable[[Position, bool], None]
    validate: Callable[[], dict[str, float]]
    on_epoch: Callable[[int, dict[str, float]], None]
    prepare_seconds: Callable[[], float] = float


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
        exchanged = exchanges.seconds
        rows = _train_steps(method, wrapped, optimizer, hooks, position, start)
        validates = (epoch + 1) % eval_every_epochs == 0 or epoch + 1 == num_epochs
        hooks.on_trained(position, validates)
        method.clock.mark(TRAINED)
        metrics |= _speed_metrics(method.clock, rows, exchanges.seconds - exchanged)
        metrics |= _epoch_metrics(method, position)
        with warnings.catch_warnings():  # a run resumed here has not stepped its optimizer yet
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            scheduler.step()
        sync_buffers(method)
        began = time.monotonic()
        if validates:
            metrics |= hooks.validate()
            metrics["time/validate_seconds"] = time.monotonic() - began
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
) -> int:
    """Take the steps of an epoch that are left; returns the rows of their global batches."""
    method.train()
    clock, rows = method.clock, 0
    batches = hooks.train_batches(position.epoch, position.resampling, position.step)
    clock.reset()
    began = time.monotonic()
    prepared = hooks.prepare_seconds()
    while (batch := next(batches, None)) is not None:
        clock.mark("wait")
        now = hooks.prepare_seconds()
        clock.move("wait", "prepare", now - prepared)
        prepared = now
        progress = replace(start, step=position.step)
        _seed(progress.stream_seed("torch", rank()), batch.label.device)
        carried = hooks.signals() | {ORDER: order_digest(batch)}
        batch = replace(batch, carried=carried)
        sums = method.train_step(wrapped, batch, optimizer, progress)
        reduced = {name: sums.pop(name) for name in (*carried, HOPELESS) if name in sums}
        position.add(sums)
        now = time.monotonic()
        position.seconds, began = position.seconds + now - began, now
        hooks.on_step(position, reduced | {LOSS: sums["loss_sum"] / sums["rows"]})
        rows += batch.global_rows
        clock.mark(STEP)
    clock.mark("wait")
    return rows


def _seed(seed: int, device: torch.device) -> None:
    """Seed what dropout and the like draw from; torch.manual_seed also asks after devices that are
    not there, and writes down who asked."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _epoch_metrics(method: Method, position: Position) -> dict[str, float]:
    """Metrics of an epoch's steps, from sums that were reduced once per step."""
    totals = position.totals
    metrics = {
        "train/loss": float(totals["loss_sum"] / totals["rows"]),
        **method.epoch_metrics(totals),
    }
    if method.loss_scale is not None:
        metrics["train/skipped_steps"] = position.step - float(totals[FINITE])
        metrics["train/loss_scale"] = float(method.loss_scale.factor)
    return metrics


def _speed_metrics(clock: Clock, rows: int, exchanged: float) -> dict[str, float]:
    """Speed of the steps that this process took in an epoch, over all ranks, with what they
    reported and saved.

    Args:
        clock: of these steps.
        rows: of their global batches.
        exchanged: seconds spent in exchanges inside forward and backward passes.
    """
    clock.settle()
    if not clock.steps:
        return {}
    total = sum(clock.seconds.values())
    own = {
        f"speed/{name}_share": sum(clock.seconds[mark] for mark in marks) / total
        for name, marks in SHARES.items()
    }
    own["speed/exchange_share"] += exchanged / total
    own |= peak_memory()
    ranks: list[dict[str, float]] = from_ranks(own)
    p50, p95 = percentiles(clock.steps)
    return {
        "speed/samples_per_second": rows / total,
        "speed/step_p50_seconds": p50,
        "speed/step_p95_seconds": p95,
        **{
            name: (max if name.startswith(OF_THE_WORST) else fmean)(rank[name] for rank in ranks)
            for name in own
        },
    }


def peak_memory() -> dict[str, float]:
    """MiB that this process has held at most, and had allocated on its GPU."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    peaks = {"memory/peak_mib": resident / (2**20 if sys.platform == "darwin" else 2**10)}
    if torch.cuda.is_available():
        peaks["memory/peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks

"""The workers' half of `midas bench`: contenders train in turns, so that noise hits them alike.

One contender is the real loop in Ray Train workers, fed by Ray Data. Its rank 0 conducts: after a
turn it lets every other contender have one, then goes on. The others are single steps of three
methods on batches in memory, the reader alone, and processes without Ray, started by the driver as
`python -m service.contest`, that run the same loop on the same batches in memory: a group of as
many, smaller groups, one alone, and as many apart, which do not talk to each other. These are
called by files in a folder that all see.

A turn takes a fixed number of steps, the same for all, that took the conductor TURN_SECONDS, and
one before them that does not count: between turns the contenders give their memory back, for
together they would need more than many a machine has.
"""

import contextlib
import ctypes
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data.order import Order
from data.schema import Manifest
from service.config import RunConfig
from service.files import write_text
from service.rows import WorkerRows, make_order
from service.stepper import Stepper
from training.batch import Batch, Progress
from training.clock import STEP, percentiles
from training.distributed import (
    exchanges,
    from_rank_zero,
    from_ranks,
    process_group,
    rank,
    world_size,
)
from training.loop import Hooks, Position, fit, peak_memory
from training.methods.base import EpochData

TURN_SECONDS = 3.0
WARMUP_STEPS = 3
CALIBRATION_STEPS = 4
KEPT_BATCHES = 4
# On GPUs, between two waits for the device: the first steps after one wait for their kernels.
STEPS_TOGETHER = 10
# The turns are over long before; the stream must not be.
EPOCHS = 10_000
METHODS = ("midas", "joint_uni", "joint")
# Those that wait must not take time from those that run: at 0.01, each took 2 % of a core.
POLL_SECONDS = 0.1
ANSWER_SECONDS = 300.0
CALL, DONE, END = "call", "done", "end"

Numbers = dict[str, float]


class TheEnd(Exception):
    """There are no more turns."""


def steady(config: RunConfig) -> RunConfig:
    """The config with all epochs in the main phase of training."""
    midas = config.midas.model_copy(update={"warmup_epochs": 0})
    return config.model_copy(update={"midas": midas})


def give_back_memory() -> None:
    """Return freed memory to the system and to the GPU; workers keep it otherwise, see
    service/environment.py."""
    torch.cuda.empty_cache()  # nothing, where none was used
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class Loop:
    """`fit` that pauses after every turn.

    Args:
        stepper: method and optimizer.
        batches: of an epoch.
        between: called after a turn with its numbers; returns the steps of the next one. May raise
            TheEnd.
        prepare_seconds: see Hooks.
    """

    def __init__(
        self,
        stepper: Stepper,
        batches: Callable[[int], Iterator[Batch]],
        between: Callable[[Numbers], int],
        prepare_seconds: Callable[[], float] = float,
    ):
        self._stepper = stepper
        self._batches = batches
        self._between = between
        self._prepare_seconds = prepare_seconds

    def run(self) -> None:
        """Train until TheEnd."""
        zero = torch.zeros((), device=self._stepper.device)
        hooks = Hooks(
            wrap=self._stepper.wrap,
            train_batches=lambda epoch, resampling, step: self._counted(self._batches(epoch)),
            data=EpochData(lambda: iter(()), lambda: iter(())),
            signals=lambda: {"stop": zero, "leave": zero, "failed": zero},
            on_step=self._on_step,
            on_trained=lambda position, validates: self._take_in(),
            validate=dict,
            on_epoch=lambda epoch, metrics: None,
            prepare_seconds=self._prepare_seconds,
        )
        parts = (self._stepper.method, self._stepper.optimizer, self._stepper.schedule)
        self._steps, self._left = WARMUP_STEPS, WARMUP_STEPS
        self._reset()
        with contextlib.suppress(TheEnd):
            fit(*parts, hooks, Position(), seed=0, num_epochs=EPOCHS, eval_every_epochs=EPOCHS)

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._rows += batch.global_rows
            yield batch

    def _reset(self) -> None:
        """Count from here."""
        _wait_for(self._stepper.device)
        self._rows, self._exchanged = 0, exchanges.seconds
        self._seconds: Numbers = defaultdict(float)
        self._step_seconds: list[float] = []
        self._began = time.perf_counter()
        self._stepper.method.clock.reset()

    def _take_in(self) -> None:
        """Add what the clock has counted; the loop resets it in every epoch."""
        clock = self._stepper.method.clock
        clock.settle()
        self._step_seconds += clock.steps
        for name, seconds in clock.seconds.items():
            self._seconds[name] += seconds

    def _on_step(self, position: Position, signals: dict[str, Tensor]) -> None:
        self._left -= 1
        if self._left == self._steps:  # the step before the turn
            self._reset()
            return
        if self._left:
            return
        self._stepper.method.clock.mark(STEP)
        self._take_in()
        seconds = time.perf_counter() - self._began
        known = sum(self._seconds.values())
        shares = {f"{name}_share": value / known for name, value in self._seconds.items()}
        shares["exchange_share"] = shares.get("exchange_share", 0.0) + (
            (exchanges.seconds - self._exchanged) / seconds
        )
        numbers = {"seconds": seconds, "steps": self._steps, "rows": self._rows, **shares}
        step_seconds = self._step_seconds[-self._steps :]  # without the rest of the one before
        numbers["step_p50"], numbers["step_p95"] = percentiles(step_seconds)
        numbers["first_step"] = step_seconds[0]
        self._steps = self._between(numbers)
        self._left = self._steps + 1


def conduct(payload: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The part of a Ray Train worker on `device`; see `bench_worker`."""
    return _Conductor(payload, device).turns()


class _Conductor:
    def __init__(self, payload: dict[str, Any], device: torch.device):
        self._config = steady(RunConfig.model_validate(payload["config"]))
        self._manifest = Manifest.model_validate(payload["manifest"])
        self._data_folder, self._folder = payload["data_folder"], Path(payload["folder"])
        self._others: dict[str, list[str]] = payload["others"]
        self._seconds = payload["seconds"]
        self._calls: dict[str, int] = defaultdict(int)
        self._device, self._on_gpu = device, device.type == "cuda"
        self._found: dict[str, list[Numbers]] = defaultdict(list)
        self._deadline = 0.0
        self._round = -2  # two turns before the first that counts
        self._steps = CALIBRATION_STEPS
        self._first_step = 0.0
        self._flops = 0
        self._rows = self._new_rows()
        self._reader = self._stream(self._new_rows())
        self._kept = list(islice(self._stream(self._new_rows()), KEPT_BATCHES))
        self._steppers = {
            name: Stepper(self._config.model_copy(update={"method": name}), self._manifest, device)
            for name in METHODS
        }
        self._wrapped: dict[str, nn.Module] = {}

    def _put_down(self) -> None:
        """Leave batches for the groups without Ray."""
        path = self._folder / f"batches-{rank()}.pt"
        torch.save([_plain(batch) for batch in self._kept], path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    def turns(self) -> dict[str, Any]:
        """Train until the time is up; returns the contenders' turns, and what they were in."""
        stepper = Stepper(self._config, self._manifest, self._device)
        rows = self._rows
        Loop(stepper, self._batches, self._between, lambda: rows.prepare_seconds).run()
        if rank() == 0:
            write_text(self._folder / END, "")
        return {
            "turns": dict(self._found),
            "precision": stepper.precision,
            "peak": peak_memory(),
            "device": str(self._device),
            "gpu": torch.cuda.get_device_name(self._device) if self._on_gpu else None,
            "flops": self._flops,
            "first_step_seconds": self._first_step,
        }

    def _new_rows(self) -> WorkerRows:
        optim = self._config.optim.model_copy(update={"epochs": EPOCHS})
        config = self._config.model_copy(update={"optim": optim})
        return WorkerRows(config, self._manifest, self._data_folder, self._device)

    def _stream(self, rows: WorkerRows) -> Iterator[Batch]:
        for epoch in range(EPOCHS):
            yield from rows.train(epoch, None, 0)

    def _batches(self, epoch: int) -> Iterator[Batch]:
        return self._rows.train(epoch, None, 0)

    def _between(self, numbers: Numbers) -> int:
        """After a turn of the real loop: let the others have theirs."""
        self._round += 1
        if self._round < 0:
            self._first_step = numbers["first_step"]
            self._put_down()
            for name in self._others:  # until they are ready
                self._call(name)
            self._found.clear()
            return CALIBRATION_STEPS
        if self._round == 0:
            step = numbers["seconds"] / numbers["steps"]
            self._steps = from_rank_zero(max(2, min(1000, round(TURN_SECONDS / step))))
            self._deadline = time.monotonic() + self._seconds
            return self._steps
        self._found["loop"].append(numbers)
        others: list[Callable[[], None]] = [self._read, self._step_in_memory]
        others += [lambda name=name: self._call(name) for name in self._others]
        for turn in others[:: 1 if self._round % 2 else -1]:
            turn()
        if from_rank_zero(time.monotonic() > self._deadline):
            raise TheEnd
        return self._steps

    def _read(self) -> None:
        """The reader alone; every rank reads its part for as long."""
        next(self._reader)  # the first one starts it
        began, rows = time.perf_counter(), 0
        while time.perf_counter() - began < TURN_SECONDS / 2:
            rows += len(next(self._reader).label)
        total = sum(from_ranks(rows / (time.perf_counter() - began)))
        self._found["reader"].append({"rows_per_second": total})

    def _step_in_memory(self) -> None:
        """Steps of the methods in turn, on batches in memory."""
        seconds: dict[str, list[float]] = {name: [] for name in METHODS}
        cycles = max(1, self._steps // (2 * len(METHODS)))
        together = min(cycles, STEPS_TOGETHER) if self._on_gpu else 1
        batches = cycle(self._kept)
        for name, stepper in self._steppers.items():
            if name not in self._wrapped:
                stepper.method.set_phase(0)
                stepper.method.train()
                self._wrapped[name] = stepper.wrap(stepper.method)
            if name == "midas" and not self._flops:
                self._flops = self._count_flops(next(batches))
            self._step_seconds(name, [next(batches)], 0)  # does not count
        for number in range(cycles // together):
            chosen = list(islice(batches, together))
            for name in METHODS[:: 1 if (self._round + number) % 2 else -1]:
                seconds[name].append(self._step_seconds(name, chosen, number))
        numbers = {name: percentiles(values)[0] for name, values in seconds.items()}
        self._found["memory"].append(numbers | {"rows": float(self._kept[0].global_rows)})

    def _count_flops(self, batch: Batch) -> int:
        """Of a step of MIDAS on all ranks: those of convolutions and products of matrices."""
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            self._step_seconds("midas", [batch], 0)
        return sum(from_ranks(counter.get_total_flops()))

    def _step_seconds(self, name: str, batches: list[Batch], number: int) -> float:
        """Time of one step, of as many as there are batches."""
        stepper = self._steppers[name]
        _wait_for(self._device)
        began = time.perf_counter()
        for place, batch in enumerate(batches, number * len(batches)):
            progress = Progress(0, 0, place, 1)
            stepper.method.train_step(self._wrapped[name], batch, stepper.optimizer, progress)
        _wait_for(self._device)
        return (time.perf_counter() - began) / len(batches)

    def _call(self, name: str) -> None:
        """A turn of a contender outside Ray, which may be several processes at a time."""
        give_back_memory()
        if rank() == 0:
            processes = self._others[name]
            for process in processes:
                self._calls[process] += 1
                call = f"{CALL}-{process}-{self._calls[process]}"
                write_text(self._folder / call, str(self._steps))
            answers = [self._answer(process) for process in processes]
            rates = [answer["rows"] / answer["seconds"] for answer in answers]
            self._found[name].append(
                answers[0] | {"rate": sum(rates), "slowest_rate": len(rates) * min(rates)}
            )
        from_rank_zero(None)

    def _answer(self, process: str) -> Numbers:
        path = self._folder / f"{DONE}-{process}-{self._calls[process]}"
        began = time.monotonic()
        while not path.exists():
            if time.monotonic() - began > ANSWER_SECONDS:
                raise RuntimeError(f"contender {process} does not answer; --debug shows its output")
            time.sleep(POLL_SECONDS)
        return json.loads(path.read_text())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _plain(batch: Batch) -> dict[str, Any]:
    """A batch as tensors and numbers."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    values["inputs"] = {name: value.cpu() for name, value in batch.inputs.items()}
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in values.items()}


def part_of_fewer(batch: Batch, order: Order, places: range, of: int) -> Batch:
    """A rank's part of a global batch as that of a smaller one, where every rank has one lane.

    Args:
        batch: the part of rank `places[rank()]` of `of` ranks.
        order: the global order it came from.
        places: those of `of` ranks whose parts make up the smaller batch, one for each rank.
    """
    assert batch.lane_rows is not None, "the reader of training rows gives them"
    lanes = [order.lanes_of(place, of) for place in places]
    rows = tuple(sum(batch.lane_rows[own.start : own.stop]) for own in lanes)
    lane = torch.full_like(batch.lane, rank())
    return replace(batch, lane=lane, num_lanes=len(rows), lane_rows=rows, global_rows=sum(rows))


def for_fewer(config: RunConfig, ranks: int) -> RunConfig:
    """The config for batches of `part_of_fewer`: a pair group has as many workers as before, and
    not less than one."""
    groups = config.midas.pair_groups * ranks // config.scaling.max_workers
    midas = config.midas.model_copy(update={"pair_groups": max(1, min(ranks, groups))})
    return config.model_copy(update={"midas": midas})


def _on(batch: Batch, device: torch.device) -> Batch:
    values = {
        field.name: getattr(batch, field.name).to(device)
        for field in fields(batch)
        if isinstance(getattr(batch, field.name), Tensor)
    }
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    return replace(batch, inputs=inputs, **values)


class Turns:
    """The turns of a contender outside Ray.

    Args:
        folder: where contenders meet.
        name: of the contender.
    """

    def __init__(self, folder: Path, name: str):
        self._folder = folder
        self._name = name
        self._round = 0
        self._parent = os.getppid()

    def next(self, numbers: Numbers) -> int:
        """Hand in the `numbers` of a turn (those before the first are not read), and wait for the
        next; returns its steps.

        Raises:
            TheEnd: there is none.
        """
        if self._round:
            write_text(self._folder / f"{DONE}-{self._name}-{self._round}", json.dumps(numbers))
        self._round += 1
        return int(self.wait(f"{CALL}-{self._name}-{self._round}").read_text())

    def wait(self, name: str) -> Path:
        """The file of this name, once it is there; raises TheEnd like `next`."""
        path = self._folder / name
        while not path.exists():
            if (self._folder / END).exists() or os.getppid() != self._parent:
                raise TheEnd
            time.sleep(POLL_SECONDS)
        return path


def bare(payload: dict[str, Any], folder: Path, name: str, place: int, device: torch.device):
    """A process without Ray: the same loop on batches in memory, alone or in a process group.

    Args:
        payload: as for `bench_worker`.
        folder: where contenders meet.
        name: of the contender.
        place: rank of the Ray worker whose rows it takes.
        device: of this process.
    """
    turns = Turns(folder, name)
    config = steady(RunConfig.model_validate(payload["config"]))
    manifest = Manifest.model_validate(payload["manifest"])
    order, of, fewer = make_order(config, manifest), config.scaling.max_workers, world_size()
    values = torch.load(turns.wait(f"batches-{place}.pt"), weights_only=True)
    kept = [_on(Batch(**value), device) for value in values]
    if fewer < of:  # as many rows a process, in smaller batches
        config, places = for_fewer(config, fewer), range(place - rank(), place - rank() + fewer)
        kept = [part_of_fewer(batch, order, places, of) for batch in kept]
    stepper = Stepper(config, manifest, device)
    source, steps = cycle(kept), order.num_steps

    def between(numbers: Numbers) -> int:
        give_back_memory()
        asked = 0
        with contextlib.suppress(TheEnd):
            asked = turns.next(numbers) if rank() == 0 else 0
        if not (asked := from_rank_zero(asked)):
            raise TheEnd
        return asked

    Loop(stepper, lambda epoch: islice(source, steps), between).run()


def main(folder: str, name: str, place: str, size: str) -> None:
    """Process `place` of the contender `name`, of `size` that talk to each other."""
    payload = json.loads((Path(folder) / "payload.json").read_text())
    scaling = RunConfig.model_validate(payload["config"]).scaling
    torch.set_num_threads(scaling.cpus_per_worker)
    on_gpu = scaling.device != "cpu" and torch.cuda.device_count() >= scaling.max_workers
    device = torch.device(f"cuda:{place}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    group = contextlib.nullcontext()
    if int(size) > 1:
        group = process_group(int(place), int(size), f"file://{folder}/group-{name}", device)
    with contextlib.suppress(TheEnd), group:
        bare(payload, Path(folder), name, int(place), device)


if __name__ == "__main__":
    main(*sys.argv[1:])

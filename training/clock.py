"""What the time of training steps goes into.

On CPUs these are seconds of the training thread. On GPUs they are seconds of the device, between
events in its queue: nobody waits for it, and what the thread does while it is busy does not count.
"""

import time
from collections import defaultdict
from statistics import quantiles

import torch

STEP = "step"
MAX_EVENTS = 10_000


class Clock:
    """Adds up the time between marks, under the name of the later one.

    Args:
        device: where the work is done.

    Attributes:
        seconds: by name.
        steps: seconds of every step.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self._on_gpu = torch.device(device).type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Forget everything; the time begins here."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps: list[float] = []
        self._in_step = 0.0
        self._last = time.perf_counter()
        self._events = [("", _event())] if self._on_gpu else []

    def mark(self, name: str) -> None:
        """The time since the last mark was spent on `name`; the mark STEP ends a step."""
        if self._on_gpu:
            self._events.append((name, _event()))
            if len(self._events) > MAX_EVENTS:
                self.settle()
            return
        now = time.perf_counter()
        self._add(name, now - self._last)
        self._last = now

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count these seconds of `source` for `target`; for what was timed in another way."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def settle(self) -> None:
        """Count all marks so far; on a GPU, wait for it."""
        if not self._on_gpu:
            return
        self._events[-1][1].synchronize()
        for (_, before), (name, after) in zip(self._events, self._events[1:], strict=False):
            self._add(name, before.elapsed_time(after) / 1e3)
        self._events = self._events[-1:]

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] += seconds
        self._in_step += seconds
        if name == STEP:
            self.steps.append(self._in_step)
            self._in_step = 0.0


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def gpu_utilization() -> float | None:
    """Share of the last second or so in which the current GPU was busy, in per cent; None where
    that is not known: without a GPU, or in a part of one (MIG)."""
    if not torch.cuda.is_available():
        return None
    try:
        return float(torch.cuda.utilization())
    except Exception:  # whatever its management library raises; training goes on
        return None


def percentiles(values: list[float]) -> tuple[float, float]:
    """The 50th and the 95th percentile of at least one value."""
    if len(values) == 1:
        return values[0], values[0]
    cuts = quantiles(values, n=20, method="inclusive")
    return cuts[9], cuts[18]

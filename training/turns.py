"""Calls that take turns in one thread, so that one computes while another's numbers travel."""

import contextlib
import contextvars
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")


class _Turn(greenlet):
    """One of the calls."""


def in_turns(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Results of calls that hand over to the next one at every `pause` inside them.

    The order is fixed by the calls alone: the first runs to its first pause, then the second to
    its own, and round again over those that have not ended. So ranks whose calls pause at the same
    places start their collectives in the same order, and autograd, which runs what came last
    first, takes turns in the same way in the backward pass.

    Raises:
        Exception: what the first of the calls raises that fails; the others are given up.
    """
    turns = [_Turn(call) for call in calls]
    for turn in turns:
        turn.gr_context = contextvars.copy_context()
    results: dict[int, Any] = {}
    try:
        while len(results) < len(turns):
            for place, turn in enumerate(turns):
                if place not in results:
                    value = turn.switch()
                    if turn.dead:
                        results[place] = value
    finally:
        for turn in (turn for turn in turns if not turn.dead):
            with contextlib.suppress(Exception):  # what made the others fail matters more
                turn.throw()
    return [results[place] for place in range(len(turns))]


def pause() -> None:
    """Let the other calls of `in_turns` go on until they pause; outside of it, nothing."""
    current = getcurrent()
    if isinstance(current, _Turn):
        assert current.parent is not None
        current.parent.switch()

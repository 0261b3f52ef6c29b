"""What to try next, what to end early, and what came out: Optuna over the record of a sweep.

Every answer is a function of the search block, the trial's number and the trials `lag` or more
before it, which have all ended by then. So it does not depend on timing, nor on the number of
trials at a time, and an interrupted sweep goes on as it would have: there is no state to restore.
"""

from __future__ import annotations

import hashlib
import itertools
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

from service.search import Distribution, SearchConfig, Value, is_active

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

State = Literal["running", "complete", "pruned", "diverged", "failed"]

# Trials that are drawn at random before TPE takes over.
STARTUP_TRIALS = 6
# Median stopping waits for this many finished trials.
MEDIAN_TRIALS = 3
OBJECTIVE = "val/accuracy"


@dataclass
class Trial:
    """One trial of a sweep, as far as it got.

    Attributes:
        number: from 0.
        values: of the searched settings.
        scores: main-phase epochs done -> validation accuracy then.
        state: "complete" has trained all its epochs; "pruned" was ended by the scheduler,
            "diverged" by a loss that is not finite.
    """

    number: int
    values: dict[str, Value]
    scores: dict[int, float] = field(default_factory=dict)
    state: State = "running"

    @property
    def score(self) -> float | None:
        """Best validation accuracy of the main phase so far."""
        return max(self.scores.values()) if self.scores else None

    def score_at(self, rung: int) -> float | None:
        """Best score up to the first validation at or after this many main-phase epochs."""
        reached = [epoch for epoch in self.scores if epoch >= rung]
        if not reached:
            return None
        return max(score for epoch, score in self.scores.items() if epoch <= min(reached))


T = TypeVar("T", bound=Trial)


def best(trials: Iterable[T]) -> T | None:
    """The complete trial with the highest score; of equal ones the first."""
    finished = [trial for trial in trials if trial.state == "complete"]
    return max(finished, key=lambda trial: (trial.score or 0.0, -trial.number), default=None)


def visible(trials: Iterable[Trial], number: int, lag: int) -> list[Trial]:
    """The trials that decisions about trial `number` may look at."""
    return [trial for trial in trials if trial.number <= number - lag]


def num_trials(search: SearchConfig) -> int:
    """Trials of the whole sweep."""
    if search.searcher == "grid":
        return min(search.trials, len(grid(search)))
    return search.trials


def grid(search: SearchConfig) -> list[dict[str, Value]]:
    """Every combination of a grid's values, each once."""
    space = search.space
    found: list[dict[str, Value]] = []
    for combination in itertools.product(*(d.values for d in space.values())):
        values: dict[str, Value] = {}
        for (name, distribution), value in zip(space.items(), combination, strict=True):
            if is_active(distribution, values):
                values[name] = value
        if values not in found:
            found.append(values)
    return found


def seed_of(search: SearchConfig, purpose: str) -> int:
    """32 bits from the sweep's seed and what they are for."""
    text = f"{search.seed}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")


def suggest(
    search: SearchConfig, number: int, trials: Sequence[Trial], lag: int
) -> dict[str, Value]:
    """Values of the searched settings for trial `number`.

    Args:
        trials: all before it; those that are not `visible` are taken for running.
    """
    if search.searcher == "grid":
        return grid(search)[number]
    import optuna

    seed = seed_of(search, str(number))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if search.searcher == "random"
            else optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=STARTUP_TRIALS,
                multivariate=True,
                group=True,
                constant_liar=True,
            )
        )
    known = {trial.number for trial in visible(trials, number, lag)}
    seen = [
        trial if trial.number in known else Trial(trial.number, trial.values)
        for trial in trials
        if trial.number < number
    ]
    asked = make_study(search, seen, sampler).ask()
    values: dict[str, Value] = {}
    for name, distribution in search.space.items():
        if is_active(distribution, values):
            values[name] = _ask(asked, name, distribution)
    return values


def is_hopeless(search: SearchConfig, trial: Trial, trials: Sequence[Trial], lag: int) -> bool:
    """Whether the scheduler ends a trial after its newest score.

    asha is asynchronous successive halving (Li et al. 2018, arXiv 1810.05934): at a rung, a trial
    goes on if it is among the best 1 / reduction_factor of those that came there. median is the
    rule of Google Vizier (Golovin et al. 2017).
    """
    others = visible(trials, trial.number, lag)
    newest = max(trial.scores)
    if search.scheduler == "asha":
        rung = search.grace_epochs
        while rung <= newest:
            came_here = min(epoch for epoch in trial.scores if epoch >= rung)
            if came_here == newest and _is_below(search, trial, others, rung):
                return True
            rung *= search.reduction_factor
    if search.scheduler == "median" and newest >= search.grace_epochs:
        finished = [other for other in others if other.state == "complete"]
        scores = [score for other in finished if (score := other.score_at(newest)) is not None]
        if len(scores) >= MEDIAN_TRIALS:
            return (trial.score or 0.0) < statistics.median(scores)
    return False


def _is_below(search: SearchConfig, trial: Trial, others: Sequence[Trial], rung: int) -> bool:
    scores = [score for other in others if (score := other.score_at(rung)) is not None]
    own = trial.score_at(rung)
    assert own is not None
    better = sum(score > own for score in scores)
    # Of all that came here, this one included, the best 1 / reduction_factor; at least one.
    return better >= max(1, (len(scores) + 1) // search.reduction_factor)


def make_study(
    search: SearchConfig,
    trials: Iterable[Trial],
    sampler: optuna.samplers.BaseSampler | None = None,
) -> optuna.Study:
    """An Optuna study, in memory, of these trials."""
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    states = {
        "running": TrialState.RUNNING,
        "complete": TrialState.COMPLETE,
        "failed": TrialState.FAIL,
    }
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trials:
        state = states.get(trial.state, TrialState.PRUNED)
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                params=dict(trial.values),
                distributions={n: _distribution(search.space[n]) for n in trial.values},
                intermediate_values=dict(trial.scores),
                value=trial.score if state is TrialState.COMPLETE else None,
            )
        )
    return study


def _ask(trial: optuna.Trial, name: str, distribution: Distribution) -> Value:
    low, high = distribution.low, distribution.high
    if low is None or high is None:
        value = trial.suggest_categorical(name, distribution.values)
        assert value is not None
        return value
    if distribution.kind == "int":
        return trial.suggest_int(name, int(low), int(high), step=distribution.step or 1)
    return trial.suggest_float(name, low, high, log=distribution.kind == "loguniform")


def _distribution(distribution: Distribution) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    low, high = distribution.low, distribution.high
    if low is None or high is None:
        return CategoricalDistribution(distribution.values)
    if distribution.kind == "int":
        return IntDistribution(int(low), int(high), step=distribution.step or 1)
    return FloatDistribution(low, high, log=distribution.kind == "loguniform")


def text_of(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flat_values(values: Mapping[str, Value]) -> str:
    """Values on one line."""
    return ", ".join(f"{name}={text_of(value)}" for name, value in values.items())

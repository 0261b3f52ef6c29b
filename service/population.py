"""Population based training (Jaderberg et al. 2017, arXiv 1711.09846), in generations.

All trials of a sweep are its population. A generation is `search.grace_epochs` main-phase epochs;
at its end each of the worst takes over the state of one of the best, and searches on around its
settings. A generation begins when the one before has ended for all, so that what happens depends on
the seed and the scores, and not on which trial was faster.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from service.search import Distribution, SearchConfig, Value, changeable
from service.study import Trial, seed_of

# Part of the population that takes over another's state, and the part that is taken over.
QUANTILE = 0.25
FACTORS = (0.8, 1.25)
# How often a setting is drawn anew instead of multiplied.
NEW_DRAWS = 0.25


class Member(NamedTuple):
    """What a trial does in a generation.

    Attributes:
        donor: trial whose state it goes on from; itself mostly.
        values: of the searched settings.
    """

    donor: int
    values: dict[str, Value]


def next_generation(
    search: SearchConfig, generation: int, trials: Sequence[Trial]
) -> dict[int, Member]:
    """What each trial does in a generation, by number.

    Args:
        generation: the coming one, from 1.
        trials: the population at the end of the one before; their newest score counts, of equal
            ones that of the first trial.
    """
    ranked = sorted(trials, key=lambda trial: (-trial.scores[max(trial.scores)], trial.number))
    count = max(1, math.floor(QUANTILE * len(ranked))) if len(ranked) > 1 else 0
    best, worst = ranked[:count], {trial.number for trial in ranked[len(ranked) - count :]}
    found = {}
    for trial in trials:
        if trial.number not in worst:
            found[trial.number] = Member(trial.number, dict(trial.values))
            continue
        draws = np.random.default_rng(seed_of(search, f"{generation}/{trial.number}"))
        donor = best[draws.integers(len(best))]
        values = dict(donor.values)
        for name, distribution in changeable(search).items():
            if name in values:
                values[name] = _near(float(values[name]), distribution, draws)
        found[trial.number] = Member(donor.number, values)
    return found


def _near(value: float, distribution: Distribution, draws: np.random.Generator) -> float:
    assert distribution.low is not None
    assert distribution.high is not None
    low, high = distribution.low, distribution.high
    if draws.random() >= NEW_DRAWS:
        value *= float(draws.choice(FACTORS))
    elif distribution.kind == "loguniform":
        value = math.exp(draws.uniform(math.log(low), math.log(high)))
    else:
        value = draws.uniform(low, high)
    return min(high, max(low, value))

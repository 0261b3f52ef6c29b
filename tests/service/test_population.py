"""Population based training: who takes over from whom, and what changes."""

import pytest

from service.population import next_generation
from service.search import SearchConfig
from service.study import Trial

SEARCH = SearchConfig.model_validate(
    {
        "scheduler": "pbt",
        "space": {
            "optim.lr": {"kind": "loguniform", "low": 0.001, "high": 0.1},
            "midas.eta": {"kind": "uniform", "low": 0.0, "high": 1.0},
            "midas.warmup_epochs": {"kind": "int", "low": 1, "high": 5},
        },
    }
)


def population(scores: list[float]) -> list[Trial]:
    return [
        Trial(
            number,
            {
                "optim.lr": 0.01,
                "midas.eta": 0.1 + number / 10,
                "midas.warmup_epochs": number % 5 + 1,
            },
            {1: 1.0, 2: score},
        )
        for number, score in enumerate(scores)
    ]


def test_the_worst_quarter_goes_on_from_the_best():
    trials = population([0.5, 0.9, 0.1, 0.6, 0.8, 0.2, 0.7, 0.4])
    members = next_generation(SEARCH, 1, trials)
    assert list(members) == list(range(8))
    for number, member in members.items():
        if number in (2, 5):  # by the newest score, not by the best
            assert member.donor in (1, 4)
        else:
            assert member == (number, trials[number].values)


def test_settings_change_near_those_of_the_donor_and_inside_their_ranges():
    lrs = set()
    for generation in range(1, 200):
        for member in next_generation(SEARCH, generation, population([0.9, 0.1])).values():
            assert member.donor == 0
            assert member.values["midas.warmup_epochs"] == 1
            assert 0.001 <= float(member.values["optim.lr"]) <= 0.1
            assert 0.0 <= float(member.values["midas.eta"]) <= 1.0
            lrs.add(round(float(member.values["optim.lr"]), 9))
    assert {0.008, 0.01, 0.0125} < lrs  # multiplied
    assert len(lrs) > 20  # and drawn anew


def test_draws_follow_seed_generation_and_trial():
    trials = population([0.9, 0.1])
    other = SEARCH.model_copy(update={"seed": 1})

    def run(search: SearchConfig) -> list:
        return [next_generation(search, generation, trials)[1] for generation in range(20)]

    assert run(SEARCH) == run(SEARCH)
    assert run(SEARCH) != run(other)
    assert len({repr(member) for member in run(SEARCH)}) > 5


@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.5, 0.5]])
def test_one_trial_goes_on_and_of_equal_ones_the_first_gives(scores: list[float]):
    members = next_generation(SEARCH, 1, population(scores))
    donors = [member.donor for member in members.values()]
    assert donors == ([0] if len(scores) == 1 else [0, 1, 0])

"""What a sweep tries next and ends early: functions of its record, whatever the timing."""

from typing import Any

import pytest

from service.search import SearchConfig
from service.study import (
    Trial,
    best,
    grid,
    is_hopeless,
    num_trials,
    suggest,
)

SPACE = {
    "midas.eta": {"kind": "loguniform", "low": 0.001, "high": 1.0},
    "optim.lr": {"kind": "uniform", "low": 0.0, "high": 1.0},
    "midas.warmup_epochs": {"kind": "int", "low": 2, "high": 8, "step": 2},
}
LAG = 4


def search(**values: Any) -> SearchConfig:
    return SearchConfig.model_validate({"space": SPACE, **values})


def quality(values: dict[str, Any]) -> float:
    """A hill in lr, flat in the others."""
    return 1.0 - (values["optim.lr"] - 0.7) ** 2


def swept(config: SearchConfig, count: int) -> list[Trial]:
    trials: list[Trial] = []
    for number in range(count):
        values = suggest(config, number, trials, LAG)
        trials.append(Trial(number, values, {1: quality(values)}, "complete"))
    return trials


def test_values_lie_in_their_ranges():
    for trial in swept(search(searcher="random"), 30):
        assert 0.001 <= trial.values["midas.eta"] <= 1.0
        assert trial.values["midas.warmup_epochs"] in (2, 4, 6, 8)


def test_tpe_comes_nearer_than_random():
    means = {}
    for searcher in ("tpe", "random"):
        scores = [
            trial.score or 0.0
            for seed in range(3)
            for trial in swept(search(searcher=searcher, seed=seed), 30)[15:]
        ]
        means[searcher] = sum(scores) / len(scores)
    assert means["tpe"] > means["random"] + 0.02


def test_a_suggestion_depends_on_the_seed_and_on_trials_at_least_lag_before():
    trials = swept(search(), 12)
    again = suggest(search(), 12, trials, LAG)
    assert again == suggest(search(), 12, trials, LAG)
    assert again != suggest(search(seed=1), 12, trials, LAG)
    near = [*trials[:9], *(Trial(t.number, t.values) for t in trials[9:])]
    assert suggest(search(), 12, near, LAG) == again
    far = [Trial(t.number, t.values, {1: -(t.score or 0.0)}, "complete") for t in trials]
    assert suggest(search(), 12, far, LAG) != again


def test_pruned_diverged_and_failed_trials_are_taken_in():
    trials = swept(search(), 8)
    trials[1].state, trials[2].state, trials[3].state = "pruned", "diverged", "failed"
    trials[2].scores.clear()
    assert set(suggest(search(), 8, trials, 1)) == set(SPACE)
    assert best(trials) not in trials[1:4]


def test_grid_has_every_combination_and_leaves_out_what_is_not_searched():
    space = {
        "optim.name": {"kind": "grid", "values": ["sgd", "adam"]},
        "optim.momentum": {
            "kind": "grid",
            "values": [0.0, 0.9],
            "when": {"optim.name": ["sgd"]},
        },
        "midas.warmup_epochs": {"kind": "choice", "values": [2, 4]},
    }
    config = search(space=space, searcher="grid", trials=100)
    assert num_trials(config) == 6
    assert {"optim.name": "adam", "midas.warmup_epochs": 4} in grid(config)
    assert suggest(config, 5, [], LAG) == grid(config)[5]


def test_conditional_settings_are_searched_only_where_they_apply():
    space = {
        "optim.name": {"kind": "choice", "values": ["sgd", "adam"]},
        "optim.momentum": {
            "kind": "uniform",
            "low": 0.0,
            "high": 0.9,
            "when": {"optim.name": ["sgd"]},
        },
    }
    config = search(space=space)
    trials: list[Trial] = []
    for number in range(20):
        values = suggest(config, number, trials, 1)
        assert ("optim.momentum" in values) == (values["optim.name"] == "sgd")
        trials.append(Trial(number, values, {1: float(len(values))}, "complete"))


def record(number: int, *scores: float) -> Trial:
    """Scores of main-phase epochs 1, 2, ..."""
    return Trial(number, {}, dict(enumerate(scores, 1)), "complete")


def test_asha_keeps_a_third_at_rungs_of_main_phase_epochs():
    config = search(grace_epochs=2, reduction_factor=3)
    others = [record(n, 0.1, 0.1 * n, 0.1 * n) for n in range(6)]  # at epoch 2: 0 ... 0.5

    def ended(*scores: float, number: int = 6) -> bool:
        return is_hopeless(config, record(number, *scores), others, 1)

    assert not ended(0.0)  # before the first rung
    assert ended(0.0, 0.35)  # below two of seven, of which two go on
    assert not ended(0.0, 0.45)
    assert not ended(0.0, 0.35, 0.0)  # between rungs
    assert not ended(0.0, 0.35, number=0)  # nothing to compare with
    assert is_hopeless(config, record(5, 0.0, 0.05), others, LAG)  # trials 0 and 1 are visible
    assert not is_hopeless(config, record(5, 0.0, 0.2), others, LAG)


def test_a_rung_between_two_validations_counts_at_the_later_one():
    config = search(grace_epochs=2)
    other = Trial(0, {}, {3: 0.5, 6: 0.6}, "complete")
    assert is_hopeless(config, Trial(1, {}, {3: 0.4}), [other], 1)
    assert not is_hopeless(config, Trial(1, {}, {3: 0.5, 5: 0.1}), [other], 1)


def test_median_waits_for_finished_trials():
    config = search(scheduler="median", grace_epochs=1)
    others = [record(n, 0.1 * n) for n in range(3)]
    assert is_hopeless(config, record(3, 0.05), others, 1)
    assert not is_hopeless(config, record(3, 0.1), others, 1)
    assert not is_hopeless(config, record(3, 0.05), others, 2)
    assert not is_hopeless(search(scheduler="none"), record(3, 0.0), others, 1)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"a": {"kind": "uniform", "low": 1, "high": 1}}, "low < high"),
        ({"a": {"kind": "loguniform", "low": 0, "high": 1}}, "low > 0"),
        ({"a": {"kind": "int", "low": 0.5, "high": 1}}, "whole low and high"),
        ({"a": {"kind": "choice"}}, "needs values"),
        ({"a": {"kind": "choice", "values": [1, 1]}}, "each once"),
        ({"a": {"kind": "choice", "values": [1], "low": 0}}, "takes values"),
        ({"a": {"kind": "uniform", "low": 0, "high": 1, "when": {"b": [1]}}}, "stand before it"),
        ({"a": {"kind": "grid", "values": [1]}}, "searcher: grid"),
    ],
)
def test_a_wrong_space_is_refused(space: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        search(space=space)

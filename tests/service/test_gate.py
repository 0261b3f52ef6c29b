"""The gate of promotion: every rule refuses on its own, and says why."""

import math
from dataclasses import replace

import pytest

from service.gate import Contender, Rules, decide, default_floor

GOOD = Contender(
    "2",
    {
        "val/accuracy": 0.90,
        "val/head_accuracy/image": 0.8,
        "val/head_accuracy/audio": 0.6,
        "val/zero_out_accuracy/image": 0.7,
        "val/zero_out_accuracy/audio": 0.12,
    },
    chance=0.1,
    data_digest="a" * 64,
)
CHAMPION = replace(GOOD, version="1", metrics=GOOD.metrics | {"val/accuracy": 0.85})


def changed(**metrics: float) -> Contender:
    names = {f"val/{name.replace('__', '/')}": value for name, value in metrics.items()}
    return replace(GOOD, metrics=GOOD.metrics | names)


def test_a_better_version_is_promoted():
    decision = decide(GOOD, CHAMPION, Rules())
    assert decision.promoted
    assert decision.numbers["gain"] == pytest.approx(0.05)
    assert decision.numbers["champion/version"] == "1"


def test_the_first_version_needs_no_champion():
    assert decide(GOOD, None, Rules()).promoted
    assert not decide(changed(head_accuracy__audio=0.1), None, Rules()).promoted


@pytest.mark.parametrize(
    ("new", "rules", "reason"),
    [
        (changed(accuracy=0.8549), Rules(), "0.8549 is not above the champion's 0.8500"),
        (changed(accuracy=0.85), Rules(margin=0.0), "is not above the champion's 0.8500"),
        (GOOD, Rules(margin=0.051), "by the margin of 0.051"),
        (changed(accuracy=math.nan), Rules(), "version 2 has no finite val/accuracy on record"),
        (changed(head_accuracy__audio=0.18), Rules(), "modality audio has collapsed"),
        (changed(head_accuracy__audio=math.nan), Rules(), "modality audio has collapsed"),
        (GOOD, Rules(floor=0.7), "val/head_accuracy/audio is 0.6000, and the floor is 0.7000"),
        (GOOD, Rules(floors={"image": 0.81}), "modality image has collapsed"),
        (GOOD, Rules(floor_metric="zero_out_accuracy"), "val/zero_out_accuracy/audio is 0.1200"),
        (GOOD, Rules(floors={"smell": 0.1}), "--floor names 'smell', which is no modality"),
        (replace(GOOD, metrics={"val/accuracy": 0.9}), Rules(), "has no val/head_accuracy/"),
        (replace(GOOD, data_digest="b" * 64), Rules(), "data with digest bbbbbbbbbbbb, the"),
        (replace(GOOD, version="1"), Rules(), "version 1 is the champion already"),
    ],
)
def test_one_broken_rule_is_enough(new: Contender, rules: Rules, reason: str):
    decision = decide(new, CHAMPION, rules)
    assert not decision.promoted
    assert len(decision.refusals) == 1
    assert reason in decision.refusals[0]


def test_a_margin_that_is_just_reached_is_reached():
    """0.9 - 0.85 is a little less than 0.05 in floating point."""
    assert decide(GOOD, CHAMPION, Rules(margin=0.05)).promoted
    assert decide(changed(accuracy=0.95), changed(accuracy=0.9), Rules()).refusals == [
        "version 2 is the champion already"
    ]


def test_floors_of_single_modalities_go_before_the_general_one():
    rules = Rules(floor=0.7, floors={"audio": 0.5})
    decision = decide(GOOD, CHAMPION, rules)
    assert decision.promoted
    assert (decision.numbers["floor/image"], decision.numbers["floor/audio"]) == (0.7, 0.5)


def test_new_data_are_accepted_with_a_reason_but_collapse_is_not():
    other = replace(GOOD, data_digest="b" * 64)
    rules = Rules(new_data="actors added")
    assert decide(other, CHAMPION, rules).promoted
    collapsed = replace(other, metrics=changed(head_accuracy__image=0.1).metrics)
    assert not decide(collapsed, CHAMPION, rules).promoted


def test_the_default_floor_is_above_chance():
    assert default_floor(0.1) == pytest.approx(0.19)
    assert default_floor(0.5) == pytest.approx(0.55)

"""Calls that take turns."""

import contextvars

import pytest

from training.turns import in_turns, pause

SETTING = contextvars.ContextVar("SETTING", default="none")


def spoken(words: list[str], name: str, pauses: int):
    """A call that notes where it is, and pauses so many times."""

    def call() -> str:
        for number in range(pauses):
            words.append(f"{name}{number}")
            pause()
        words.append(f"{name} ends")
        return name

    return call


def test_calls_hand_over_where_they_pause():
    words = []
    calls = [spoken(words, "a", 2), spoken(words, "b", 0), spoken(words, "c", 3)]
    assert in_turns(calls) == ["a", "b", "c"]
    expected = ["a0", "b ends", "c0", "a1", "c1", "a ends", "c2", "c ends"]
    assert words == expected


def test_no_calls_and_one():
    words = []
    assert in_turns([]) == []
    assert in_turns([spoken(words, "a", 2)]) == ["a"]
    assert words == ["a0", "a1", "a ends"]


def test_outside_nobody_waits():
    pause()


def test_what_a_call_returns_may_be_anything():
    assert in_turns([lambda: None, lambda: False]) == [None, False]


def test_calls_inside_of_calls():
    words = []

    def nested() -> list[str]:
        return in_turns([spoken(words, "a", 1), spoken(words, "b", 1)])

    assert in_turns([nested, spoken(words, "c", 1)]) == [["a", "b"], "c"]
    assert words == ["a0", "b0", "a ends", "b ends", "c0", "c ends"]


def test_a_failure_is_raised_and_the_others_clean_up():
    cleaned = []

    def waits() -> None:
        try:
            pause()
        finally:
            cleaned.append("waits")

    def fails() -> None:
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        in_turns([waits, fails])
    assert cleaned == ["waits"]


def test_a_failure_is_raised_though_cleaning_up_fails():
    cleaned = []

    def waits(name: str) -> None:
        try:
            pause()
        finally:
            cleaned.append(name)
            raise OSError("nor is this to be cleaned")

    def fails() -> None:
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        in_turns([lambda: waits("a"), lambda: waits("b"), fails])
    assert cleaned == ["a", "b"]


def test_calls_see_the_settings_of_their_caller():
    token = SETTING.set("mine")
    try:
        assert in_turns([SETTING.get, SETTING.get]) == ["mine", "mine"]
    finally:
        SETTING.reset(token)

"""Random numbers of samples: SplitMix64, the same wherever and with whomever a sample is drawn."""

import hashlib

import numpy as np
import pytest

from data.draws import uniform

WORD = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & WORD
    return value ^ value >> 31


def split_mix(state: int, count: int) -> list[int]:
    """`count` outputs of the generator (G. L. Steele et al., OOPSLA 2014, figure 15)."""
    return [mix(state + i * GAMMA & WORD) for i in range(1, count + 1)]


def slow_uniform(seed: int, purpose: str, epoch: int, sample_id: int, count: int) -> list[float]:
    text = f"({seed}, '{purpose}', {epoch})"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    state = mix((sample_id * GAMMA + key) & WORD)
    return [(word >> 11) / 2**53 for word in split_mix(state, count)]


def test_reference_is_split_mix() -> None:
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert split_mix(1234567, 3) == first  # as other implementations print for this seed


def test_against_the_reference() -> None:
    sample_id = np.array([0, 1, 2, 1796, 10**12, 2**62])
    found = uniform(7, "candidates/visual", 3, sample_id, 5)
    expected = [slow_uniform(7, "candidates/visual", 3, int(i), 5) for i in sample_id]
    assert found.tolist() == expected
    assert (found.dtype, found.shape) == (np.float64, (6, 5))


def test_a_sample_draws_the_same_in_every_batch() -> None:
    alone = uniform(0, "x", 1, np.array([42]), 3)[0]
    for batch in (np.array([42, 7]), np.array([1, 2, 42]), np.arange(1000)):
        drawn = uniform(0, "x", 1, batch, 3)[batch == 42]
        assert (drawn == alone).all()
    assert (uniform(0, "x", 1, np.array([42]), 9)[0, :3] == alone).all()


def test_everything_named_changes_the_numbers() -> None:
    ids = np.arange(100)
    base = uniform(0, "x", 0, ids, 2)
    for other in (
        uniform(1, "x", 0, ids, 2),
        uniform(0, "y", 0, ids, 2),
        uniform(0, "x", 1, ids, 2),
    ):
        assert not np.isin(other, base).any()
        assert len(np.unique(base)) == 200


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    """(10 epochs, 20000 samples, 4 numbers)."""
    return np.stack([uniform(0, "x", epoch, np.arange(20_000), 4) for epoch in range(10)])


def test_numbers_are_uniform(many: np.ndarray) -> None:
    assert many.min() >= 0.0
    assert many.max() < 1.0
    counts = np.histogram(many, bins=100, range=(0, 1))[0]
    expected = many.size / 100
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert 60 < chi_squared < 149  # 0.1 % and 99.9 % of 99 degrees of freedom
    assert many.mean(axis=(0, 1)) == pytest.approx(np.full(4, 0.5), abs=0.003)
    assert many.var() == pytest.approx(1 / 12, rel=0.01)


def test_neighbours_have_nothing_in_common(many: np.ndarray) -> None:
    """Neighbouring samples, epochs and numbers of a sample; 5 standard errors are allowed."""
    pairs = [
        (many[:, 1:], many[:, :-1]),
        (many[1:], many[:-1]),
        (many[..., 1:], many[..., :-1]),
        (many[1:, 1:], many[:-1, :-1]),
    ]
    for first, second in pairs:
        assert abs(correlation(first, second)) < 5 / np.sqrt(first.size)

"""Random numbers of a sample: a function of (seed, purpose, epoch, sample id) and nothing else."""

import hashlib

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def uniform(seed: int, purpose: str, epoch: int, sample_id: np.ndarray, count: int) -> np.ndarray:
    """(N, count) float64 in [0, 1): `count` numbers per sample.

    SplitMix64 (G. L. Steele et al., OOPSLA 2014), whose counter starts at a mixture of a hash of
    (seed, purpose, epoch) and the sample id: the same wherever and with whomever a sample is drawn.

    Args:
        sample_id: (N,) int64.
    """
    text = repr((seed, purpose, epoch)).encode()
    key = np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), np.uint64)
    state = _mix(sample_id.astype(np.uint64) * _GAMMA + key)[:, None]
    counter = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
    return (_mix(state + counter) >> np.uint64(11)) * 2.0**-53


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> _SHIFTS[0])) * _MULTIPLIERS[0]
    value = (value ^ (value >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return value ^ (value >> _SHIFTS[2])

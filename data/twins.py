"""Twins: rows of a prepared set that are identical or nearly so, by hashes and fingerprints."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from data.fingerprints import Fingerprints
from data.schema import Split

SPLITS: tuple[Split, ...] = get_args(Split)
MAX_EXAMPLES = 10
MAX_PARTNERS = 256
"""Rows that one row is compared with per key: the first with the same key. Bounds the time where
thousands of rows look alike (a "no picture" placeholder); their counts are then lower bounds."""
PAIRS_AT_ONCE = 1 << 18

Overlap = dict[Split, dict[Split, int]]
"""overlap[a][b]: rows of split a that have a partner in split b."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pair(_Model):
    """Two rows; the first is the earlier one, train before val before test."""

    keys: tuple[str, str]
    splits: tuple[Split, Split]
    labels: tuple[str, str]


class Twins(_Model):
    """Rows that have a twin.

    Attributes:
        rows: rows[a][b]: rows of split a with a twin in split b, another row of it if a = b.
        conflicts: rows with a twin of another class.
        examples: some pairs across splits; within one, if there are none across.
        conflict_examples: some pairs of different classes.
    """

    rows: Overlap
    conflicts: int
    examples: tuple[Pair, ...]
    conflict_examples: tuple[Pair, ...]


class Likeness(_Model):
    """What is there twice: byte for byte (as stored), or nearly (see data/fingerprints.py)."""

    identical: Twins
    near: Twins


@dataclass(frozen=True)
class Rows:
    """What is known of all N rows, in reading order (train, val, test), and their M modalities.

    Attributes:
        split: (N,) position in SPLITS.
        label: (N,) class.
        keys: (N,) names.
        classes: names of the classes.
        contents: (M, N) uint64 hash of the stored bytes; 0 where the modality is missing.
        prints: M fingerprints.
    """

    split: np.ndarray
    label: np.ndarray
    keys: pa.ChunkedArray
    classes: tuple[str, ...]
    contents: np.ndarray
    prints: tuple[Fingerprints, ...]


def find_twins(rows: Rows) -> tuple[Likeness, list[Likeness]]:
    """Twins among whole samples, and among the items of every modality.

    Two samples are nearly the same if each modality is, or is missing or blank on both sides.
    """
    samples = _sample_contents(rows)
    near_samples, near = _near(rows, samples)
    return (
        Likeness(identical=_identical(rows, samples), near=near_samples),
        [
            Likeness(identical=_identical(rows, content), near=twins)
            for content, twins in zip(rows.contents, near, strict=True)
        ],
    )


def per_split(counts: np.ndarray) -> dict[Split, int]:
    """Counts (3,) by the names of the splits."""
    return {split: int(count) for split, count in zip(SPLITS, counts, strict=True)}


def overlap(table: np.ndarray) -> Overlap:
    """Table (3, 3) by the names of the splits."""
    return {split: per_split(row) for split, row in zip(SPLITS, table, strict=True)}


class _Collector:
    """Collects pairs of twins."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.twin = np.zeros((len(rows.split), len(SPLITS)), bool)
        self.conflict = np.zeros(len(rows.split), bool)
        self._across: dict[tuple[int, int], None] = {}  # in the order they were found
        self._within: dict[tuple[int, int], None] = {}
        self._conflicts: dict[tuple[int, int], None] = {}

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Note the pairs of rows (a[i], b[i]); a comes first."""
        split, label = self._rows.split, self._rows.label
        self.twin[a, split[b]] = True
        self.twin[b, split[a]] = True
        differs = label[a] != label[b]
        self.conflict[a[differs]] = True
        self.conflict[b[differs]] = True
        crosses = split[a] != split[b]
        for examples, chosen in (
            (self._across, crosses),
            (self._within, ~crosses),
            (self._conflicts, differs),
        ):
            for place in np.flatnonzero(chosen)[:MAX_EXAMPLES]:
                if len(examples) < MAX_EXAMPLES:
                    examples[int(a[place]), int(b[place])] = None

    def is_news(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """bool (P,): whether the pairs, if they are twins, would change the counts."""
        split, label = self._rows.split, self._rows.label
        is_counted = self.twin[a, split[b]] & self.twin[b, split[a]]
        return ~is_counted | (label[a] != label[b]) & ~(self.conflict[a] & self.conflict[b])

    def twins(self) -> Twins:
        """What was noted."""
        table = np.stack(
            [self.twin[self._rows.split == number].sum(axis=0) for number in range(len(SPLITS))]
        )
        return Twins(
            rows=overlap(table),
            conflicts=int(self.conflict.sum()),
            examples=self._pairs(self._across or self._within),
            conflict_examples=self._pairs(self._conflicts),
        )

    def _pairs(self, examples: dict[tuple[int, int], None]) -> tuple[Pair, ...]:
        rows = self._rows
        return tuple(
            Pair(
                keys=(rows.keys[a].as_py(), rows.keys[b].as_py()),
                splits=(SPLITS[rows.split[a]], SPLITS[rows.split[b]]),
                labels=(rows.classes[rows.label[a]], rows.classes[rows.label[b]]),
            )
            for a, b in examples
        )


def _sample_contents(rows: Rows) -> np.ndarray:
    """(N,) numbers from 1: equal where the contents of all modalities are."""
    number = np.zeros(len(rows.split), np.int64)
    for content in rows.contents:
        distinct, inverse = np.unique(content, return_inverse=True)
        _, number = np.unique(number * len(distinct) + inverse, return_inverse=True)
    return number + 1


def _identical(rows: Rows, contents: np.ndarray) -> Twins:
    """Rows of equal content; content 0 is none."""
    here = np.flatnonzero(contents)
    _, first, inverse = np.unique(contents[here], return_index=True, return_inverse=True)
    collector = _Collector(rows)
    repeats = np.flatnonzero(first[inverse] != np.arange(len(here)))
    collector.add(here[first[inverse[repeats]]], here[repeats])
    # Pairs with the first row alone do not tell which splits the others share.
    split, label = rows.split[here], rows.label[here]
    counts = np.zeros((len(first), len(SPLITS)), np.int64)
    np.add.at(counts, (inverse, split), 1)
    collector.twin[here] = counts[inverse] > (split[:, None] == np.arange(len(SPLITS)))
    mixed = np.zeros(len(first), bool)
    mixed[inverse[label != label[first[inverse]]]] = True
    collector.conflict[here] = mixed[inverse]
    return collector.twins()


def _near(rows: Rows, samples: np.ndarray) -> tuple[Twins, list[Twins]]:
    """Twins that are not identical: among samples, whose contents are given, and in modalities."""
    whole, modalities = _Collector(rows), list[Twins]()
    for number, (prints, content) in enumerate(zip(rows.prints, rows.contents, strict=True)):
        single = _Collector(rows)
        known = np.flatnonzero(prints.known)
        for key in prints.keys()[known].T:
            for first, second in candidate_pairs(key):
                a, b = known[first], known[second]
                likely = prints.likely(a, b)
                a, b = a[likely], b[likely]
                same = content[a] == content[b]
                of_items = ~same & single.is_news(a, b)
                of_samples = (samples[a] != samples[b]) & whole.is_news(a, b)
                of_samples[of_samples] = _agree(rows, a[of_samples], b[of_samples], number)
                close = same.copy()
                open_ = ~same & (of_items | of_samples)
                close[open_] = prints.close(a[open_], b[open_])
                single.add(a[close & of_items], b[close & of_items])
                whole.add(a[close & of_samples], b[close & of_samples])
        modalities.append(single.twins())
    return whole.twins(), modalities


def _agree(rows: Rows, a: np.ndarray, b: np.ndarray, left_out: int) -> np.ndarray:
    """bool (P,): no modality but perhaps the one left out tells the two rows apart."""
    agree = np.ones(len(a), bool)
    for number, (prints, content) in enumerate(zip(rows.prints, rows.contents, strict=True)):
        if number != left_out:
            same = (content[a] == content[b]) | ~(prints.known[a] | prints.known[b])
            open_ = agree & ~same & prints.known[a] & prints.known[b]
            same[open_] = prints.close(a[open_], b[open_])
            agree &= same
    return agree


def candidate_pairs(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of positions with equal keys, (P,) and (P,), the first position before the second.

    A position is paired with at most the `MAX_PARTNERS` first ones of its key.
    """
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    start = np.searchsorted(ranked, ranked)
    partners = np.minimum(np.arange(len(keys)) - start, MAX_PARTNERS)
    ends = np.cumsum(partners)
    low = 0
    while low < len(keys):
        done = ends[low - 1] if low else 0
        high = max(int(np.searchsorted(ends, done + PAIRS_AT_ONCE, side="right")), low + 1)
        part = partners[low:high]
        second = np.repeat(np.arange(low, high), part)
        number = np.arange(len(second)) - np.repeat(np.cumsum(part) - part, part)
        yield order[start[second] + number], order[second]
        low = high

"""Which sample is on which side: the official partition, the release's, or one by group.

Every rule is a function of the list of samples and the seeds alone.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.config import DataConfig
from data.schema import DataError, Split
from data.sources.base import stratified_splits
from data.sources.raw import RawSample

SPLITS: tuple[Split, ...] = ("train", "val", "test")
# Sets whose released code gives the share of train, not of the rest; both round down.
CUT_BY_TRAIN = ("ucf101", "food101")
# Its published class numbers, by which the release stratifies, are sorted without regard to case.
NUMBERED_IN_LOWER_CASE = "ucf101"
NUM_FOLDS = 10
TEST_SHARE, VAL_SHARE = 0.2, 0.1


def assign(
    samples: Sequence[RawSample], classes: Sequence[str], config: DataConfig
) -> tuple[list[Split], str]:
    """Split of every sample, and the rule in words.

    A set without any official partition is split by group, or at random where it has no groups.
    One without validation gives up `val_fraction` of its training samples, by group where the
    partition keeps groups apart, else stratified by class.

    Args:
        samples: in index order: train, val, test of the official partition.
        classes: names in the order of their numbers.

    Raises:
        DataError: there are too few samples or groups for the rule.
    """
    labels = [sample.label for sample in samples]
    official: list[Split] = [sample.split for sample in samples]
    rule = config.split
    grouped = any(sample.group for sample in samples)
    if rule == "official" and set(official) == {"train"}:
        rule = "grouped" if grouped else "random_70_10_20"
    if rule == "grouped":
        if not grouped:
            raise DataError(
                "data.split=grouped needs groups, and no sample of this set has one (a table names "
                "them by data.group_column); use another data.split"
            )
        return _grouped(samples, config.split_seed), f"grouped, seed {config.split_seed}"
    if rule == "random_70_10_20":
        order = sorted(classes, key=str.lower) if config.name == NUMBERED_IN_LOWER_CASE else classes
        numbers = [order.index(label) for label in labels]
        cut_by_train = config.name in CUT_BY_TRAIN
        return (
            random_70_10_20(numbers, config.split_seed, cut_by_train=cut_by_train),
            f"random_70_10_20, seed {config.split_seed}",
        )
    if not {"train", "test"} <= set(official):
        raise DataError(
            f"data.split={rule} has no {'test' if 'train' in official else 'train'} samples; a "
            "partition needs both; complete it (a table says it by data.split_column), or use "
            "--data.split random_70_10_20 or grouped"
        )
    if "val" in official:
        return official, rule
    return _carved(samples, official, config), f"{rule}, {config.val_fraction:.0%} of train for val"


def random_70_10_20(labels: Sequence[int], seed: int, *, cut_by_train: bool) -> list[Split]:
    """The partition of the MIDAS release: stratified by class, blind to groups.

    Args:
        labels: class number per sample; train, val and test lists of the set one after the
            other. Classes are drawn in the order of their numbers.
        cut_by_train: the release writes `train_size=0.7` for some sets and `test_size=0.3` for
            others; they round differently.

    Raises:
        DataError: a class has too few samples.
    """
    from sklearn.model_selection import train_test_split

    everything = np.arange(len(labels))
    numbers = np.array(labels)
    first: dict[str, Any] = {"train_size": 0.7} if cut_by_train else {"test_size": 0.3}
    second: dict[str, Any] = {"train_size": 1 / 3} if cut_by_train else {"test_size": 2 / 3}
    try:
        _, rest = train_test_split(everything, **first, stratify=numbers, random_state=seed)
        val, test = train_test_split(rest, **second, stratify=numbers[rest], random_state=seed)
    except ValueError as error:
        raise DataError(
            f"data.split=random_70_10_20 cannot divide {len(labels)} samples: {error}; every class "
            "needs about 7 samples; add some, or use another data.split"
        ) from error
    return _sides(len(labels), np.asarray(val), np.asarray(test))


def _grouped(samples: Sequence[RawSample], seed: int) -> list[Split]:
    """About 70/10/20 with every group on one side, and classes as even as groups allow."""
    groups = _groups(samples)
    # Stratifying needs a class with a sample for every fold.
    largest_class = max(Counter(sample.label for sample in samples).values(), default=0)
    num_folds = min(NUM_FOLDS, len(set(groups)), largest_class)
    if num_folds < 3:
        raise DataError(
            f"data.split=grouped needs at least 3 groups and 3 samples in a class; the samples "
            f"have {len(set(groups))} groups, and {largest_class} in the largest class; use another"
            " data.split"
        )
    folds = _folds(samples, groups, num_folds, seed)
    num_test, num_val = (max(1, round(share * num_folds)) for share in (TEST_SHARE, VAL_SHARE))
    test = np.concatenate(folds[:num_test])
    val = np.concatenate(folds[num_test : num_test + num_val])
    return _sides(len(samples), val, test)


def _carved(samples: Sequence[RawSample], official: list[Split], config: DataConfig) -> list[Split]:
    """The official partition with a validation part out of train."""
    own = [number for number, split in enumerate(official) if split == "train"]
    train = [samples[number] for number in own]
    groups = _groups(train)
    apart = not set(groups) & {s.group for s in samples if s.split == "test"}
    if apart and 3 <= len(set(groups)) < len(train):
        largest_class = max(Counter(sample.label for sample in train).values())
        num_folds = min(NUM_FOLDS, len(set(groups)), max(2, largest_class))
        num_val = min(max(1, round(config.val_fraction * num_folds)), num_folds - 1)
        folds = _folds(train, groups, num_folds, config.split_seed)
        val = set(np.concatenate(folds[:num_val]).tolist())
        sides: list[Split] = ["val" if number in val else "train" for number in range(len(train))]
    else:
        labels = [sample.label for sample in train]
        sides = stratified_splits(labels, {"val": config.val_fraction}, config.seed)
    result = list(official)
    for number, side in zip(own, sides, strict=True):
        result[number] = side
    return result


def _groups(samples: Sequence[RawSample]) -> list[str]:
    """Group of every sample; one of its own for a sample without."""
    return [s.group or f"only {number}" for number, s in enumerate(samples)]


def _folds(
    samples: Sequence[RawSample], groups: list[str], num_folds: int, seed: int
) -> list[np.ndarray]:
    """Positions of the samples of each fold; a group is in one fold."""
    import warnings

    from sklearn.model_selection import StratifiedGroupKFold

    labels = np.array([sample.label for sample in samples])
    folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # classes with fewer samples than folds are as even as can be
        warnings.simplefilter("ignore", UserWarning)
        return [own for _, own in folds.split(labels, labels, np.array(groups))]


def _sides(count: int, val: np.ndarray, test: np.ndarray) -> list[Split]:
    sides: list[Split] = ["train"] * count
    for number in val:
        sides[number] = "val"
    for number in test:
        sides[number] = "test"
    return sides

"""Partitions: the release's to the sample, by group without leaks, official ones untouched."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from data.config import DataConfig
from data.schema import DataError, Split
from data.sources.raw import RawSample
from data.splits import assign, random_70_10_20

LISTS = Path(__file__).parents[2].parent / "shared" / "data" / "lists"
needs_lists = pytest.mark.skipif(not LISTS.is_dir(), reason="needs the shared id lists")


def config(**settings: object) -> DataConfig:
    return DataConfig.model_validate({"name": "cremad", "root": "unused", **settings})


def sample(number: int, label: str, split: Split = "train", group: str | None = None) -> RawSample:
    return RawSample(f"clip-{number}", label, split, {}, group)


def assigned(samples: Sequence[RawSample], **settings: object) -> list[Split]:
    return assign(samples, sorted({s.label for s in samples}), config(**settings))[0]


def rule(samples: Sequence[RawSample], **settings: object) -> str:
    return assign(samples, sorted({s.label for s in samples}), config(**settings))[1]


# ---- the release's partition, on the real lists


def cremad_rows() -> list[list[str]]:
    return [line.split(",") for line in (LISTS / "cremad" / "data.csv").read_text().split()]


@needs_lists
def test_cremad_is_what_the_release_draws() -> None:
    ids, labels = zip(*cremad_rows(), strict=True)
    train, rest = train_test_split(
        np.arange(7442), test_size=0.3, stratify=labels, random_state=2, shuffle=True
    )
    again = [labels[row] for row in rest]
    val, test = train_test_split(rest, test_size=2 / 3, stratify=again, random_state=2)
    samples = [sample(0, label) for label in labels]
    sides = assigned(samples, split="random_70_10_20")
    for split, rows in {"train": train, "val": val, "test": test}.items():
        assert [row for row, side in enumerate(sides) if side == split] == sorted(rows)
    assert Counter(sides) == {"train": 5209, "val": 744, "test": 1489}
    side = dict(zip(ids, sides, strict=True))
    assert side["1025_IWL_HAP_XX"] == "train"
    assert side["1084_ITS_NEU_XX"] == "val"
    assert side["1046_IEO_SAD_HI"] == "test"


def ucf101_rows() -> list[tuple[str, str, str]]:
    """Clip, class name and class number, in the order of the two lists."""
    folder = LISTS / "ucf101"
    names = dict(line.split() for line in (folder / "classInd.txt").read_text().splitlines())
    rows = [
        line.split()
        for name in ("trainlist01_new.txt", "testlist01_new.txt")
        for line in (folder / name).read_text().splitlines()[1:]
    ]
    return [(path.split("/")[1].removesuffix(".avi"), names[n], n) for path, n in rows]


@needs_lists
def test_ucf101_is_what_the_release_draws() -> None:
    """The release stratifies by the numbers of its lists, which differ from the sorted names."""
    clips, names, numbers = zip(*ucf101_rows(), strict=True)
    drawn = [int(number) for number in numbers]
    _, rest = train_test_split(np.arange(13320), train_size=0.7, stratify=drawn, random_state=2)
    again = [drawn[row] for row in rest]
    val, test = train_test_split(rest, train_size=1 / 3, stratify=again, random_state=2)
    sides = assigned([sample(0, name) for name in names], name="ucf101", split="random_70_10_20")
    assert Counter(sides) == {"train": 9324, "val": 1332, "test": 2664}
    assert [row for row, side in enumerate(sides) if side == "val"] == sorted(val)
    assert [row for row, side in enumerate(sides) if side == "test"] == sorted(test)
    side = dict(zip(clips, sides, strict=True))
    assert side["v_Shotput_g08_c03"] == "train"
    assert side["v_CricketShot_g24_c02"] == "val"
    assert side["v_ApplyEyeMakeup_g08_c02"] == "test"


@needs_lists
def test_kinetics_is_stratified_by_number() -> None:
    """As text, class 10 would come before class 2."""
    lines = [
        line.split(",")
        for name in ("my_train.txt", "my_test.txt")
        for line in (LISTS / "kinetics-sounds" / name).read_text().split()
    ]
    labels = [line[2] for line in lines]
    samples = [sample(0, label) for label in labels]
    classes = sorted(set(labels), key=int)
    sides, _ = assign(samples, classes, config(name="kinetics", split="random_70_10_20"))
    numbers = [int(label) for label in labels]
    train, _ = train_test_split(np.arange(17396), test_size=0.3, stratify=numbers, random_state=2)
    assert [row for row, side in enumerate(sides) if side == "train"] == sorted(train)
    assert Counter(sides) == {"train": 12177, "val": 1739, "test": 3480}


def test_random_split_ignores_the_official_one_and_moves_with_its_seed() -> None:
    labels = ["ab"[number % 2] for number in range(100)]
    mixed = [sample(n, labels[n], "test" if n > 60 else "train", f"g{n % 5}") for n in range(100)]
    plain = [sample(n, labels[n]) for n in range(100)]
    first = assigned(mixed, split="random_70_10_20")
    assert first == assigned(plain, split="random_70_10_20", seed=5)
    assert first != assigned(plain, split="random_70_10_20", split_seed=3)
    assert Counter(first) == {"train": 70, "val": 10, "test": 20}
    assert rule(mixed, split="random_70_10_20", split_seed=3) == "random_70_10_20, seed 3"


def test_sets_round_as_their_release_does() -> None:
    labels = [number % 2 for number in range(90)]  # 0.7 * 90 is a little less than 63
    by_rest = random_70_10_20(labels, 2, cut_by_train=False)
    by_train = random_70_10_20(labels, 2, cut_by_train=True)
    assert Counter(by_rest) == {"train": 63, "val": 9, "test": 18}
    assert Counter(by_train) == {"train": 62, "val": 9, "test": 19}
    samples = [sample(number, "ab"[number % 2]) for number in range(90)]
    assert assigned(samples, split="random_70_10_20") == by_rest
    assert assigned(samples, split="random_70_10_20", name="food101") == by_train


def test_too_few_samples_of_a_class() -> None:
    samples = [sample(n, "a") for n in range(50)] + [sample(50, "b")]
    with pytest.raises(DataError, match=r"cannot divide 51 samples: .*only 1.*about 7 samples"):
        assigned(samples, split="random_70_10_20")


# ---- by group


def speakers(
    num_groups: int = 40, per_group: int = 12, classes: str = "abcd", split: Split = "train"
) -> list[RawSample]:
    return [
        sample(n, classes[n % len(classes)], split, f"speaker-{n % num_groups}")
        for n in range(num_groups * per_group)
    ]


def sides_of_groups(samples: Sequence[RawSample], sides: Sequence[Split]) -> dict[str, set[Split]]:
    found: dict[str, set[Split]] = defaultdict(set)
    for one, side in zip(samples, sides, strict=True):
        found[str(one.group)].add(side)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_group_is_on_two_sides(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [
        sample(n, "abc"[rng.choice(3, p=[0.6, 0.3, 0.1])], "train", f"g{rng.integers(60)}")
        for n in range(1500)
    ]
    sides = assigned(samples, split="grouped", split_seed=seed)
    assert all(len(found) == 1 for found in sides_of_groups(samples, sides).values())
    counts = Counter(sides)
    shares: dict[Split, float] = {"train": 0.7, "val": 0.1, "test": 0.2}
    for split, share in shares.items():
        assert counts[split] / 1500 == pytest.approx(share, abs=0.02)
        own = Counter(s.label for s, side in zip(samples, sides, strict=True) if side == split)
        for label, part in {"a": 0.6, "b": 0.3, "c": 0.1}.items():
            assert own[label] / counts[split] == pytest.approx(part, abs=0.06)


@needs_lists
def test_actors_of_cremad_stay_apart() -> None:
    samples = [sample(n, row[1], "train", row[0][:4]) for n, row in enumerate(cremad_rows())]
    sides = assigned(samples, split="grouped")
    groups = sides_of_groups(samples, sides)
    assert len(groups) == 91
    assert all(len(found) == 1 for found in groups.values())
    assert Counter(sides)["train"] / 7442 == pytest.approx(0.7, abs=0.02)


def test_grouped_split_is_fixed_by_its_seed() -> None:
    samples = speakers()
    first = assigned(samples, split="grouped")
    assert first == assigned(samples, split="grouped", seed=9)
    assert first != assigned(samples, split="grouped", split_seed=3)
    assert rule(samples, split="grouped", split_seed=3) == "grouped, seed 3"


def test_samples_without_group_stand_alone() -> None:
    """But a set without any group cannot be split by group."""
    samples = [sample(n, "ab"[n % 2]) for n in range(200)]
    with pytest.raises(DataError, match=r"grouped needs groups, .* data\.group_column"):
        assigned(samples, split="grouped")
    mixed = [sample(n, "ab"[n % 2], "train", "g" if n < 2 else None) for n in range(200)]
    assert Counter(assigned(mixed, split="grouped"))["train"] == pytest.approx(140, abs=2)


def test_an_incomplete_partition_is_not_replaced() -> None:
    samples = [sample(n, "ab"[n % 2], "val" if n % 5 == 0 else "train") for n in range(50)]
    for asked in ("official", "given"):
        with pytest.raises(DataError, match=f"data.split={asked} has no test samples"):
            assigned(samples, split=asked, name="table")


def test_three_groups_are_one_each() -> None:
    samples = speakers(num_groups=3, classes="ab")
    groups = sides_of_groups(samples, assigned(samples, split="grouped"))
    assert sorted(side for found in groups.values() for side in found) == ["test", "train", "val"]


def test_too_few_groups_or_samples() -> None:
    with pytest.raises(DataError, match=r"at least 3 groups.*have 2 groups.*another data\.split"):
        assigned(speakers(num_groups=2), split="grouped")
    few = [sample(n, f"class {n // 2}", "train", f"g{n}") for n in range(20)]
    with pytest.raises(DataError, match=r"3 samples in a class; .* 2 in the largest class"):
        assigned(few, split="grouped")


# ---- official


def test_official_partition_with_validation_stays() -> None:
    order: list[Split] = ["train", "train", "train", "val", "val", "test", "test"]
    samples = [sample(n, "ab"[n % 2], split) for n, split in enumerate(order)]
    assert assigned(samples) == order
    assert rule(samples) == "official"
    assert rule(samples, split="given", name="table") == "given"


def test_validation_is_carved_by_group_where_the_partition_keeps_groups_apart() -> None:
    samples = speakers() + [sample(n, "abcd"[n % 4], "test", f"other-{n % 9}") for n in range(100)]
    sides = assigned(samples)
    assert sides[480:] == ["test"] * 100
    groups = sides_of_groups(samples, sides)
    assert all(len(found) == 1 for found in groups.values())
    assert Counter(sides[:480])["val"] == pytest.approx(0.2 * 480, abs=12)
    assert rule(samples) == "official, 20% of train for val"
    tenth = assigned(samples, val_fraction=0.1)
    assert Counter(tenth[:480])["val"] == pytest.approx(0.1 * 480, abs=12)


def test_groups_of_some_samples_are_enough_to_carve_by() -> None:
    """Samples without group are on both sides of any partition; they join no group."""
    samples = [
        *speakers(),
        *(sample(n, "abcd"[n % 4]) for n in range(40)),
        *(sample(n, "abcd"[n % 4], "test") for n in range(40)),
    ]
    sides = assigned(samples)
    groups = sides_of_groups(samples[:480], sides[:480])
    assert all(len(found) == 1 for found in groups.values())
    assert "val" in sides


def test_validation_is_stratified_where_groups_are_mixed_or_absent() -> None:
    mixed = speakers() + [sample(n, "abcd"[n % 4], "test", f"speaker-{n}") for n in range(40)]
    plain = [sample(n, "abcd"[n % 4]) for n in range(480)]
    plain += [sample(n, "abcd"[n % 4], "test") for n in range(40)]
    sides = assigned(mixed)
    assert sides == assigned(plain)
    val = [s.label for s, side in zip(mixed, sides, strict=True) if side == "val"]
    assert Counter(val) == {"a": 24, "b": 24, "c": 24, "d": 24}
    assert sides != assigned(plain, seed=1)
    assert any(len(found) == 2 for found in sides_of_groups(mixed[:480], sides[:480]).values())


@needs_lists
def test_ucf101_official_split_gets_validation_groups() -> None:
    train = {line.split()[0] for line in (LISTS / "ucf101" / "trainlist01.txt").open()}
    samples = []
    for path in sorted(train) + (LISTS / "ucf101" / "testlist01.txt").read_text().split():
        label, clip = path.split("/")
        split: Split = "train" if path in train else "test"
        samples.append(RawSample(clip, label, split, {}, clip[2:].rsplit("_", 1)[0]))
    sides = assigned(samples, name="ucf101")
    assert Counter(sides)["test"] == 3783
    assert Counter(sides)["val"] / 9537 == pytest.approx(0.2, abs=0.02)
    assert all(len(found) == 1 for found in sides_of_groups(samples, sides).values())
    assert len({s.label for s, side in zip(samples, sides, strict=True) if side == "val"}) == 101


def test_a_set_without_partition_is_split_by_group_or_at_random() -> None:
    assert rule(speakers()) == "grouped, seed 2"
    assert assigned(speakers()) == assigned(speakers(), split="grouped")
    plain = [sample(n, "ab"[n % 2]) for n in range(100)]
    assert rule(plain) == "random_70_10_20, seed 2"
    assert assigned(plain) == assigned(plain, split="random_70_10_20")
    with pytest.raises(DataError, match="data.split=given has no test samples"):
        rule(plain, split="given", name="table")

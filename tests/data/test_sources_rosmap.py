"""ROSMAP: scaling, validation part and faults on a generated folder and on the real files."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.schema import DataError
from data.sources import DataConfig, RejectedSample, build_source

SHARED = Path(
    os.environ.get("MIDAS_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data")
)
ROWS = {"tr": 20, "te": 6}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, rows in ROWS.items():
        for view in (1, 2, 3):
            values = rng.normal(size=(rows, 200))
            values[:, 5] = 3.0 if part == "tr" else 4.0  # constant over train, another in test
            np.savetxt(tmp_path / f"{view}_{part}.csv", values, delimiter=",")
        np.savetxt(tmp_path / f"labels_{part}.csv", np.arange(rows) % 2)
    return tmp_path


def rosmap(root: Path, **settings: object) -> DataConfig:
    return DataConfig.model_validate({"name": "rosmap", "root": str(root), **settings})


def replace_line(path: Path, row: int, line: str) -> None:
    lines = path.read_text().splitlines()
    lines[row] = line
    path.write_text("\n".join(lines) + "\n")


def test_items(root: Path) -> None:
    items = build_source(rosmap(root)).items()
    assert [item.key for item in items[:2]] == ["tr-000", "tr-001"]
    assert [item.label for item in items[:3]] == ["control", "alzheimer", "control"]
    val = [item for item in items if item.split == "val"]
    assert Counter(item.label for item in val) == {"control": 2, "alzheimer": 2}
    assert all((item.split == "test") == item.key.startswith("te-") for item in items)


def test_validation_part_follows_seed_and_fraction(root: Path) -> None:
    def val_keys(**settings: object) -> list[str]:
        items = build_source(rosmap(root, **settings)).items()
        return [item.key for item in items if item.split == "val"]

    assert val_keys(seed=0) != val_keys(seed=1)
    assert len(val_keys(val_fraction=0.5)) == 10


def test_scaling_uses_the_train_rows_only(root: Path) -> None:
    source = build_source(rosmap(root))
    items = source.items()
    raw = np.concatenate(
        [np.loadtxt(root / "2_tr.csv", delimiter=","), np.loadtxt(root / "2_te.csv", delimiter=",")]
    )
    train = raw[[item.sample_id for item in items if item.split == "train"]]
    low, high = train.min(axis=0), train.max(axis=0)
    for item in items:
        expected = (raw[item.sample_id] - low) / (high - low + 1e-10)
        expected[5] = raw[item.sample_id, 5] - 3.0  # constant feature: x - min
        array = source.load(item)["methylation"]
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected, atol=1e-5)


def test_noise(root: Path) -> None:
    clean = build_source(rosmap(root))
    noisy = build_source(rosmap(root, noise={"mirna": 0.3}))
    items = clean.items()
    difference = [noisy.load(item)["mirna"] - clean.load(item)["mirna"] for item in items]
    assert np.std(difference) == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (",".join(["0.5"] * 199 + ["n/a"]), r"2_tr\.csv row 4: column 200 holds 'n/a', .* not a n"),
        (",".join(["nan"] * 200), r"2_tr\.csv row 4: column 1 holds 'nan', which is not finite"),
        ("0.5,0.5", r"2_tr\.csv row 4: 2 cells, 200 expected"),
    ],
)
def test_bad_row_is_rejected(root: Path, line: str, reason: str) -> None:
    replace_line(root / "2_tr.csv", 3, line)
    source = build_source(rosmap(root))
    items = source.items()
    with pytest.raises(RejectedSample, match=reason):
        source.load(items[3])
    assert np.isfinite(source.load(items[4])["methylation"]).all()


def test_views_of_unequal_length(root: Path) -> None:
    path = root / "3_te.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match=r"3_te\.csv \(mirna\) has 5 rows and labels_te\.csv has 6"):
        build_source(rosmap(root)).items()


def test_missing_file(root: Path) -> None:
    (root / "2_te.csv").unlink()
    with pytest.raises(DataError, match=r"lacks 2_te\.csv.*it holds 1_te\.csv.*`--data\.root DIR`"):
        build_source(rosmap(root))


@pytest.mark.skipif(not (SHARED / "rosmap").is_dir(), reason="needs rosmap/; set MIDAS_SHARED_DATA")
def test_real_files() -> None:
    source = build_source(rosmap(SHARED / "rosmap"))
    items = source.items()
    counts = Counter((item.split, item.label) for item in items)
    assert counts == {
        ("train", "control"): 94,
        ("train", "alzheimer"): 102,
        ("val", "control"): 24,
        ("val", "alzheimer"): 25,
        ("test", "control"): 51,
        ("test", "alzheimer"): 55,
    }
    train = [source.load(item) for item in items if item.split == "train"]
    for view in ("mrna", "methylation", "mirna"):
        values = np.stack([arrays[view] for arrays in train])
        np.testing.assert_array_equal(values.min(axis=0), 0.0)
        np.testing.assert_allclose(values.max(axis=0), 1.0, atol=1e-6)

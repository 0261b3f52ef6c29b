"""Preparing: shards hold the right bytes, repeat exactly, survive kills and name what is wrong."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest

from data.prepare import check_disk, default_folder, prepare
from data.schema import DataError, Modality, Split, load_manifest, verify_shards
from data.sources import SOURCES, DataConfig, Item, RejectedSample, build_source

NUM_SAMPLES = 120
SPLIT_CYCLE: tuple[Split, ...] = ("train", "train", "val", "test")


class Toy:
    """120 samples, classes in turn; the two hooks are what each test bends."""

    name: ClassVar[str] = "digits"
    version: ClassVar[int] = 1
    modalities: ClassVar[tuple[Modality, ...]] = (
        Modality(name="x", kind="vector", shape=(3,), dtype="float32"),
        Modality(name="y", kind="vector", shape=(2, 2), dtype="int16"),
    )
    classes: ClassVar[tuple[str, ...]] = ("a", "b")
    change: ClassVar[Callable[[int, dict[str, np.ndarray]], None]] = lambda number, arrays: None
    label: ClassVar[Callable[[int], str]] = lambda number: "ab"[number % 8 // 4]

    def __init__(self, config: DataConfig) -> None: ...

    def items(self) -> list[Item]:
        return [
            Item(n, f"toy-{n}", type(self).label(n), SPLIT_CYCLE[n % 4]) for n in range(NUM_SAMPLES)
        ]

    def load(self, item: Item) -> dict[str, np.ndarray]:
        number = item.sample_id
        arrays = {
            "x": np.full(3, number, dtype=np.float32),
            "y": np.full((2, 2), -number, dtype=np.int16),
        }
        type(self).change(number, arrays)
        return arrays


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Toy]:
    """A fresh subclass of Toy, in the place of digits."""
    source = type("FreshToy", (Toy,), {})
    monkeypatch.setitem(SOURCES, "digits", source)
    return source


CONFIG = DataConfig(rows_per_shard=25, rows_per_group=4)


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_split(folder: Path, split: Split) -> list[dict[str, object]]:
    shards = load_manifest(folder).splits[split]
    return [row for shard in shards for row in pq.read_table(folder / shard.path).to_pylist()]


def sample_ids(folder: Path, split: Split) -> list[int]:
    return [int(str(row["sample_id"])) for row in read_split(folder, split)]


def test_shards_hold_every_sample_once(toy: type[Toy], tmp_path: Path) -> None:
    report = prepare(CONFIG, tmp_path)
    assert (report.read, report.written, report.rejected, report.reused) == (120, 120, [], False)
    seen: list[int] = []
    for split in ("train", "val", "test"):
        rows = read_split(tmp_path, split)
        for row in rows:
            number = row["sample_id"]
            assert isinstance(number, int)
            assert row["key"] == f"toy-{number}"
            assert row["label"] == number % 8 // 4
            assert row["x"] == np.full(3, number, "<f4").tobytes()
            assert row["y"] == np.full(4, -number, "<i2").tobytes()
            assert SPLIT_CYCLE[number % 4] == split
        numbers = sample_ids(tmp_path, split)
        assert numbers != sorted(numbers)
        seen += numbers
    assert sorted(seen) == list(range(120))
    assert sorted(os.listdir(tmp_path)) == [
        "manifest.json",
        "rejected.jsonl",
        "test-00000.parquet",
        "test-00001.parquet",
        "train-00000.parquet",
        "train-00001.parquet",
        "train-00002.parquet",
        "val-00000.parquet",
        "val-00001.parquet",
    ]


def test_manifest_describes_the_files(toy: type[Toy], tmp_path: Path) -> None:
    manifest = prepare(CONFIG, tmp_path).manifest
    verify_shards(manifest, tmp_path)
    assert manifest.class_counts == {"train": (30, 30), "val": (15, 15), "test": (15, 15)}
    for shards in manifest.splits.values():
        for shard in shards:
            metadata = pq.read_metadata(tmp_path / shard.path)
            groups = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
            assert tuple(groups) == shard.row_groups
            assert metadata.row_group(0).column(3).compression == "UNCOMPRESSED"
            assert pq.read_schema(tmp_path / shard.path).equals(manifest.arrow_schema())
    assert [shard.rows for shard in manifest.splits["train"]] == [25, 25, 10]
    assert manifest.splits["train"][2].row_groups == (4, 4, 2)


def test_default_row_groups_of_small_sets_have_8_rows(toy: type[Toy], tmp_path: Path) -> None:
    manifest = prepare(DataConfig(), tmp_path).manifest
    assert manifest.splits["train"][0].row_groups == (8,) * 7 + (4,)


def test_made_twice_is_byte_identical(toy: type[Toy], tmp_path: Path) -> None:
    prepare(CONFIG, tmp_path / "one")
    prepare(CONFIG, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_digits_made_twice_are_byte_identical(tmp_path: Path) -> None:
    config = DataConfig(noise={"image": 0.5, "audio": 2.0})
    prepare(config, tmp_path / "one")
    prepare(config, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    source = build_source(config)
    row = read_split(tmp_path / "one", "val")[0]
    item = source.items()[int(str(row["sample_id"]))]
    assert row["audio"] == source.load(item)["audio"].tobytes()


def test_second_run_verifies_and_changes_nothing(toy: type[Toy], tmp_path: Path) -> None:
    toy.change = lambda number, arrays: arrays["x"].fill(np.nan) if number == 7 else None
    first = prepare(CONFIG, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = prepare(CONFIG, tmp_path)
    assert second.reused
    assert second.manifest == first.manifest
    assert second.rejected == first.rejected
    assert (second.read, second.written) == (120, 119)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_other_settings_are_refused(toy: type[Toy], tmp_path: Path) -> None:
    prepare(CONFIG, tmp_path)
    other = CONFIG.model_copy(update={"seed": 3})
    with pytest.raises(DataError, match="other settings: seed is 0 there and 3 here; use its"):
        prepare(other, tmp_path)


def test_interrupted_run_resumes_to_the_same_bytes(toy: type[Toy], tmp_path: Path) -> None:
    prepare(CONFIG, tmp_path / "straight")
    loaded: list[int] = []

    def fail_at_60(number: int, arrays: dict[str, np.ndarray]) -> None:
        loaded.append(number)
        if len(loaded) == 60:
            raise OSError("the disk went away")

    toy.change = fail_at_60
    with pytest.raises(OSError, match="the disk went away"):
        prepare(CONFIG, tmp_path / "resumed")
    assert not (tmp_path / "resumed" / "manifest.json").exists()
    loaded.clear()
    toy.change = lambda number, arrays: loaded.append(number)
    calls: list[tuple[int, int]] = []
    prepare(CONFIG, tmp_path / "resumed", lambda done, total: calls.append((done, total)))
    assert len(loaded) == 120 - 50  # two finished shards of 25 were kept
    assert calls == [(done, 120) for done in range(50, 121)]
    assert contents(tmp_path / "resumed") == contents(tmp_path / "straight")


def test_resume_rewrites_a_damaged_shard(toy: type[Toy], tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(CONFIG, tmp_path / "resumed", stop)
    (tmp_path / "resumed" / "train-00000.parquet").write_bytes(b"damaged")
    prepare(CONFIG, tmp_path / "resumed")
    prepare(CONFIG, tmp_path / "straight")
    assert contents(tmp_path / "resumed") == contents(tmp_path / "straight")


def test_interrupted_run_with_other_settings_starts_over(toy: type[Toy], tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(CONFIG, tmp_path / "again", stop)
    other = CONFIG.model_copy(update={"rows_per_shard": 100})
    prepare(other, tmp_path / "again")
    prepare(other, tmp_path / "straight")
    assert contents(tmp_path / "again") == contents(tmp_path / "straight")


KILLED = """
import os, signal, sys
from pathlib import Path
from data.prepare import prepare
from data.sources import DataConfig

def stop(done, total):
    if done == 30:
        os.kill(os.getpid(), signal.SIGKILL)

prepare(DataConfig(name="rosmap", root=sys.argv[1], rows_per_shard=12), Path(sys.argv[2]), stop)
"""


@pytest.fixture
def rosmap_root(tmp_path: Path) -> Path:
    root = tmp_path / "rosmap"
    root.mkdir()
    rng = np.random.default_rng(0)
    for part in ("tr", "te"):
        for view in (1, 2, 3):
            np.savetxt(root / f"{view}_{part}.csv", rng.normal(size=(40, 200)), delimiter=",")
        np.savetxt(root / f"labels_{part}.csv", np.arange(40) % 2)
    return root


def test_killed_process_resumes(rosmap_root: Path, tmp_path: Path) -> None:
    config = DataConfig(name="rosmap", root=str(rosmap_root), rows_per_shard=12)
    command = [sys.executable, "-c", KILLED, str(rosmap_root), str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run(command, env=environment, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "train-00001.parquet").is_file()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    prepare(config, tmp_path / "killed")
    prepare(config, tmp_path / "straight")
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_moved_raw_folder_gives_the_same_bytes(rosmap_root: Path, tmp_path: Path) -> None:
    prepare(DataConfig(name="rosmap", root=str(rosmap_root)), tmp_path / "one")
    moved = rosmap_root.rename(tmp_path / "elsewhere")
    prepare(DataConfig(name="rosmap", root=str(moved)), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_bad_cell_is_rejected_and_reported(rosmap_root: Path, tmp_path: Path) -> None:
    path = rosmap_root / "2_tr.csv"
    lines = path.read_text().splitlines()
    lines[7] = ",".join(["nan", *lines[7].split(",")[1:]])
    path.write_text("\n".join(lines))
    report = prepare(DataConfig(name="rosmap", root=str(rosmap_root)), tmp_path / "out")
    reason = "2_tr.csv row 8: column 1 holds 'nan', which is not finite"
    assert report.rejected == [("tr-007", reason)]
    assert (report.read, report.written) == (80, 79)


def reject(number: int, arrays: dict[str, np.ndarray]) -> None:
    """One violation of each kind."""
    if number == 8:
        arrays["x"][1] = np.nan
    if number == 9:
        arrays["x"] = arrays["x"].astype(np.float64)
    if number == 10:
        arrays["y"] = arrays["y"].reshape(4)
    if number == 11:
        del arrays["y"]
    if number == 12:
        raise RejectedSample("its file ends early")


def test_violations_are_rejected_counted_and_named(toy: type[Toy], tmp_path: Path) -> None:
    toy.change = reject
    toy.label = lambda number: "zebra" if number == 13 else "ab"[number % 8 // 4]
    report = prepare(CONFIG, tmp_path)
    assert (report.read, report.written) == (120, 114)
    assert dict(report.rejected) == {
        "toy-8": "x has 1 values that are not finite",
        "toy-9": "x is float64 (3,), float32 (3,) expected",
        "toy-10": "y is int16 (4,), int16 (2, 2) expected",
        "toy-11": "modalities ['x'] differ from the declared ones",
        "toy-12": "its file ends early",
        "toy-13": "label 'zebra' is none of a, b",
    }
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert {line["key"]: line["split"] for line in lines} == {
        f"toy-{n}": SPLIT_CYCLE[n % 4] for n in range(8, 14)
    }
    written = [n for split in report.manifest.splits for n in sample_ids(tmp_path, split)]
    assert sorted(written) == [n for n in range(120) if not 8 <= n < 14]


def test_everything_rejected_leaves_no_shards(toy: type[Toy], tmp_path: Path) -> None:
    toy.change = lambda number, arrays: arrays["x"].fill(np.inf)
    with pytest.raises(DataError, match="120 samples were rejected and nothing is left of split t"):
        prepare(CONFIG, tmp_path)
    assert list(tmp_path.iterdir()) == []
    toy.change = Toy.change
    assert prepare(CONFIG, tmp_path).written == 120


def test_class_rejected_from_train(toy: type[Toy], tmp_path: Path) -> None:
    toy.change = lambda n, arrays: arrays["x"].fill(np.nan) if n % 8 // 4 and n % 4 < 2 else None
    with pytest.raises(DataError, match="nothing is left of class b of train; the first is toy-"):
        prepare(CONFIG, tmp_path)


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_damaged_shard_is_found(toy: type[Toy], tmp_path: Path, damage: str) -> None:
    manifest = prepare(CONFIG, tmp_path).manifest
    path = tmp_path / manifest.splits["train"][1].path
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content[:-10] if damage == "cut" else content)
    if damage == "missing":
        path.unlink()
    message = r"train-00001\.parquet \(train\) is (corrupt|missing).*run `midas prepare` again"
    with pytest.raises(DataError, match=message):
        verify_shards(manifest, tmp_path)
    with pytest.raises(DataError, match=message):
        prepare(CONFIG, tmp_path)


def test_class_without_training_sample(toy: type[Toy], tmp_path: Path) -> None:
    toy.label = lambda number: "b" if SPLIT_CYCLE[number % 4] == "test" else "a"
    with pytest.raises(DataError, match="no training sample of class b; every class needs one"):
        prepare(CONFIG, tmp_path)


def test_one_class(toy: type[Toy], tmp_path: Path) -> None:
    toy.classes = ("a",)
    with pytest.raises(DataError, match=r"has 1 class \(a\); classification needs at least 2"):
        prepare(CONFIG, tmp_path)


def test_full_disk(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs 1073741824\.00 GiB .* choose a folder on another"):
        check_disk(2**60, tmp_path)


def test_foreign_folder_is_left_alone(toy: type[Toy], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds files \(thesis\.txt\) .* did not make"):
        prepare(CONFIG, tmp_path)
    with pytest.raises(DataError, match="cannot be used as a folder"):
        prepare(CONFIG, tmp_path / "thesis.txt")


def test_wrong_root(tmp_path: Path) -> None:
    config = DataConfig(name="avdigits", root=str(tmp_path))
    with pytest.raises(DataError, match=r"lacks fsdd, .*it holds .*; give `--data\.root DIR` with"):
        prepare(config, tmp_path / "out")


def test_wrong_root_leaves_no_folder(tmp_path: Path) -> None:
    config = DataConfig(name="rosmap", root=str(tmp_path / "nowhere"))
    with pytest.raises(DataError):
        prepare(config, tmp_path / "shards" / "out")
    assert not (tmp_path / "shards").exists()


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = DataConfig(name="rosmap", root="raw")
    folder = default_folder(here, tmp_path)
    assert folder.parent == tmp_path / "shards"
    assert folder.name.startswith("rosmap-")
    assert len(folder.name) == len("rosmap-") + 10
    absolute = here.model_copy(update={"root": str(tmp_path / "raw")})
    assert default_folder(absolute, tmp_path) == folder
    assert default_folder(here.model_copy(update={"seed": 1}), tmp_path) != folder

"""Preparing: shards hold the right bytes, repeat exactly, survive kills and name what is wrong."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import prepare as module
from data.features import fbank
from data.folder import Folder
from data.media import read_sound
from data.prepare import Part, PrepareReport, Work, check_disk, default_folder, prepare
from data.schema import DataError, Modality, Split, load_manifest, verify_shards
from data.shards import ShardOutcome
from data.sources import DataConfig, Item, RejectedSample, build_source
from data.sources.base import Rejection, TensorSource
from tests.data.media_files import cut, picture, tone, write_image, write_sound

NUM_SAMPLES = 120
SPLIT_CYCLE: tuple[Split, ...] = ("train", "train", "val", "test")


class Toy(TensorSource):
    """120 samples, classes in turn; the two hooks are what each test bends."""

    name: ClassVar[str] = "digits"
    version: ClassVar[int] = 1
    modalities: ClassVar[tuple[Modality, ...]] = (
        Modality(name="x", kind="vector", shape=(3,), dtype="float32"),
        Modality(name="y", kind="vector", shape=(2, 2), dtype="int16"),
    )
    classes: ClassVar[tuple[str, ...]] = ("a", "b")
    split_rule: ClassVar[str] = "in turn"
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
    monkeypatch.setattr("data.sources.digits.Digits", source)
    return source


CONFIG = DataConfig(rows_per_shard=25, rows_per_group=4, max_rejected=1.0)


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_split(place: Path | Folder, split: Split) -> list[dict[str, Any]]:
    folder, rows = Folder.at(place), list[dict[str, Any]]()
    for shard in load_manifest(folder).splits[split]:
        with folder.open(shard.path) as file:
            rows += pq.read_table(file).to_pylist()
    return rows


def sample_ids(folder: Path | Folder, split: Split) -> list[int]:
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
        "audit.json",
        "card.html",
        "card.md",
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
    for split, shards in manifest.splits.items():
        for shard in shards:
            metadata = pq.read_metadata(tmp_path / shard.path)
            groups = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
            assert tuple(groups) == shard.row_groups
            assert metadata.row_group(0).column(3).compression == "UNCOMPRESSED"
            assert pq.read_schema(tmp_path / shard.path).equals(manifest.arrow_schema(split))
    assert (manifest.format_version, manifest.split_rule) == (2, "in turn")
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
    assert calls == [(done, 120) for done in (0, *range(50, 121))]
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
    config = DataConfig(name="rosmap", root=str(rosmap_root), max_rejected=0.02)
    report = prepare(config, tmp_path / "out")
    (rejected,) = report.rejected
    assert rejected.key == "tr-007"
    assert rejected.reason == "methylation has 1 values that are not finite"
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
    assert {rejection.key: rejection.reason for rejection in report.rejected} == {
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
    assert report.rejected == [Rejection(**line) for line in lines]
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
    assert folder.path.parent == tmp_path / "shards"
    assert folder.path.name.startswith("rosmap-")
    assert len(folder.path.name) == len("rosmap-") + 10
    absolute = here.model_copy(update={"root": str(tmp_path / "raw")})
    assert default_folder(absolute, tmp_path) == folder
    assert default_folder(here.model_copy(update={"seed": 1}), tmp_path) != folder


def test_folder_of_a_uri(tmp_path: Path) -> None:
    here = DataConfig(name="rosmap", root="raw", storage="memory://bucket/sets?x=1")
    folder = default_folder(here, tmp_path)
    name = default_folder(here.model_copy(update={"storage": None}), tmp_path).path.name
    assert folder.uri == f"memory://bucket/sets/{name}?x=1"  # the place is no setting of the set
    with pytest.raises(DataError, match=r"data\.storage: nope://x cannot be used"):
        default_folder(here.model_copy(update={"storage": "nope://x"}), tmp_path)


# ---- any file system


@pytest.fixture
def remote(tmp_path: Path) -> Folder:
    """A folder that lives as long as this process."""
    return Folder.at(f"memory://{tmp_path.name}/digits")


def remote_contents(folder: Folder) -> dict[str, str]:
    return {name: folder.sha256(name) for name in folder.names()}


def test_a_uri_gets_the_same_bytes(toy: type[Toy], remote: Folder, tmp_path: Path) -> None:
    report = prepare(CONFIG, remote.uri)
    prepare(CONFIG, tmp_path / "local")
    assert remote_contents(remote) == contents(tmp_path / "local")
    assert (report.folder, report.written) == (remote, 120)
    assert sample_ids(remote, "val") == sample_ids(tmp_path / "local", "val")
    again = prepare(CONFIG, remote)
    assert (again.reused, again.manifest) == (True, report.manifest)


def test_damage_on_a_uri_is_found(toy: type[Toy], remote: Folder) -> None:
    prepare(CONFIG, remote)
    remote.write("val-00000.parquet", remote.read("val-00000.parquet")[:-1])
    with pytest.raises(DataError, match=r"digits/val-00000\.parquet \(val\) is corrupt"):
        prepare(CONFIG, remote)


def test_a_uri_resumes(toy: type[Toy], remote: Folder, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(CONFIG, remote, stop)
    assert remote.names() == [".progress", *(f"train-{n:05d}.parquet" for n in range(3))]
    calls: list[int] = []
    prepare(CONFIG, remote, lambda done, total: calls.append(done))
    assert calls[:3] == [0, 60, 61]
    prepare(CONFIG, tmp_path)
    assert remote_contents(remote) == contents(tmp_path)


def test_foreign_uri_is_left_alone(toy: type[Toy], remote: Folder) -> None:
    remote.create()
    remote.write("thesis.txt", "mine")
    with pytest.raises(DataError, match=r"holds files \(thesis\.txt\)"):
        prepare(CONFIG, remote)


# ---- too many rejected samples

STRICT = CONFIG.model_copy(update={"max_rejected": 0.02})


def break_three(number: int, arrays: dict[str, np.ndarray]) -> None:
    if number in (17, 41, 90):  # train, train, val
        raise RejectedSample(f"file {number} ends early")


def test_too_many_rejected_samples_stop_the_preparation(toy: type[Toy], tmp_path: Path) -> None:
    toy.change = break_three
    message = (
        r"3 of 120 samples \(2\.5%\) are rejected, more than data\.max_rejected=0\.02 allows; the "
        r"first is toy-\d+: file \d+ ends early; repair the raw files, or give a larger --data.max"
    )
    with pytest.raises(DataError, match=message):
        prepare(STRICT, tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert {line["key"]: line["reason"] for line in lines} == {
        f"toy-{n}": f"file {n} ends early" for n in (17, 41, 90)
    }


def test_a_higher_limit_goes_on_where_it_stopped(toy: type[Toy], tmp_path: Path) -> None:
    toy.change = break_three
    with pytest.raises(DataError, match="are rejected"):
        prepare(STRICT, tmp_path / "out")
    notes = (tmp_path / "out" / ".progress").glob("*.parquet.json")
    outcomes = [ShardOutcome.model_validate_json(note.read_text()) for note in notes]
    sound = sum(done.shard.rows for done in outcomes if done.shard and not done.rejected)
    assert sound > 0
    loaded: list[int] = []

    def count(number: int, arrays: dict[str, np.ndarray]) -> None:
        loaded.append(number)
        break_three(number, arrays)

    toy.change = count
    report = prepare(STRICT.model_copy(update={"max_rejected": 0.025}), tmp_path / "out")
    assert len(loaded) == 120 - sound
    assert (report.read, report.written, len(report.rejected)) == (120, 117, 3)
    prepare(CONFIG, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_repaired_samples_are_tried_again(toy: type[Toy], tmp_path: Path) -> None:
    toy.change = break_three
    with pytest.raises(DataError, match="are rejected"):
        prepare(STRICT, tmp_path / "out")
    toy.change = Toy.change
    report = prepare(STRICT, tmp_path / "out")
    assert (report.written, report.rejected) == (120, [])
    assert (tmp_path / "out" / "rejected.jsonl").read_text() == ""
    prepare(STRICT, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_the_limit_is_no_setting_of_the_set(toy: type[Toy], tmp_path: Path) -> None:
    toy.change = break_three
    prepare(CONFIG, tmp_path)
    assert prepare(CONFIG.model_copy(update={"max_rejected": 0.5}), tmp_path).reused
    with pytest.raises(DataError, match=r"are rejected, more than data\.max_rejected"):
        prepare(STRICT, tmp_path)


def test_a_repaired_number_makes_all_shards_again(rosmap_root: Path, tmp_path: Path) -> None:
    """It moves mean and deviation of its column, by which the finished shards were scaled."""
    config = DataConfig(name="rosmap", root=str(rosmap_root), rows_per_shard=12)
    prepare(config, tmp_path / "straight")
    key = read_split(tmp_path / "straight", "train")[-1]["key"]  # of the last train shard
    path = rosmap_root / "1_tr.csv"
    whole = path.read_text()
    lines = whole.splitlines()
    row = int(key.removeprefix("tr-"))
    lines[row] = ",".join(["nan", *lines[row].split(",")[1:]])
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=f"1 of 80 samples .* the first is {key}: mrna has 1 val"):
        prepare(config, tmp_path / "out")
    assert (tmp_path / "out" / ".progress" / "train-00000.parquet.json").is_file()
    path.write_text(whole)
    prepare(config, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


# ---- on a cluster


class Backwards:
    """Stands for a cluster: makes the parts in reverse order, in this process."""

    def __init__(self, copy: Callable[[Any], Any] = lambda value: value):
        self.parts: list[str] = []
        self.closed = 0
        self._copy = copy

    @contextmanager
    def __call__(self) -> Iterator[Callable[[Work, list[Part]], Iterator[ShardOutcome]]]:
        def run(work: Work, parts: list[Part]) -> Iterator[ShardOutcome]:
            for part in reversed(parts):
                self.parts.append(part.path)
                yield self._copy(work)(self._copy(part))

        try:
            yield run
        finally:
            self.closed += 1


def test_a_cluster_makes_the_same_bytes(
    toy: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.change = break_three
    monkeypatch.setattr(module, "CLUSTER_BYTES", 100)
    cluster, calls = Backwards(), list[tuple[int, int]]()
    report = prepare(
        CONFIG, tmp_path / "far", lambda done, total: calls.append((done, total)), cluster
    )
    assert cluster.parts == sorted(contents_of_shards(tmp_path / "far"), key=order, reverse=True)
    assert cluster.closed == 1
    assert calls[-1] == (120, 120)
    near = prepare(CONFIG, tmp_path / "near")
    assert contents(tmp_path / "far") == contents(tmp_path / "near")
    assert report.rejected == near.rejected


def contents_of_shards(folder: Path) -> list[str]:
    return [name for name in contents(folder) if name.endswith(".parquet")]


def order(path: str) -> tuple[int, str]:
    return module.SPLITS.index(path.split("-")[0]), path  # pyright: ignore[reportArgumentType]


def test_small_sets_need_no_cluster(toy: type[Toy], tmp_path: Path) -> None:
    cluster = Backwards()
    prepare(CONFIG, tmp_path, cluster=cluster)
    assert (cluster.parts, cluster.closed) == ([], 0)


def test_a_cluster_does_only_what_is_left(
    toy: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLUSTER_BYTES", 1)

    def stop(done: int, total: int) -> None:
        if done == 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(CONFIG, tmp_path / "out", stop)
    cluster = Backwards()
    prepare(CONFIG, tmp_path / "out", cluster=cluster)
    assert len(cluster.parts) == 7 - 3
    prepare(CONFIG, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_too_many_rejected_samples_stop_a_cluster(
    toy: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.change = break_three
    monkeypatch.setattr(module, "CLUSTER_BYTES", 1)
    cluster = Backwards()
    with pytest.raises(DataError, match="1 of 120 samples"):
        prepare(CONFIG.model_copy(update={"max_rejected": 0.0}), tmp_path, cluster=cluster)
    assert cluster.closed == 1
    assert len(cluster.parts) < 7


# ---- media, end to end

EMOTIONS = ("ANG", "HAP")
LISTS: dict[str, Split] = {"train_split.csv": "train", "val.csv": "val", "test.csv": "test"}
SMALL: dict[str, Any] = {
    "audio": {"seconds": 0.5, "num_mels": 16},
    "visual": {"side": 16, "train_side": 24, "candidates": 2},
}


def clips_of(name: str) -> list[str]:
    """Clip ids of a list; every actor is in one list only."""
    first, count = {"train_split.csv": (1001, 8), "val.csv": (1011, 2), "test.csv": (1021, 2)}[name]
    return [
        f"{actor}_IEO_{emotion}_HI" for actor in range(first, first + count) for emotion in EMOTIONS
    ]


@pytest.fixture(scope="module")
def clean_cremad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cremad")
    (root / "stat.csv").write_text("\n".join(EMOTIONS))
    number = 0
    for name in LISTS:
        clips = clips_of(name)
        rows = [f"{clip},{clip.split('_')[2]}" for clip in clips]
        (root / name).write_text("\n".join(["clip_id,label", *rows]))
        for clip in clips:
            number += 1
            write_sound(root / "AudioWAV" / f"{clip}.wav", tone(0.4, hertz=100.0 * number))
            for frame in range(6):
                pixels = picture(24, 32, seed=10 * number + frame)
                write_image(root / "visual_frames" / clip / f"{frame:05d}.jpg", pixels)
    return root


@pytest.fixture
def cremad(clean_cremad: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    root = tmp_path / "raw"
    shutil.copytree(clean_cremad, root)
    return root


def cremad_config(root: Path, **settings: Any) -> DataConfig:
    values = {"name": "cremad", "root": str(root), "modalities": SMALL} | settings
    return DataConfig.model_validate(values)


def row_of(place: Path | Folder, split: Split, key: str) -> Mapping[str, Any]:
    return next(row for row in read_split(place, split) if row["key"] == key)


def test_media_become_shards(clean_cremad: Path, tmp_path: Path) -> None:
    report = prepare(cremad_config(clean_cremad, rows_per_shard=6), tmp_path)
    manifest = report.manifest
    assert (report.read, report.written, report.rejected) == (24, 24, [])
    assert (manifest.split_rule, manifest.classes) == ("official", EMOTIONS)
    assert manifest.class_counts == {"train": (8, 8), "val": (2, 2), "test": (2, 2)}
    audio, visual = manifest.modalities
    assert (audio.shape, audio.dtype) == ((1, 50, 16), "float16")
    assert (visual.shape, visual.stored("train")) == ((3, 3, 16, 16), (6, 3, 24, 24))
    assert visual.augment.crop
    for name, split in LISTS.items():
        rows = read_split(tmp_path, split)
        assert sorted(row["key"] for row in rows) == sorted(clips_of(name))
        for row in rows:
            assert row["group"] == row["key"][:4]
            assert EMOTIONS[row["label"]] == row["key"].split("_")[2]
    key = "1011_IEO_HAP_HI"
    found = row_of(tmp_path, "val", key)
    frames = [clean_cremad / "visual_frames" / key / f"{n:05d}.jpg" for n in (1, 3, 5)]
    expected = [
        np.asarray(Image.open(path).resize((16, 16), 2)).transpose(2, 0, 1) for path in frames
    ]
    assert found["visual"] == np.stack(expected).tobytes()
    samples, rate = read_sound(clean_cremad / "AudioWAV" / f"{key}.wav")
    features = fbank(samples[0], rate, 16_000, num_frames=50, num_mels=16)
    assert found["audio"] == features.astype("<f2").tobytes()


def break_cremad(root: Path) -> dict[str, tuple[Split, str]]:
    """Break some samples; key -> split and what the reason begins with."""
    ids = clips_of("train_split.csv")
    cut(root / "AudioWAV" / f"{ids[0]}.wav", 0.5)
    (root / "AudioWAV" / f"{ids[1]}.wav").unlink()
    (root / "visual_frames" / ids[2] / "00003.jpg").write_bytes(b"")
    for frame in range(4):
        (root / "visual_frames" / ids[3] / f"{frame:05d}.jpg").unlink()
    test = root / "test.csv"
    test.write_text(f"{test.read_text()}\n{ids[4]},ANG\n1099_IEO_ZZZ_HI,ZZZ\n1099_IEO_ANG_HI")
    first = clips_of("val.csv")[0]
    (root / "visual_frames" / first / "00005.jpg").write_bytes(b"\xff\xd8 no picture")
    return {
        ids[0]: ("train", f"audio: {ids[0]}.wav is shorter than its header says"),
        ids[1]: ("train", f"audio: AudioWAV/{ids[1]}.wav does not exist"),
        ids[2]: ("train", f"visual: visual_frames/{ids[2]}/00003.jpg is empty"),
        ids[3]: ("train", "visual: has 2 frames; at least 3 are needed"),
        ids[4]: ("test", "its key was seen before, in train; keys are unique"),
        "1099_IEO_ZZZ_HI": ("test", "label 'ZZZ' is none of ANG, HAP"),
        "test.csv line 8": ("test", "1 cells (1099_IEO_ANG_HI), not id,emotion"),
        first: ("val", "visual: 00005.jpg is not a whole picture ("),
    }


def check_rejections(report: PrepareReport, expected: dict[str, tuple[Split, str]]) -> None:
    assert {rejection.key for rejection in report.rejected} == set(expected)
    for rejection in report.rejected:
        split, reason = expected[rejection.key]
        assert rejection.split == split
        assert rejection.reason.startswith(reason)


def test_broken_media_are_named(cremad: Path, tmp_path: Path) -> None:
    expected = break_cremad(cremad)
    report = prepare(cremad_config(cremad, max_rejected=0.5), tmp_path / "out")
    check_rejections(report, expected)
    assert (report.read, report.written) == (27, 19)
    assert report.manifest.class_counts == {"train": (6, 6), "val": (1, 2), "test": (2, 2)}
    again = prepare(cremad_config(cremad, max_rejected=0.5), tmp_path / "out")
    assert (again.reused, again.rejected) == (True, report.rejected)


def test_broken_media_stop_the_preparation_by_default(cremad: Path, tmp_path: Path) -> None:
    break_cremad(cremad)
    with pytest.raises(DataError, match=r"3 of 27 samples \(11\.1%\) are rejected"):
        prepare(cremad_config(cremad), tmp_path / "out")
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert len(lines) == 3  # those of the lists; no media were read
    with pytest.raises(DataError, match=r"4 of 27 samples \(14\.8%\) are rejected"):
        prepare(cremad_config(cremad, max_rejected=0.12, rows_per_shard=1), tmp_path / "out")


def test_media_on_a_cluster_and_a_uri(
    cremad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work and parts are pickled, as they are on the way to other processes."""
    break_cremad(cremad)
    monkeypatch.setattr(module, "CLUSTER_BYTES", 1)
    config = cremad_config(cremad, max_rejected=0.5, rows_per_shard=4, recipe="official")
    far = Folder.at(f"memory://{tmp_path.name}/cremad")
    cluster = Backwards(lambda value: pickle.loads(pickle.dumps(value)))
    report = prepare(config, far, cluster=cluster)
    assert len(cluster.parts) == 4 + 1 + 1
    near = prepare(config, tmp_path / "near")
    assert report.rejected == near.rejected
    assert remote_contents(far) == contents(tmp_path / "near")
    assert near.manifest.modalities[0].dtype == "float32"


def test_grouped_media_keep_actors_apart(clean_cremad: Path, tmp_path: Path) -> None:
    manifest = prepare(cremad_config(clean_cremad, split="grouped"), tmp_path).manifest
    assert manifest.split_rule == "grouped, seed 2"
    actors = [{row["group"] for row in read_split(tmp_path, s)} for s in LISTS.values()]
    assert sum(map(len, actors)) == len(set().union(*actors)) == 12


def test_an_optional_modality_may_be_absent(clean_cremad: Path, tmp_path: Path) -> None:
    manifest = prepare(cremad_config(clean_cremad), tmp_path / "whole").manifest
    assert not manifest.has_optional
    optional = {**SMALL, "audio": {**SMALL["audio"], "optional": True}}
    config = cremad_config(clean_cremad, modalities=optional)
    manifest = prepare(config, tmp_path / "optional").manifest
    assert manifest.has_optional
    assert {row["present"] for row in read_split(tmp_path / "optional", "train")} == {0b11}


def test_wrong_root_of_media_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        prepare(cremad_config(tmp_path / "nowhere"), tmp_path / "shards" / "out")
    assert not (tmp_path / "shards").exists()


def test_a_key_that_cannot_be_printed_is_rejected(toy: type[Toy], tmp_path: Path) -> None:
    """As of a file whose name is not UTF-8; and line separators do not break `rejected.jsonl`."""
    items = Toy.items

    def renamed(self: Toy) -> list[Item]:
        bad = {3: "caf\udce9", 5: "two\u2028lines"}
        return [replace(item, key=bad.get(item.sample_id, item.key)) for item in items(self)]

    toy.items = renamed
    report = prepare(CONFIG, tmp_path)
    assert {rejection.key for rejection in report.rejected} == {r"caf\udce9", "two\u2028lines"}
    assert [r.key for r in prepare(CONFIG, tmp_path).rejected] == [r.key for r in report.rejected]


def test_other_files_are_verified_too(toy: type[Toy], tmp_path: Path) -> None:
    toy.files = {"notes.json": "{}"}
    prepare(CONFIG, tmp_path)
    (tmp_path / "notes.json").write_text("{ }")
    with pytest.raises(DataError, match=r"notes\.json is missing or changed"):
        prepare(CONFIG, tmp_path)

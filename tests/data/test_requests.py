"""Rows for a trained model: raw files give what the shards of the same files hold, bit for bit."""

import csv
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig
from data.prepare import prepare
from data.requests import CHUNK, Requests, requests
from data.schema import DataError, Manifest, Split, load_manifest
from tests.data.media_files import picture, tone, write_image, write_sound

ROWS = 60
WORDS = ("a cat sat", "the dog ran far", "an eel swims in the sea", "birds sing")
MODALITIES = {
    "photo": {"kind": "image", "side": 16, "train_side": 20, "storage": "jpeg"},
    "sound": {"kind": "audio", "seconds": 0.3, "num_mels": 16},
    "words": {"kind": "text", "tokens": 8, "optional": True},
    "numbers": {"kind": "vector"},
    "steps": {"kind": "sequence", "scale": "minmax", "steps": 4},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of five modalities; every seventh row has no words, one photo is broken."""
    folder = tmp_path_factory.mktemp("raw")
    for number in range(4):
        write_image(folder / "photos" / f"{number}.png", picture(20, 30, seed=number))
        write_sound(folder / "sounds" / f"{number}.wav", tone(0.3, hertz=200.0 + 100 * number))
    (folder / "photos" / "broken.png").write_bytes(b"no picture")
    write_table(folder / "table.csv", range(ROWS))
    return folder


def write_table(
    path: Path,
    numbers: Iterable[int],
    *,
    label: bool = True,
    unlabelled: Sequence[int] = (),
    words: str | None = "as they are",
    broken: int = 13,
) -> Path:
    rows = []
    for number in numbers:
        rng = np.random.default_rng(number)
        steps = rng.normal(size=(2 + number % 3, 2)).round(3).tolist()
        rows.append(
            {
                "id": f"row-{number}",
                "photo": f"photos/{'broken' if number == broken else number % 4}.png",
                "sound": f"sounds/{number % 4}.wav",
                "words": "" if number % 7 == 3 else f"{WORDS[number % 4]} {number % 5}",
                "numbers": str(rng.normal(100, 20, size=3).round(3).tolist()),
                "steps": str(steps),
                **({"label": ("cat", "dog")[number % 2]} if label else {}),
            }
        )
        if number in unlabelled:
            rows[-1]["label"] = ""
        if words is None:
            del rows[-1]["words"]
        elif not words:
            rows[-1]["words"] = ""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def config(root: Path) -> DataConfig:
    values = {
        "name": "table",
        "table": str(root / "table.csv"),
        "modalities": MODALITIES,
        "max_rejected": 0.05,
    }
    return DataConfig.model_validate(values)


@pytest.fixture(scope="module")
def shards(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "set"
    prepare(config, folder)
    return folder


@pytest.fixture(scope="module")
def made(shards: Path) -> tuple[Manifest, dict[str, str]]:
    return load_made(shards)


def load_made(folder: Path) -> tuple[Manifest, dict[str, str]]:
    manifest = load_manifest(folder)
    return manifest, {name: (folder / name).read_text() for name in manifest.files}


def tables(wanted: list[Requests]) -> Iterator[pa.Table]:
    for part in wanted:
        for item, rows in zip(part.items, part.rows, strict=True):
            [table] = part.read(*part.shared, *item)
            assert table.num_rows == rows
            yield table


def by_key(wanted: list[Requests]) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for table in tables(wanted) for row in table.to_pylist()}


@pytest.mark.parametrize("split", ["val", "test"])
def test_raw_rows_are_those_of_the_shards(
    config: DataConfig,
    shards: Path,
    made: tuple[Manifest, dict[str, str]],
    root: Path,
    split: Split,
):
    stored = by_key(requests(str(shards), config, *made, split))
    raw = by_key(requests(str(root / "table.csv"), config, *made, split))
    sound = {key: row for key, row in raw.items() if row["reason"] is None}
    assert sound == stored
    assert len(stored) == made[0].rows(split) > 5


def test_what_was_learnt_comes_from_the_training_samples_of_the_model(
    config: DataConfig, shards: Path, made: tuple[Manifest, dict[str, str]], root: Path
):
    few = write_table(root / "few.csv", range(30, 34))
    stored = by_key(requests(str(shards), config, *made, None))
    raw = by_key(requests(str(few), config, *made, None))
    assert set(made[1]) == {"tokenizer-words.json", "scale-numbers.json", "scale-steps.json"}
    assert list(raw) == ["row-30", "row-31", "row-32", "row-33"]
    for name in ("words", "numbers", "steps"):
        assert {k: row[name] for k, row in raw.items()} == {k: stored[k][name] for k in raw}


def test_a_broken_sample_is_a_row_with_its_reason(
    config: DataConfig, made: tuple[Manifest, dict[str, str]], root: Path
):
    rows = by_key(requests(str(root / "table.csv"), config, *made, None))
    assert len(rows) == ROWS
    bad = {key: row for key, row in rows.items() if row["reason"]}
    assert list(bad) == ["row-13"]
    assert bad["row-13"]["reason"].startswith("photo: broken.png is not a whole picture")
    assert bad["row-13"]["photo"] is None
    lacking = [key for key, row in rows.items() if row["present"] == 0b11011]
    assert lacking == [f"row-{n}" for n in range(ROWS) if n % 7 == 3]


def test_rows_need_no_label(config: DataConfig, made: tuple[Manifest, dict[str, str]], root: Path):
    path = write_table(root / "unlabelled.csv", range(ROWS), label=False)
    told = by_key(requests(str(root / "table.csv"), config, *made, None))
    untold = by_key(requests(str(path), config, *made, None))
    assert untold == {key: row | {"label": None} for key, row in told.items()}


def test_some_rows_may_have_a_label(
    config: DataConfig, made: tuple[Manifest, dict[str, str]], root: Path
):
    path = write_table(root / "some.csv", range(ROWS), unlabelled=range(0, ROWS, 4))
    told = by_key(requests(str(root / "table.csv"), config, *made, None))
    some = by_key(requests(str(path), config, *made, None))
    empty = {f"row-{number}": {"label": None} for number in range(0, ROWS, 4)}
    assert some == {key: row | empty.get(key, {}) for key, row in told.items()}
    labelled = write_table(root / "rest.csv", (n for n in range(ROWS) if n % 4))
    for split in ("train", "val", "test"):  # rows without a label are in none, and move none
        own = by_key(requests(str(path), config, *made, split))
        assert own == by_key(requests(str(labelled), config, *made, split))


@pytest.mark.parametrize("column", ["absent", "empty"])
def test_an_optional_modality_may_be_missing_in_all_rows(
    config: DataConfig, made: tuple[Manifest, dict[str, str]], root: Path, column: str
):
    path = write_table(
        root / f"{column}.csv", range(20, 30), words=None if column == "absent" else ""
    )
    told = by_key(requests(str(root / "table.csv"), config, *made, None))
    rows = by_key(requests(str(path), config, *made, None))
    assert len(rows) == 10
    for key, row in rows.items():
        assert row["present"] == 0b11011
        assert row["words"] == bytes(8 * 4)
        assert row["sound"] == told[key]["sound"]


def test_a_missing_column_is_named(
    config: DataConfig, made: tuple[Manifest, dict[str, str]], root: Path
):
    path = root / "narrow.csv"
    path.write_text("id,photo,sound,words,steps\n1,photos/0.png,sounds/0.wav,a,[[1]]\n")
    with pytest.raises(DataError, match=r"no column 'numbers', of which modality numbers was made"):
        requests(str(path), config, *made, None)


def test_columns_of_numbers_keep_the_order_of_training(tmp_path: Path):
    """Whatever order another table has them in, and whatever other numbers it has."""
    rng = np.random.default_rng(0)
    names = ("age", "weight", "height")
    rows = [
        {"id": f"r{number}", "label": "ab"[number % 2], "note": f"word {WORDS[number % 4]}"}
        | {name: float(value) for name, value in zip(names, rng.normal(100, 9, 3), strict=True)}
        for number in range(60)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "own.parquet")
    config = DataConfig.model_validate({"name": "table", "table": str(tmp_path / "own.parquet")})
    prepare(config, tmp_path / "set")
    made = load_made(tmp_path / "set")
    assert {"columns-table.json", "scale-table.json"} <= set(made[1])
    stored = by_key(requests(str(tmp_path / "set"), config, *made, None))
    other = [
        {name: row[name] for name in ("weight", "note", "height", "id", "age")} | {"shoes": 40.0}
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(other), tmp_path / "other.parquet")
    raw = by_key(requests(str(tmp_path / "other.parquet"), config, *made, None))
    assert {key: row["table"] for key, row in raw.items()} == {
        key: row["table"] for key, row in stored.items()
    }
    pq.write_table(pa.Table.from_pylist(other).drop(["age"]), tmp_path / "less.parquet")
    with pytest.raises(DataError, match="no column 'age', of which modality table was made"):
        requests(str(tmp_path / "less.parquet"), config, *made, None)


LAYOUTS = {
    "cremad": {"modalities": {"visual": {"storage": "jpeg"}}},
    "kinetics": {"recipe": "official"},
    "ucf101": {},
    "food101": {"modalities": {"text": {"tokenizer": "fit", "tokens": 16}}},
    "mosi": {},
    "rosmap": {"split": "random_70_10_20"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_raw_folders_give_the_rows_of_their_shards(shared_data: Path, tmp_path: Path, name: str):
    root = shared_data / name
    if not root.is_dir():
        generator = shared_data.parent / "reference" / "make_layouts.py"
        flags = ["--classes", "2", "--per-class", "12", "--clip-seconds", "0.5", "--datasets", name]
        command = [sys.executable, str(generator), str(tmp_path), *flags]
        subprocess.run(command, check=True, capture_output=True)
        root = tmp_path / name
    settings = {"name": name, "root": str(root), **LAYOUTS[name]}
    config = DataConfig.model_validate(settings)
    prepare(config, tmp_path / "set")
    made = load_made(tmp_path / "set")
    for split in ("val", "test"):
        stored = by_key(requests(str(tmp_path / "set"), config, *made, split))
        raw = by_key(requests(str(root), config, *made, split))
        assert raw == stored
        assert len(raw) == made[0].rows(split) > 0


def test_a_manifest_that_leads_elsewhere_is_refused(
    config: DataConfig, shards: Path, made: tuple[Manifest, dict[str, str]], tmp_path: Path
):
    (tmp_path / "secret").write_text("key")
    content = json.loads((shards / "manifest.json").read_text())
    shard = content["splits"]["val"][0]
    sha256 = hashlib.sha256(b"key").hexdigest()
    for changed in (
        content | {"files": {"../secret": sha256}},
        content | {"splits": {"val": [shard | {"path": "../secret", "sha256": sha256}]}},
        content | {"splits": {"val": [shard | {"path": str(tmp_path / "secret")}]}},
    ):
        folder = tmp_path / "hostile"
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match="is not a manifest of format 2"):
            requests(str(folder), config, *made, None)


def test_shards_of_another_kind_are_refused(
    config: DataConfig, made: tuple[Manifest, dict[str, str]], tmp_path: Path
):
    changed = config.modalities["sound"].model_copy(update={"num_mels": 8})
    other = config.model_copy(update={"modalities": config.modalities | {"sound": changed}})
    prepare(other, tmp_path / "set")
    with pytest.raises(DataError, match="was prepared in another way than the data of the model"):
        requests(str(tmp_path / "set"), config, *made, None)


def test_a_set_without_its_scale_cannot_shape_raw_files(
    config: DataConfig, made: tuple[Manifest, dict[str, str]], root: Path
):
    manifest, files = made
    files = {name: text for name, text in files.items() if name != "scale-numbers.json"}
    with pytest.raises(DataError, match=r"scale-numbers\.json is not kept with the prepared set"):
        requests(str(root / "table.csv"), config, manifest, files, None)


@pytest.mark.parametrize(
    ("place", "message"),
    [("gone", "gone does not exist"), ("photos", "photos is no table; the model was trained on")],
)
def test_a_wrong_place_is_named(
    config: DataConfig,
    made: tuple[Manifest, dict[str, str]],
    root: Path,
    place: str,
    message: str,
):
    with pytest.raises(DataError, match=message):
        requests(str(root / place), config, *made, None)


def test_parts_are_whole_chunks(
    config: DataConfig, shards: Path, made: tuple[Manifest, dict[str, str]]
):
    for part in requests(str(shards), config, *made, None):
        assert part.part_rows % CHUNK == 0
        assert all(rows == part.part_rows for rows in part.rows[:-1])


def test_avdigits_of_another_folder_are_scaled_as_the_models(shared_data: Path, tmp_path: Path):
    config = DataConfig.model_validate({"name": "avdigits", "root": str(shared_data)})
    few = tmp_path / "few"
    (few / "fsdd").mkdir(parents=True)
    (few / "mnist").symlink_to(shared_data / "mnist")
    names = [f"{digit}_jackson_{index}.wav" for digit in range(10) for index in (5, 20)]
    for name in names:
        (few / "fsdd" / name).write_bytes((shared_data / "fsdd" / name).read_bytes())
    from data.sources import build_source

    source = build_source(config)
    items = source.items()
    manifest = Manifest(
        name="avdigits",
        source={},
        split_rule="",
        modalities=source.modalities,
        classes=source.classes,
        splits={},
        class_counts={},
    )
    rows = by_key(requests(str(few), config, manifest, source.files, None))
    assert len(rows) == len(names)
    recorded = {item.key.split("+")[0]: source.load(item)["audio"] for item in items}
    for key, row in rows.items():
        expected = recorded[key.split("+")[0]]
        np.testing.assert_array_equal(np.frombuffer(row["audio"], np.float32), expected.ravel())

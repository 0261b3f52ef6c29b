"""`recipe: official` gives what the released MIDAS code gives on the same raw files.

That code made the arrays in golden/ (see the README there) of files that golden/raw.py writes. Ours
goes all the way: prepared into shards and read back.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig
from data.prepare import prepare
from data.processors import parts
from data.reader import ShardReader, columns, read_chunks
from data.schema import Manifest, Modality, Split, load_manifest
from data.sources import build_source
from tests.data.golden import raw

GOLDEN = Path(__file__).parent / "golden"
FBANK_TOLERANCE, GREY_TOLERANCE = 1e-4, 1
MEAN_GREY_TOLERANCE = 0.01
PICKS = {"cremad": "middle", "kinetics": "middle", "ucf101": "early"}
SIDES: tuple[Split, ...] = ("train", "val", "test")
# Crops of training clips are random in the release; ours are stored larger, to be cropped later.
NOT_COMPARED = {("cremad", "train"): ("visual",), ("kinetics", "train"): ("visual",)}
# The lists of UCF-101 have no validation part.
COMPARED = [(n, side) for n in raw.WRITE for side in SIDES if (n, side) != ("ucf101", "val")]
Rows = dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the prepared set of a name; each is made once."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            root = tmp_path_factory.mktemp(name)
            raw.WRITE[name](root)
            folders[name] = tmp_path_factory.mktemp("shards")
            prepare(config(name, root), folders[name])
        return folders[name]

    return make


def config(name: str, root: Path, **settings: object) -> DataConfig:
    """The official recipe; the release's tokenizer, which must be downloaded, is replaced."""
    values: dict[str, object] = {"name": name, "root": str(root), "recipe": "official"}
    if name == "ucf101":
        values["val_fraction"] = 0.5
    if name == "food101":
        tokenizer = root.parent / "tokenizer"
        raw.write_tokenizer(tokenizer)
        values["modalities"] = {"text": {"tokenizer": str(tokenizer)}}
    return DataConfig.model_validate(values | settings)


def read(folder: Path, split: Split) -> tuple[Rows, dict[str, str]]:
    """Modality -> tensor of every sample, and its class, both by key."""
    manifest = load_manifest(folder)
    (table,) = read_chunks(ShardReader(str(folder), manifest, split), 100, 0, 1)
    arrays = columns(table, manifest, split)
    names = [modality.name for modality in manifest.modalities]
    if (manifest.name, split) == ("ucf101", "train"):
        arrays |= {m.name: later_frames(folder, manifest, m) for m in manifest.modalities}
    keys = stored_keys(manifest, folder, split)
    rows = {key: {name: arrays[name][n] for name in names} for n, key in enumerate(keys)}
    classes = [manifest.classes[label] for label in arrays["label"]]
    return rows, dict(zip(keys, classes, strict=True))


def later_frames(folder: Path, manifest: Manifest, modality: Modality) -> np.ndarray:
    """Of both candidates of every part, the one that evaluation does not take: the release's
    training was held to it."""
    (shard,) = manifest.splits["train"]
    stored = pq.read_table(folder / shard.path)[modality.name].to_pylist()
    shape = modality.stored("train")
    return np.stack([np.frombuffer(row, np.uint8).reshape(shape)[::2] for row in stored])


def stored_keys(manifest: Manifest, folder: Path, split: Split) -> list[str]:
    paths = [folder / shard.path for shard in manifest.splits[split]]
    return [key for path in paths for key in pq.read_table(path)["key"].to_pylist()]


def differs(row: np.ndarray, golden: np.ndarray, moments: np.ndarray) -> str | None:
    """What is wrong with a row, given the release's, thinned out, and mean and deviation of all."""
    allowed, allowed_mean = FBANK_TOLERANCE, FBANK_TOLERANCE
    if row.dtype.kind != "f":
        is_text = row.ndim == 1
        allowed, allowed_mean = (0, 0) if is_text else (GREY_TOLERANCE, MEAN_GREY_TOLERANCE)
    ours = raw.thin(row)
    if ours.shape != golden.shape or ours.dtype != golden.dtype:
        return f"{ours.dtype} {ours.shape}, {golden.dtype} {golden.shape} expected"
    largest = np.abs(ours.astype(np.float64) - golden).max()
    mean = np.abs(raw.moments(row) - moments).max()
    if largest > allowed or mean > allowed_mean:
        return f"differs by up to {largest}, mean or deviation by {mean}"
    return None


@pytest.mark.parametrize(("name", "split"), COMPARED)
def test_tensors_are_the_releases(prepared: Callable[[str], Path], name: str, split: Split):
    rows, _ = read(prepared(name), split)
    golden = np.load(GOLDEN / f"{name}.npz")
    found = {
        f"{key}/{modality}": differs(
            row, golden[f"{key}/{modality}"], golden[f"{key}/{modality}/moments"]
        )
        for key, arrays in rows.items()
        for modality, row in arrays.items()
        if modality not in NOT_COMPARED.get((name, split), ())
    }
    assert found
    assert not {what: why for what, why in found.items() if why}


@pytest.mark.parametrize("name", raw.WRITE)
def test_labels_are_the_releases_by_name(prepared: Callable[[str], Path], name: str):
    golden = np.load(GOLDEN / f"{name}.npz")
    manifest = load_manifest(prepared(name))
    labels = {
        key: label for split in SIDES for key, label in read(prepared(name), split)[1].items()
    }
    if name == "food101":  # the release knows numbers only
        labels = {key: str(manifest.classes.index(label)) for key, label in labels.items()}
    released = {
        key.removesuffix("/label"): str(golden[key])
        for key in golden.files
        if key.endswith("/label")
    }
    assert len(labels) == {"cremad": 4, "kinetics": 4, "ucf101": 6, "food101": 5}[name]
    assert labels == released
    if "classes" in golden.files:
        assert manifest.classes == tuple(golden["classes"])


@pytest.mark.parametrize(("name", "pick"), PICKS.items())
def test_evaluation_takes_the_releases_frames(name: str, pick: str):
    golden = np.load(GOLDEN / "positions.npz")
    counts = golden[f"{name}/counts"].tolist()
    ours = [parts(count, 3, 1, pick) for count in counts]
    assert len(counts) > 30
    assert ours == golden[f"{name}/positions"].tolist()


@pytest.mark.parametrize("name", raw.WRITE)
def test_random_split_is_the_releases(tmp_path: Path, name: str):
    root = tmp_path / "raw"
    root.mkdir()
    raw.write_index(name, root)
    source = build_source(config(name, root, split="random_70_10_20"))
    sides = np.array([SIDES.index(item.split) for item in source.items()])
    assert np.array_equal(sides, np.load(GOLDEN / "splits.npz")[name])

"""Reading shards without Ray: frames drawn per epoch, JPEG, absent modalities, any file system."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data.draws import uniform
from data.folder import Folder
from data.order import Entries, Read, chunk_reads
from data.reader import LANE, ShardReader, columns, read_chunks, sample_index
from data.schema import Manifest, Modality, Split
from data.shards import write_shard
from data.sources.base import Item, TensorSource
from tests.data.media_files import picture

NUM_ROWS, GROUP_ROWS = 25, 4
CLIP = Modality(
    name="clip",
    kind="frames",
    shape=(2, 3, 8, 8),
    train_shape=(2, 3, 12, 12),
    dtype="uint8",
    candidates=3,
)
FILM = Modality(
    name="film",
    kind="frames",
    shape=(2, 3, 32, 32),
    dtype="uint8",
    storage="jpeg",
    candidates=2,
)
PHOTO = Modality(name="photo", kind="image", shape=(3, 32, 32), dtype="uint8", storage="jpeg")
NUMBERS = Modality(name="numbers", kind="vector", shape=(3,), dtype="float32", optional=True)


def stored(modality: Modality, number: int, split: Split) -> np.ndarray:
    """What the shard holds; every frame of a clip has one value, those of JPEGs are pictures."""
    shape = modality.stored(split)
    if modality is CLIP:
        values = (number * 7 + np.arange(shape[0]) * 3) % 256
        return np.broadcast_to(values[:, None, None, None], shape).astype(np.uint8)
    if modality is NUMBERS:
        return np.full(3, number, np.float32)
    pictures = [
        picture(32, 32, seed=100 * number + frame).transpose(2, 0, 1)
        for frame in range(shape[0] if modality is FILM else 1)
    ]
    return np.stack(pictures).reshape(shape)


class Clips(TensorSource):
    """Samples with a clip, a film and a photo; every third lacks the numbers."""

    name: str = "clips"
    version: int = 1
    modalities: tuple[Modality, ...] = (CLIP, FILM, PHOTO, NUMBERS)
    classes: tuple[str, ...] = ("a", "b")
    split_rule: str = "none"

    def items(self) -> list[Item]:
        return [Item(3 * n, f"k{n}", "ab"[n % 2], "train", f"g{n % 4}") for n in range(NUM_ROWS)]

    def load(self, item: Item) -> dict[str, np.ndarray]:
        lacks = () if item.sample_id // 3 % 3 else ("numbers",)
        return {
            m.name: stored(m, item.sample_id, item.split)
            for m in self.modalities
            if m.name not in lacks
        }


def write(folder: Folder) -> Manifest:
    """The same samples in train and in val; two shards each."""
    source = Clips()
    draft = Manifest(
        name="clips",
        source={},
        split_rule="none",
        modalities=source.modalities,
        classes=source.classes,
        splits={},
        class_counts={},
    )
    splits = {}
    for split in ("train", "val"):
        items = [
            Item(i.sample_id, i.key, i.label, split, i.group)  # all in this split
            for i in source.items()
        ]
        parts = {f"{split}-0.parquet": items[:11], f"{split}-1.parquet": items[11:]}
        outcomes = [
            write_shard(
                source,
                part,
                folder,
                name,
                draft=draft,
                split=split,
                group_rows=GROUP_ROWS,
                count=lambda _: None,
            )
            for name, part in parts.items()
        ]
        splits[split] = tuple(done.shard for done in outcomes if done.shard)
    return draft.model_copy(update={"splits": splits})


@pytest.fixture(scope="module", params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path = tmp_path_factory.mktemp("clips")
    place = Folder.at(path if request.param == "local" else f"memory://{path.name}")
    place.create()
    return place


@pytest.fixture(scope="module")
def manifest(folder: Folder) -> Manifest:
    return write(folder)


@pytest.fixture
def reader(folder: Folder, manifest: Manifest) -> ShardReader:
    return ShardReader(str(folder), manifest, "train", seed=5)


@pytest.fixture
def val_reader(folder: Folder, manifest: Manifest) -> ShardReader:
    return ShardReader(str(folder), manifest, "val", seed=5)


def rows(reader: ShardReader, epoch: int | None) -> dict[str, np.ndarray]:
    """All rows in the order of the shards."""
    table = reader.gather(
        chunk_reads(reader.group_rows, 0, NUM_ROWS), np.arange(NUM_ROWS), epoch=epoch
    )
    return arrays(table, reader)


def arrays(table: pa.Table, reader: ShardReader) -> dict[str, np.ndarray]:
    lanes = pa.array(np.zeros(table.num_rows, np.int64))
    return columns(table.append_column(LANE, lanes), reader.manifest, reader.split)


def drawn(number: int, epoch: int, modality: Modality, seed: int = 5) -> np.ndarray:
    """Positions of the stored frames that this epoch delivers."""
    frames, candidates = modality.shape[0], modality.candidates
    purpose = f"candidates/{modality.name}"
    draw = uniform(seed, purpose, epoch, np.array([number]), frames)[0]
    return np.arange(frames) * candidates + np.floor(draw * candidates).astype(int)


def test_small_columns(reader: ShardReader) -> None:
    found = rows(reader, None)
    assert found["sample_id"].tolist() == [3 * n for n in range(NUM_ROWS)]
    assert found["label"].tolist() == [n % 2 for n in range(NUM_ROWS)]
    assert reader.group_rows == (4, 4, 3, 4, 4, 4, 2)
    index = sample_index(reader)
    assert index.sample_id.tolist() == found["sample_id"].tolist()
    assert index.offsets.tolist() == [0, 4, 8, 11, 15, 19, 23, 25]


def test_keys_and_groups_are_stored_and_not_delivered(reader: ShardReader, folder: Folder) -> None:
    import pyarrow.parquet as pq

    with folder.open("train-0.parquet") as file:
        table = pq.read_table(file)
    assert table.column("key").to_pylist()[:2] == ["k0", "k1"]
    assert table.column("group").to_pylist()[:5] == ["g0", "g1", "g2", "g3", "g0"]
    assert not {"key", "group"} & rows(reader, None).keys()


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_a_candidate_is_drawn_for_every_frame(reader: ShardReader, epoch: int) -> None:
    found = rows(reader, epoch)
    assert found["clip"].shape == (NUM_ROWS, 2, 3, 12, 12)
    for number, clip in zip(found["sample_id"].tolist(), found["clip"], strict=True):
        expected = stored(CLIP, number, "train")[drawn(number, epoch, CLIP)]
        np.testing.assert_array_equal(clip, expected)


def test_candidates_depend_on_seed_epoch_and_sample_alone(reader: ShardReader) -> None:
    whole = rows(reader, 3)
    reads = [Read(6, 1, 2), Read(0, 0, 3), Read(3, 2, 4)]
    where = np.array([24, 0, 1, 2, 13, 14])
    take = np.array([4, 0, 5, 2, 1, 3])
    table = reader.gather(reads, take, epoch=3)
    for name, array in arrays(table, reader).items():
        if name != LANE:
            np.testing.assert_array_equal(array, whole[name][where[take]])
    other = ShardReader(reader.folder, reader.manifest, "train", seed=6)
    assert not np.array_equal(rows(other, 3)["clip"], whole["clip"])
    assert not np.array_equal(rows(reader, 4)["clip"], whole["clip"])


def test_all_candidates_come_equally_often() -> None:
    counts = np.zeros(3)
    for epoch in range(100):
        draw = uniform(5, "candidates/clip", epoch, np.arange(NUM_ROWS), 2)
        counts += np.bincount((draw * 3).astype(int).ravel(), minlength=3)
    np.testing.assert_allclose(counts / counts.sum(), 1 / 3, atol=0.03)


def test_without_an_epoch_the_middle_candidate_is_taken(reader: ShardReader) -> None:
    found = rows(reader, None)
    for number, clip in zip(found["sample_id"].tolist(), found["clip"], strict=True):
        np.testing.assert_array_equal(clip, stored(CLIP, number, "train")[[1, 4]])


def test_validation_has_its_own_frames_and_shape(val_reader: ShardReader) -> None:
    (table,) = read_chunks(val_reader, 10, 0, 3)
    assert table.column(LANE).to_pylist() == [0] * 10 + [1] * 10 + [2] * 5
    found = columns(table, val_reader.manifest, "val")
    assert found["clip"].shape == (NUM_ROWS, 2, 3, 8, 8)
    for number, clip in zip(found["sample_id"].tolist(), found["clip"], strict=True):
        np.testing.assert_array_equal(clip, stored(CLIP, number, "val"))


def grey_levels(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found.astype(int) - expected).mean())


def test_jpeg_rows_are_within_a_few_grey_levels(
    reader: ShardReader, val_reader: ShardReader
) -> None:
    found = rows(reader, 2)
    assert found["film"].shape == (NUM_ROWS, 2, 3, 32, 32)
    assert found["photo"].shape == (NUM_ROWS, 3, 32, 32)
    for row, number in enumerate(found["sample_id"].tolist()):
        film = stored(FILM, number, "train")
        chosen = drawn(number, 2, FILM)
        others = np.setdiff1d(np.arange(4), chosen)
        assert grey_levels(found["film"][row], film[chosen]) < 4
        assert grey_levels(found["film"][row], film[others]) > 10
        assert grey_levels(found["photo"][row], stored(PHOTO, number, "train")) < 4
    found = rows(val_reader, None)
    for row, number in enumerate(found["sample_id"].tolist()):
        assert grey_levels(found["film"][row], stored(FILM, number, "val")) < 4


def test_absent_modalities_are_zeros_and_marked(reader: ShardReader) -> None:
    found = rows(reader, 0)
    lacks = np.arange(NUM_ROWS) % 3 == 0
    assert found["present"].tolist() == np.where(lacks, 0b0111, 0b1111).tolist()
    assert (found["numbers"][lacks] == 0).all()
    assert found["numbers"][~lacks, 0].tolist() == found["sample_id"][~lacks].tolist()


def test_resampled_rows_have_their_own_frames(reader: ShardReader) -> None:
    """Rows of a group in any order, some twice: all columns follow."""
    offsets = np.array([0, 3, 3, 3, 5, 5, 5, 5])
    entries = Entries(offsets, np.array([2, 0, 2, 3, 3]), np.array([1, 2, 3, 4, 5]))
    reads = [Read(3, 0, 2), Read(0, 0, 3)]
    table = reader.gather(reads, np.array([1, 0, 4, 3, 2]), entries=entries, epoch=1)
    assert table.column("keep").to_pylist() == [5, 4, 3, 2, 1]
    found, whole = arrays(table, reader), rows(reader, 1)
    for name in ("sample_id", "clip", "film", "photo", "present", "numbers"):
        np.testing.assert_array_equal(found[name], whole[name][[14, 14, 2, 0, 2]])


def test_tables_are_the_same_on_every_file_system(
    reader: ShardReader, tmp_path: Path, manifest: Manifest
) -> None:
    local = Folder.at(tmp_path)
    assert write(local) == manifest
    other = ShardReader(str(local), manifest, "train", seed=5)
    for name, array in rows(other, 1).items():
        np.testing.assert_array_equal(array, rows(reader, 1)[name])

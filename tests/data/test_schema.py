"""The manifest: canonical form, hashes and what `verify_shards` finds."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.schema import (
    DataError,
    Manifest,
    Modality,
    Shard,
    load_manifest,
    verify_shards,
)

CONTENT = b"not really Parquet"


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    (tmp_path / "train-00000.parquet").write_bytes(CONTENT)
    shard = Shard(
        path="train-00000.parquet",
        rows=3,
        row_groups=(2, 1),
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    return Manifest(
        name="toy",
        source={"seed": 0},
        split_rule="official",
        modalities=(
            Modality(name="image", kind="image", shape=(1, 8, 8), dtype="float32"),
            Modality(name="audio", kind="audio", shape=(5,), dtype="int16"),
        ),
        classes=("a", "b"),
        splits={"train": (shard,), "val": (), "test": ()},
        class_counts={"train": (2, 1), "val": (0, 0), "test": (0, 0)},
    )


def test_row_bytes_are_64_floats_and_5_shorts(manifest: Manifest) -> None:
    assert [modality.nbytes("train") for modality in manifest.modalities] == [256, 10]
    assert manifest.row_nbytes("train") == manifest.stored_row_nbytes("test") == 266
    assert manifest.rows("train") == 3


def test_arrow_schema_has_plain_types(manifest: Manifest) -> None:
    schema = manifest.arrow_schema("train")
    assert schema.names == ["sample_id", "label", "key", "group", "image", "audio"]
    assert schema.types[:4] == [pa.int64(), pa.int64(), pa.string(), pa.string()]
    assert schema.types[4:] == [pa.binary(256), pa.binary(10)]


CLIP = Modality(
    name="visual",
    kind="frames",
    shape=(3, 3, 224, 224),
    train_shape=(3, 3, 256, 256),
    dtype="uint8",
    candidates=2,
)


def test_training_clips_are_stored_with_all_candidates_and_room_for_crops() -> None:
    assert CLIP.stored("train") == (6, 3, 256, 256)
    assert CLIP.delivered("train") == (3, 3, 256, 256)
    assert CLIP.stored("val") == CLIP.delivered("val") == (3, 3, 224, 224)
    assert CLIP.stored_nbytes("train") == 2 * CLIP.nbytes("train") == 6 * 3 * 256 * 256
    assert CLIP.nbytes("test") == 3 * 3 * 224 * 224


def test_schema_of_jpegs_and_optional_modalities(manifest: Manifest) -> None:
    optional = CLIP.model_copy(update={"storage": "jpeg", "optional": True})
    changed = manifest.model_copy(update={"modalities": (manifest.modalities[0], optional)})
    for split in ("train", "val"):
        schema = changed.arrow_schema(split)
        assert schema.names[4:] == ["present", "image", "visual"]
        assert schema.types[4:] == [pa.int64(), pa.binary(256), pa.binary()]
    tensors = manifest.model_copy(update={"modalities": (CLIP,)})
    assert tensors.arrow_schema("train").field("visual").type == pa.binary(6 * 3 * 256 * 256)
    assert tensors.arrow_schema("val").field("visual").type == pa.binary(3 * 3 * 224 * 224)
    assert not any(field.nullable for field in changed.arrow_schema("test"))


def test_manifest_survives_the_file(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    loaded = load_manifest(tmp_path)
    assert loaded == manifest
    assert loaded.digest == manifest.digest


def test_digest_changes_with_content(manifest: Manifest) -> None:
    assert manifest.model_copy(update={"source": {"seed": 1}}).digest != manifest.digest


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no manifest\.json.*run `midas prepare`"):
        load_manifest(tmp_path)


def test_unknown_manifest_key(manifest: Manifest, tmp_path: Path) -> None:
    text = manifest.to_json().replace('"name": "toy"', '"name": "toy", "nam": "x"')
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="not a manifest of format 2"):
        load_manifest(tmp_path)


def test_manifest_of_the_old_format(manifest: Manifest, tmp_path: Path) -> None:
    text = manifest.to_json().replace('"format_version": 2', '"format_version": 1')
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"(?s)not a manifest of format 2.*prepare again"):
        load_manifest(tmp_path)


def write_shard(manifest: Manifest, folder: Path, schema: pa.Schema) -> Manifest:
    """Three rows with these columns; the manifest with the right size and hash."""
    path = folder / "train-00000.parquet"
    row = {"label": 0, "key": "k", "group": "", "image": bytes(256), "audio": bytes(10)}
    rows = [row | {"sample_id": i} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=2)
    data = path.read_bytes()
    (shard,) = manifest.splits["train"]
    update = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return manifest.model_copy(update={"splits": {"train": (shard.model_copy(update=update),)}})


def test_verify_accepts_whole_shards(manifest: Manifest, tmp_path: Path) -> None:
    schema = manifest.arrow_schema("train")
    verify_shards(write_shard(manifest, tmp_path, schema), tmp_path)


def test_verify_finds_other_columns(manifest: Manifest, tmp_path: Path) -> None:
    schema = manifest.arrow_schema("train").remove(3)
    with pytest.raises(
        DataError, match=r"\(train\) has other columns or rows than the manifest says"
    ):
        verify_shards(write_shard(manifest, tmp_path, schema), tmp_path)


@pytest.mark.parametrize("content", [CONTENT[:-1], b"N" + CONTENT[1:]], ids=["cut", "changed"])
def test_verify_finds_damage(manifest: Manifest, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train-00000.parquet").write_bytes(content)
    with pytest.raises(DataError, match=rf"corrupt: {len(content)} bytes, 18 expected"):
        verify_shards(manifest, tmp_path)


def test_verify_finds_missing_shard(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "train-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"train-00000\.parquet \(train\) is missing"):
        verify_shards(manifest, tmp_path)

"""The manifest: canonical form, hashes and what `verify_shards` finds."""

import hashlib
from pathlib import Path

import pyarrow as pa
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
        modalities=(
            Modality(name="image", kind="image", shape=(1, 8, 8), dtype="float32"),
            Modality(name="audio", kind="audio", shape=(5,), dtype="int16"),
        ),
        classes=("a", "b"),
        splits={"train": (shard,), "val": (), "test": ()},
        class_counts={"train": (2, 1), "val": (0, 0), "test": (0, 0)},
    )


def test_row_bytes_are_64_floats_and_5_shorts(manifest: Manifest) -> None:
    assert [modality.nbytes for modality in manifest.modalities] == [256, 10]
    assert manifest.row_nbytes == 266
    assert manifest.rows("train") == 3


def test_arrow_schema_has_plain_types(manifest: Manifest) -> None:
    schema = manifest.arrow_schema()
    assert schema.names == ["sample_id", "label", "key", "image", "audio"]
    assert schema.types == [pa.int64(), pa.int64(), pa.string(), pa.binary(256), pa.binary(10)]


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
    with pytest.raises(DataError, match="not a manifest of format 1"):
        load_manifest(tmp_path)


def test_verify_accepts_whole_shards(manifest: Manifest, tmp_path: Path) -> None:
    verify_shards(manifest, tmp_path)


@pytest.mark.parametrize("content", [CONTENT[:-1], b"N" + CONTENT[1:]], ids=["cut", "changed"])
def test_verify_finds_damage(manifest: Manifest, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train-00000.parquet").write_bytes(content)
    with pytest.raises(DataError, match=rf"corrupt: {len(content)} bytes, 18 expected"):
        verify_shards(manifest, tmp_path)


def test_verify_finds_missing_shard(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "train-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"train-00000\.parquet \(train\) is missing"):
        verify_shards(manifest, tmp_path)

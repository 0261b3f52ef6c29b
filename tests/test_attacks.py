"""Attacks on the data that a run reads, and what keeps others from coming back; the table in the
README says where the rest is tested."""

import ast
import hashlib
import json
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.pictures import decode_jpeg, encode_jpeg
from data.schema import MANIFEST_NAME, DataError, Manifest, load_manifest, verify_shards
from data.sources.table_rows import read_columns
from tests.service.test_cli import midas

ROOT = Path(__file__).parent.parent
SHARD = "train-00000.parquet"
TENSOR_TYPES = ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "arrow.fixed_shape_tensor")


def manifest(**changes: Any) -> dict[str, Any]:
    """Of a set of three rows, as JSON values; its shard is what `plain_shard` writes."""
    image = {"name": "image", "kind": "image", "shape": [1, 2, 2], "dtype": "uint8"}
    return {
        "name": "toy",
        "source": {},
        "split_rule": "official",
        "modalities": [image],
        "classes": ["a", "b"],
        "splits": {"train": [], "val": [], "test": []},
        "class_counts": {"train": [0, 0], "val": [0, 0], "test": [0, 0]},
        **changes,
    }


def shard(file: Path, **changes: Any) -> dict[str, Any]:
    """The manifest's entry of a file, with its true hash: the attacker wrote both."""
    data = file.read_bytes()
    true = {"path": file.name, "rows": 3, "row_groups": [3], "num_bytes": len(data)}
    return true | {"sha256": hashlib.sha256(data).hexdigest()} | changes


def plain_shard(path: Path) -> pa.Table:
    schema = Manifest.model_validate(manifest()).arrow_schema("train")
    row = {"label": 0, "key": "k", "group": "", "image": bytes(4)}
    table = pa.Table.from_pylist([row | {"sample_id": i} for i in range(3)], schema=schema)
    pq.write_table(table, path)
    return table


def place(folder: Path, content: dict[str, Any] | str | bytes) -> Path:
    """A prepared set as a stranger hands it out."""
    text = json.dumps(content) if isinstance(content, dict) else content
    data = text if isinstance(text, bytes) else text.encode()
    (folder / MANIFEST_NAME).write_bytes(data)
    return folder


def of_train(*shards: dict[str, Any]) -> dict[str, Any]:
    return {"splits": {"train": list(shards), "val": [], "test": []}}


@pytest.mark.parametrize(
    "name",
    ["../secret.parquet", "/etc/passwd", "a/b.parquet", "..", ".", "", "a\0b", "..\\x", "a/../b"],
)
def test_a_manifest_names_files_of_its_own_folder_only(tmp_path: Path, name: str):
    folder = tmp_path / "set"
    folder.mkdir()
    plain_shard(tmp_path / "secret.parquet")
    entry = shard(tmp_path / "secret.parquet", path=name)
    for changes in (of_train(entry), {"files": {name: entry["sha256"]}}):
        place(folder, manifest(**changes))
        with pytest.raises(DataError, match="is no name of a file in the folder itself"):
            load_manifest(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": [1 << 40, 1 << 40]}, "at most 2147483647 are read"),
        ({"shape": [1 << 62, 4]}, "at most 2147483647 are read"),  # wraps to 0 in 64 bits
        ({"shape": [1, 2, 2], "candidates": 1 << 60}, "at most 2147483647 are read"),
        ({"shape": [-1, 2, 2]}, "must be positive"),
        ({"shape": [-1, -2, 2]}, "must be positive"),
        ({"shape": [1, 2, 2], "train_shape": [0, 2, 2]}, "must be positive"),
        ({"shape": []}, "must be positive"),
        ({"shape": [1, 2, 2], "dtype": "object"}, "dtype"),
        ({"shape": [1, 2, 2], "__class__": "x"}, "Extra inputs"),
    ],
)
def test_rows_of_absurd_shapes_are_refused(tmp_path: Path, changes: dict[str, Any], words: str):
    modality = {"name": "image", "kind": "image", "dtype": "uint8"} | changes
    place(tmp_path, manifest(modalities=[modality]))
    with pytest.raises(DataError, match=words):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "recursion limit"),
        ('{"source": ' + '{"a": ' * 100_000, "recursion limit"),
        ('{"name": ' + "9" * 100_000 + "}", "string|number out of range"),
        (b"\xff\xfe{}", "expected value"),
        ("null", "object"),
        (" " * (65 << 20), "at most 67108864 are read"),
    ],
    ids=["lists", "dicts", "number", "bytes", "null", "size"],
)
def test_malformed_manifests_are_refused(tmp_path: Path, content: str | bytes, words: str):
    place(tmp_path, content)
    with pytest.raises(DataError, match=words):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"rows": 1 << 50}, {"rows": 1 << 50, "row_groups": [1 << 50]}, {"rows": 0, "row_groups": []}],
)
def test_a_shard_has_the_rows_that_the_manifest_says(tmp_path: Path, changes: dict[str, Any]):
    plain_shard(tmp_path / SHARD)
    place(tmp_path, manifest(**of_train(shard(tmp_path / SHARD))))
    verify_shards(load_manifest(tmp_path), tmp_path)
    place(tmp_path, manifest(**of_train(shard(tmp_path / SHARD, **changes))))
    with pytest.raises(DataError, match="rows"):
        verify_shards(load_manifest(tmp_path), tmp_path)


class Hostile:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self._mark),)


def with_extension(column: pa.Array, name: str, about: bytes) -> pa.Field:
    """A field that claims to be of an extension type, as a Parquet file can."""
    keys = {"ARROW:extension:name": name, "ARROW:extension:metadata": about}
    return pa.field("image", column.type, nullable=False, metadata=keys)


@pytest.mark.parametrize("name", TENSOR_TYPES)
@pytest.mark.parametrize("storage", [pa.binary(4), pa.list_(pa.uint8()), pa.list_(pa.uint8(), 4)])
def test_tensor_types_in_parquet_run_nothing_and_are_refused(
    tmp_path: Path, name: str, storage: pa.DataType
):
    """CVE-2026-41486: Ray's tensor types unpickled their metadata when a file was opened."""
    import ray.data  # noqa: F401  registers its types

    mark = tmp_path / "taken"
    values = [bytes(4)] * 3 if storage == pa.binary(4) else [[0] * 4] * 3
    column = pa.array(values, storage)
    for about in (pickle.dumps(Hostile(mark)), b'{"shape": [1099511627776]}', b"[1099511627776]"):
        plain = plain_shard(tmp_path / SHARD)
        field = with_extension(column, name, about)
        pq.write_table(plain.drop(["image"]).append_column(field, column), tmp_path / SHARD)
        place(tmp_path, manifest(**of_train(shard(tmp_path / SHARD))))
        with pytest.raises(DataError, match="plain types|other columns"):
            verify_shards(load_manifest(tmp_path), tmp_path)
        with pytest.raises(DataError, match="extension type|cannot be read"):
            read_columns(tmp_path / SHARD)
        assert not mark.exists()


def test_a_picture_in_a_shard_that_claims_to_be_huge_is_not_decoded():
    data = bytearray(encode_jpeg(np.zeros((1, 3, 8, 8), np.uint8)))
    out = np.empty((1, 3, 8, 8), np.uint8)
    decode_jpeg(bytes(data), [0], out)
    size = data.index(b"\xff\xc0") + 5  # height and width of a baseline JPEG
    for claimed in ((9, 8), (9000, 9000)):
        data[size : size + 4] = struct.pack(">2H", *claimed)
        with pytest.raises(DataError, match=rf"claims \({claimed[1]}, {claimed[0]}\) pixels"):
            decode_jpeg(bytes(data), [0], out)


def shape_bomb(folder: Path) -> None:
    header = repr({"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)}).encode()
    head = header + b" " * (118 - len(header) - 1) + b"\n"
    (folder / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head)


def object_array(folder: Path) -> None:
    np.save(folder / "a.npy", np.array([Hostile(folder / "taken")], object), allow_pickle=True)


def way_out(folder: Path) -> None:
    np.save(folder.parent / "secret.npy", np.zeros(4, np.float32))
    (folder / "a.npy").symlink_to(folder.parent / "secret.npy")


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (shape_bomb, "no whole .npy file"),
        (object_array, "no whole .npy file"),
        (way_out, "leads out of data.root"),
    ],
)
def test_arrays_of_a_table_are_refused_with_their_reason(
    tmp_path: Path, attack: Callable[[Path], None], words: str
):
    root = tmp_path / "raw"
    root.mkdir()
    for number in range(30):
        np.save(root / f"{number}.npy", np.full(4, number, np.float32))
    rows = [f"{number}.npy,{number}.npy,{'ab'[number % 2]}" for number in range(30)]
    attack(root)
    (root / "table.csv").write_text("\n".join(["x,y,label", *rows, "a.npy,0.npy,a"]) + "\n")
    command = ("prepare", "--manifest", root / "table.csv", "--storage", tmp_path / "runs")
    kinds = ("--data.modalities.x.kind", "vector", "--data.modalities.y.kind", "vector")
    done = midas(*command, *kinds, "--data.max-rejected", "0.5", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out.splitlines()[-1])["rejected"] == 1
    (rejected,) = (tmp_path / "runs").rglob("rejected.jsonl")
    assert words in rejected.read_text()
    assert not (root / "taken").exists()


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """What a file calls, by its full name as far as it is written there."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def given(call: ast.Call, name: str) -> object:
    """A literal argument."""
    return next((ast.literal_eval(k.value) for k in call.keywords if k.arg == name), None)


def dangers(path: Path) -> list[str]:
    """Calls by which content that is read could run, or write anywhere."""
    found = []
    for name, call in calls(path):
        last = name.rpartition(".")[2]
        if (
            name
            in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "jsonpickle.decode")
            or name.startswith(("pickle.load", "cloudpickle.", "joblib.load", "dill.", "marshal."))
            or last in ("extract", "extractall", "unpack_archive", "read_pickle")
            or (name == "torch.load" and given(call, "weights_only") is not True)
            or (name == "np.load" and given(call, "allow_pickle") is not False)
            or name == "torch.export.load"
            or any(k.arg == "shell" for k in call.keywords)
        ):
            found.append(f"{path.relative_to(path.parents[1])}:{call.lineno} {name}")
    return found


def test_no_code_of_ours_unpickles_unpacks_or_evaluates():
    files = [
        path for room in ("service", "training", "data") for path in (ROOT / room).rglob("*.py")
    ]
    assert [danger for path in files for danger in dangers(path)] == []


@pytest.mark.parametrize(
    "line",
    [
        "pickle.loads(b)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f)",
        "archive.extractall(folder)",
        "shutil.unpack_archive(f)",
        "subprocess.run(text, shell=True)",
        "yaml.load(text)",
    ],
)
def test_such_code_would_be_found(tmp_path: Path, line: str):
    (tmp_path / "a.py").write_text(line)
    assert dangers(tmp_path / "a.py")


def test_the_table_of_attacks_names_tests_that_are_there():
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("**Attacks tried.**")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`([\w/]+)::(\w+)`", row)
        assert named, row
        for file, test in named:
            source = (ROOT / "tests" / f"{file}.py").read_text()
            assert f"def {test}(" in source, f"{file}.py has no {test}"

"""Folders: the same behaviour on this machine and on the file systems of pyarrow and fsspec."""

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from data.folder import Folder, file_system


@pytest.fixture(params=["local", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder that exists."""
    places = {"local": str(tmp_path / "set"), "file": f"file://{tmp_path}/set"}
    found = Folder.at(places.get(request.param, f"memory://{tmp_path.name}/set"))
    found.create()
    return found


def test_files_come_back(folder: Folder) -> None:
    assert folder.names() == []
    folder.write("b.json", '{"é": 1}')
    folder.write("a.bin", b"\0\1\2")
    assert folder.names() == ["a.bin", "b.json"]
    assert folder.read("b.json").decode() == '{"é": 1}'
    assert folder.read("a.bin") == b"\0\1\2"
    assert (folder.size("a.bin"), folder.size("b.json"), folder.size("c")) == (3, 9, None)
    assert folder.has("a.bin")
    assert not folder.has("c")
    assert folder.sha256("a.bin") == hashlib.sha256(b"\0\1\2").hexdigest()
    with folder.open("a.bin") as file:
        assert file.size() == 3
        file.seek(1)
        assert file.read() == b"\1\2"


def test_writing_replaces(folder: Folder) -> None:
    folder.write("a", "a longer text than the next")
    folder.write("a", "short")
    assert folder.read("a") == b"short"
    assert folder.names() == ["a"]


def test_remove(folder: Folder) -> None:
    folder.write("a", "1")
    folder.write("b", "2")
    folder.remove("a")
    folder.remove("never there")
    assert folder.names() == ["b"]


def test_folders_in_folders(folder: Folder) -> None:
    notes = folder.child("notes")
    notes.create()
    notes.write("plan", "x")
    folder.write("a", "1")
    assert folder.names() == ["a", "notes"]
    assert notes.names() == ["plan"]
    assert not folder.has("notes")  # not a file
    notes.remove_all()
    notes.remove_all()
    assert folder.names() == ["a"]


def test_folder_that_is_not_there(folder: Folder) -> None:
    absent = folder.child("absent")
    assert absent.names() == []
    assert not absent.has("a")
    assert absent.size("a") is None
    absent.remove_all()
    with pytest.raises(FileNotFoundError):
        absent.read("a")


def test_a_failed_write_leaves_the_old_file(folder: Folder) -> None:
    folder.write("a", "old")

    def write_half() -> None:
        with folder.new_file("a") as path:
            path.write_text("ha")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        write_half()
    assert folder.read("a") == b"old"


def test_unfinished_files_have_another_name(folder: Folder) -> None:
    with folder.new_file("a") as path:
        path.write_text("half")
        assert not folder.has("a")
    assert folder.read("a") == b"half"
    assert not path.exists()


def test_pickles_are_the_same_folder(folder: Folder) -> None:
    folder.write("a", "1")
    again = pickle.loads(pickle.dumps(folder))
    assert (again, str(again)) == (folder, folder.uri)
    assert again.read("a") == b"1"
    assert len(pickle.dumps(folder)) < 300  # no connection inside


def test_local_folders_reach_other_processes(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    code = "import pickle, sys; pickle.load(sys.stdin.buffer).write('a', 'from there')"
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    subprocess.run(command, input=pickle.dumps(folder), cwd=root, check=True, timeout=60)
    assert folder.read("a") == b"from there"


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Folder.at("shards") == Folder.at(tmp_path / "shards")
    assert Folder.at("~/shards").path == tmp_path / "home" / "shards"
    folder = Folder.at("memory://bucket/set")
    assert Folder.at(folder) is folder
    assert not folder.is_local
    assert Folder.at(tmp_path).is_local
    with pytest.raises(ValueError, match=r"nope://x cannot be used: .*give a folder, or a URI"):
        Folder.at("nope://x")


def test_queries_stay_at_the_end() -> None:
    child = Folder("s3://bucket/sets/?region=eu-west-1").child("digits").child(".progress")
    assert child.uri == "s3://bucket/sets/digits/.progress?region=eu-west-1"
    assert Folder("memory://bucket").child("a").uri == "memory://bucket/a"


def test_a_question_mark_in_a_local_name(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "why?" / "set")
    assert folder.child("a").path == tmp_path / "why?" / "set" / "a"
    folder.create()
    folder.write("a", "1")
    assert (tmp_path / "why?" / "set" / "a").read_text() == "1"


def test_pyarrow_is_asked_before_fsspec(tmp_path: Path) -> None:
    system, path = file_system(f"file://{tmp_path}")
    assert isinstance(system, fs.LocalFileSystem)
    assert path == str(tmp_path)
    system, path = file_system("memory://bucket/set")
    assert isinstance(system, fs.PyFileSystem)
    with system.open_output_stream(f"{path}/a") as stream:
        stream.write(b"1")
    assert fsspec.filesystem("memory").cat("/bucket/set/a") == b"1"


def test_parquet_is_read_from_anywhere(folder: Folder) -> None:
    import pyarrow as pa

    with folder.new_file("a.parquet") as path:
        pq.write_table(pa.table({"x": [1, 2, 3]}), path, row_group_size=2)
    with folder.open("a.parquet") as source, pq.ParquetFile(source) as file:
        assert file.read_row_group(1).to_pydict() == {"x": [3]}

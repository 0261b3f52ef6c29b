"""A folder on this machine, or on any file system that pyarrow or fsspec knows."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

COPY_BYTES = 8 << 20


def file_system(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path in it.

    Raises:
        ValueError: neither pyarrow nor fsspec knows the scheme, or its package is missing.
    """
    try:
        return fs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid:
        from fsspec.core import url_to_fs

        try:
            system, path = url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"{uri} cannot be used: {error}; give a folder, or a URI that pyarrow or an "
                "installed fsspec package knows (s3://, gs://, abfs://, ...)"
            ) from error
        return fs.PyFileSystem(fs.FSSpecHandler(system)), str(path)


@dataclass(frozen=True)
class Folder:
    """A folder by its path or URI; need not exist. File names in it have no folders of their own.

    Writing is atomic: a name stands for the old content, or the new, or nothing.
    """

    uri: str

    @classmethod
    def at(cls, place: "str | Path | Folder") -> "Folder":
        """The folder at a path (made absolute) or URI.

        Raises:
            ValueError: see `file_system`.
        """
        if isinstance(place, Folder):
            return place
        text = str(place)
        folder = cls(text if "://" in text else str(Path(text).expanduser().absolute()))
        folder._place  # noqa: B018  raises if the scheme is unknown
        return folder

    @cached_property
    def _place(self) -> tuple[fs.FileSystem, str]:
        if self.is_local:
            return fs.LocalFileSystem(), self.uri
        system, root = file_system(self.uri)
        return system, root.rstrip("/")

    def __reduce__(self):
        return Folder, (self.uri,)

    def __str__(self) -> str:
        return self.uri

    @property
    def is_local(self) -> bool:
        """Whether it is a path of this machine (or one that is mounted)."""
        return "://" not in self.uri

    @property
    def path(self) -> Path:
        """As a path; for local folders only."""
        assert self.is_local
        return Path(self.uri)

    def create(self) -> None:
        """Make the folder."""
        system, root = self._place
        system.create_dir(root)

    def names(self) -> list[str]:
        """Names of files and folders in it, sorted; empty if it does not exist."""
        system, root = self._place
        selector = fs.FileSelector(root, allow_not_found=True)
        return sorted(info.base_name for info in system.get_file_info(selector))

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""
        system, _ = self._place
        info = system.get_file_info(self._path(name))
        return info.size if info.type == fs.FileType.File else None

    def read(self, name: str) -> bytes:
        """Content of a file."""
        system, _ = self._place
        with system.open_input_stream(self._path(name)) as stream:
            return stream.read()

    def open(self, name: str) -> pa.NativeFile:
        """A file for reading anywhere in it; mapped into memory where that can be."""
        if self.is_local:
            return pa.memory_map(self._path(name))
        system, _ = self._place
        return system.open_input_file(self._path(name))

    def sha256(self, name: str) -> str:
        """SHA-256 of a file, hex."""
        digest = hashlib.sha256()
        system, _ = self._place
        with system.open_input_stream(self._path(name)) as stream:
            while part := stream.read(COPY_BYTES):
                digest.update(part)
        return digest.hexdigest()

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file."""
        data = content.encode() if isinstance(content, str) else content
        with self.new_file(name) as path:
            path.write_bytes(data)

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """A path of this machine to write to; it becomes the file when the block ends well."""
        if self.is_local:
            temporary = self.path / f".{name}.tmp"
            yield temporary
            os.replace(temporary, self._path(name))
            return
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            yield path
            system, _ = self._place
            with path.open("rb") as source, system.open_output_stream(self._path(name)) as target:
                shutil.copyfileobj(source, target, COPY_BYTES)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.has(name):
            system, _ = self._place
            system.delete_file(self._path(name))

    def child(self, name: str) -> "Folder":
        """A folder in it."""
        place, mark, query = (self.uri, "", "") if self.is_local else self.uri.partition("?")
        return Folder(f"{place.rstrip('/')}/{name}{mark}{query}")

    def remove_all(self) -> None:
        """Remove the folder and what is in it, if it is there."""
        system, root = self._place
        if system.get_file_info(root).type == fs.FileType.Directory:
            system.delete_dir(root)

    def _path(self, name: str) -> str:
        return f"{self._place[1]}/{name}"

"""Kinetics-Sounds: the classes of Kinetics-400 that can be heard and seen (R. Arandjelovic and
A. Zisserman, ICCV 2017); layouts of the MIDAS release and of the downloaded videos."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from data.config import DataConfig, Kind, ModalityConfig
from data.schema import DataError, Split
from data.sources.base import raw_folder
from data.sources.index import (
    list_images,
    read_lines,
    read_rows,
    takes_extracted,
    where,
    without_header,
)
from data.sources.raw import RawSample, Sound, Stills, Unreadable, Video

NUM_CLASSES = 31
LISTS = ("videos/train.txt", "videos/val.txt")
TEST_LIST = "videos/test.txt"
NAME_FILES = ("videos/labels.txt", "videos/classes.txt", "labels.txt", "classes.txt")
FOLDERS = ("train", "val", "test")
VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".webm"})
REMEDY = (
    "`--data.root DIR` with audios/<name>.wav, videos/<name>/*.jpg, videos/train.txt and "
    "videos/val.txt inside, or with the videos as train/<class>/<name>.mp4 and val/<class>/..."
)
CLIP_NAME = re.compile(r"(?P<video>[A-Za-z0-9_-]{11})(_\d+)*")


class Kinetics:
    """Clips of 10 s from YouTube; the video they are from is the group.

    `media: extracted` reads the lists `videos/train.txt` and `videos/val.txt` (and
    `videos/test.txt`), `auto` does where the first is there. A row begins with the clip's name and
    ends with the class number, separated by blanks or commas, with or without a header. The
    media are `audios/<name>.wav` and `videos/<name>/`.

    `media: videos` reads `train/<class>/<name>.mp4`, `val/<class>/` and `test/<class>/`: the clips
    are the files there are, the class is the folder's name. The publisher's CSV lists are not
    read: they also name the clips that have vanished from YouTube.

    Split: without a test list (folder) the clips of val are the test side, as is usual for
    Kinetics, whose test labels were held back.

    Classes: the lines of `labels.txt` or `classes.txt` (in the root or `videos/`), line 1 for
    number 0. No such file is published: without one the classes are the numbers from 0 to 30 that
    occur, as text. A number outside stays as it is and is no class.
    """

    name: ClassVar[str] = "kinetics"
    version: ClassVar[int] = 1
    kinds: Mapping[str, Kind] = {"audio": "audio", "visual": "frames"}
    official: ClassVar[Mapping[str, ModalityConfig]] = {
        "visual": ModalityConfig(frames=3, candidates=3)
    }

    def __init__(self, config: DataConfig) -> None:
        root = self._root = raw_folder(config, (), REMEDY)
        self._extracted = takes_extracted(config, root, LISTS[0])
        raw_folder(config, ("audios", *LISTS) if self._extracted else FOLDERS[:1], REMEDY)
        if self._extracted:
            names = _read_names(root)
            self._names = names or {str(n): str(n) for n in range(NUM_CLASSES)}
            self._lists = _with_splits(root, (*LISTS, TEST_LIST))
            self._rows = [without_header(read_rows(path, ", ")) for _, path in self._lists]
            self.classes = tuple(names.values()) if names else self._numbers()
        else:
            self._videos = _find_videos(root)
            self.classes = tuple(sorted({path.parent.name for _, path in self._videos}))

    def samples(self) -> Iterator[RawSample | Unreadable]:
        """Clips in the order of the lists, or by split, class and name."""
        if not self._extracted:
            yield from (self._from_video(path, split) for split, path in self._videos)
            return
        for (split, path), rows in zip(self._lists, self._rows, strict=True):
            for line, cells in rows:
                yield self._from_row(where(path, line), cells, split)

    def _from_video(self, path: Path, split: Split) -> RawSample:
        video = Video(path.relative_to(self._root).as_posix())
        media = {"audio": video, "visual": video}
        return RawSample(path.stem, path.parent.name, split, media, _video_id(path.stem))

    def _from_row(self, key: str, cells: list[str], split: Split) -> RawSample | Unreadable:
        if len(cells) < 2 or not cells[0]:
            return Unreadable(key, f"{' '.join(cells)!r} is not a name and a class number", split)
        name = cells[0]
        media = {
            "audio": Sound(f"audios/{name}.wav"),
            "visual": Stills(list_images(self._root, f"videos/{name}")),
        }
        return RawSample(name, self._label(cells), split, media, _video_id(name))

    def _label(self, cells: list[str]) -> str:
        """Class of a row; the cell as it is written if that names none."""
        return self._names.get(cells[-1], cells[-1])

    def _numbers(self) -> tuple[str, ...]:
        """The valid class numbers that occur, as text."""
        found = {self._label(cells) for rows in self._rows for _, cells in rows}
        return tuple(number for number in self._names if number in found)


def _with_splits(root: Path, names: Sequence[str]) -> list[tuple[Split, Path]]:
    """The lists or folders that are there, each with its split; the second of two is for test."""
    paths = [root / name for name in names if (root / name).exists()]
    splits: tuple[Split, ...] = ("train", "val", "test") if len(paths) > 2 else ("train", "test")
    return list(zip(splits, paths, strict=False))


def _read_names(root: Path) -> dict[str, str]:
    """Class number, as text, -> name; empty if there is no file of names."""
    paths = [root / name for name in NAME_FILES if (root / name).exists()]
    lines = read_lines(paths[0]) if paths else []
    return {str(number): line.strip() for number, (_, line) in enumerate(lines)}


def _find_videos(root: Path) -> list[tuple[Split, Path]]:
    """Split and file of every video, by split, class and name.

    Raises:
        DataError: there is none.
    """
    found: list[tuple[Split, Path]] = [
        (split, path)
        for split, folder in _with_splits(root, FOLDERS)
        for path in sorted(folder.glob("*/*"))
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")
    ]
    if not found:
        raise DataError(f"{root / FOLDERS[0]} holds no <class>/<name>.mp4; give {REMEDY}")
    return found


def _video_id(name: str) -> str | None:
    """The 11 characters of a video's address on YouTube, where the name begins with them."""
    match = CLIP_NAME.fullmatch(name)
    return match["video"] if match else None

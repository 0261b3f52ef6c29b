"""UCF-101: 101 human actions in videos (K. Soomro et al., CRCV-TR-12-01, 2012); layouts of its
site and of the MIDAS release."""

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from data.config import DataConfig, Kind, ModalityConfig
from data.schema import DataError, Split
from data.sources.base import raw_folder
from data.sources.index import list_images, read_rows, takes_extracted, where, without_header
from data.sources.raw import FlowStills, Media, RawSample, Stills, Unreadable, Video

FRAMES, FLOW_U, FLOW_V, VIDEOS = "frames_rgb", "flows_u", "flows_v", "UCF-101"
CLASS_LIST = "classInd.txt"
LISTS: dict[Split, tuple[str, ...]] = {
    "train": ("trainlist01_new.txt", "trainlist01.txt"),
    "test": ("testlist01_new.txt", "testlist01.txt"),
}
LIST_FOLDERS = ("", "ucfTrainTestlist/")
FRAME_NAMES = tuple(f"img_{number:05d}.jpg" for number in range(1, 7))
CLIP_PATH = re.compile(r"(?P<folder>[^/]+)/(?P<clip>v_(?P<source>[^/]+_g\d+)_c\d+)\.avi")
REMEDY = (
    f"`--data.root DIR` with {CLASS_LIST}, trainlist01_new.txt, testlist01_new.txt, {FRAMES}/, "
    f"{FLOW_U}/ and {FLOW_V}/ inside, or with {VIDEOS}/<Class>/*.avi and ucfTrainTestlist/"
)


class Ucf101:
    """Clips of 101 actions; the video they were cut from, `Archery_g08`, is the group.

    Index: `trainlist01` and `testlist01`, both as `_new.txt` of the MIDAS release or as published
    (`.txt`), in the root or in `ucfTrainTestlist/`, with or without a header. A row is
    `Class/v_Class_gNN_cNN.avi` and, but for the published test list, the class number. The class
    is that of the number, without one that of the folder; a number that contradicts the folder
    makes the row unreadable. There is no validation list.

    Classes: the names of `classInd.txt`, sorted; their numbers there differ.

    Media: visual is `frames_rgb/<clip>/`, where a folder with fewer than six frames is taken to
    lack some of `img_00001.jpg` to `img_00006.jpg`; flow is `flows_u/<clip>/` and
    `flows_v/<clip>/`. `media: extracted` needs all three folders. With `videos` both are
    `UCF-101/<Class>/<clip>.avi`. `auto` decides for frames and flow apart, by the folders that are
    there. Case does not matter in class folders: one of the published ones is written in two ways.
    """

    name: ClassVar[str] = "ucf101"
    version: ClassVar[int] = 1
    kinds: Mapping[str, Kind] = {"flow": "flow", "visual": "frames"}
    official: ClassVar[Mapping[str, ModalityConfig]] = {
        "flow": ModalityConfig(frames=3, candidates=2, pick="early"),
        "visual": ModalityConfig(frames=3, candidates=2, pick="early"),
    }

    def __init__(self, config: DataConfig) -> None:
        root = self._root = raw_folder(config, (), REMEDY)
        self._has_frames = takes_extracted(config, root, FRAMES)
        self._has_flow = takes_extracted(config, root, FLOW_U, FLOW_V)
        class_list = _find(root, CLASS_LIST)
        self._lists: dict[Split, str] = {
            split: _find(root, *names) for split, names in LISTS.items()
        }
        wanted = {
            FRAMES: self._has_frames,
            FLOW_U: self._has_flow,
            FLOW_V: self._has_flow,
            VIDEOS: not (self._has_frames and self._has_flow),
        }
        files = (class_list, *self._lists.values())
        raw_folder(config, (*files, *(name for name in wanted if wanted[name])), REMEDY)
        self._class_names = _read_class_names(root / class_list)
        self._by_folder = {name.lower(): name for name in self._class_names.values()}
        self.classes = tuple(sorted(self._by_folder.values()))

    def samples(self) -> Iterator[RawSample | Unreadable]:
        """Clips in the order of the lists.

        Raises:
            DataError: a list cannot be read.
        """
        for split, name in self._lists.items():
            path = self._root / name
            for line, cells in without_header(read_rows(path, ", ")):
                yield self._from_row(where(path, line), cells, split)

    def _from_row(self, key: str, cells: list[str], split: Split) -> RawSample | Unreadable:
        match = CLIP_PATH.fullmatch(cells[0])
        if not match or len(cells) > 2:
            reason = f"{' '.join(cells)!r} is not Class/v_Class_gNN_cNN.avi and a class number"
            return Unreadable(key, reason, split)
        folder = match["folder"]
        label = by_folder = self._by_folder.get(folder.lower(), folder)
        if len(cells) == 2:
            label = self._class_names.get(cells[1], cells[1])
            if label in self.classes and label != by_folder:
                reason = f"class {cells[1]} is {label}, and the folder is {folder}"
                return Unreadable(key, reason, split)
        clip, group = match["clip"], match["source"]
        return RawSample(clip, label, split, self._media(folder, clip), group)

    def _media(self, folder: str, clip: str) -> dict[str, Media]:
        video = Video(f"{VIDEOS}/{self._video_folders.get(folder.lower(), folder)}/{clip}.avi")
        return {
            "flow": self._flow(clip) if self._has_flow else video,
            "visual": self._frames(clip) if self._has_frames else video,
        }

    def _frames(self, clip: str) -> Stills:
        folder = f"{FRAMES}/{clip}"
        images = list_images(self._root, folder)
        if len(images) < len(FRAME_NAMES):
            return Stills(tuple(f"{folder}/{name}" for name in FRAME_NAMES))
        return Stills(images)

    def _flow(self, clip: str) -> FlowStills:
        u, v = (list_images(self._root, f"{folder}/{clip}") for folder in (FLOW_U, FLOW_V))
        return FlowStills(u, v)

    @cached_property
    def _video_folders(self) -> dict[str, str]:
        """Name in lower case -> name, of the class folders that are there."""
        root = self._root / VIDEOS
        return {path.name.lower(): path.name for path in root.iterdir()} if root.exists() else {}


def _find(root: Path, *names: str) -> str:
    """Where a list is, relative to the root: the first that is there, else the first there is."""
    places = [folder + name for folder in LIST_FOLDERS for name in names]
    return next((place for place in places if (root / place).exists()), places[0])


def _read_class_names(path: Path) -> dict[str, str]:
    """Number, as text, -> class name.

    Raises:
        DataError: a line is not a number and a name.
    """
    names: dict[str, str] = {}
    for line, cells in read_rows(path, " "):
        if len(cells) != 2 or not cells[0].isdecimal():
            raise DataError(
                f"{path} line {line} is {' '.join(cells)!r}; every line must be a class number and "
                "a name; get the file again"
            )
        names[cells[0]] = cells[1]
    return names

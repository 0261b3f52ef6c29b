"""CREMA-D: acted emotions, heard and seen (H. Cao et al., IEEE Trans. Affective Computing 5(4),
2014); layouts of its repository and of the MIDAS release."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from data.config import DataConfig, Kind, ModalityConfig
from data.schema import DataError, Split
from data.sources.base import raw_folder
from data.sources.index import list_images, read_rows, takes_extracted, where, without_header
from data.sources.raw import Media, RawSample, Sound, Stills, Unreadable, Video

WAVS, FRAMES, VIDEOS = "AudioWAV", "visual_frames", "VideoFlash"
SUFFIXES = {WAVS: ".wav", FRAMES: "", VIDEOS: ".flv"}
REMEDY = (
    f"`--data.root DIR` with {WAVS}/<id>.wav and {FRAMES}/<id>/*.jpg inside, or the CREMA-D "
    f"repository with {VIDEOS}/<id>.flv"
)
EMOTIONS = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")
CLIP_ID = re.compile(r"(?P<actor>\d{4})_[A-Z]{3}_(?P<emotion>[A-Z]{3})_[A-Z]{1,2}")
LISTS: dict[Split, tuple[str, ...]] = {
    "train": ("train_split.csv", "train.csv"),
    "val": ("val.csv",),
    "test": ("test.csv",),
}
LFS_STUB = b"version https://git-lfs"


class Cremad:
    """Clips of 91 actors speaking 12 sentences in 6 emotions.

    A clip id is `{actor}_{sentence}_{emotion}_{level}`; the actor is the group.

    Index: the lists `train_split.csv` (or `train.csv`), `val.csv` and `test.csv` with rows
    `id,emotion`, with or without a header. Without lists, as in the CREMA-D repository, the clips
    are all files there are, the emotion is the one in the id, and all clips are "train": the
    repository has no partition. A clip that only one of the folders has is still a sample, so that
    it is reported.

    Classes: the sorted lines of `stat.csv`, without it the six emotions.

    Media: audio is `AudioWAV/<id>.wav` where that folder is there, else the sound of the video.
    Visual is `visual_frames/<id>/` with `media: extracted`, `VideoFlash/<id>.flv` with `videos`;
    `auto` takes the frames where that folder is there. `extracted` needs `AudioWAV/` as well.
    """

    name: ClassVar[str] = "cremad"
    version: ClassVar[int] = 1
    kinds: Mapping[str, Kind] = {"audio": "audio", "visual": "frames"}
    official: ClassVar[Mapping[str, ModalityConfig]] = {
        "visual": ModalityConfig(frames=3, candidates=3)
    }

    def __init__(self, config: DataConfig) -> None:
        root = raw_folder(config, (), REMEDY)
        has_wavs = config.media == "extracted" or (root / WAVS).exists()
        self._audio = WAVS if has_wavs else VIDEOS
        self._visual = FRAMES if takes_extracted(config, root, FRAMES) else VIDEOS
        self._folders = tuple(dict.fromkeys((self._audio, self._visual)))
        self._lists = _find_lists(root)
        needed = [LISTS[split][0] for split in ("train", "test") if split not in self._lists]
        raw_folder(config, (*self._folders, *(needed if self._lists else ())), REMEDY)
        for folder in self._folders:
            _check_no_stub(root / folder, SUFFIXES[folder])
        self._root = root
        self.classes = _read_classes(root / "stat.csv")

    def samples(self) -> Iterator[RawSample | Unreadable]:
        """Clips in the order of the lists, or sorted by id.

        Raises:
            DataError: a list cannot be read.
        """
        if not self._lists:
            yield from map(self._from_name, self._names())
        for split, path in self._lists.items():
            for line, cells in without_header(read_rows(path, ", ")):
                yield self._from_row(where(path, line), cells, split)

    def _names(self) -> list[str]:
        """Names of all media of all folders, without suffix, sorted."""
        names: set[str] = set()
        for folder in self._folders:
            suffix = SUFFIXES[folder]
            paths = (self._root / folder).iterdir()
            names |= {path.stem for path in paths if path.suffix.lower() == suffix}
        return sorted(name for name in names if not name.startswith("."))

    def _from_name(self, name: str) -> RawSample | Unreadable:
        match = CLIP_ID.fullmatch(name)
        if not match:
            return Unreadable(name, _not_an_id(name), "train")
        return self._sample(match, match["emotion"], "train")

    def _from_row(self, key: str, cells: list[str], split: Split) -> RawSample | Unreadable:
        if len(cells) != 2:
            return Unreadable(key, f"{len(cells)} cells ({','.join(cells)}), not id,emotion", split)
        match = CLIP_ID.fullmatch(cells[0])
        if not match:
            return Unreadable(key, _not_an_id(cells[0]), split)
        return self._sample(match, cells[1], split)

    def _sample(self, match: re.Match[str], label: str, split: Split) -> RawSample:
        media = {"audio": self._sound(match[0]), "visual": self._frames(match[0])}
        return RawSample(match[0], label, split, media, group=match["actor"])

    def _sound(self, clip: str) -> Media:
        path = f"{self._audio}/{clip}{SUFFIXES[self._audio]}"
        return Sound(path) if self._audio == WAVS else Video(path)

    def _frames(self, clip: str) -> Media:
        if self._visual == VIDEOS:
            return Video(f"{VIDEOS}/{clip}{SUFFIXES[VIDEOS]}")
        return Stills(list_images(self._root, f"{FRAMES}/{clip}"))


def _find_lists(root: Path) -> dict[Split, Path]:
    """Split -> its list, where there is one."""
    found: dict[Split, Path] = {}
    for split, names in LISTS.items():
        paths = [root / name for name in names if (root / name).exists()]
        if paths:
            found[split] = paths[0]
    return found


def _read_classes(path: Path) -> tuple[str, ...]:
    if not path.exists():
        return EMOTIONS
    return tuple(sorted({cells[0] for _, cells in read_rows(path, ",")}))


def _check_no_stub(folder: Path, suffix: str) -> None:
    """Refuse a copy of the repository made without Git LFS.

    Raises:
        DataError: the first media file of the folder is such a stub.
    """
    paths = sorted(path for path in folder.iterdir() if suffix and path.suffix.lower() == suffix)
    if not paths:
        return
    with paths[0].open("rb") as file:
        is_stub = file.read(len(LFS_STUB)) == LFS_STUB
    if is_stub:
        raise DataError(
            f"{paths[0]} is a stub of Git LFS, some lines of text in place of the media; run "
            "`git lfs pull` in a clone of the repository (the zip has only stubs)"
        )


def _not_an_id(name: str) -> str:
    return f"{name!r} is no clip id; one is like 1001_IEO_HAP_LO"

"""CREMA-D, Kinetics-Sounds and UCF-101: index rules, on generated and on hand-made trees."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from data.config import DataConfig
from data.schema import DataError
from data.sources import index
from data.sources.cremad import EMOTIONS, Cremad
from data.sources.kinetics import Kinetics
from data.sources.raw import Adapter, FlowStills, RawSample, Sound, Stills, Unreadable, Video
from data.sources.ucf101 import Ucf101

SHARED = Path(__file__).parents[2].parent / "shared"
GENERATOR = SHARED / "reference" / "make_layouts.py"
LISTS = SHARED / "data" / "lists"
TREES = {
    "clean": ["--per-class", "5"],
    "faults": ["--per-class", "5", "--faults", "all"],
    "videos": ["--per-class", "2", "--raw"],
}
ADAPTERS: Mapping[str, type[Adapter]] = {"cremad": Cremad, "kinetics": Kinetics, "ucf101": Ucf101}
DEV_SIDE = {"cremad": "val", "kinetics": "train", "ucf101": "train"}
needs_lists = pytest.mark.skipif(not LISTS.is_dir(), reason="needs the shared id lists")
LFS_STUB = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 84000\n"


def adapter(name: str, root: Path, **settings: object) -> Adapter:
    config = DataConfig.model_validate({"name": name, "root": str(root), **settings})
    return ADAPTERS[name](config)


def read(source: Adapter) -> tuple[list[RawSample], list[Unreadable]]:
    """Samples, and rows that are none."""
    rows = list(source.samples())
    return (
        [row for row in rows if isinstance(row, RawSample)],
        [row for row in rows if isinstance(row, Unreadable)],
    )


def write(root: Path, files: Mapping[str, str]) -> Path:
    """Files with these contents, as they are."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return root


# ---- trees of the generator


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three sets with two classes, for every entry of TREES."""
    if not GENERATOR.is_file():
        pytest.skip("needs the generator of the trees")
    root = tmp_path_factory.mktemp("clips")
    for name, flags in TREES.items():
        options = ["--classes", "2", "--clip-seconds", "0.4", "--datasets", *ADAPTERS, *flags]
        command = [sys.executable, str(GENERATOR), str(root / name), *options]
        subprocess.run(command, check=True, capture_output=True)
    return root


def manifest(tree: Path) -> dict:
    return json.loads((tree / "_manifest.json").read_text())


def expected(tree: Path) -> list[tuple[str, str, str]]:
    """(key, class name, split), as the generator wrote them, in index order."""
    content = manifest(tree)
    labels = content["classes"]
    if tree.name == "kinetics":
        labels = [str(number) for number in range(len(labels))]
    sides = {"train": "train", "dev": DEV_SIDE[tree.name], "test": "test"}
    order = ("train", "val", "test")
    rows = [
        (sample["id"], labels[sample["class"]], sides[sample["split"]])
        for sample in content["samples"]
    ]
    return sorted(rows, key=lambda row: order.index(row[2]))


def found(samples: list[RawSample]) -> list[tuple[str, str, str]]:
    return [(sample.key, sample.label, sample.split) for sample in samples]


def paths_of(sample: RawSample) -> list[str]:
    paths: list[str] = []
    for media in sample.media.values():
        match media:
            case Stills(stills):
                paths += stills
            case FlowStills(u, v):
                paths += (*u, *v)
            case Sound(path) | Video(path):
                paths.append(path)
    return paths


@pytest.mark.parametrize("name", ADAPTERS)
def test_clean_tree_is_read_as_written(trees: Path, name: str):
    tree = trees / "clean" / name
    source = adapter(name, tree)
    samples, unreadable = read(source)
    assert not unreadable
    assert found(samples) == expected(tree)
    assert source.classes == tuple(sorted({label for _, label, _ in expected(tree)}))
    assert [len(sample.media) for sample in samples] == [2] * 10
    assert tuple(source.kinds) == tuple(samples[0].media)
    for sample in samples:
        assert all((tree / path).is_file() for path in paths_of(sample))
    listed = [path for sample in samples for path in paths_of(sample)]
    on_disk = [*tree.rglob("*.jpg"), *tree.rglob("*.wav")]
    assert sorted(listed) == sorted(path.relative_to(tree).as_posix() for path in on_disk)


@pytest.mark.parametrize("name", ADAPTERS)
def test_faults_are_seen_or_passed_on(trees: Path, name: str):
    tree = trees / "faults" / name
    source = adapter(name, tree)
    samples, unreadable = read(source)
    faults = {fault["kind"]: fault for fault in manifest(tree)["faults"]}
    unknown = {"cremad": "XXX", "kinetics": "999", "ucf101": "999"}[name]
    wanted = [
        (key, unknown if key == faults["unknown_label"]["id"] else label, split)
        for key, label, split in expected(tree)
    ]
    assert found(samples) == wanted
    assert unknown not in source.classes
    assert len(samples) == 10 + 1  # the one listed twice
    assert Counter(sample.key for sample in samples)[faults["duplicate_id"]["id"]] == 2

    index_file = {"cremad": "train_split.csv", "kinetics": "train.txt"}
    file = index_file.get(name, "trainlist01_new.txt")
    assert [row.key.split(" line ")[0] for row in unreadable] == [file]
    assert unreadable[0].split == "train"

    lost = {fault["path"] for fault in faults.values() if fault["kind"] == "missing_file"}
    missing = {
        path for sample in samples for path in paths_of(sample) if not (tree / path).is_file()
    }
    assert lost <= missing
    short = next(s for s in samples if s.key == faults["short_clip"]["id"]).media["visual"]
    assert isinstance(short, Stills)
    assert sum((tree / path).is_file() for path in short.paths) == 2


@pytest.mark.parametrize("name", ADAPTERS)
def test_official_download_is_read(trees: Path, name: str):
    tree = trees / "videos" / name
    samples, unreadable = read(adapter(name, tree / "raw"))
    assert not unreadable
    wanted = {key: (label, split) for key, label, split in expected(tree)}
    assert {sample.key for sample in samples} == set(wanted)
    names = manifest(tree)["classes"]
    for sample in samples:
        label, split = wanted[sample.key]
        assert sample.label == (names[int(label)] if name == "kinetics" else label)
        assert sample.split == ("train" if name == "cremad" else split)
        assert set(map(type, sample.media.values())) == {Video}
        assert all((tree / "raw" / path).is_file() for path in paths_of(sample))


# ---- CREMA-D

CLIPS = ("1001_IEO_ANG_LO", "1001_IEO_NEU_XX", "1091_WSI_HAP_XX")


def cremad_tree(root: Path, **files: str) -> Path:
    """Wavs and frame folders of three clips, and index files."""
    write(root, {f"AudioWAV/{clip}.wav": "sound" for clip in CLIPS})
    write(root, {f"visual_frames/{c}/{n}.jpg": "x" for c in CLIPS for n in ("10", "9", "11")})
    return write(root, {name.replace("_csv", ".csv"): text for name, text in files.items()})


@pytest.mark.parametrize("header", ["", "clip_id,label\n", "\ufeffid,emotion\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_cremad_lists_with_and_without_header(tmp_path: Path, header: str, end: str):
    first = f"{header}{CLIPS[1]},NEU\n{CLIPS[0]},ANG\n\n".replace("\n", end)
    cremad_tree(tmp_path, train_csv=first, test_csv=f"\ufeff{CLIPS[2]},HAP")
    source = adapter("cremad", tmp_path)
    samples, unreadable = read(source)
    assert not unreadable
    assert found(samples) == [
        (CLIPS[1], "NEU", "train"),
        (CLIPS[0], "ANG", "train"),
        (CLIPS[2], "HAP", "test"),
    ]
    assert [sample.group for sample in samples] == ["1001", "1001", "1091"]
    assert source.classes == EMOTIONS
    frames = tuple(f"visual_frames/{CLIPS[1]}/{name}.jpg" for name in ("10", "11", "9"))
    assert samples[0].media["audio"] == Sound(f"AudioWAV/{CLIPS[1]}.wav")
    assert samples[0].media["visual"] == Stills(frames)  # sorted as text
    assert source.official["visual"].candidates == 3


def test_cremad_rows_that_are_no_clips(tmp_path: Path):
    rows = f"{CLIPS[0]}\n../../etc/passwd,HAP\n{CLIPS[0]},ANG,extra\n{CLIPS[1]},NEU\n"
    samples, unreadable = read(
        adapter("cremad", cremad_tree(tmp_path, train_split_csv=rows, test_csv=""))
    )
    assert [sample.key for sample in samples] == [CLIPS[1]]
    assert [row.key for row in unreadable] == [f"train_split.csv line {n}" for n in (1, 2, 3)]
    assert "'../../etc/passwd' is no clip id" in unreadable[1].reason
    assert "3 cells" in unreadable[2].reason


def test_cremad_clip_without_its_files_is_a_sample(tmp_path: Path):
    cremad_tree(tmp_path, train_csv="1002_IEO_SAD_HI,SAD\n", test_csv="")
    samples, _ = read(adapter("cremad", tmp_path))
    assert samples[0].media == {
        "audio": Sound("AudioWAV/1002_IEO_SAD_HI.wav"),
        "visual": Stills(()),
    }


def test_cremad_repository_without_lists(tmp_path: Path):
    write(tmp_path, {f"AudioWAV/{clip}.wav": "sound" for clip in CLIPS})
    write(tmp_path, {f"VideoFlash/{clip}.flv": "video" for clip in CLIPS[1:]})
    write(tmp_path, {"VideoFlash/notes.flv": "", "AudioWAV/README.md": ""})
    samples, unreadable = read(adapter("cremad", tmp_path))
    assert found(samples) == [
        (clip, emotion, "train") for clip, emotion in zip(CLIPS, ("ANG", "NEU", "HAP"), strict=True)
    ]
    assert samples[0].media["audio"] == Sound(f"AudioWAV/{CLIPS[0]}.wav")
    assert samples[0].media["visual"] == Video(f"VideoFlash/{CLIPS[0]}.flv")  # reported as absent
    assert [row.key for row in unreadable] == ["notes"]


def test_cremad_media(tmp_path: Path):
    cremad_tree(tmp_path, train_csv=f"{CLIPS[0]},ANG\n", test_csv="")
    with pytest.raises(DataError, match="lacks VideoFlash"):
        adapter("cremad", tmp_path, media="videos")
    write(tmp_path, {f"VideoFlash/{CLIPS[0]}.flv": "video"})
    by_media = {
        media: read(adapter("cremad", tmp_path, media=media))[0][0].media["visual"]
        for media in ("auto", "extracted", "videos")
    }
    assert isinstance(by_media["auto"], Stills)
    assert by_media["extracted"] == by_media["auto"]
    assert by_media["videos"] == Video(f"VideoFlash/{CLIPS[0]}.flv")


def test_cremad_sound_of_the_video_where_there_are_no_wavs(tmp_path: Path):
    write(tmp_path, {f"VideoFlash/{CLIPS[0]}.flv": "video"})
    samples, _ = read(adapter("cremad", tmp_path))
    video = Video(f"VideoFlash/{CLIPS[0]}.flv")
    assert samples[0].media == {"audio": video, "visual": video}
    with pytest.raises(DataError, match="lacks AudioWAV, visual_frames"):
        adapter("cremad", tmp_path, media="extracted")


@pytest.mark.parametrize("folder", ["AudioWAV", "VideoFlash"])
def test_cremad_lfs_stubs_are_refused(tmp_path: Path, folder: str):
    write(tmp_path, {f"AudioWAV/{CLIPS[0]}.wav": "sound", f"VideoFlash/{CLIPS[0]}.flv": "video"})
    suffix = {"AudioWAV": "wav", "VideoFlash": "flv"}[folder]
    write(tmp_path, {f"{folder}/{CLIPS[0]}.{suffix}": LFS_STUB})
    with pytest.raises(DataError, match=rf"{CLIPS[0]}\.{suffix} is a stub.*git lfs pull"):
        adapter("cremad", tmp_path)


def test_cremad_half_a_partition_is_refused(tmp_path: Path):
    cremad_tree(tmp_path, train_csv=f"{CLIPS[0]},ANG\n")
    with pytest.raises(DataError, match=r"lacks test\.csv"):
        adapter("cremad", tmp_path)


@needs_lists
def test_cremad_true_lists(tmp_path: Path):
    lists = {name: (LISTS / "cremad" / name).read_text() for name in ("train.csv", "test.csv")}
    stat = (LISTS / "cremad" / "stat.csv").read_text(encoding="utf-8")
    write(tmp_path, {**lists, "stat.csv": stat, "AudioWAV/x": "", "visual_frames/x": ""})
    source = adapter("cremad", tmp_path)
    samples, unreadable = read(source)
    assert not unreadable
    assert Counter(sample.split for sample in samples) == {"train": 6698, "test": 744}
    assert len({sample.key for sample in samples}) == 7442
    assert Counter(sample.label for sample in samples) == dict.fromkeys(EMOTIONS, 1271) | {
        "NEU": 1087
    }
    assert source.classes == EMOTIONS
    assert len({sample.group for sample in samples}) == 91
    assert all(sample.label in sample.key for sample in samples)


# ---- Kinetics-Sounds

NAMES = ("-abcdefghij_000001_000011", "abcdefghijk_000002_000012", "abcdefghijk_30", "odd")


def kinetics_tree(root: Path, train: str, val: str, **files: str) -> Path:
    (root / "audios").mkdir()
    lists = {"videos/train.txt": train, "videos/val.txt": val}
    texts = {name.replace("_txt", ".txt"): text for name, text in files.items()}
    return write(root, lists | texts)


@pytest.mark.parametrize("header", ["", "filename start end label\n"])
@pytest.mark.parametrize("separator", [" ", ","])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_kinetics_lists(tmp_path: Path, header: str, separator: str, end: str):
    train = f"{header}{NAMES[0]} 1 10 30\n{NAMES[1]} 1 10 4\n{NAMES[2]} 1 10 31\n"
    train = train.replace(" ", separator).replace("\n", end)
    source = adapter("kinetics", kinetics_tree(tmp_path, "\ufeff" + train, f"{NAMES[3]} 1 10 -1"))
    samples, unreadable = read(source)
    assert not unreadable
    assert found(samples) == [
        (NAMES[0], "30", "train"),
        (NAMES[1], "4", "train"),
        (NAMES[2], "31", "train"),
        (NAMES[3], "-1", "test"),
    ]
    assert [sample.group for sample in samples] == ["-abcdefghij", *["abcdefghijk"] * 2, None]
    assert source.classes == ("4", "30")
    assert samples[0].media == {
        "audio": Sound(f"audios/{NAMES[0]}.wav"),
        "visual": Stills(()),
    }


def test_kinetics_frames_are_sorted_and_nothing_else(tmp_path: Path):
    kinetics_tree(tmp_path, f"{NAMES[0]} 1 10 0\n", "")
    files = ("frame_00010.jpg", "frame_00002.JPG", "._frame_00001.jpg", "Thumbs.db")
    write(tmp_path, {f"videos/{NAMES[0]}/{file}": "" for file in files})
    samples, _ = read(adapter("kinetics", tmp_path))
    frames = tuple(f"videos/{NAMES[0]}/frame_{n}" for n in ("00002.JPG", "00010.jpg"))
    assert samples[0].media["visual"] == Stills(frames)


@pytest.mark.parametrize("file", ["videos/labels_txt", "classes_txt"])
def test_kinetics_names(tmp_path: Path, file: str):
    kinetics_tree(
        tmp_path,
        f"{NAMES[0]} 1 10 1\n{NAMES[1]} 1 10 3\n",
        "",
        **{file: "tap dancing\r\nbowling\r\nlaughing\r\n"},
    )
    source = adapter("kinetics", tmp_path)
    assert [sample.label for sample in read(source)[0]] == ["bowling", "3"]
    assert source.classes == ("tap dancing", "bowling", "laughing")  # the order of the numbers


def test_kinetics_with_a_test_list_val_is_validation(tmp_path: Path):
    lists = [f"{name} 1 10 0" for name in NAMES]
    kinetics_tree(tmp_path, lists[0], lists[1], **{"videos/test_txt": lists[2]})
    samples, _ = read(adapter("kinetics", tmp_path))
    assert [sample.split for sample in samples] == ["train", "val", "test"]


def test_kinetics_media(tmp_path: Path):
    kinetics_tree(tmp_path, f"{NAMES[0]} 1 10 0\n-abc\n", "")
    with pytest.raises(DataError, match="lacks train"):
        adapter("kinetics", tmp_path, media="videos")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train holds no <class>/<name>.mp4"):
        adapter("kinetics", tmp_path, media="videos")
    write(tmp_path, {f"train/tap dancing/{NAMES[1]}.mp4": "", f"val/bowling/{NAMES[2]}.mp4": ""})
    source = adapter("kinetics", tmp_path, media="videos")
    samples, _ = read(source)
    assert source.classes == ("bowling", "tap dancing")
    assert found(samples) == [(NAMES[1], "tap dancing", "train"), (NAMES[2], "bowling", "test")]
    video = Video(f"train/tap dancing/{NAMES[1]}.mp4")
    assert samples[0].media == {"audio": video, "visual": video}
    samples, unreadable = read(adapter("kinetics", tmp_path))  # auto: the lists
    assert [sample.key for sample in samples] == [NAMES[0]]
    assert [row.key for row in unreadable] == ["train.txt line 2"]
    with pytest.raises(DataError, match="lacks audios"):
        adapter("kinetics", write(tmp_path / "bare", {"videos/x.jpg": ""}), media="extracted")


@needs_lists
def test_kinetics_true_lists(tmp_path: Path):
    texts = ((LISTS / "kinetics-sounds" / f"my_{p}.txt").read_text() for p in ("train", "test"))
    source = adapter("kinetics", kinetics_tree(tmp_path, *texts))
    samples, unreadable = read(source)
    assert not unreadable
    assert Counter(sample.split for sample in samples) == {"train": 14799, "test": 2597}
    assert source.classes == tuple(str(number) for number in range(31))
    assert all(sample.group == sample.key[:11] for sample in samples)


# ---- UCF-101

INDEX = "1 Archery\r\n2 Hammering\r\n3 HammerThrow\r\n4 HandStandPushups\r\n"


def ucf_row(name: str, source: int, number: str = "") -> str:
    return f"{name}/v_{name}_g{source:02d}_c01.avi {number}".strip() + "\n"


def ucf_tree(root: Path, train: str, test: str, **folders: str) -> Path:
    """Published lists; frames and flow of nothing, unless `folders` says otherwise."""
    for folder in ("frames_rgb", "flows_u", "flows_v"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    lists = {"classInd.txt": INDEX, "trainlist01.txt": train, "testlist01.txt": test}
    return write(root, {f"ucfTrainTestlist/{name}": text for name, text in lists.items()})


def test_ucf101_published_lists(tmp_path: Path):
    train = ucf_row("HammerThrow", 8, "3") + ucf_row("Hammering", 9, "2")
    test = ucf_row("Archery", 1) + ucf_row("Hammering", 2)
    source = adapter("ucf101", ucf_tree(tmp_path, train.replace("\n", "\r\n"), "\ufeff" + test))
    samples, unreadable = read(source)
    assert not unreadable
    assert found(samples) == [
        ("v_HammerThrow_g08_c01", "HammerThrow", "train"),
        ("v_Hammering_g09_c01", "Hammering", "train"),
        ("v_Archery_g01_c01", "Archery", "test"),
        ("v_Hammering_g02_c01", "Hammering", "test"),
    ]
    assert [s.group for s in samples][:2] == ["HammerThrow_g08", "Hammering_g09"]
    assert source.classes == ("Archery", "HammerThrow", "Hammering", "HandStandPushups")
    assert source.official["visual"].candidates == 2


def test_ucf101_new_lists_come_first(tmp_path: Path):
    ucf_tree(tmp_path, "", "")
    new = {
        "classInd.txt": INDEX,
        "trainlist01_new.txt": "path label\n" + ucf_row("Archery", 8, "1"),
        "testlist01_new.txt": ucf_row("Archery", 1, "1"),
    }
    samples, _ = read(adapter("ucf101", write(tmp_path, new)))
    assert found(samples) == [
        ("v_Archery_g08_c01", "Archery", "train"),
        ("v_Archery_g01_c01", "Archery", "test"),
    ]


def test_ucf101_rows_that_are_no_clips(tmp_path: Path):
    train = [
        ucf_row("Archery", 8, "2"),
        "v_Archery_g08_c01.avi 1\n",
        "Archery/v_Archery_g08_c01.avi 1 1\n",
        ucf_row("Archery", 8, "99"),
        ucf_row("Juggling", 8),
        ucf_row("Juggling", 8, "1"),
    ]
    source = adapter("ucf101", ucf_tree(tmp_path, "".join(train), ""))
    samples, unreadable = read(source)
    assert [sample.label for sample in samples] == ["99", "Juggling"]
    assert not {"99", "Juggling"} & set(source.classes)
    assert [row.key for row in unreadable] == [f"trainlist01.txt line {n}" for n in (1, 2, 3, 6)]
    assert unreadable[0].reason == "class 2 is Hammering, and the folder is Archery"


def test_ucf101_stills(tmp_path: Path):
    ucf_tree(tmp_path, ucf_row("Archery", 8, "1") + ucf_row("Archery", 9, "1"), "")
    clip = "v_Archery_g08_c01"
    write(tmp_path, {f"frames_rgb/{clip}/img_{n:05d}.jpg": "" for n in (2, 3, 4, 5, 6)})
    write(tmp_path, {f"flows_u/{clip}/frame{n:05d}.jpg": "" for n in (2, 1)})
    (tmp_path / "flows_v" / clip).mkdir()
    first, absent = read(adapter("ucf101", tmp_path))[0]
    six = tuple(f"frames_rgb/{clip}/img_{n:05d}.jpg" for n in range(1, 7))
    assert first.media["visual"] == Stills(six)  # the first is missing, and will be named
    flow = first.media["flow"]
    assert flow == FlowStills(u=tuple(f"flows_u/{clip}/frame{n:05d}.jpg" for n in (1, 2)), v=())
    assert absent.media["flow"] == FlowStills((), ())
    write(tmp_path, {f"frames_rgb/{clip}/img_{n:05d}.jpg": "" for n in (1, 7)})
    visual = read(adapter("ucf101", tmp_path))[0][0].media["visual"]
    assert isinstance(visual, Stills)
    assert len(visual.paths) == 7


def test_ucf101_flow_of_the_videos_where_none_is_extracted(tmp_path: Path):
    ucf_tree(tmp_path, ucf_row("HandStandPushups", 8, "4"), "")
    (tmp_path / "flows_v").rmdir()
    with pytest.raises(DataError, match="lacks UCF-101"):
        adapter("ucf101", tmp_path)
    write(tmp_path, {"UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.avi": ""})
    video = Video("UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.avi")
    media = read(adapter("ucf101", tmp_path))[0][0].media
    assert isinstance(media["visual"], Stills)
    assert media["flow"] == video
    media = read(adapter("ucf101", tmp_path, media="videos"))[0][0].media
    assert media == {"flow": video, "visual": video}
    with pytest.raises(DataError, match="lacks flows_v"):
        adapter("ucf101", tmp_path, media="extracted")


def test_ucf101_broken_class_list(tmp_path: Path):
    ucf_tree(tmp_path, "", "")
    write(tmp_path, {"classInd.txt": "1 Archery\nHammering\n"})
    with pytest.raises(DataError, match="line 2 is 'Hammering'"):
        adapter("ucf101", tmp_path)


@needs_lists
@pytest.mark.parametrize("suffix", ["", "_new"])
def test_ucf101_true_lists(tmp_path: Path, suffix: str):
    ucf_tree(tmp_path, "", "")
    for name in ("classInd.txt", f"trainlist01{suffix}.txt", f"testlist01{suffix}.txt"):
        write(tmp_path, {name: (LISTS / "ucf101" / name).read_text()})
    source = adapter("ucf101", tmp_path)
    samples, unreadable = read(source)
    assert not unreadable
    assert Counter(sample.split for sample in samples) == {"train": 9537, "test": 3783}
    assert len(source.classes) == 101
    assert source.classes[34:36] == ("HammerThrow", "Hammering")
    assert {sample.label for sample in samples} == set(source.classes)
    train, test = ({s.group for s in samples if s.split == split} for split in ("train", "test"))
    assert not train & test


# ---- reading index files


def test_images_of_a_folder(tmp_path: Path):
    write(tmp_path, {f"clip/{name}": "" for name in ("b.jpg", "a.PNG", ".c.jpg", "d.txt")})
    assert index.list_images(tmp_path, "clip") == ("clip/a.PNG", "clip/b.jpg")


@pytest.mark.parametrize("name", ["missing", "file", "a" * 300, "a\0b", "loop"])
def test_images_of_what_is_no_folder(tmp_path: Path, name: str):
    """An index may hold any name; the sample is rejected later, as it has no frames."""
    write(tmp_path, {"file": ""})
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert index.list_images(tmp_path, name) == ()


def test_kinetics_list_with_a_name_that_no_file_has(tmp_path: Path):
    root = kinetics_tree(tmp_path, "a" * 300 + " 1\nb\0 0\n", "c 1\n")
    samples, unreadable = read(adapter("kinetics", root))
    assert not unreadable
    assert [sample.media["visual"] for sample in samples] == [Stills(())] * 3


def test_rows(tmp_path: Path):
    path = tmp_path / "rows"
    path.write_bytes('\ufeffa, b\r\n\r\n"x, ""y""\r\nz",\u2028c\r\n'.encode())
    assert index.read_rows(path, ",") == [(1, ["a", "b"]), (3, ['x, "y"\nz', "c"])]
    path.write_text("\ta\t\n'\t\"b\n")
    assert index.read_rows(path, "\t") == [(1, ["", "a", ""]), (2, ["'", '"b'])]
    path.write_text("one\nid, label\na, b\n")
    assert index.read_rows(path, " ,")[1:] == [(2, ["id,", "label"]), (3, ["a,", "b"])]
    assert index.read_rows(path, ", ") == [(1, ["one"]), (2, ["id", "label"]), (3, ["a", "b"])]
    path.write_text("a  b\tc\n")
    assert index.read_rows(path, ", ") == [(1, ["a", "b", "c"])]
    path.write_text("")
    assert index.read_rows(path, ",") == []


def test_rows_that_cannot_be_read(tmp_path: Path):
    path = tmp_path / "rows.csv"
    with pytest.raises(DataError, match=r"rows\.csv cannot be read"):
        index.read_rows(path, ",")
    path.write_bytes(b"caf\xe9,1\n")
    with pytest.raises(DataError, match="UTF-8"):
        index.read_rows(path, ",")
    path.write_text('a,1\n"b,2\nc,3\n')
    with pytest.raises(DataError, match="no CSV from line 2 on"):
        index.read_rows(path, ",")


def test_header_is_found_not_assumed():
    rows = [(1, ["clip_7", "start"]), (2, ["clip_8", "end of it"])]
    assert index.without_header(rows) == rows[1:]
    assert index.without_header(rows[1:]) == rows[1:]
    assert index.without_header([(1, ["Path", "n"])]) == []


def test_records(tmp_path: Path):
    path = tmp_path / "records.csv"
    path.write_text("id,label\na,1\nb\n")
    assert index.read_records(path, ",") == [
        (2, {"id": "a", "label": "1"}),
        (3, "1 cells, and the header has 2"),
    ]


def test_json(tmp_path: Path):
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 862902619928506372}\r\n\r\n{"id": 1\n[2]\n')
    (first, item), broken, no_object = index.read_json_lines(path)
    assert (first, item) == (1, {"id": 862902619928506372})
    assert broken[0] == 3
    assert "no JSON" in str(broken[1])
    assert no_object == (4, "a JSON list, no object")
    path.write_text('[{"a": null}, 3]')
    assert index.read_json_list(path) == [(1, {"a": None}), (2, "a JSON int, no object")]
    path.write_text("{}")
    with pytest.raises(DataError, match="a JSON dict; a list"):
        index.read_json_list(path)
    path.write_text("[1")
    with pytest.raises(DataError, match="is no JSON"):
        index.read_json_list(path)

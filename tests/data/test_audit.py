"""The audit finds what was planted, all of it and nothing else."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from PIL import Image

from data.audit import Audit, audit, findings, summary_lines
from data.features import log_mel
from data.fingerprints import PictureFingerprints, comparable, shown_frames, without_padding
from data.pictures import encode_jpeg
from data.schema import Modality, Split
from data.sources.mnist import read_images
from data.twins import MAX_PARTNERS, SPLITS, Overlap, Rows, _Collector, candidate_pairs
from tests.data.prepared_sets import Row, smooth_picture, spectrogram, token_ids, write_set

IMAGE = Modality(name="image", kind="image", shape=(3, 64, 64), dtype="uint8", scale=255.0)
AUDIO = Modality(name="audio", kind="audio", shape=(1, 200, 64), dtype="float16")
TEXT = Modality(name="text", kind="text", shape=(80,), dtype="int32", vocab_size=9000)
VECTOR = Modality(name="omics", kind="vector", shape=(40,), dtype="float32")
FRAMES = Modality(
    name="visual",
    kind="frames",
    shape=(3, 3, 56, 56),
    train_shape=(3, 3, 64, 64),
    candidates=3,
    dtype="uint8",
    storage="jpeg",
    scale=255.0,
)
NUM_TRAIN, NUM_TEST = 150, 50


def make_item(modality: Modality, rng: np.random.Generator) -> np.ndarray:
    if modality.kind == "image":
        return smooth_picture(rng, modality.shape[-1], modality.shape[0])
    if modality.kind == "audio":
        _, frames, bands = modality.shape
        return spectrogram(rng, frames, bands, int(rng.integers(60, 110))).astype(modality.dtype)
    if modality.kind == "text":
        return token_ids(rng, modality.shape[0], int(rng.integers(40, 70)))
    return rng.standard_normal(modality.shape).astype(modality.dtype)


def unrelated_rows(
    modalities: list[Modality], rng: np.random.Generator, prefix: str, count: int
) -> list[Row]:
    return [
        Row(f"{prefix}-{i}", i % 2, {m.name: make_item(m, rng) for m in modalities})
        for i in range(count)
    ]


def none() -> Overlap:
    return {a: dict.fromkeys(SPLITS, 0) for a in SPLITS}


def table(**counts: int) -> Overlap:
    """`test_train=3`: 3 rows of test have a partner in train."""
    overlap = none()
    for name, count in counts.items():
        a, b = name.split("_")
        overlap[_split(a)][_split(b)] = count
    return overlap


def _split(name: str) -> Split:
    return next(split for split in SPLITS if split == name)


def _array(row: Row, name: str) -> np.ndarray:
    return np.asarray(row.items[name])


def is_empty(found: Audit) -> bool:
    every = [found.samples, *found.modalities.values()]
    return all(t.rows == none() and not t.conflicts for x in every for t in (x.identical, x.near))


@pytest.mark.parametrize("modality", [IMAGE, AUDIO, TEXT, VECTOR], ids=lambda m: m.kind)
def test_unrelated_items_are_left_alone(modality: Modality, tmp_path: Path):
    """80,000 pairs of each kind, none near."""
    rng = np.random.default_rng(0)
    splits: dict[Split, list[Row]] = {
        "train": unrelated_rows([modality], rng, "train", 300),
        "test": unrelated_rows([modality], rng, "test", 100),
    }
    found = audit(tmp_path, write_set(tmp_path, [modality], splits))
    assert is_empty(found)
    assert found.grade == "good"
    assert found.rows == {"train": 300, "val": 0, "test": 100}
    assert found.class_counts == {"train": (150, 150), "val": (0, 0), "test": (50, 50)}
    row_bytes = modality.stored_nbytes("test")
    assert found.stored_bytes[modality.name] == {
        "train": 300 * row_bytes,
        "val": 0,
        "test": 100 * row_bytes,
    }
    assert summary_lines(found) == [
        "No sample and no near copy of one is on two sides of the split; groups (speakers, source "
        "videos) are not known."
    ]


def test_copies_are_counted_by_row_and_split(tmp_path: Path):
    """a is 3 times in train, once in val, twice in test under another label; b twice in test."""
    rng = np.random.default_rng(1)
    a, b = make_item(IMAGE, rng), make_item(IMAGE, rng)
    splits: dict[Split, list[Row]] = {
        "train": [
            *unrelated_rows([IMAGE], rng, "train", 30),
            *(Row(f"a{i}", 0, {"image": a}) for i in range(3)),
        ],
        "val": [*unrelated_rows([IMAGE], rng, "val", 5), Row("a3", 0, {"image": a})],
        "test": [
            *(Row(f"a{i}", 1, {"image": a}) for i in (4, 5)),
            *(Row(f"b{i}", 1, {"image": b}) for i in range(2)),
            *unrelated_rows([IMAGE], rng, "test", 8),
        ],
    }
    found = audit(tmp_path, write_set(tmp_path, [IMAGE], splits))
    assert found.grade == "bad"
    twins = found.samples.identical
    assert twins == found.modalities["image"].identical
    assert twins.rows == table(
        train_train=3, train_val=3, train_test=3, val_train=1, val_test=1, test_train=2,
        test_val=2, test_test=4,
    )  # fmt: skip
    assert twins.conflicts == 6
    assert twins.examples[0].keys == ("a0", "a3")
    assert twins.examples[0].splits == ("train", "val")
    assert {pair.keys for pair in twins.conflict_examples} == {("a0", "a4"), ("a0", "a5")}
    assert twins.conflict_examples[0].labels == ("cat", "dog")
    assert found.samples.near.rows == none()
    assert findings(found) == [
        "2 of 12 test samples (16.7 %) are byte for byte also in train; 1 of 6 val samples "
        "(16.7 %) are byte for byte also in train; 2 of 12 test samples (16.7 %) are byte for "
        "byte also in val.",
        "6 samples have a copy with another label.",
        "3 of 33 train samples are there more than once.",
        "4 of 12 test samples are there more than once.",
    ]


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).transpose(2, 0, 1)


def noisy(array: np.ndarray, std: float) -> np.ndarray:
    noise = np.random.default_rng(7).normal(0.0, std, array.shape)
    if array.dtype == np.uint8:
        return np.clip(array + noise, 0, 255).astype(np.uint8)
    return (array + noise).astype(array.dtype)


def one_frame_later(array: np.ndarray) -> np.ndarray:
    return np.roll(array, 1, axis=1)  # the last frame is padding


def with_other_token(array: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(array)) == 20, 8888, array).astype(array.dtype)


CHANGES: list[tuple[str, Modality, Callable[[np.ndarray], np.ndarray]]] = [
    ("jpeg", IMAGE, lambda a: jpeg(a, 50)),
    ("darker", IMAGE, lambda a: (a * 0.6).astype(np.uint8)),
    ("brighter", IMAGE, lambda a: np.minimum(a.astype(int) + 20, 255).astype(np.uint8)),
    ("noise", IMAGE, lambda a: noisy(a, 8.0)),
    ("one frame later", AUDIO, one_frame_later),
    ("louder", AUDIO, lambda a: np.where(a == a[0, -1, 0], a, a + np.float16(0.1))),
    ("noise", AUDIO, lambda a: noisy(a, 0.02)),
    ("one token of 40 to 70", TEXT, with_other_token),
    ("rounding", VECTOR, lambda a: (a * np.float32(1 + 2e-7)).astype(np.float32)),
]


@pytest.mark.parametrize(
    ("modality", "change"),
    [(modality, change) for _, modality, change in CHANGES],
    ids=[f"{modality.kind}: {name}" for name, modality, _ in CHANGES],
)
def test_small_changes_are_seen_through(
    modality: Modality, change: Callable[[np.ndarray], np.ndarray], tmp_path: Path
):
    """50 changed copies with other labels among 150 + 50 rows; 2 may hide, none be made up."""
    rng = np.random.default_rng(2)
    train = unrelated_rows([modality], rng, "train", NUM_TRAIN)
    copies = [
        Row(f"copy-{i}", 1 - row.label, {modality.name: change(_array(row, modality.name))})
        for i, row in enumerate(train[:NUM_TEST])
    ]
    splits: dict[Split, list[Row]] = {
        "train": train,
        "test": [*unrelated_rows([modality], rng, "test", NUM_TEST), *copies],
    }
    found = audit(tmp_path, write_set(tmp_path, [modality], splits))
    near = found.modalities[modality.name].near
    assert near == found.samples.near
    count = near.rows["test"]["train"]
    assert 0.95 * NUM_TEST <= count <= NUM_TEST
    assert near.rows == table(test_train=count, train_test=count)
    assert near.conflicts == 2 * count
    for pair in (*near.examples, *near.conflict_examples):
        assert pair.keys[1] == f"copy-{pair.keys[0].removeprefix('train-')}"
    assert found.samples.identical.rows == none()


def test_larger_changes_are_not_copies(tmp_path: Path):
    """A mirrored picture, a tenth of the words, and one per cent of the values are differences."""
    rng = np.random.default_rng(3)
    modalities = [IMAGE, TEXT, VECTOR]
    train = unrelated_rows(modalities, rng, "train", 40)
    words = (np.arange(80) % 10 == 5) & (np.arange(80) < 40)
    test = [
        Row(
            f"test-{i}",
            row.label,
            {
                "image": np.ascontiguousarray(_array(row, "image")[..., ::-1]),
                "text": np.where(words, 8888, _array(row, "text")).astype(np.int32),
                "omics": (_array(row, "omics") * 1.01).astype(np.float32),
            },
        )
        for i, row in enumerate(train)
    ]
    assert is_empty(
        audit(tmp_path, write_set(tmp_path, modalities, {"train": train, "test": test}))
    )


def test_clips_are_compared_by_the_middle_frame_of_evaluation(tmp_path: Path):
    """Three parts of three candidates in train, at 64 pixels; one frame of each, at 56, in test."""
    assert shown_frames(FRAMES, "train") == [1, 4, 7]
    assert shown_frames(FRAMES, "test") == [0, 1, 2]
    rng = np.random.default_rng(4)

    def clip(count: int, side: int) -> np.ndarray:
        return np.stack([smooth_picture(rng, side) for _ in range(count)])

    def small(picture: np.ndarray) -> np.ndarray:
        image = Image.fromarray(picture.transpose(1, 2, 0)).resize((56, 56))
        return np.asarray(image).transpose(2, 0, 1)

    train = [clip(9, 64) for _ in range(10)]
    test = [clip(3, 56) for _ in range(10)]
    test[3][1] = small(train[5][4])
    test[6][1] = small(train[8][3])  # not the middle candidate
    test[7][0] = small(train[9][4])  # not the middle part
    rows: dict[Split, list[Row]] = {
        "train": [Row(f"train-{i}", 0, {"visual": encode_jpeg(c)}) for i, c in enumerate(train)],
        "test": [Row(f"test-{i}", 0, {"visual": encode_jpeg(c)}) for i, c in enumerate(test)],
    }
    near = audit(tmp_path, write_set(tmp_path, [FRAMES], rows)).modalities["visual"].near
    assert near.rows == table(test_train=1, train_test=1)
    assert [pair.keys for pair in near.examples] == [("train-5", "test-3")]


def test_samples_are_twins_only_if_every_modality_is(tmp_path: Path):
    rng = np.random.default_rng(5)
    modalities = [IMAGE, TEXT]
    train = unrelated_rows(modalities, rng, "train", 10)

    def copy(row: Row, **changes: np.ndarray) -> Row:
        return Row(f"copy-{row.key}", 1 - row.label, {**row.items, **changes})

    new_text = make_item(TEXT, rng)
    image = [_array(row, "image") for row in train]
    test = [
        copy(train[0]),  # identical
        copy(train[1], text=new_text),  # identical picture
        copy(train[2], image=jpeg(image[2], 80)),  # near
        copy(train[3], image=jpeg(image[3], 80), text=make_item(TEXT, rng)),  # near picture
    ]
    found = audit(tmp_path, write_set(tmp_path, modalities, {"train": train, "test": test}))
    pictures, texts = found.modalities["image"], found.modalities["text"]
    assert found.samples.identical.rows == table(test_train=1, train_test=1)
    assert found.samples.near.rows == table(test_train=1, train_test=1)
    assert found.samples.near.examples[0].keys == ("train-2", "copy-train-2")
    assert pictures.identical.rows == table(test_train=2, train_test=2)
    assert pictures.near.rows == table(test_train=2, train_test=2)
    assert texts.identical.rows == table(test_train=2, train_test=2)
    assert texts.near.rows == none()
    assert findings(found) == [
        "1 of 4 test samples (25.0 %) are byte for byte also in train.",
        "2 samples have a copy with another label.",
        "1 of 4 test samples (25.0 %) are nearly the same as one in train.",
        "2 samples have a near copy with another label.",
        "2 of 4 test items of image (50.0 %) are byte for byte also in train.",
        "4 items of image have a copy with another label.",
        "2 of 4 test items of text (50.0 %) are byte for byte also in train.",
        "4 items of text have a copy with another label.",
        "2 of 4 test items of image (50.0 %) are nearly the same as one in train.",
        "4 items of image have a near copy with another label.",
    ]
    assert summary_lines(found) == [
        *findings(found)[:5],
        "5 more findings are in the data card.",
    ]


def test_repeats_within_a_split_and_of_one_modality_are_remarks(tmp_path: Path):
    rng = np.random.default_rng(5)
    modalities = [IMAGE, TEXT]
    train = unrelated_rows(modalities, rng, "train", 10)
    train.append(Row("again", train[0].label, train[0].items))
    test = [Row("test", 1, {"image": train[1].items["image"], "text": make_item(TEXT, rng)})]
    found = audit(tmp_path, write_set(tmp_path, modalities, {"train": train, "test": test}))
    assert found.grade == "note"
    assert findings(found)[1:] == [
        "1 of 1 test items of image (100.0 %) are byte for byte also in train.",
        "2 of 11 train samples are there more than once.",
    ]


def test_missing_items_are_counted_and_are_no_twins(tmp_path: Path):
    rng = np.random.default_rng(6)
    modalities = [IMAGE.model_copy(update={"optional": True}), TEXT]
    rows = unrelated_rows(modalities, rng, "row", 20)
    rows = [Row(r.key, r.label, {"text": r.items["text"]}) if i < 8 else r
            for i, r in enumerate(rows)]  # fmt: skip
    splits: dict[Split, list[Row]] = {"train": rows[:12], "val": rows[12:15], "test": rows[15:]}
    found = audit(tmp_path, write_set(tmp_path, modalities, splits))
    assert found.missing == {"image": {"train": 8, "val": 0, "test": 0}}
    assert is_empty(found)


def test_a_missing_modality_may_be_missing_on_both_sides_of_a_twin(tmp_path: Path):
    rng = np.random.default_rng(6)
    modalities = [IMAGE.model_copy(update={"optional": True}), TEXT]
    text, image = make_item(TEXT, rng), make_item(IMAGE, rng)
    splits: dict[Split, list[Row]] = {
        "train": [Row("a", 0, {"text": text}), Row("b", 0, {"text": text, "image": image})],
        "test": [Row("c", 0, {"text": with_other_token(text)})],
    }
    near = audit(tmp_path, write_set(tmp_path, modalities, splits)).samples.near
    assert near.rows == table(test_train=1, train_test=1)
    assert [pair.keys for pair in near.examples] == [("a", "c")]


@pytest.mark.parametrize("level", [0, 128, 255])
def test_blank_pictures_are_not_compared(level: int):
    """A fog of eight grey levels, lighter at the top, and noise; and with more contrast."""
    prints = PictureFingerprints(3, 255.0, is_sound=False)
    fog = np.linspace(4, -4, 64)[:, None] + np.random.default_rng(8).integers(-1, 2, (64, 64))
    prints.add(0, np.full((64, 64), level))
    prints.add(1, (level + fog).clip(0, 255))
    prints.add(2, (level + 8 * fog).clip(0, 255))
    assert prints.known.tolist() == [False, False, True]


def test_lasting_tones_are_not_compared():
    """A tone that swells and fades; and one that rises."""
    prints = PictureFingerprints(2, 1.0, is_sound=True)
    bands, frames = np.arange(64)[:, None], np.arange(200)
    loudness = np.exp(-((frames - 100) ** 2) / 8000)
    prints.add(0, loudness * 0.2 + np.exp(-((bands - 20) ** 2) / 18))
    prints.add(1, loudness * 0.2 + np.exp(-((bands - 20 - frames / 20) ** 2) / 18))
    assert prints.known.tolist() == [False, True]


def test_groups_on_both_sides(tmp_path: Path):
    """Actor 1 in train and test, 2 in all three, 3 in train alone; rows without a name are own."""
    rng = np.random.default_rng(9)

    def rows(prefix: str, groups: list[str]) -> list[Row]:
        return [
            Row(f"{prefix}-{i}", 0, {"omics": make_item(VECTOR, rng)}, group)
            for i, group in enumerate(groups)
        ]

    splits: dict[Split, list[Row]] = {
        "train": rows("train", ["1", "1", "2", "3", "", ""]),
        "val": rows("val", ["2", ""]),
        "test": rows("test", ["1", "2", "2"]),
    }
    found = audit(tmp_path, write_set(tmp_path, [VECTOR], splits))
    assert (found.groups.total, found.groups.shared) == (3, 2)
    assert found.groups.examples == ("1", "2")
    assert found.groups.rows == table(
        train_val=1, train_test=3, val_train=1, val_test=1, test_train=3, test_val=2
    )
    assert findings(found) == [
        "2 of 3 groups are on both sides of the split: test accuracy says nothing about unseen "
        "groups (actors, speakers, source videos). Use --data.split grouped."
    ]


def test_groups_that_are_kept_apart(tmp_path: Path):
    rng = np.random.default_rng(9)
    splits: dict[Split, list[Row]] = {
        "train": [Row("a", 0, {"omics": make_item(VECTOR, rng)}, "1")],
        "test": [Row("b", 0, {"omics": make_item(VECTOR, rng)}, "2")],
    }
    found = audit(tmp_path, write_set(tmp_path, [VECTOR], splits))
    assert (found.groups.total, found.groups.shared) == (2, 0)
    assert findings(found) == [
        "No group, no sample and no near copy of one is on two sides of the split."
    ]


def test_candidate_pairs_are_all_pairs_of_equal_keys():
    keys = np.random.default_rng(0).integers(0, 40, 500)
    found = [pair for a, b in candidate_pairs(keys) for pair in zip(a, b, strict=True)]
    first, second = np.nonzero(np.triu(keys[:, None] == keys[None], 1))
    assert len(found) == len(set(found))
    assert set(found) == set(zip(first, second, strict=True))


def test_candidate_pairs_are_bounded_where_all_keys_are_equal():
    count = MAX_PARTNERS * 4
    found = [(a, b) for a, b in candidate_pairs(np.zeros(count, np.int64))]
    first, second = (np.concatenate(part) for part in zip(*found, strict=True))
    assert len(first) < count * MAX_PARTNERS
    assert set(second) == set(range(1, count))
    assert (first < second).all()
    assert first.max() == MAX_PARTNERS - 1


def test_pairs_that_change_no_count_are_skipped():
    """Four rows of train, labels 0 0 1 1."""
    names = pa.chunked_array([["a", "b", "c", "d"]])
    split, label = np.zeros(4, np.int8), np.array([0, 0, 1, 1])
    rows = Rows(split, label, names, ("cat", "dog"), np.ones((1, 4), np.uint64), ())
    collector = _Collector(rows)
    first, second = np.array([0, 2, 0]), np.array([1, 3, 2])
    assert collector.is_news(first, second).tolist() == [True, True, True]
    collector.add(first[:2], second[:2])
    assert collector.is_news(first, second).tolist() == [False, False, True]
    collector.add(first[2:], second[2:])
    assert not collector.is_news(first, second).any()
    assert collector.twins().conflicts == 2


def test_codes_six_bits_apart_share_a_key():
    rng = np.random.default_rng(0)
    prints = PictureFingerprints(2000, 255.0, is_sound=False)
    codes = rng.integers(0, 256, (1000, 8), np.uint8)
    flips = np.zeros((1000, 64), bool)
    for row in flips:
        row[rng.permutation(64)[:6]] = True
    prints._codes[::2] = codes
    prints._codes[1::2] = codes ^ np.packbits(flips, axis=1)
    keys = prints.keys()
    assert (keys[::2] == keys[1::2]).any(axis=1).all()


def test_padding_is_cut_off_on_both_sides():
    sound = spectrogram(np.random.default_rng(0), 300, 64, 90)[0].T
    np.testing.assert_array_equal(without_padding(np.roll(sound, 100, axis=1)), sound[:, :90])


def test_padding_is_cut_off_where_the_axis_of_time_is_wrong():
    sound = spectrogram(np.random.default_rng(0), 300, 64, 90)[0]
    np.testing.assert_array_equal(without_padding(sound), sound[:90])


@pytest.mark.parametrize("axis", [-1, -2])
def test_spectrograms_are_turned_to_bands_and_frames(axis: Literal[-1, -2]):
    modality = Modality(name="a", kind="audio", shape=(2, 10, 12), dtype="float16", time_axis=axis)
    values = np.random.default_rng(0).standard_normal(modality.shape).astype(np.float16)
    mean = values.astype(np.float32).mean(axis=0)
    expected = mean if axis == -1 else mean.T
    np.testing.assert_allclose(comparable(modality, "test", values.tobytes()), expected, atol=1e-6)


def test_real_digits_are_left_alone(shared_data: Path, tmp_path: Path):
    """3,000 images of MNIST: phash alone would pair over a thousand of them."""
    modality = Modality(name="image", kind="image", shape=(1, 28, 28), dtype="uint8", scale=255.0)
    images = read_images(shared_data / "mnist" / "t10k-images-idx3-ubyte.gz")[:3000]
    rows = [Row(str(i), 0, {"image": image}) for i, image in enumerate(images)]
    splits: dict[Split, list[Row]] = {"train": rows[:2000], "test": rows[2000:]}
    assert is_empty(audit(tmp_path, write_set(tmp_path, [modality], splits)))


def spoken(folder: Path, digits: str, takes: range) -> list[np.ndarray]:
    """Recordings of one speaker, take by take."""
    names = [f"{digit}_jackson_{take}.wav" for take in takes for digit in digits]
    return [soundfile.read(folder / "fsdd" / name)[0] for name in names]


def log_mels(waves: list[np.ndarray], prefix: str) -> list[Row]:
    settings = {"num_mels": 40, "num_frames": 300, "hop_seconds": 0.01, "floor": 1e-6}
    return [Row(f"{prefix}{i}", 0, {"audio": log_mel(wave, 8000, **settings)})
            for i, wave in enumerate(waves)]  # fmt: skip


def mu_law(wave: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    soundfile.write(file, wave, 8000, format="WAV", subtype="ULAW")
    file.seek(0)
    return soundfile.read(file)[0]


LOG_MEL = Modality(name="audio", kind="audio", shape=(1, 40, 300), dtype="float32", time_axis=-1)


def test_real_recordings_are_told_apart(shared_data: Path, tmp_path: Path):
    """The same speaker says each of four digits fifty times."""
    rows = log_mels(spoken(shared_data, "0123", range(50)), "")
    splits: dict[Split, list[Row]] = {"train": rows[:120], "test": rows[120:]}
    assert is_empty(audit(tmp_path, write_set(tmp_path, [LOG_MEL], splits)))


def test_real_recordings_are_recognised_in_another_coding(shared_data: Path, tmp_path: Path):
    """20 clips of three digits, and again in mu-law."""
    waves = spoken(shared_data, "0123456789", range(6))
    joined = [np.concatenate(waves[i : i + 3]) for i in range(0, 60, 3)]
    splits: dict[Split, list[Row]] = {
        "train": log_mels(joined, "clip-"),
        "test": log_mels([mu_law(wave) for wave in joined], "copy-"),
    }
    near = audit(tmp_path, write_set(tmp_path, [LOG_MEL], splits)).modalities["audio"].near
    assert near.rows == table(test_train=20, train_test=20)

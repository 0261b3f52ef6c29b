"""Raw media -> stored tensors: which frames, which pixels, which numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchaudio.compliance import kaldi
from torchaudio.functional import resample

from data.config import Kind, ModalityConfig
from data.media import read_video
from data.processors import Place, Processor, _dense_flow, build, parts, text_of
from data.schema import Augment, DataError, Split
from data.sources.base import RejectedSample
from data.sources.raw import FlowStills, Media, Sound, Stills, Text, TextFile, Values, Video
from tests.data.media_files import (
    RATE,
    picture,
    tone,
    write_image,
    write_sound,
    write_video,
)

CROP = Augment(crop=True, flip=True)
PICTURES: dict[str, Any] = {"storage": "tensor", "side": 16, "train_side": 24}


def built(
    kind: Kind,
    root: Path,
    training: Sequence[Media] = (),
    *,
    official: bool = False,
    augment: Augment = CROP,
    **settings: Any,
) -> Processor:
    config = ModalityConfig.model_validate(settings)
    place = Place(root.resolve(), official)
    return build("m", kind, config, augment, place, lambda: training)


# ---- which frames


@pytest.mark.parametrize("count", [*range(3, 40), 100])
def test_middle_is_the_rule_of_cremad(count: int) -> None:
    """`i*seg + seg//2` with seg = n // 3, on sorted names."""
    third = count // 3
    assert parts(count, 3, 1, "middle") == [i * third + third // 2 for i in range(3)]


@pytest.mark.parametrize("count", [*range(6, 40), 100])
def test_early_is_the_rule_of_ucf101(count: int) -> None:
    """Flow `i*seg + seg//2` with seg = n // 3, and RGB 1, 3, 5 of 6; names are counted from 1."""
    third = count // 3
    names = [i * third + third // 2 for i in range(3)]
    assert parts(count, 3, 1, "early") == [name - 1 for name in names]


def test_six_frames_of_ucf101() -> None:
    assert parts(6, 3, 1, "early") == [0, 2, 4]
    assert parts(6, 3, 2, "early") == [1, 0, 3, 2, 5, 4]
    assert parts(3, 3, 1, "early") == parts(3, 3, 1, "middle") == [0, 1, 2]


@pytest.mark.parametrize("count", [9, 10, 17, 31, 300])
@pytest.mark.parametrize("candidates", [2, 3])
def test_candidates_are_spread_over_their_part(count: int, candidates: int) -> None:
    found = np.array(parts(count, 3, candidates, "middle")).reshape(3, candidates)
    third = count // 3
    assert (found // third == np.arange(3)[:, None]).all()
    assert (np.diff(np.sort(found), axis=1) >= third // (2 * candidates)).all()
    assert len(set(found.flatten().tolist())) == 3 * candidates


@pytest.mark.parametrize("pick", ["middle", "early"])
@pytest.mark.parametrize("candidates", [2, 3, 4, 5])
def test_the_frame_of_evaluation_is_a_candidate(candidates: int, pick: str) -> None:
    """At the place that readers without an epoch, and the audit, take."""
    for count in (6, 9, 10, 17, 60):
        found = np.array(parts(count, 3, candidates, pick)).reshape(3, candidates)
        assert found[:, candidates // 2].tolist() == parts(count, 3, 1, pick)


def test_parts_shorter_than_their_candidates_repeat_frames() -> None:
    assert parts(3, 3, 3, "middle") == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert parts(7, 3, 3, "middle") == [0, 1, 1, 2, 3, 3, 4, 5, 5]


@pytest.mark.parametrize("count", [2, 0, -1])
def test_too_few_frames(count: int) -> None:
    with pytest.raises(RejectedSample, match=rf"has {count} frames; at least 3 are needed"):
        parts(count, 3, 1, "middle")


# ---- pictures


def squeezed(pixels: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def test_image(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", picture())
    processor = built("image", tmp_path, **PICTURES)
    modality = processor.modality
    assert (modality.shape, modality.train_shape) == ((3, 16, 16), (3, 24, 24))
    assert (modality.dtype, modality.scale, modality.candidates) == ("uint8", 255.0, 1)
    assert modality.mean == (0.485, 0.456, 0.406)
    assert modality.std == (0.229, 0.224, 0.225)
    sides: dict[Split, int] = {"train": 24, "val": 16, "test": 16}
    for split, side in sides.items():
        found = processor.load(Stills(("a.png",)), split)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, squeezed(picture(), side))


def test_without_a_crop_training_pictures_are_no_larger(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", picture())
    processor = built("image", tmp_path, augment=Augment(flip=True), **PICTURES)
    assert processor.modality.train_shape is None
    assert processor.load(Stills(("a.png",)), "train").shape == (3, 16, 16)


def test_pictures_are_turned_upright_by_the_default_recipe_only(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    write_image(tmp_path / "a.png", picture(), exif=exif)
    found = [
        built("image", tmp_path, official=official, **PICTURES).load(Stills(("a.png",)), "val")
        for official in (False, True)
    ]
    np.testing.assert_array_equal(found[0], squeezed(np.rot90(picture(), 2), 16))
    np.testing.assert_array_equal(found[1], squeezed(picture(), 16))


def write_numbered(root: Path, folder: str, count: int) -> tuple[str, ...]:
    """Grey pictures; picture n has the value 5 n everywhere."""
    names = [f"{folder}/{number:03d}.png" for number in range(count)]
    for number, name in enumerate(names):
        write_image(root / name, np.full((20, 30, 3), 5 * number, np.uint8))
    return tuple(names)


def numbers_of(array: np.ndarray) -> list[int]:
    """Which pictures of `write_numbered` these are."""
    values = array.reshape(len(array), -1)
    assert (values == values[:, :1]).all()
    return (values[:, 0] // 5).tolist()


@pytest.mark.parametrize("pick", ["middle", "early"])
def test_frames_of_stills(tmp_path: Path, pick: str) -> None:
    media = Stills(write_numbered(tmp_path, "clip", 12))
    processor = built("frames", tmp_path, **PICTURES, frames=3, candidates=2, pick=pick)
    modality = processor.modality
    assert (modality.shape, modality.train_shape) == ((3, 3, 16, 16), (3, 3, 24, 24))
    train, val = processor.load(media, "train"), processor.load(media, "val")
    assert train.shape == modality.stored("train") == (6, 3, 24, 24)
    assert val.shape == modality.stored("val") == (3, 3, 16, 16)
    assert numbers_of(train) == ([3, 2, 7, 6, 11, 10] if pick == "middle" else [3, 1, 7, 5, 11, 9])
    assert numbers_of(val) == ([2, 6, 10] if pick == "middle" else [1, 5, 9])


def test_frames_of_a_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [picture(shift=n) for n in range(13)])
    processor = built("frames", tmp_path, **PICTURES, frames=3, candidates=2)
    expected = [squeezed(frame, 16) for frame in read_video(path, [2, 6, 10])]
    np.testing.assert_array_equal(processor.load(Video("a.mp4"), "test"), np.stack(expected))
    assert processor.load(Video("a.mp4"), "train").shape == (6, 3, 24, 24)


def test_a_hole_in_a_clip_rejects_it_whichever_frames_are_taken(tmp_path: Path) -> None:
    names = write_numbered(tmp_path, "clip", 9)
    processor = built("frames", tmp_path, **PICTURES, frames=3, candidates=1, pick="early")
    assert numbers_of(processor.load(Stills(names), "val")) == [0, 3, 6]
    (tmp_path / names[4]).write_bytes(b"")
    with pytest.raises(RejectedSample, match=r"clip/004\.png is empty"):
        processor.load(Stills(names), "val")


# ---- optical flow


def test_flow_of_stills(tmp_path: Path) -> None:
    media = FlowStills(write_numbered(tmp_path, "u", 6), write_numbered(tmp_path, "v", 6))
    processor = built("flow", tmp_path, **PICTURES, frames=3, candidates=2, pick="early")
    modality = processor.modality
    assert modality.shape == (3, 2, 16, 16)
    train, val = processor.load(media, "train"), processor.load(media, "val")
    assert (train.shape, train.dtype) == ((6, 2, 24, 24), np.uint8)
    assert train.shape == modality.stored("train")
    assert numbers_of(train) == [1, 0, 3, 2, 5, 4]
    assert numbers_of(val) == [0, 2, 4]
    unequal = FlowStills(media.u, media.v[:5])
    with pytest.raises(RejectedSample, match="has 6 horizontal and 5 vertical"):
        processor.load(unequal, "val")


def test_horizontal_flow_comes_first(tmp_path: Path) -> None:
    write_image(tmp_path / "u.png", np.full((20, 30), 7, np.uint8))
    write_image(tmp_path / "v.png", np.full((20, 30), 9, np.uint8))
    processor = built("flow", tmp_path, **PICTURES, frames=1, candidates=1)
    found = processor.load(FlowStills(("u.png",), ("v.png",)), "val")
    assert (found[0, 0] == 7).all()
    assert (found[0, 1] == 9).all()


@pytest.mark.parametrize(("right", "down"), [(2, 0), (0, 2), (-3, 1), (0, 0)])
def test_flow_of_a_video_has_direction_and_scale(tmp_path: Path, right: int, down: int) -> None:
    """128 is rest; a pixel to the right or down is 128 / 20 more."""
    base = picture(128, 160)
    frames = [np.roll(base, (down * n, right * n), axis=(0, 1)) for n in range(5)]
    write_video(tmp_path / "a.mkv", frames, "ffv1", pixels="yuv444p")
    settings: dict[str, Any] = PICTURES | {"side": 64}
    processor = built("flow", tmp_path, **settings, frames=2, candidates=1)
    found = processor.load(Video("a.mkv"), "val")
    assert (found.shape, found.dtype) == ((2, 2, 64, 64), np.uint8)
    inner = found[..., 16:-16, 16:-16].astype(float)
    expected = 128 + 6.4 * np.array([right, down])
    np.testing.assert_allclose(inner.mean(axis=(0, 2, 3)), expected, atol=1.0)
    np.testing.assert_allclose(np.median(inner, axis=(0, 2, 3)), np.rint(expected), atol=1.0)


def test_flow_is_the_same_on_any_number_of_cores() -> None:
    first, second = picture(120, 160), picture(120, 160, shift=3)
    before, found = cv2.getNumThreads(), list[np.ndarray]()
    for threads in (1, 2, 5):
        cv2.setNumThreads(threads)
        found.append(_dense_flow(first, second, 64))
    cv2.setNumThreads(before)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_flow_needs_a_frame_more_than_parts(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", [picture()] * 3)
    processor = built("flow", tmp_path, **PICTURES, frames=3, candidates=1)
    with pytest.raises(RejectedSample, match="has 2 frames; at least 3 are needed"):
        processor.load(Video("a.mp4"), "val")


def test_flow_is_normalised_as_the_recipe_says(tmp_path: Path) -> None:
    default = built("flow", tmp_path, **PICTURES, frames=3, candidates=1).modality
    assert (128 / default.scale - default.mean[0]) == pytest.approx(0.0)
    official = built("flow", tmp_path, official=True, **PICTURES, frames=3, candidates=1).modality
    assert (official.mean, official.std) == ((0.1307, 0.1307), (0.3081, 0.3081))


# ---- sounds

OFFICIAL_SOUND = {"storage": "float32", "sample_rate": 0, "seconds": 1.28, "num_mels": 128}
DEFAULT_SOUND = {"storage": "float16", "sample_rate": RATE, "seconds": 1.28, "num_mels": 64}


def reference_fbank(wave: np.ndarray, rate: int, frames: int, mels: int) -> np.ndarray:
    """The recipe of datasets.md, written out."""
    clip = torch.from_numpy(wave)[None]
    features = kaldi.fbank(
        clip - clip.mean(),
        htk_compat=True,
        sample_frequency=rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=mels,
        dither=0.0,
        frame_shift=10,
    )
    missing = frames - len(features)
    features = torch.nn.functional.pad(features, (0, 0, 0, missing))  # negative cuts
    return ((features - (-4.503877)) / (2 * 5.141276)).numpy()[None]


def noisy(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    rng = np.random.default_rng(0)
    clips = [tone(seconds, rate, 300.0 * (1 + c)) for c in range(channels)]
    wave = np.stack(clips, axis=1)
    return wave + 0.01 * rng.standard_normal(wave.shape).astype(np.float32)


@pytest.mark.parametrize(("rate", "seconds"), [(16_000, 0.7), (22_050, 0.7), (16_000, 2.0)])
def test_official_sound_is_the_recipe_of_the_release(
    tmp_path: Path, rate: int, seconds: float
) -> None:
    wave = np.round(noisy(seconds, rate, 2) * 32768) / 32768
    write_sound(tmp_path / "a.wav", wave, rate)
    processor = built("audio", tmp_path, official=True, **OFFICIAL_SOUND)
    found = processor.load(Sound("a.wav"), "train")
    assert processor.modality.shape == found.shape == (1, 128, 128)
    assert (processor.modality.dtype, found.dtype) == ("float32", np.float32)
    expected = reference_fbank(wave[:, 0].astype(np.float32), rate, 128, 128)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_padding_is_438_thousandths(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.wav", noisy(0.5, RATE))
    found = built("audio", tmp_path, **OFFICIAL_SOUND).load(Sound("a.wav"), "val")
    used = 1 + (8000 - 400) // 160
    np.testing.assert_allclose(found[0, used:], 4.503877 / (2 * 5.141276), atol=1e-6)
    assert found[0, -1, 0] == pytest.approx(0.438, abs=1e-3)
    assert found[0, :used].std() > 0.1


def test_default_sound_is_resampled_and_averaged(tmp_path: Path) -> None:
    wave = np.round(noisy(1.0, 44_100, 2) * 32768) / 32768
    write_sound(tmp_path / "a.wav", wave, 44_100)
    processor = built("audio", tmp_path, **DEFAULT_SOUND)
    found = processor.load(Sound("a.wav"), "train")
    assert found.shape == processor.modality.shape == (1, 128, 64)
    assert found.dtype == np.float16
    mono = torch.from_numpy(wave.astype(np.float32).mean(axis=1))
    expected = reference_fbank(resample(mono, 44_100, RATE).numpy(), RATE, 128, 64)
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=2e-3)


def test_sound_of_a_video(tmp_path: Path) -> None:
    wave = noisy(1.0, RATE)[:, 0]
    write_video(tmp_path / "a.avi", [picture()] * 10, sound=wave, sound_codec="pcm_s16le")
    write_sound(tmp_path / "a.wav", wave)
    processor = built("audio", tmp_path, **OFFICIAL_SOUND)
    found = processor.load(Video("a.avi"), "val")
    np.testing.assert_allclose(found, processor.load(Sound("a.wav"), "val"), atol=0.02)


def test_sound_shorter_than_a_window(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.wav", tone(0.02))
    processor = built("audio", tmp_path, **DEFAULT_SOUND)
    with pytest.raises(RejectedSample, match=r"has 0\.020 s; at least 0\.025 s are needed"):
        processor.load(Sound("a.wav"), "val")


# ---- given arrays and numbers


def test_given_pictures_and_spectrograms_stay_as_they_are(tmp_path: Path) -> None:
    image = Values(np.linspace(0, 1, 3 * 8 * 8).reshape(3, 8, 8))
    processor = built("image", tmp_path, [image], **PICTURES)
    modality = processor.modality
    assert (modality.shape, modality.dtype, modality.mean) == ((3, 8, 8), "float32", ())
    assert modality.augment == Augment()
    np.testing.assert_allclose(processor.load(image, "train"), image.array, rtol=1e-6)
    audio = Values(np.ones((1, 112, 112)))
    processor = built("audio", tmp_path, [audio], **DEFAULT_SOUND)
    assert (processor.modality.shape, processor.modality.dtype) == ((1, 112, 112), "float16")
    assert processor.load(audio, "val").dtype == np.float16


def vectors(array: np.ndarray) -> list[Media]:
    return [Values(row) for row in array]


TRAIN = np.random.default_rng(0).normal([5.0, -2.0, 1e8], [2.0, 0.1, 1.0], size=(200, 3))


@pytest.mark.parametrize("scale", ["none", "standard", "minmax"])
def test_vectors(tmp_path: Path, scale: str) -> None:
    processor = built("vector", tmp_path, vectors(TRAIN), storage="float32", scale=scale)
    assert (processor.modality.shape, processor.modality.dtype) == ((3,), "float32")
    found = np.stack([processor.load(value, "train") for value in vectors(TRAIN)])
    low, width = TRAIN.min(axis=0), np.ptp(TRAIN, axis=0)
    expected = {
        "none": TRAIN,
        "standard": (TRAIN - TRAIN.mean(axis=0)) / TRAIN.std(axis=0),
        "minmax": (TRAIN - low) / width,
    }[scale]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    other = processor.load(Values(low - width), "test")  # by the numbers of train, unclipped
    assert scale != "minmax" or other == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize("scale", ["standard", "minmax"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3e7])
def test_columns_that_never_change_become_zero(tmp_path: Path, scale: str, value: float) -> None:
    train = np.column_stack([np.full(300, value), np.arange(300.0)])
    processor = built("vector", tmp_path, vectors(train), storage="float32", scale=scale)
    found = np.stack([processor.load(row, "train") for row in vectors(train)])
    np.testing.assert_allclose(found[:, 0], 0.0, atol=1e-6)
    assert found[:, 1].std() > 0.1
    changed = processor.load(Values(np.array([value + 1, 0.0])), "test")
    assert changed[0] == pytest.approx(1.0, abs=1e-6)  # not blown up


@pytest.mark.parametrize("scale", ["standard", "minmax"])
def test_rows_that_are_not_finite_spoil_nothing(tmp_path: Path, scale: str) -> None:
    spoilt = TRAIN.copy()
    spoilt[3, 1], spoilt[50, 0] = np.nan, np.inf
    processor = built("vector", tmp_path, vectors(spoilt), storage="float32", scale=scale)
    clean = vectors(np.delete(TRAIN, [3, 50], axis=0))
    expected = built("vector", tmp_path, clean, storage="float32", scale=scale)
    for row in clean:
        np.testing.assert_allclose(
            processor.load(row, "val"), expected.load(row, "val"), rtol=1e-6, atol=1e-6
        )
    assert np.isnan(processor.load(Values(spoilt[3]), "train")[1])  # the shard will reject it


def test_sequences_are_padded_in_front_and_cut_behind(tmp_path: Path) -> None:
    clips = [Values(np.arange(2.0 * steps).reshape(steps, 2) + 1) for steps in (2, 5, 3)]
    processor = built("sequence", tmp_path, clips, storage="float32", scale="none")
    assert processor.modality.shape == (5, 2)  # the longest of train
    short = processor.load(clips[0], "train")
    assert short.tolist() == [[0, 0], [0, 0], [0, 0], [1, 2], [3, 4]]
    longer = Values(np.arange(14.0).reshape(7, 2))
    assert processor.load(longer, "test").tolist() == longer.array[:5].tolist()
    three = built("sequence", tmp_path, clips, storage="float16", scale="none", steps=3)
    assert three.modality.shape == (3, 2)
    assert three.load(clips[1], "val").tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("scale", ["standard", "minmax"])
def test_padding_of_a_sequence_is_not_scaled(tmp_path: Path, scale: str) -> None:
    """Rows of zeros, as files hold them in front of the words, count for nothing and stay."""
    rng = np.random.default_rng(0)
    clips = [rng.normal(7, 2, size=(steps, 3)) for steps in (4, 6, 2)]
    padded = [np.concatenate([np.zeros((8 - len(clip), 3)), clip]) for clip in clips]
    media = [Values(clip) for clip in padded]
    processor = built("sequence", tmp_path, media, storage="float32", scale=scale)
    rows = np.concatenate(clips)
    shift, factor = (
        (rows.mean(axis=0), rows.std(axis=0))
        if scale == "standard"
        else (rows.min(axis=0), np.ptp(rows, axis=0))
    )
    for clip, medium in zip(clips, media, strict=True):
        found = processor.load(medium, "train")
        assert (found[: 8 - len(clip)] == 0).all()
        np.testing.assert_allclose(found[8 - len(clip) :], (clip - shift) / factor, atol=1e-5)


def test_arrays_of_another_shape(tmp_path: Path) -> None:
    processor = built("vector", tmp_path, vectors(TRAIN), storage="float32")
    for array in (np.ones(2), np.ones((1, 3)), np.float64(1)):
        with pytest.raises(RejectedSample, match=r"m has shape \(.*\), \(3,\) expected"):
            processor.load(Values(np.asarray(array)), "val")
    with pytest.raises(DataError, match=r"arrays of 1 dimensions; a sequence has 2; set data"):
        built("sequence", tmp_path, vectors(TRAIN), storage="float32")
    with pytest.raises(DataError, match="no training sample has modality m; leave it out"):
        built("vector", tmp_path, [], storage="float32")


@pytest.mark.parametrize("odd", [np.ones(1), np.ones(2)])
def test_an_array_of_another_shape_has_no_part_in_the_scale(tmp_path: Path, odd: np.ndarray):
    media = vectors(TRAIN)
    plain = built("vector", tmp_path, media, storage="float32", scale="standard")
    spoilt = built("vector", tmp_path, [Values(odd), *media], storage="float32", scale="standard")
    found, expected = (p.load(media[0], "train") for p in (spoilt, plain))
    np.testing.assert_array_equal(found, expected)


# ---- texts and mix-ups


def test_texts(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    place = Place(root.resolve(), official=False)
    (root / "a.txt").write_text("from a file")
    (tmp_path / "b.txt").write_text("from elsewhere")
    assert text_of(Text("given"), place) == "given"
    assert text_of(TextFile("a.txt"), place) == "from a file"
    with pytest.raises(RejectedSample, match=r"leads out of data\.root"):
        text_of(TextFile("../b.txt"), place)
    with pytest.raises(RejectedSample, match="cannot be written as UTF-8"):
        text_of(Text("half an emoji: \ud83d"), place)


@pytest.mark.parametrize(
    ("kind", "media", "settings"),
    [
        ("image", Sound("a.wav"), PICTURES),
        ("frames", Text("x"), PICTURES | {"frames": 1, "candidates": 1}),
        ("flow", Stills(("a.png",)), PICTURES | {"frames": 1, "candidates": 1}),
        ("audio", Stills(("a.png",)), DEFAULT_SOUND),
    ],
)
def test_media_of_another_kind(
    tmp_path: Path, kind: Kind, media: Media, settings: dict[str, Any]
) -> None:
    with pytest.raises(RejectedSample, match=rf"{type(media).__name__} cannot be read as {kind}"):
        built(kind, tmp_path, **settings).load(media, "val")


def test_optional_modalities_say_so(tmp_path: Path) -> None:
    assert built("image", tmp_path, **PICTURES, optional=True).modality.optional
    assert not built("image", tmp_path, **PICTURES).modality.optional

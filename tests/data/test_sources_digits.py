"""The built-in digits, against scikit-learn's arrays and the table of ITU-T Q.23."""

from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.datasets import load_digits

from data.features import log_mel, resample
from data.schema import DataError
from data.sources import DataConfig, build_source
from data.sources.digits import key_tone

# Written out again from the recommendation: the keypad with its row and column frequencies.
ROWS_HZ = {697: "123", 770: "456", 852: "789", 941: "*0#"}
COLUMNS_HZ = {1209: "147*", 1336: "2580", 1477: "369#"}


def test_every_item_is_one_sklearn_digit() -> None:
    items = build_source(DataConfig()).items()
    assert [item.sample_id for item in items] == list(range(1797))
    assert len({item.key for item in items}) == 1797
    _, digits = load_digits(return_X_y=True)
    assert [int(item.label) for item in items] == list(digits)


def test_splits_are_stratified_70_10_20() -> None:
    items = build_source(DataConfig()).items()
    total = Counter(item.label for item in items)
    for split, share in {"train": 0.7, "val": 0.1, "test": 0.2}.items():
        counts = Counter(item.label for item in items if item.split == split)
        for label, count in counts.items():
            assert count == pytest.approx(share * total[label], abs=1.0)
    assert Counter(item.split for item in items) == {"train": 1259, "test": 359, "val": 179}


def test_splits_do_not_move_with_seed_or_noise() -> None:
    other = DataConfig(seed=7, noise={"image": 1.0, "audio": 4.0})
    assert build_source(other).items() == build_source(DataConfig()).items()


def test_image_is_the_standardised_pixels() -> None:
    source = build_source(DataConfig())
    pixels = np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 8, 8) / 16
    images = np.stack([source.load(item)["image"] for item in source.items()[:50]])
    expected = (pixels[:50, None] - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(images, expected, atol=1e-5)


@pytest.mark.parametrize("digit", list("0123456789"))
def test_tone_peaks_at_the_two_frequencies_of_the_key(digit: str) -> None:
    tone = key_tone(digit, np.random.default_rng(1))
    assert np.mean(tone**2) == pytest.approx(1.0, abs=1e-5)
    spectrum = np.abs(np.fft.rfft(tone, n=8000))  # zero-padded to 1 s: bin = Hz
    row = next(hz for hz, keys in ROWS_HZ.items() if digit in keys)
    column = next(hz for hz, keys in COLUMNS_HZ.items() if digit in keys)
    assert abs(int(spectrum[:1075].argmax()) - row) <= 2
    assert abs(1075 + int(spectrum[1075:].argmax()) - column) <= 2


def test_sample_is_the_same_however_many_are_loaded() -> None:
    config = DataConfig(noise={"image": 0.5, "audio": 2.0})
    first, second = build_source(config), build_source(config)
    items = first.items()
    for item in items[:5]:
        first.load(item)
    for name, array in first.load(items[5]).items():
        np.testing.assert_array_equal(array, second.load(items[5])[name])


def test_noise_has_the_declared_strength() -> None:
    clean, noisy = build_source(DataConfig()), build_source(DataConfig(noise={"image": 0.5}))
    items = clean.items()[:100]
    difference = [noisy.load(item)["image"] - clean.load(item)["image"] for item in items]
    assert np.std(difference) == pytest.approx(0.5, rel=0.03)
    for item in items[:3]:
        np.testing.assert_array_equal(noisy.load(item)["audio"], clean.load(item)["audio"])


def test_audio_constants_standardise() -> None:
    source = build_source(DataConfig(noise={"audio": 2.0}))
    audio = np.stack([source.load(item)["audio"] for item in source.items()[::9]])
    assert audio.dtype == np.float32
    assert audio.shape[1:] == (1, 40, 25)
    assert audio.mean() == pytest.approx(0.0, abs=0.02)
    assert audio.std() == pytest.approx(1.0, abs=0.02)


def test_log_mel_matches_a_written_out_formula() -> None:
    waveform = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    features = log_mel(waveform, 8000, num_mels=40, num_frames=25, hop_seconds=0.01, floor=1e-3)
    window = np.zeros(256)
    window[28:228] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(200) / 200)
    padded = np.pad(waveform.astype(np.float64), 128, mode="reflect")
    frames = np.stack([padded[80 * i : 80 * i + 256] for i in range(25)])
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    edges_mel = np.linspace(0.0, 2595 * np.log10(1 + 4000 / 700), 42)
    edges = 700 * (10 ** (edges_mel / 2595) - 1)
    hz = np.linspace(0, 4000, 129)[:, None]
    rising = (hz - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - hz) / np.diff(edges)[1:]
    bank = np.maximum(0.0, np.minimum(rising, falling))
    np.testing.assert_allclose(features[0], np.log(power @ bank + 1e-3).T, atol=2e-3)


def test_log_mel_pads_with_silence_and_cuts() -> None:
    waveform = np.random.default_rng(0).standard_normal(1600).astype(np.float32)

    def features(clip: np.ndarray) -> np.ndarray:
        return log_mel(clip, 8000, num_mels=40, num_frames=10, hop_seconds=0.01, floor=1e-6)

    assert features(waveform).shape == (1, 40, 10)
    np.testing.assert_array_equal(features(waveform), features(waveform[:800]))
    np.testing.assert_allclose(features(waveform[:400])[..., 7:], np.log(1e-6), rtol=1e-6)


def test_resample_keeps_a_sine() -> None:
    seconds = np.arange(4000) / 16000
    half = resample(np.sin(2 * np.pi * 440 * seconds).astype(np.float32), 16000, 8000)
    expected = np.sin(2 * np.pi * 440 * seconds[::2])
    assert half.shape == (2000,)
    np.testing.assert_allclose(half[50:-50], expected[50:-50], atol=0.01)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(noise={"video": 1.0}), r"'video'.*no modality of digits; use one of image, a"),
        (DataConfig(noise={"audio": -1.0}), r"\['audio'\]=-1\.0.*modalities of digits: image, a"),
        (DataConfig(noise={"audio": float("nan")}), "not a finite number"),
        (DataConfig(split="unseen_speakers"), "unseen_speakers does not exist for digits; use off"),
        (DataConfig(root="somewhere"), r"data\.root='somewhere' has no effect on digits"),
    ],
)
def test_bad_settings(config: DataConfig, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_source(config)


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(ValidationError, match="rowspershard"):
        DataConfig.model_validate({"rowspershard": 3})


def test_every_setting_is_described() -> None:
    assert all(field.description for field in DataConfig.model_fields.values())

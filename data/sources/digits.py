"""Digits, seen and dialled: small images with the tone of the digit's telephone key. Offline.

Images: the 1,797 test digits of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
Digits (UCI, 1998), 8 x 8 with 17 grey levels, shipped with scikit-learn. Tones: made here after
Recommendation ITU-T Q.23 (push-button signalling). The pairing is by digit.
"""

from functools import cached_property
from typing import ClassVar

import numpy as np

from data.config import DataConfig
from data.features import log_mel
from data.schema import Modality, Split
from data.sources.base import (
    Item,
    Purpose,
    TensorSource,
    add_noise,
    stratified_splits,
    stream,
)

# ITU-T Q.23: a key sounds the frequency of its row together with that of its column, in Hz.
KEY_TONES_HZ: dict[str, tuple[int, int]] = {
    "1": (697, 1209),
    "2": (697, 1336),
    "3": (697, 1477),
    "4": (770, 1209),
    "5": (770, 1336),
    "6": (770, 1477),
    "7": (852, 1209),
    "8": (852, 1336),
    "9": (852, 1477),
    "0": (941, 1336),
}
SAMPLE_RATE = 8000
TONE_SECONDS = 0.25
LEVEL_DB = 2.0
NUM_MELS = 40
NUM_FRAMES = 25
HOP_SECONDS = 0.01

SPLIT_SEED = 2025
SPLIT_FRACTIONS: dict[Split, float] = {"test": 0.2, "val": 0.1}

# Mean and standard deviation of pixel / 16 over the 1,797 images.
PIXEL_MEAN, PIXEL_STD = 0.305260, 0.376049
# Of the log-mel over the 1,797 samples at noise["audio"]=2 and seed 0. Thanks to the gain control
# below, strengths from 1 to 16 move the mean by at most 0.31 and the deviation by at most 0.18.
LOG_MEL_MEAN, LOG_MEL_STD = 4.992855, 1.053888
# 22 dB below white noise of unit RMS; keeps a noise-free line from dominating with log(0).
LOG_MEL_FLOOR = 1.0


class Digits(TensorSource):
    """The 1,797 digits.

    Splits are fixed: stratified 70/10/20 by `stratified_splits` with seed 2025, whatever
    `config.seed` is, so that all results share one test set. `config.seed` moves tones and noise.

    Modalities:
        image: float32 (1, 8, 8), standardised; `noise["image"]` is the std of Gaussian noise added
            to it.
        audio: float32 (1, 40, 25), standardised log-mel (bands, 10 ms frames) of 0.25 s of dual
            tone at 8 kHz with random phases, each frequency up to 2 dB louder or softer;
            `noise["audio"]` is the RMS of white Gaussian line noise divided by that of the tone.
            An automatic gain control then brings tone plus noise to an RMS of 1.
    """

    name: ClassVar[str] = "digits"
    version: ClassVar[int] = 1
    modalities: ClassVar[tuple[Modality, ...]] = (
        Modality(name="image", kind="image", shape=(1, 8, 8), dtype="float32"),
        Modality(
            name="audio",
            kind="audio",
            shape=(1, NUM_MELS, NUM_FRAMES),
            dtype="float32",
            time_axis=-1,
        ),
    )
    classes: ClassVar[tuple[str, ...]] = tuple("0123456789")
    split_rule: ClassVar[str] = f"stratified 70/10/20, seed {SPLIT_SEED}"

    def __init__(self, config: DataConfig) -> None:
        self._config = config

    @cached_property
    def _digits(self) -> tuple[np.ndarray, list[str]]:
        """Pixels (1797, 8, 8) from 0 to 16, and labels."""
        from sklearn.datasets import load_digits

        pixels, digits = load_digits(return_X_y=True)
        return np.asarray(pixels).reshape(-1, 8, 8), [str(int(digit)) for digit in digits]

    def items(self) -> list[Item]:
        """All samples in scikit-learn's order."""
        _, labels = self._digits
        splits = stratified_splits(labels, SPLIT_FRACTIONS, SPLIT_SEED)
        return [
            Item(number, f"digits-{number:04d}", label, split)
            for number, (label, split) in enumerate(zip(labels, splits, strict=True))
        ]

    def load(self, item: Item) -> dict[str, np.ndarray]:
        """Image and audio of one sample; see the class."""
        pixels, _ = self._digits
        image = (pixels[item.sample_id][None] / 16.0 - PIXEL_MEAN) / PIXEL_STD
        clean = {
            "image": image.astype(np.float32),
            "audio": key_tone(item.label, stream(self._config.seed, Purpose.TONE, item.sample_id)),
        }
        noisy = add_noise(clean, self._config.noise, self._config.seed, item.sample_id)
        return {"image": noisy["image"], "audio": _standard_log_mel(noisy["audio"])}


def key_tone(digit: str, rng: np.random.Generator) -> np.ndarray:
    """Tone of a telephone key (ITU-T Q.23), scaled to an RMS of 1.

    Args:
        digit: "0" to "9".
        rng: draws the two phases (uniform) and the two levels (uniform within 2 dB either way).

    Returns:
        float32 (2000,), 0.25 s at 8 kHz.
    """
    seconds = np.arange(round(TONE_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    phases = rng.uniform(0.0, 2.0 * np.pi, size=2)
    amplitudes = 10.0 ** (rng.uniform(-LEVEL_DB, LEVEL_DB, size=2) / 20.0)
    parts = [
        amplitude * np.sin(2.0 * np.pi * frequency * seconds + phase)
        for frequency, phase, amplitude in zip(KEY_TONES_HZ[digit], phases, amplitudes, strict=True)
    ]
    return unit_rms(np.sum(parts, axis=0)).astype(np.float32)


def unit_rms(waveform: np.ndarray) -> np.ndarray:
    """The waveform scaled to a root mean square of 1."""
    return waveform / np.sqrt(np.mean(waveform**2))


def _standard_log_mel(line: np.ndarray) -> np.ndarray:
    features = log_mel(
        unit_rms(line),
        SAMPLE_RATE,
        num_mels=NUM_MELS,
        num_frames=NUM_FRAMES,
        hop_seconds=HOP_SECONDS,
        floor=LOG_MEL_FLOOR,
    )
    return (features - LOG_MEL_MEAN) / LOG_MEL_STD

"""Digits, seen and spoken: MNIST images with recordings of the Free Spoken Digit Dataset.

Recordings: `<root>/fsdd/{digit}_{speaker}_{index}.wav` (Z. Jackson and contributors, FSDD).
Images: `<root>/mnist/*-ubyte.gz`. The sets have no natural pairing; the one used here:

1. Recordings are sorted by file name. The k-th recording of a digit gets that digit's k-th image
   after its positions in the MNIST file were shuffled with
   `numpy.random.default_rng([2025, digit]).permutation(n)`. No image is used twice. With n images
   per test recording the k-th test recording gets the shuffled images nk, ..., nk + n - 1.
2. Test recordings are paired with the MNIST test file, all others with the training file.
3. `official`: test is every recording with index 0 to 4 (the FSDD convention); speakers occur on
   both sides. `unseen_speakers`: test is every recording, whatever its index, of the last two
   speakers by name (theo and yweweler in the full set).
4. Of the others, index 5 to 9 is validation and the rest train. Pairing comes first, so the
   validation part moves no pair.
"""

import re
import wave
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from data.config import DataConfig
from data.features import log_mel, resample
from data.kept import kept, read_scale, scale_json, scale_name
from data.schema import DataError, Modality, Split
from data.sources.base import Item, RejectedSample, TensorSource, add_noise, raw_folder
from data.sources.mnist import read_images, read_labels

REMEDY = "`--data.root DIR` with fsdd/ (wav files) and mnist/ (the four idx gz files) inside"
Part = Literal["train", "t10k"]
FILE_NAMES: dict[Part, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "t10k": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
RECORDING_NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<index>\d+)")
NUM_TEST_INDICES = 5
VAL_INDICES = range(5, 10)
NUM_UNSEEN_SPEAKERS = 2
PAIRING_SEED = 2025

# The usual constants of the MNIST training images, in units of full white.
PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081
SAMPLE_RATE = 8000
SAMPLE_BYTES = 2
NUM_MELS = 40
NUM_FRAMES = 100
HOP_SECONDS = 0.01
LOG_MEL_FLOOR = 1e-6
LEVEL = 0.05  # root mean square of a clip; the median of the recordings
SILENCE = 1e-4


@dataclass(frozen=True)
class Recording:
    """One wav file, by what its name says."""

    stem: str
    digit: int
    speaker: str
    index: int


@dataclass(frozen=True)
class Pair:
    """A recording and the position of its image in the MNIST file of `part`."""

    recording: Recording
    part: Part
    position: int


class AVDigits(TensorSource):
    """MNIST and FSDD, paired by digit; rules in the head of the file.

    Modalities:
        image: float32 (1, 28, 28), (pixel / 255 - 0.1307) / 0.3081.
        audio: float32 (1, 40, 100), log-mel (bands, 10 ms frames) of the first second at 8 kHz,
            the clip brought to a root mean square of 0.05 (two speakers are 20 dB quieter than the
            others), shorter clips padded with silence, standardised by mean and standard deviation
            over all values of the train split.

    `noise[...]` is the std of Gaussian noise added to the standardised input.
    """

    name: ClassVar[str] = "avdigits"
    version: ClassVar[int] = 2
    modalities: ClassVar[tuple[Modality, ...]] = (
        Modality(name="image", kind="image", shape=(1, 28, 28), dtype="float32"),
        Modality(
            name="audio",
            kind="audio",
            shape=(1, NUM_MELS, NUM_FRAMES),
            dtype="float32",
            time_axis=-1,
        ),
    )
    classes: ClassVar[tuple[str, ...]] = tuple("0123456789")

    def __init__(self, config: DataConfig) -> None:
        files = [f"mnist/{name}" for names in FILE_NAMES.values() for name in names]
        self._root = raw_folder(config, ["fsdd", *files], REMEDY)
        self._config = config
        self.split_rule = f"{config.split} (recordings of FSDD)"
        self._log_mels: dict[str, np.ndarray] = {}

    def items(self) -> list[Item]:
        """Pairs, test ones last; a key is `7_theo_3+t10k-00042`: recording, file and position.

        Raises:
            DataError: a wav file is misnamed, there is none, too few speakers or too few images.
        """
        return [
            Item(
                number,
                f"{pair.recording.stem}+{pair.part}-{pair.position:05d}",
                str(pair.recording.digit),
                self._split(pair),
                pair.recording.speaker,
            )
            for number, pair in enumerate(self._pairs)
        ]

    def load(self, item: Item) -> dict[str, np.ndarray]:
        """Image and audio of one pair.

        Raises:
            RejectedSample: the wav file cannot be read, or the idx file is cut off before the
                image.
        """
        pair = self._pairs[item.sample_id]
        images = self._images[pair.part]
        if pair.position >= len(images):
            raise RejectedSample(
                f"{FILE_NAMES[pair.part][0]} is cut off: it holds {len(images)} images, number "
                f"{pair.position} is wanted"
            )
        mean, std = self._audio_statistics
        image = (images[pair.position][None] / 255.0 - PIXEL_MEAN) / PIXEL_STD
        audio = (self._log_mel(pair.recording) - mean) / std
        clean = {"image": image.astype(np.float32), "audio": audio.astype(np.float32)}
        return add_noise(clean, self._config.noise, self._config.seed, item.sample_id)

    @property
    def files(self) -> Mapping[str, str]:
        """The scale of the audio.

        Raises:
            DataError: no train recording can be read.
        """
        mean, std = self._audio_statistics
        return {scale_name("audio"): scale_json((np.array([mean]), np.array([std])))}

    def restore(self, files: Mapping[str, str]) -> None:
        """Scale audio as a prepared set's was."""
        shift, factor = read_scale(kept(files, scale_name("audio")))
        self._audio_statistics = shift[0], factor[0]

    def _split(self, pair: Pair) -> Split:
        if pair.part == "t10k":
            return "test"
        return "val" if pair.recording.index in VAL_INDICES else "train"

    @cached_property
    def _pairs(self) -> list[Pair]:
        recordings = list_recordings(self._root / "fsdd")
        is_test = _test_rule(recordings, self._config.split)
        train = [recording for recording in recordings if not is_test[recording.stem]]
        test = [recording for recording in recordings if is_test[recording.stem]]
        return [
            *pair_images(train, "train", self._labels("train"), 1),
            *pair_images(
                test, "t10k", self._labels("t10k"), self._config.test_images_per_recording
            ),
        ]

    def _labels(self, part: Part) -> np.ndarray:
        return read_labels(self._root / "mnist" / FILE_NAMES[part][1])

    @cached_property
    def _images(self) -> dict[Part, np.ndarray]:
        return {
            part: read_images(self._root / "mnist" / images)
            for part, (images, _) in FILE_NAMES.items()
        }

    def _log_mel(self, recording: Recording) -> np.ndarray:
        """Log-mel before standardising, float32 (1, 40, 100); kept, since train asks twice."""
        if recording.stem not in self._log_mels:
            waveform, rate = read_wav(self._root / "fsdd" / f"{recording.stem}.wav")
            level = np.sqrt(np.mean(np.square(waveform))) + SILENCE
            self._log_mels[recording.stem] = log_mel(
                resample(waveform * np.float32(LEVEL / level), rate, SAMPLE_RATE),
                SAMPLE_RATE,
                num_mels=NUM_MELS,
                num_frames=NUM_FRAMES,
                hop_seconds=HOP_SECONDS,
                floor=LOG_MEL_FLOOR,
            )
        return self._log_mels[recording.stem]

    @cached_property
    def _audio_statistics(self) -> tuple[np.float64, np.float64]:
        """Mean and standard deviation over all values of the readable train recordings."""
        features: list[np.ndarray] = []
        reasons: list[str] = []
        for pair in self._pairs:
            if self._split(pair) == "train":
                try:
                    features.append(self._log_mel(pair.recording))
                except RejectedSample as error:
                    reasons.append(f"{pair.recording.stem}: {error}")
        if not features:
            raise DataError(
                f"none of the {len(reasons)} train recordings in {self._root / 'fsdd'} can be "
                f"read ({'; '.join(reasons[:1])}); download them again"
            )
        values = np.stack(features)
        return values.mean(dtype=np.float64), values.std(dtype=np.float64)


def list_recordings(folder: Path) -> list[Recording]:
    """All recordings of a folder, sorted by file name.

    Raises:
        DataError: there is no wav file, or one is not named `{digit}_{speaker}_{index}.wav`.
    """
    recordings: list[Recording] = []
    for name in sorted(path.name for path in folder.glob("*.wav")):
        stem = name.removesuffix(".wav")
        if not (match := RECORDING_NAME.fullmatch(stem)):
            raise DataError(
                f"{folder / name} is not named {{digit}}_{{speaker}}_{{index}}.wav, and digit and "
                "split are read from the name; rename it or move it elsewhere"
            )
        digit, speaker, index = match.group("digit", "speaker", "index")
        recordings.append(Recording(stem, int(digit), speaker, int(index)))
    if not recordings:
        raise DataError(f"{folder} holds no wav file; give {REMEDY}")
    return recordings


def _test_rule(recordings: list[Recording], split: str) -> dict[str, bool]:
    """Stem -> whether the recording is a test recording (rule 3 above)."""
    if split == "official":
        return {recording.stem: recording.index < NUM_TEST_INDICES for recording in recordings}
    speakers = sorted({recording.speaker for recording in recordings})
    if len(speakers) <= NUM_UNSEEN_SPEAKERS:
        raise DataError(
            f"data.split='unseen_speakers' keeps {NUM_UNSEEN_SPEAKERS} speakers for the test set "
            f"and the recordings have {len(speakers)} ({', '.join(speakers)}); add recordings or "
            "use data.split='official'"
        )
    unseen = speakers[-NUM_UNSEEN_SPEAKERS:]
    return {recording.stem: recording.speaker in unseen for recording in recordings}


def pair_images(
    recordings: list[Recording], part: Part, labels: np.ndarray, images_per_recording: int
) -> list[Pair]:
    """Pair recordings with images of their digit (rule 1 above).

    Args:
        recordings: sorted by file name.
        part: which MNIST file.
        labels: its labels (N,).
        images_per_recording: n of the rule.

    Returns:
        `len(recordings) * images_per_recording` pairs, recordings in order.

    Raises:
        DataError: a digit has too few images.
    """
    shuffled: dict[int, np.ndarray] = {}
    for digit in range(10):
        positions = np.flatnonzero(labels == digit)
        order = np.random.default_rng([PAIRING_SEED, digit]).permutation(len(positions))
        shuffled[digit] = positions[order]
    used: dict[int, int] = defaultdict(int)
    pairs: list[Pair] = []
    for recording in recordings:
        start = used[recording.digit]
        used[recording.digit] = stop = start + images_per_recording
        positions = shuffled[recording.digit]
        if stop > len(positions):
            raise DataError(
                f"{FILE_NAMES[part][1]} has {len(positions)} images of digit {recording.digit} "
                f"and {recording.stem} would need number {stop}, since no image is used twice; "
                "use fewer recordings or a smaller data.test_images_per_recording"
            )
        pairs.extend(Pair(recording, part, int(position)) for position in positions[start:stop])
    return pairs


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    """A mono 16-bit PCM file.

    Returns:
        Waveform (T,) float32 in [-1, 1), and the sample rate in Hz.

    Raises:
        RejectedSample: not such a file, empty, or shorter than its header says.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, frames = file.getparams()[:4]
            data = file.readframes(frames)
    except (OSError, EOFError, wave.Error) as error:
        raise RejectedSample(f"not a readable wav file ({error or 'it ends too early'})") from error
    if (channels, width) != (1, SAMPLE_BYTES):
        raise RejectedSample(f"{channels} channels of {8 * width} bit; mono 16 bit expected")
    if len(data) != frames * SAMPLE_BYTES or frames == 0:
        raise RejectedSample(
            f"{len(data) // SAMPLE_BYTES} samples, and the header says {frames}; at least one and "
            "no fewer than the header says are expected"
        )
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768.0, rate

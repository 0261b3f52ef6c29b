"""Audio features. The only file of data/ that uses torch, imported when the first clip comes."""

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torchaudio.transforms import MelSpectrogram

WINDOW_SECONDS = 0.025
MAX_RESAMPLING = 20_000_000  # filter taps, about 100 MB; 44,056 to 16,000 Hz needs half of it


@lru_cache(maxsize=8)
def _mel_transform(sample_rate: int, num_mels: int, hop: int) -> "MelSpectrogram":
    from torchaudio.transforms import MelSpectrogram

    window = round(WINDOW_SECONDS * sample_rate)
    return MelSpectrogram(
        sample_rate=sample_rate,
        n_fft=2 ** math.ceil(math.log2(window)),
        win_length=window,
        hop_length=hop,
        n_mels=num_mels,
    )


def log_mel(
    waveform: np.ndarray,
    sample_rate: int,
    *,
    num_mels: int,
    num_frames: int,
    hop_seconds: float,
    floor: float,
) -> np.ndarray:
    """Natural logarithm of the mel power spectrum, `log(mel + floor)`.

    Hann windows of 25 ms, centred on multiples of the hop (reflected at the ends), HTK mel scale
    from 0 Hz to half the sample rate (the defaults of torchaudio.transforms.MelSpectrogram).
    A clip shorter than `num_frames * hop` is padded with zeros at its end, a longer one is cut at
    its end. Runs on one thread, so that preparing leaves the other cores alone.

    Args:
        waveform: mono clip (T,), float32 or float64, T >= 1.
        sample_rate: in Hz.
        num_mels: mel bands.
        num_frames: frames of the result.
        hop_seconds: time between frames; with the sample rate a whole number of samples.
        floor: smallest power that matters, in squared waveform units.

    Returns:
        float32 (1, num_mels, num_frames).
    """
    import torch

    hop = round(hop_seconds * sample_rate)
    clip = np.zeros(num_frames * hop, dtype=np.float32)
    used = min(len(waveform), len(clip))
    clip[:used] = waveform[:used]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        mel = _mel_transform(sample_rate, num_mels, hop)(torch.from_numpy(clip)[None])
        # Centring gives one frame more than hops: its window lies half behind the clip.
        return torch.log(mel[..., :num_frames] + floor).numpy()
    finally:
        torch.set_num_threads(threads)


FBANK_MEAN, FBANK_STD = -4.503877, 5.141276  # of AudioSet, as its released models are fed


def mono(samples: np.ndarray) -> np.ndarray:
    """Mean over channels: (C, T) -> (T,)."""
    return samples.mean(axis=0)


def fbank(
    waveform: np.ndarray, sample_rate: int, target_rate: int, *, num_frames: int, num_mels: int
) -> np.ndarray:
    """Log-mel filter banks after Kaldi, padded or cut, normalised (methods.md 3.2; datasets.md).

    Hanning windows of 25 ms every 10 ms, no dither, no energy; zeros behind short clips are put
    there before the normalisation `(x + 4.503877) / (2 * 5.141276)`. Runs on one thread.

    Args:
        waveform: float32 (T,) in [-1, 1]; its mean is taken away.
        sample_rate: of the waveform, Hz.
        target_rate: it is resampled to this rate first, Hz.

    Returns:
        float32 (1, num_frames, num_mels).

    Raises:
        ValueError: the clip is shorter than one window.
    """
    import torch
    from torchaudio.compliance import kaldi

    if len(waveform) < WINDOW_SECONDS * sample_rate:
        raise ValueError(
            f"the sound has {len(waveform) / sample_rate:.3f} s; at least {WINDOW_SECONDS} s are "
            "needed"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        clip = torch.from_numpy(resample(waveform, sample_rate, target_rate))[None]
        features = kaldi.fbank(
            clip - clip.mean(),
            htk_compat=True,
            sample_frequency=target_rate,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=num_mels,
            dither=0.0,
            frame_shift=10.0,
        )
    finally:
        torch.set_num_threads(threads)
    result = np.zeros((1, num_frames, num_mels), dtype=np.float32)
    used = features[:num_frames].numpy()
    result[0, : len(used)] = used
    return (result - np.float32(FBANK_MEAN)) / np.float32(2 * FBANK_STD)


def resample(waveform: np.ndarray, sample_rate: int, target_rate: int) -> np.ndarray:
    """Band-limited resampling (sinc with a Hann window) of a mono clip (T,), float32.

    Raises:
        ValueError: the rates have so small a common divisor that the filters need gigabytes.

    Returns:
        float32 (ceil(T * target_rate / sample_rate),); the clip itself when the rates are equal.
    """
    if sample_rate == target_rate:
        return waveform
    common = math.gcd(sample_rate, target_rate)
    if (sample_rate // common) * (target_rate // common) > MAX_RESAMPLING:
        raise ValueError(f"{sample_rate} Hz cannot be resampled to {target_rate} Hz exactly")
    import torch
    from torchaudio.functional import resample as torch_resample

    clip = torch.from_numpy(np.asarray(waveform, dtype=np.float32))
    return torch_resample(clip, sample_rate, target_rate).numpy()

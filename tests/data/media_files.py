"""Small pictures, sounds and videos with known content."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from av.audio.stream import AudioStream
from av.video.stream import VideoStream
from PIL import Image

RATE = 16_000
FRAME_RATE = 10


def picture(height: int = 48, width: int = 64, shift: int = 0, seed: int = 0) -> np.ndarray:
    """uint8 (H, W, 3), smooth; `shift` moves it that many pixels to the right, round the edge."""
    rng = np.random.default_rng(seed)
    rows, columns = np.arange(height)[:, None], np.arange(width)[None, :] - shift
    waves = [
        np.cos(2 * np.pi * (k * columns / width + m * rows / height + rng.random()))
        for k in range(1, 6)
        for m in range(1, 6)
    ]
    light = np.sum(waves, axis=0) / np.abs(np.sum(waves, axis=0)).max()
    return (128 + light[..., None] * np.array([127, 100, 70])).astype(np.uint8)


def write_image(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    """In the format that the suffix says; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def tone(seconds: float = 1.0, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    """float32 (T,), half of full scale."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def write_sound(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    """(T,) or (T, channels), in the format that the suffix says; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)
    return path


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    codec: str | None = None,
    sound: np.ndarray | None = None,
    pixels: str = "yuv420p",
    sound_codec: str = "aac",
    **options: str,
) -> Path:
    """Frames (H, W, 3), 10 a second, and a mono sound (T,) at 16 kHz; folders are made.

    Args:
        codec: None takes MPEG-4, or in .flv what such files have.
        options: of the container.
    """
    codec = codec or ("flv" if path.suffix == ".flv" else "mpeg4")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=FRAME_RATE)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        heard = None
        if sound is not None:
            heard = container.add_stream(sound_codec, rate=RATE, layout="mono")
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
        if sound is not None:
            assert isinstance(heard, AudioStream)
            clip = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            clip.sample_rate = RATE
            container.mux(heard.encode(clip))
            container.mux(heard.encode())
    return path


def cut(path: Path, share: float) -> Path:
    """Keep the first part of the bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: round(len(data) * share)])
    return path

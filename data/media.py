"""Opening raw media: below one folder, whole, and of sane size, or not at all.

Every function raises `RejectedSample` with the reason; nothing is repaired, skipped or replaced.
"""

import contextlib
import math
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import av
import numpy as np
import soundfile
from av.container import InputContainer
from av.error import FFmpegError
from PIL import ExifTags, Image

from data.sources.base import RejectedSample

MAX_FILE_BYTES = 4 << 30
MAX_PIXELS = 64_000_000  # decoded 190 MB; a picture of a few kB can claim thousands of times more
MAX_SOUND_SECONDS = 3600.0
MAX_SOUND_VALUES = 1 << 29  # 2 GiB decoded; a header can claim any rate and number of channels
MAX_CHANNELS = 32
MIN_RATE = 1000  # Hz; below, there are no filter banks
MAX_VIDEO_FRAMES = 200_000
MAX_TEXT_BYTES = 16 << 20
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
TURNS = {  # EXIF orientation -> what makes the picture upright; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PICTURE_ERRORS = (  # what PIL raises of damaged pixels, headers and EXIF
    *(OSError, ValueError, SyntaxError, TypeError, AttributeError),
    *(struct.error, Image.DecompressionBombError),
)
UNKNOWN_LENGTHS = (0, 0xFFFFFFFF)  # of a wav that was written to a pipe
HEADLESS_SOUND = ".raw"  # libsndfile takes any such file for bare numbers and asks for their rate
VIDEO_SUFFIXES = (".flv", ".avi", ".mp4", ".mkv", ".webm", ".mov", ".mpg", ".mpeg")
# Others, such as playlists, whatever they are called, would open more files, of any folder.
CONTAINERS = "avi,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegts,asf,ogg,wav,mp3,flac,aac"
WHOLE = 0.9  # of the length that a header promises; the last frames are often counted otherwise


def inside(root: Path, relative: str) -> Path:
    """The file `relative` below `root`.

    Args:
        root: resolved folder.
        relative: path as an index names it.

    Raises:
        RejectedSample: it is absent, empty, no file, too large, or not below the root, also when a
            link leads out of it.
    """
    try:
        path = (root / relative).resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise RejectedSample(f"{relative} does not exist") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise RejectedSample(f"{relative!r} is no usable path ({error})") from error
    if not path.is_relative_to(root):
        raise RejectedSample(f"{relative} leads out of data.root; only files below it are read")
    if not path.is_file():
        raise RejectedSample(f"{relative} is not a file")
    size = path.stat().st_size
    if size == 0:
        raise RejectedSample(f"{relative} is empty")
    if size > MAX_FILE_BYTES:
        raise RejectedSample(f"{relative} has {size} bytes; at most {MAX_FILE_BYTES} are read")
    return path


def read_image(path: Path, *, upright: bool) -> Image.Image:
    """A picture, in RGB.

    Args:
        upright: turn it as its EXIF orientation says, if that can be read.

    Raises:
        RejectedSample: it cannot be decoded to its end, or has too many pixels.
    """
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # of what is checked here or harmless
            Image.open(path, formats=IMAGE_FORMATS) as image,
        ):
            _check_picture(path.name, image)
            image.load()  # EXIF may stand behind the pixels
            turn = TURNS.get(_orientation(image)) if upright else None
            turned = image if turn is None else image.transpose(turn)
            return turned.convert("RGB")
    except RejectedSample:
        raise
    except PICTURE_ERRORS as error:
        raise RejectedSample(f"{path.name} is not a whole picture ({_words(error)})") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 if there is none or it cannot be read.

    `ImageOps.exif_transpose` would write all of the EXIF anew, and fail at what is odd in it.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except PICTURE_ERRORS:  # the picture itself is whole
        return 1


def _check_picture(name: str, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise RejectedSample(
            f"{name} claims {image.width} x {image.height} pixels; at most {MAX_PIXELS} are decoded"
        )
    if image.mode.startswith(("I", "F")):  # PIL would cut all values above 255
        raise RejectedSample(f"{name} has more than 8 bits a channel; save it with 8")


def read_sound(path: Path) -> tuple[np.ndarray, int]:
    """An audio file, or the sound of a video.

    Returns:
        float32 (channels, samples) in [-1, 1], and the sample rate in Hz.

    Raises:
        RejectedSample: it cannot be decoded, is shorter than its header says, too long or silent
            for lack of samples.
    """
    if path.suffix.lower() in (*VIDEO_SUFFIXES, HEADLESS_SOUND):
        return _sound_of_video(path)
    try:
        with soundfile.SoundFile(path) as file:
            _check_sound(path.name, file.frames, file.samplerate, file.channels)
            samples = file.read(dtype="float32", always_2d=True).T
            frames, rate = file.frames, file.samplerate
    except soundfile.LibsndfileError:
        return _sound_of_video(path)  # m4a and the like
    if samples.shape[1] != frames or _is_cut(path):
        raise RejectedSample(f"{path.name} is shorter than its header says")
    if samples.shape[1] == 0:
        raise RejectedSample(f"{path.name} has no samples")
    return samples, rate


def _is_cut(path: Path) -> bool:
    """Whether a RIFF file promises more bytes than it has; libsndfile reads it all the same."""
    with path.open("rb") as file:
        head = file.read(8)
    promised = int.from_bytes(head[4:8], "little")
    is_riff = head[:4] == b"RIFF" and promised not in UNKNOWN_LENGTHS
    return is_riff and path.stat().st_size < promised + 8


def _check_sound(name: str, frames: int, rate: int, channels: int) -> None:
    if rate < MIN_RATE:
        raise RejectedSample(f"{name} claims {rate} Hz; at least {MIN_RATE} are needed")
    too_long = frames > MAX_SOUND_SECONDS * rate or frames * channels > MAX_SOUND_VALUES
    if too_long or channels > MAX_CHANNELS:
        raise RejectedSample(
            f"{name} claims {channels} channels of {frames} samples at {rate} Hz; at most "
            f"{MAX_CHANNELS} channels, {MAX_SOUND_SECONDS:.0f} s and {MAX_SOUND_VALUES} samples in "
            "all are read"
        )


def _sound_of_video(path: Path) -> tuple[np.ndarray, int]:
    _num_frames(path, "audio")
    with _opened(path, "audio") as container:
        stream = container.streams.audio[0]
        rate = stream.codec_context.sample_rate
        resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=rate)
        parts: list[np.ndarray] = []
        length = 0
        for frame in container.decode(stream):
            parts += [part.to_ndarray() for part in resampler.resample(frame)]
            length += frame.samples
            _check_sound(path.name, length, rate, len(stream.layout.channels))
        if not length:
            raise RejectedSample(f"{path.name} has no samples")
        parts += [part.to_ndarray() for part in resampler.resample(None)]
        return np.concatenate(parts, axis=1), rate


@contextlib.contextmanager
def _opened(path: Path, wanted: Literal["audio", "video"]) -> Iterator[InputContainer]:
    """An audio or video file with at least one stream of the kind that is wanted.

    Raises:
        RejectedSample: it has none, or whatever is done with the file fails.
    """
    what = "sound" if wanted == "audio" else "video"
    try:
        options = {"format_whitelist": CONTAINERS}
        with av.open(str(path), container_options=options) as container:
            has = container.streams
            streams = has.audio if wanted == "audio" else has.video
            if not streams:
                raise RejectedSample(f"{path.name} has no {what}")
            if streams[0].codec_context is None:
                raise RejectedSample(f"{path.name} has {what} of an unknown codec")
            yield container
    except RejectedSample:
        raise
    except (FFmpegError, ValueError) as error:
        raise RejectedSample(f"{path.name} has no whole {what} ({_words(error)})") from error


def num_video_frames(path: Path) -> int:
    """Frames of a video, counted from its packets.

    Raises:
        RejectedSample: it is no video, shorter than its header says, or too long.
    """
    count = _num_frames(path, "video")
    if count > MAX_VIDEO_FRAMES:
        raise RejectedSample(f"{path.name} has {count} frames; at most {MAX_VIDEO_FRAMES} are read")
    return count


def _num_frames(path: Path, wanted: Literal["audio", "video"]) -> int:
    """Frames of the pictures, after comparing all packets with the length in the header."""
    pictures = shown = 0
    first, last = math.inf, 0.0
    with _opened(path, wanted) as container:
        video = next(iter(container.streams.video), None)
        for packet in container.demux():
            when = packet.dts if packet.pts is None else packet.pts
            if when is None:  # the end of a stream
                continue
            if video and packet.stream.index == video.index:
                pictures += 1
                shown += packet.size > 0 and not packet.is_discard
            first = min(first, float(when * packet.time_base))
            last = max(last, float((when + (packet.duration or 0)) * packet.time_base))
        promised_frames = video.frames if video else 0
        promised = (container.duration or 0) / av.time_base
    if pictures < WHOLE * promised_frames:
        raise RejectedSample(f"{path.name} breaks off after {pictures} of {promised_frames} frames")
    if (seconds := max(last - first, 0.0)) < WHOLE * promised:
        raise RejectedSample(f"{path.name} breaks off after {seconds:.1f} of {promised:.1f} s")
    return shown


def read_video(path: Path, wanted: Sequence[int]) -> list[np.ndarray]:
    """Frames of a video by their numbers from 0.

    Args:
        wanted: numbers in any order, repeats allowed.

    Returns:
        uint8 (H, W, 3) each.

    Raises:
        RejectedSample: it cannot be decoded up to the last of them, or is too large.
    """
    needed, frames = set(wanted), dict[int, np.ndarray]()
    with _opened(path, "video") as container:
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if frame.width * frame.height > MAX_PIXELS:
                raise RejectedSample(f"{path.name} claims {frame.width} x {frame.height} pixels")
            if number in needed:
                frames[number] = frame.to_ndarray(format="rgb24")
            if len(frames) == len(needed):
                return [frames[number] for number in wanted]
    raise RejectedSample(
        f"{path.name} breaks off: {len(frames)} of the {len(needed)} wanted frames can be decoded"
    )


def read_text(path: Path) -> str:
    """A text file in UTF-8.

    Raises:
        RejectedSample: it is too large, cannot be read or is not UTF-8.
    """
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise RejectedSample(f"{path.name} has over {MAX_TEXT_BYTES} bytes of text")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RejectedSample(f"{path.name} is not UTF-8 ({error})") from error
    except OSError as error:
        raise RejectedSample(f"{path.name} cannot be read ({_words(error)})") from error


def _words(error: Exception) -> str:
    """What a library says, without this machine's paths."""
    return re.sub(r"['\"]?/[^'\"]*/([^'\"/]*)['\"]?", r"\1", str(error)) or type(error).__name__

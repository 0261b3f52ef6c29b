"""Raw media of one modality -> the tensor that a shard stores. One processor per kind.

A processor knows its settings and, where it needs them, numbers of the training split; `load` is a
function of these and the file alone.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from data.config import Kind, ModalityConfig
from data.features import fbank, mono
from data.kept import kept, read_scale, scale_name, tokenizer_name
from data.media import (
    inside,
    num_video_frames,
    read_image,
    read_sound,
    read_text,
    read_video,
)
from data.schema import Augment, DataError, Modality, Split
from data.sources.base import RejectedSample
from data.sources.raw import FlowStills, Media, Sound, Stills, Text, TextFile, Values, Video

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of MNIST's pixels, which the MIDAS release uses for flow; rest is 128 / 255 = 0.502.
RELEASE_FLOW_MEAN, RELEASE_FLOW_STD = 0.1307, 0.3081
FLOW_MEAN, FLOW_STD = 128 / 255, 0.25
MAX_FLOW_PIXELS = 20.0
FRAME_SECONDS = 0.01
AS_GIVEN, FLOW_GIVEN = "numbers as given", "flow images as given"


class Processor(Protocol):
    """Reads one modality.

    Attributes:
        modality: what `load` returns, for the manifest; known after `fit`.
    """

    modality: Modality

    def load(self, media: Media, split: Split) -> np.ndarray:
        """Array of `modality.stored(split)` and its dtype.

        Raises:
            RejectedSample: the medium is absent, broken or not of this kind.
        """
        ...


@dataclass(frozen=True)
class Place:
    """Where the media of a set lie, and how they are to be read.

    Attributes:
        root: resolved folder that all paths are relative to.
        official: the released code's way, see data/recipes.py.
    """

    root: Path
    official: bool


def build(
    name: str,
    kind: Kind,
    settings: ModalityConfig,
    augment: Augment,
    place: Place,
    training: Callable[[], Iterable[Media]],
) -> Processor:
    """The processor of a modality.

    Args:
        training: media of the training samples that have it; sizes and scales are taken from them.

    Raises:
        DataError: the settings or the training samples do not allow it.
    """
    base = Modality(
        name=name,
        kind=kind,
        shape=(),
        dtype="float32",
        augment=augment,
        optional=settings.optional,
    )
    first = next(iter(training()), None)
    if isinstance(first, Values) and kind in ("image", "audio"):
        return Given(base, settings, first)
    if kind in ("image", "frames"):
        return Pictures(base, settings, place)
    if kind == "flow":
        return Flow(base, settings, place, first)
    if kind == "audio":
        return Audio(base, settings, place)
    if kind == "text":
        from data.text import Tokens

        return Tokens(base, settings, place, training)
    return Numbers.fitted(base, settings, training)


def rebuild(
    modality: Modality, settings: ModalityConfig, place: Place, files: Mapping[str, str]
) -> Processor:
    """The processor that made a modality of a prepared set, for other raw files.

    Args:
        modality: as the set's manifest has it.
        settings: that the set was made with.
        files: of the set, by name: what was learnt from its training media.

    Raises:
        DataError: a file that is needed is not there, or these settings make other tensors.
    """
    processor = _rebuilt(modality, settings, place, files)
    if processor.modality != modality:
        raise DataError(
            f"modality {modality.name} of the prepared set is {modality}, its settings now make "
            f"{processor.modality}; use the version of this package that prepared it"
        )
    return processor


def _rebuilt(
    modality: Modality, settings: ModalityConfig, place: Place, files: Mapping[str, str]
) -> Processor:
    if modality.kind in ("image", "audio") and modality.about == AS_GIVEN:
        given = Given(modality, settings, Values(np.empty(modality.shape)))
        given.modality = modality
        return given
    if modality.kind in ("image", "frames"):
        return Pictures(modality, settings, place)
    if modality.kind == "flow":
        stills = FlowStills((), ()) if modality.about == FLOW_GIVEN else None
        return Flow(modality, settings, place, stills)
    if modality.kind == "audio":
        return Audio(modality, settings, place)
    if modality.kind == "text":
        from data.text import Tokens

        learnt = kept(files, tokenizer_name(modality.name))
        return Tokens(modality, settings, place, lambda: (), learnt)
    if settings.scale in (None, "none"):
        return Numbers(modality, None)
    return Numbers(modality, read_scale(kept(files, scale_name(modality.name))))


def _wrong(media: Media, kind: Kind) -> RejectedSample:
    return RejectedSample(f"{type(media).__name__} cannot be read as {kind}")


def parts(count: int, num_parts: int, candidates: int, pick: str) -> list[int]:
    """Which of `count` frames are stored: `candidates` of each of `num_parts` equal parts.

    A part has count // num_parts frames; what is left over at the end is not used. Candidates are
    spread evenly over it; number candidates // 2 of them is the frame that evaluation takes.

    Raises:
        RejectedSample: there are fewer frames than parts.
    """
    length = count // num_parts
    if length < 1:
        raise RejectedSample(f"has {count} frames; at least {num_parts} are needed")
    shown = length // 2 if pick == "middle" else max(length // 2, 1) - 1
    offsets = [(2 * c + 1) * length // (2 * candidates) for c in range(candidates)]
    nearest = min(range(candidates), key=lambda c: abs(offsets[c] - shown))
    offsets[nearest] = offsets[candidates // 2]
    offsets[candidates // 2] = shown
    return [part * length + offset for part in range(num_parts) for offset in offsets]


def chosen(count: int, modality: Modality, pick: str, split: Split) -> list[int]:
    """Which of a clip's `count` frames are stored for a split; raises like `parts`."""
    candidates = modality.candidates if split == "train" else 1
    return parts(count, modality.shape[0], candidates, pick)


class Pictures:
    """Images and clips: uint8 (3, S, S), or (K, 3, S, S) of K frames.

    Pictures are squeezed to a square (bilinear, antialiased), as all released codes do it.
    """

    def __init__(self, base: Modality, settings: ModalityConfig, place: Place):
        assert settings.side
        assert settings.train_side
        self._place = place
        self._pick = settings.pick or "middle"
        is_clip = base.kind == "frames"
        frames = (settings.frames or 1,) if is_clip else ()
        # Without a crop, a training picture needs no more pixels than the model sees.
        train_side = settings.train_side if base.augment.crop else settings.side
        train_shape = (*frames, 3, train_side, train_side)
        shape = (*frames, 3, settings.side, settings.side)
        self.modality = base.model_copy(
            update={
                "shape": shape,
                "dtype": "uint8",
                "storage": settings.storage,
                "train_shape": None if train_shape == shape else train_shape,
                "candidates": settings.candidates if is_clip else 1,
                "mean": IMAGENET_MEAN,
                "std": IMAGENET_STD,
                "scale": 255.0,
                "about": f"RGB, bilinear to {settings.side} (train {train_side})",
            }
        )

    def load(self, media: Media, split: Split) -> np.ndarray:
        """Decode, choose and resize."""
        shape = self.modality.stored(split)
        side = shape[-1]
        if self.modality.kind == "image":
            if not isinstance(media, Stills):
                raise _wrong(media, "image")
            if not media.paths:
                raise RejectedSample("no picture is named")
            return self._still(media.paths[0], side)
        if isinstance(media, Stills):
            taken = [
                media.paths[i] for i in chosen(len(media.paths), self.modality, self._pick, split)
            ]
            for path in media.paths:  # a hole in a clip is a fault, whichever frames are taken
                inside(self._place.root, path)
            unique = {path: self._still(path, side) for path in dict.fromkeys(taken)}
            return np.stack([unique[path] for path in taken])
        if not isinstance(media, Video):
            raise _wrong(media, "frames")
        path = inside(self._place.root, media.path)
        frames = read_video(path, chosen(num_video_frames(path), self.modality, self._pick, split))
        return np.stack([_square(Image.fromarray(frame), side) for frame in frames])

    def _still(self, relative: str, side: int) -> np.ndarray:
        path = inside(self._place.root, relative)
        return _square(read_image(path, upright=not self._place.official), side)


def _square(image: Image.Image, side: int) -> np.ndarray:
    """uint8 (C, side, side)."""
    resized = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
    return np.atleast_3d(resized).transpose(2, 0, 1)


class Flow:
    """Optical flow: uint8 (K, 2, S, S), horizontal and vertical, 128 at rest.

    Read from grey images, or computed between neighbouring frames of a video by OpenCV's Dense
    Inverse Search (T. Kroeger et al., ECCV 2016), clipped to 20 pixels either way.
    """

    def __init__(self, base: Modality, settings: ModalityConfig, place: Place, first: Media | None):
        assert settings.side
        assert settings.train_side
        self._place = place
        self._pick = settings.pick or "middle"
        train_side = settings.train_side if base.augment.crop else settings.side
        frames = settings.frames or 1
        mean, std = (
            (RELEASE_FLOW_MEAN, RELEASE_FLOW_STD) if place.official else (FLOW_MEAN, FLOW_STD)
        )
        self.modality = base.model_copy(
            update={
                "shape": (frames, 2, settings.side, settings.side),
                "dtype": "uint8",
                "train_shape": None
                if train_side == settings.side
                else (frames, 2, train_side, train_side),
                "candidates": settings.candidates,
                "mean": (mean, mean),
                "std": (std, std),
                "scale": 255.0,
                "about": FLOW_GIVEN
                if isinstance(first, FlowStills)
                else f"flow by OpenCV DIS, +-{MAX_FLOW_PIXELS:g} pixels on 0-255",
            }
        )

    def load(self, media: Media, split: Split) -> np.ndarray:
        """Read or compute the fields that are stored."""
        side = self.modality.stored(split)[-1]
        if isinstance(media, FlowStills):
            if len(media.u) != len(media.v):
                raise RejectedSample(f"has {len(media.u)} horizontal and {len(media.v)} vertical")
            return np.stack(
                [
                    np.concatenate([self._grey(media.u[i], side), self._grey(media.v[i], side)])
                    for i in chosen(len(media.u), self.modality, self._pick, split)
                ]
            )
        if not isinstance(media, Video):
            raise _wrong(media, "flow")
        path = inside(self._place.root, media.path)
        taken = chosen(num_video_frames(path) - 1, self.modality, self._pick, split)
        frames = read_video(path, [number for i in taken for number in (i, i + 1)])
        pairs = zip(frames[::2], frames[1::2], strict=True)
        return np.stack([_dense_flow(first, second, side) for first, second in pairs])

    def _grey(self, relative: str, side: int) -> np.ndarray:
        image = read_image(inside(self._place.root, relative), upright=False)
        return _square(image.convert("L"), side)


def _dense_flow(first: np.ndarray, second: np.ndarray, side: int) -> np.ndarray:
    """uint8 (2, side, side) from two RGB frames (H, W, 3)."""
    import cv2

    solver = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    field = solver.calc(grey[0], grey[1], np.zeros((*grey[0].shape, 2), np.float32))
    level = np.clip(np.rint(field * (128 / MAX_FLOW_PIXELS)) + 128, 0, 255).astype(np.uint8)
    planes = [_square(Image.fromarray(level[..., axis]), side) for axis in range(2)]
    return np.concatenate(planes)


class Audio:
    """Sound: Kaldi log-mel filter banks, (1, frames, bands), as AudioSet models take them.

    Frames of 25 ms every 10 ms; short clips are padded with zeros behind, long ones cut; then
    (x + 4.503877) / (2 * 5.141276).
    """

    def __init__(self, base: Modality, settings: ModalityConfig, place: Place):
        assert settings.seconds
        assert settings.num_mels
        self._place = place
        self._rate = settings.sample_rate
        rate = f"{self._rate} Hz" if self._rate else "rate of the file"
        self.modality = base.model_copy(
            update={
                "shape": (1, round(settings.seconds / FRAME_SECONDS), settings.num_mels),
                "dtype": settings.storage,
                "about": f"Kaldi fbank, 25/10 ms, {rate}",
            }
        )

    def load(self, media: Media, split: Split) -> np.ndarray:
        """Decode, resample, transform."""
        if not isinstance(media, Sound | Video):
            raise _wrong(media, "audio")
        samples, rate = read_sound(inside(self._place.root, media.path))
        wave = samples[0] if self._place.official else mono(samples)
        _, frames, bands = self.modality.shape
        try:
            features = fbank(wave, rate, self._rate or rate, num_frames=frames, num_mels=bands)
        except ValueError as error:
            raise RejectedSample(str(error)) from error
        return features.astype(self.modality.dtype)


class Given:
    """Pictures or spectrograms that come as numbers (C, H, W); taken as they are."""

    def __init__(self, base: Modality, settings: ModalityConfig, first: Values):
        dtype = settings.storage if settings.storage in ("float16", "float32") else "float32"
        update = {"shape": first.array.shape, "dtype": dtype, "about": AS_GIVEN}
        self.modality = base.model_copy(update=update | {"augment": Augment()})

    def load(self, media: Media, split: Split) -> np.ndarray:
        """Convert."""
        if not isinstance(media, Values):
            raise _wrong(media, self.modality.kind)
        return media.array.astype(self.modality.dtype)


class Numbers:
    """Vectors (D,) and sequences (T, D), scaled per column by numbers of the training split.

    Args:
        modality: what `load` returns.
        scale: what to subtract and to divide by, (D,) float64 each; None leaves rows as they are.
    """

    def __init__(self, modality: Modality, scale: tuple[np.ndarray, np.ndarray] | None):
        self.modality = modality
        self.scale = scale

    @classmethod
    def fitted(
        cls,
        base: Modality,
        settings: ModalityConfig,
        training: Callable[[], Iterable[Media]],
    ) -> "Numbers":
        """With size and scale of the training media.

        Raises:
            DataError: there are none, or they are of another kind.
        """
        forms = Counter((v.array.ndim, v.array.shape[-1:]) for v in _values(training()))
        if not forms:
            raise DataError(
                f"no training sample has modality {base.name}; leave it out of data.modalities, or "
                "check the raw files"
            )
        # The commonest: a sample of another form is rejected, and has no part in size and scale.
        (ndim, width), _ = forms.most_common(1)[0]
        wanted = 1 if base.kind == "vector" else 2
        if ndim != wanted:
            raise DataError(
                f"{base.name} has arrays of {ndim} dimensions; a {base.kind} has {wanted}; set "
                f"data.modalities.{base.name}.kind"
            )

        def alike() -> Iterator[np.ndarray]:
            arrays = (values.array for values in _values(training()))
            return (a for a in arrays if (a.ndim, a.shape[-1:]) == (ndim, width))

        shape = width
        if base.kind == "sequence":
            shape = (settings.steps or max(len(array) for array in alike()), *width)
        scale = _scale(settings.scale, alike())
        update = {
            "shape": shape,
            "dtype": settings.storage,
            "about": f"scale {settings.scale or 'none'}{_fingerprint(scale)}",
        }
        return cls(base.model_copy(update=update), scale)

    def load(self, media: Media, split: Split) -> np.ndarray:
        """Scale and pad."""
        if not isinstance(media, Values):
            raise _wrong(media, self.modality.kind)
        rows = np.asarray(media.array, dtype=np.float64)
        if rows.shape[-1:] != self.modality.shape[-1:] or rows.ndim != len(self.modality.shape):
            raise RejectedSample(
                f"{self.modality.name} has shape {rows.shape}, {self.modality.shape} expected"
            )
        is_sequence = self.modality.kind == "sequence"
        if self.scale:
            shift, factor = self.scale
            padding = ~rows.any(axis=1, keepdims=True) if is_sequence else False
            rows = np.where(padding, 0.0, (rows - shift) / factor)
        if is_sequence:
            padded = np.zeros(self.modality.shape)
            used = rows[: len(padded)]
            padded[len(padded) - len(used) :] = used
            rows = padded
        return rows.astype(self.modality.dtype)


def _values(media: Iterable[Media]) -> Iterable[Values]:
    return (medium for medium in media if isinstance(medium, Values))


def _scale(
    rule: str | None, training: Iterable[np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    """What to subtract and to divide by, per column; columns that never change become 0."""
    if rule in (None, "none"):
        return None
    # One pass in float64, counted from the first row, since the squares of large numbers have no
    # digits left for their spread; rows with NaN are rejected later and must not spoil the numbers.
    origin: Any = None
    total: Any = 0.0
    squares: Any = 0.0
    low: Any = np.inf
    high: Any = -np.inf
    count = 0
    for array in training:
        rows = np.atleast_2d(np.asarray(array, dtype=np.float64))
        rows = rows[np.isfinite(rows).all(axis=1)]
        if array.ndim == 2:
            rows = rows[(rows != 0).any(axis=1)]  # padding
        if len(rows):
            origin = rows[0] if origin is None else origin
            rows = rows - origin
            total, squares = total + rows.sum(0), squares + (rows**2).sum(0)
            count += len(rows)
            low, high = np.minimum(low, rows.min(0)), np.maximum(high, rows.max(0))
    if not count:
        return None
    mean = total / count
    spread = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    shift, factor = (mean, spread) if rule == "standard" else (low, high - low)
    return origin + shift, np.where(high > low, factor, 1.0)


def _fingerprint(scale: tuple[np.ndarray, np.ndarray] | None) -> str:
    """What tells shards of other numbers apart: after a repair of raw files all are made again."""
    if scale is None:
        return ""
    return f" by numbers {hashlib.sha256(np.concatenate(scale).tobytes()).hexdigest()[:10]}"


def text_of(media: Media, place: Place) -> str:
    """The text of a text medium.

    Raises:
        RejectedSample: the file cannot be read, or JSON gave half of a character.
    """
    if isinstance(media, TextFile):
        return read_text(inside(place.root, media.path))
    if not isinstance(media, Text):
        raise _wrong(media, "text")
    try:
        media.text.encode()
    except UnicodeEncodeError as error:
        raise RejectedSample(f"the text cannot be written as UTF-8 ({error})") from error
    return media.text

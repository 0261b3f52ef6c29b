"""Delivered rows to what the model reads, on the training device: random changes, size and scale.

Pure functions of the rows and of uniform random numbers. The result of a sample does not depend on
the batch it is in, so neither does it on the number of workers.

Differences from torchvision's transforms:

- RandomResizedCrop draws up to ten boxes until one fits into the picture; here there is one draw,
  and a box that is wider or higher than the picture is clamped to it.
- A crop is resampled without antialiasing: delivered pictures are little larger than the result.
- Crop and rotation are one bilinear resampling, and what a rotation leaves empty has a hard edge.

Shapes: B rows, K frames of a clip; N groups of F frames that are changed alike: a row, or a frame
with `per_frame`; C channels, H and W of the result; n random numbers a sample.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from training.byte_pictures import LEVELS, shaped
from training.modality import CLIPS, ModalityKind

PICTURES = ("image", *CLIPS)
CROP_AREA = (0.08, 1.0)
CROP_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
CROP_NUMBERS = 4
FLOW_REST = 128.0


@dataclass(frozen=True)
class RowSpec:
    """What the rows of a modality are to become. What does not suit the kind changes nothing.

    Attributes:
        kind: of the modality.
        shape: of a row of the result; pictures with channels, (C, H, W) or (K, C, H, W).
        mean, std: per channel (dimension -3), of x / scale; empty: rows are not normalised.
        scale: see `mean`.
        crop: pictures: a random part of 8 to 100 % of the area and of 3/4 to 4/3 in shape, resized.
        flip: pictures: mirrored left to right, half of the time. The horizontal component of a flow
            then changes its sign, but not with `per_frame`, as in the released code.
        rotate_degrees: pictures: turned by up to this angle either way. Flow vectors keep their
            direction.
        per_frame: every frame of a clip draws its own numbers.
        time_mask, frequency_mask: audio: largest width of a stripe that is set to zero, which is
            the mean of normalised rows (SpecAugment, arXiv 1904.08779).
        time_axis: audio: dimension of time, -1 or -2; the other one is frequency.
    """

    kind: ModalityKind
    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    scale: float = 1.0
    crop: bool = False
    flip: bool = False
    rotate_degrees: float = 0.0
    per_frame: bool = False
    time_mask: int = 0
    frequency_mask: int = 0
    time_axis: int = -2

    @property
    def num_groups(self) -> int:
        """Groups of frames of a row that are changed alike."""
        return self.shape[0] if self.per_frame and self.kind in CLIPS else 1


def num_uniform(spec: RowSpec) -> int:
    """Random numbers a sample that `augment` needs."""
    if spec.kind == "audio":
        return 2 * ((spec.time_mask > 0) + (spec.frequency_mask > 0))
    if spec.kind in PICTURES:
        return spec.num_groups * (
            CROP_NUMBERS * spec.crop + (spec.rotate_degrees > 0) + int(spec.flip)
        )
    return 0


def augment(rows: Tensor, spec: RowSpec, uniform: Tensor | None) -> Tensor:
    """(B, *delivered shape) of any dtype to float32 (B, *spec.shape); token ids stay as they are.

    Pictures are cropped, turned and mirrored, in this order, those of another size are resized;
    then rows are normalised, then stripes of spectrograms are masked. No call but the first
    waits for a GPU.

    Args:
        rows: may have another height and width than `spec.shape`; not changed.
        spec: what to do.
        uniform: (B, num_uniform(spec)) float64 in [0, 1); None for no random changes.
    """
    if spec.kind == "text":
        return rows
    if _is_shaped_by_planes(rows, spec, uniform):
        return _shaped_by_planes(rows, spec, uniform)
    values = rows
    if spec.kind in PICTURES:
        values = _pictures(rows.float(), spec, uniform)
    values = _normalised(values, spec)
    if spec.kind == "audio" and uniform is not None:
        values = _masked(values, spec, uniform)
    return values


def crop_boxes(uniform_N4: Tensor, height: int, width: int) -> Tensor:
    """(N, 4) top, left, height and width, whole numbers, of parts of a picture of this size."""
    area_N = _between(CROP_AREA, uniform_N4[:, 0]) * height * width
    ratio_N = _between(CROP_LOG_RATIO, uniform_N4[:, 1]).exp()
    part_height_N = (area_N / ratio_N).sqrt().round().clamp(1, height)
    part_width_N = (area_N * ratio_N).sqrt().round().clamp(1, width)
    top_N = (uniform_N4[:, 2] * (height - part_height_N + 1)).floor()
    left_N = (uniform_N4[:, 3] * (width - part_width_N + 1)).floor()
    return torch.stack([top_N, left_N, part_height_N, part_width_N], dim=1)


def rotations(uniform_N: Tensor, degrees: float) -> Tensor:
    """(N,) angles in radians, counter-clockwise."""
    return _between((-math.radians(degrees), math.radians(degrees)), uniform_N)


def _between(limits: tuple[float, float], uniform: Tensor) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * uniform


def stripes(uniform_B2: Tensor, size: int, widest: int) -> Tensor:
    """(B, size) bool, True in a stripe of 0 to `widest` places."""
    width_B = (uniform_B2[:, 0] * (min(widest, size) + 1)).floor()
    start_B = (uniform_B2[:, 1] * (size - width_B + 1)).floor()
    place = torch.arange(size, device=uniform_B2.device)
    return (place >= start_B[:, None]) & (place < (start_B + width_B)[:, None])


def _normalised(values: Tensor, spec: RowSpec) -> Tensor:
    """(..., C, H, W) as float32, normalised if the rows are to be."""
    if not spec.mean:
        return values.float()
    gain_C11, shift_C11 = gain_and_shift(spec.mean, spec.std, spec.scale, values.device)
    # Not fused: `addcmul` may round otherwise at the end of the batch's memory than before.
    return (values * gain_C11).add_(shift_C11)


@lru_cache(maxsize=64)  # a copy to a GPU waits for it
def gain_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], scale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """float32 (C, 1, 1) each: x * gain + shift is (x / scale - mean) / std."""
    mean_C11, std_C11 = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (mean, std))
    gain_C11, shift_C11 = 1 / (scale * std_C11), -mean_C11 / std_C11
    return gain_C11.float().to(device), shift_C11.float().to(device)


def _is_shaped_by_planes(rows: Tensor, spec: RowSpec, uniform: Tensor | None) -> bool:
    """Whether training/byte_pictures.py can do it, which is ten times as fast."""
    is_simple = rows.shape[-2:] == spec.shape[-2:]
    if uniform is not None:
        is_simple = (is_simple or spec.crop) and not spec.rotate_degrees
    is_bytes = rows.dtype == torch.uint8 and rows.device.type == "cpu"
    return spec.kind in PICTURES and is_bytes and is_simple


def _shaped_by_planes(rows: Tensor, spec: RowSpec, uniform: Tensor | None) -> Tensor:
    """Delivered bytes to (B, *spec.shape), normalised."""
    num_groups, delivered = len(rows) * spec.num_groups, rows.shape[-2:]
    frames = math.prod(spec.shape[:-3]) // spec.num_groups
    boxes, mirrored = None, [False] * num_groups
    if uniform is not None:
        uniform_NU = uniform.reshape(num_groups, num_uniform(spec) // spec.num_groups)
        if spec.crop:
            boxes = crop_boxes(uniform_NU[:, :CROP_NUMBERS], *delivered).long().tolist()
        if spec.flip:
            mirrored = (uniform_NU[:, -1] < 0.5).tolist()
    groups = rows.reshape(num_groups, frames, spec.shape[-3], *delivered)
    height, width = spec.shape[-2:]
    result = shaped(groups, boxes, mirrored, _tables(spec), (height, width))
    return result.reshape(len(rows), *spec.shape)


@lru_cache(maxsize=64)
def _tables(spec: RowSpec) -> tuple[np.ndarray, np.ndarray]:
    """(C, 256) float32 results of every byte, of pictures as they are and of mirrored ones."""
    levels_C1L = torch.arange(LEVELS).float().repeat(spec.shape[-3], 1, 1)
    mirrored_C1L = levels_C1L.clone()
    if _changes_sign(spec):
        mirrored_C1L[0] = 2 * FLOW_REST - levels_C1L[0]
    plain, mirrored = (
        _normalised(values, spec).squeeze(1).numpy() for values in (levels_C1L, mirrored_C1L)
    )
    return plain, mirrored


def _pictures(values: Tensor, spec: RowSpec, uniform: Tensor | None) -> Tensor:
    """(B, *delivered shape) to (B, *spec.shape), not normalised."""
    size, num_rows = spec.shape[-2:], len(values)
    if values.shape[-2:] != size and (uniform is None or not spec.crop):
        values = _resized(values, size)
    if uniform is None:
        return values
    num_channels, num_groups = spec.shape[-3], num_rows * spec.num_groups
    frames = math.prod(spec.shape[:-3]) // spec.num_groups
    uniform_NU = uniform.reshape(num_groups, num_uniform(spec) // spec.num_groups)
    groups = values.reshape(num_groups, frames * num_channels, *values.shape[-2:])
    if spec.crop or spec.rotate_degrees > 0:
        groups = _resampled(groups, spec, uniform_NU)
    groups = groups.reshape(num_groups, frames, num_channels, *size)
    if spec.flip:
        mirrored = _mirrored(groups, spec)
        groups = torch.where(uniform_NU[:, -1, None, None, None, None] < 0.5, mirrored, groups)
    return groups.reshape(num_rows, *spec.shape)


def _resized(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """(..., C, X, X) to (..., C, H, W), antialiased."""
    pictures = values.reshape(math.prod(values.shape[:-3]), *values.shape[-3:])
    resized = functional.interpolate(pictures, size, mode="bilinear", antialias=True)
    return resized.reshape(*values.shape[:-2], *size)


def _resampled(groups: Tensor, spec: RowSpec, uniform_NU: Tensor) -> Tensor:
    """Crop and turn: (N, F*C, X, X) to (N, F*C, H, W).

    The place of every pixel is a matter of sums and products element by element, which round alike
    in batches of any size; `affine_grid` multiplies matrices, which do not.
    """
    (height, width), delivered = spec.shape[-2:], groups.shape[-2:]
    box_N4 = uniform_NU.new_zeros(len(groups), 4)
    if spec.crop:
        box_N4 = crop_boxes(uniform_NU[:, :CROP_NUMBERS], *delivered)
    else:
        box_N4[:, 2], box_N4[:, 3] = delivered
    angle_N = torch.zeros_like(box_N4[:, 0])
    if spec.rotate_degrees > 0:
        angle_N = rotations(uniform_NU[:, CROP_NUMBERS * spec.crop], spec.rotate_degrees)
    cos_N11, sin_N11 = (f(angle_N).float()[:, None, None] for f in (torch.cos, torch.sin))
    y_H1, x_W = _centres(height, groups)[:, None], _centres(width, groups)
    y_NHW = cos_N11 * y_H1 + (sin_N11 * width / height) * x_W
    x_NHW = cos_N11 * x_W - (sin_N11 * height / width) * y_H1
    y_in_NHW = _in_part(y_NHW, box_N4[:, 0], box_N4[:, 2], delivered[0])
    x_in_NHW = _in_part(x_NHW, box_N4[:, 1], box_N4[:, 3], delivered[1])
    grid = torch.stack([x_in_NHW, y_in_NHW], dim=-1)
    values = functional.grid_sample(groups, grid, padding_mode="border", align_corners=False)
    outside_NHW = (x_NHW.abs() > 1) | (y_NHW.abs() > 1)
    return values.masked_fill(outside_NHW[:, None], FLOW_REST if spec.kind == "flow" else 0.0)


def _centres(count: int, like: Tensor) -> Tensor:
    """(count,) centres of pixels on a side from -1 to 1."""
    return (2 * torch.arange(count, dtype=like.dtype, device=like.device) + 1) / count - 1


def _in_part(place_NHW: Tensor, start_N: Tensor, length_N: Tensor, size: int) -> Tensor:
    """Places on a part of a side as places on the whole side, both from -1 to 1.

    Between a border of the part and its outermost pixel centres, that pixel is taken.
    """
    edge, scale, shift = (
        numbers.to(place_NHW.dtype)[:, None, None]
        for numbers in (1 - 1 / length_N, length_N / size, (2 * start_N + length_N) / size - 1)
    )
    return place_NHW.clamp(-edge, edge) * scale + shift


def _mirrored(groups: Tensor, spec: RowSpec) -> Tensor:
    """(N, F, C, H, W) mirrored left to right."""
    mirrored = groups.flip(-1)
    if _changes_sign(spec):
        mirrored[:, :, 0] = 2 * FLOW_REST - mirrored[:, :, 0]
    return mirrored


def _changes_sign(spec: RowSpec) -> bool:
    """Whether the horizontal component of a mirrored picture does."""
    return spec.kind == "flow" and not spec.per_frame


def _masked(values: Tensor, spec: RowSpec, uniform: Tensor) -> Tensor:
    """(B, ..., time and frequency) with a stripe along either set to zero."""
    drawn = iter(uniform.split(2, dim=1))
    axes = ((spec.time_axis, spec.time_mask), (-3 - spec.time_axis, spec.frequency_mask))
    for axis, widest in axes:
        if widest > 0:
            stripe_BX = stripes(next(drawn), values.shape[axis], widest)
            shape = [len(values), *[1] * (values.dim() - 1)]
            shape[axis] = values.shape[axis]
            values = values.masked_fill(stripe_BX.reshape(shape), 0.0)
    return values

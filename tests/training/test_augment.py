"""Augmentation against torchvision's functions with the same parameters, sample by sample."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from training.augment import RowSpec, augment, crop_boxes, num_uniform, rotations, stripes

IMAGE = RowSpec("image", (3, 24, 20))
FRAMES = RowSpec("frames", (3, 3, 24, 20))
FLOW = RowSpec("flow", (2, 2, 24, 20))
AUDIO = RowSpec("audio", (1, 30, 12), time_mask=8, frequency_mask=4)
EVERYTHING = {"crop": True, "rotate_degrees": 30.0, "flip": True}
GREY_LEVELS = {"atol": 1.0, "rtol": 0.0}


def pictures(*shape: int) -> Tensor:
    """Smooth coloured waves with a little noise, bytes."""
    generator = torch.Generator().manual_seed(0)
    phase = 6 * torch.rand(*shape[:-2], 1, 1, generator=generator)
    y, x = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])
    waves = 120 + 90 * torch.sin(0.2 * x + phase) * torch.cos(0.15 * y - phase)
    return (waves + 20 * torch.rand(shape, generator=generator)).to(torch.uint8)


def numbers(spec: RowSpec, rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, num_uniform(spec), generator=generator, dtype=torch.float64)


def cropped(picture: Tensor, uniform: Tensor, size: tuple[int, ...]) -> Tensor:
    """torchvision's crop of one picture (C, H, W), from the four numbers of a crop."""
    box = crop_boxes(uniform[None, :4], *picture.shape[-2:])[0].long().tolist()
    return reference.resized_crop(picture.float(), *box, list(size), antialias=False)


def turned(picture: Tensor, uniform: Tensor, degrees: float) -> Tensor:
    angle = math.degrees(rotations(uniform, degrees))
    return reference.rotate(picture.float(), angle, InterpolationMode.BILINEAR)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (IMAGE, 0),
        (replace(IMAGE, crop=True), 4),
        (replace(IMAGE, rotate_degrees=1.0, flip=True), 2),
        (replace(FRAMES, **EVERYTHING), 6),
        (replace(FRAMES, **EVERYTHING, per_frame=True), 18),
        (replace(IMAGE, flip=True, per_frame=True), 1),
        (replace(IMAGE, time_mask=3), 0),
        (AUDIO, 4),
        (replace(AUDIO, frequency_mask=0, flip=True), 2),
        (RowSpec("vector", (5,), flip=True), 0),
        (RowSpec("text", (5,)), 0),
    ],
)
def test_numbers_a_sample(spec, expected):
    assert num_uniform(spec) == expected


@pytest.mark.parametrize("size", [(24, 20), (48, 40)])
def test_crop_equals_torchvision(size):
    """Also enlarging: what lies beyond the box does not shine through at its border."""
    spec = RowSpec("image", (3, *size), crop=True)
    rows, uniform = pictures(8, 3, 40, 36), numbers(spec, 8)
    found = augment(rows, spec, uniform)
    expected = torch.stack([cropped(*each, size) for each in zip(rows, uniform, strict=True)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)


def test_rotation_equals_torchvision_inside():
    """Away from the edge of the turned picture, where torchvision fades to black."""
    spec = replace(IMAGE, rotate_degrees=30.0)
    rows, uniform = pictures(8, 3, 24, 20), numbers(spec, 8)
    found = augment(rows, spec, uniform)
    empty = 0
    for one, result, u in zip(rows, found, uniform[:, 0], strict=True):
        inside = turned(torch.ones_like(one), u, 30.0) > 0.999
        assert 0.6 < inside.float().mean() < 1
        torch.testing.assert_close(result[inside], turned(one, u, 30.0)[inside], **GREY_LEVELS)
        outside = turned(torch.ones_like(one), u, 30.0) == 0
        assert not result[outside].any()
        empty += int(outside.sum())
    assert empty > 500


def test_all_changes_are_crop_then_rotation_then_flip():
    """One resampling instead of two: the mean difference is small, not every pixel's."""
    spec = replace(IMAGE, **EVERYTHING)
    rows, uniform = pictures(16, 3, 40, 36), numbers(spec, 16)
    found = augment(rows, spec, uniform)
    differences = []
    for one, result, u in zip(rows, found, uniform, strict=True):
        expected = turned(cropped(one, u, (24, 20)), u[4], 30.0)
        mask = turned(torch.ones(3, 24, 20), u[4], 30.0) > 0.999
        if u[5] < 0.5:
            expected, mask = reference.hflip(expected), reference.hflip(mask)
        differences.append((result - expected)[mask].abs().mean())
    assert 0 < (uniform[:, 5] < 0.5).sum() < 16
    assert max(differences) < 4
    assert float(torch.stack(differences).mean()) < 2


def test_flip_mirrors_exactly_the_samples_below_one_half():
    rows, uniform = pictures(4, 3, 24, 20), torch.tensor([[0.1], [0.5], [0.49], [0.9]])
    found = augment(rows, replace(IMAGE, flip=True), uniform.double())
    expected = rows.float()
    expected[[0, 2]] = expected[[0, 2]].flip(-1)
    assert torch.equal(found, expected)


def test_crops_have_the_stated_area_and_shape():
    """8 to 100 % of the area, 3/4 to 4/3 in shape, all over the picture; and clamped to it."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(5000, 4, generator=generator, dtype=torch.float64)
    top, left, height, width = crop_boxes(uniform, 1000, 1000).T
    assert bool(((top >= 0) & (left >= 0) & (top + height <= 1000) & (left + width <= 1000)).all())
    free = (height < 1000) & (width < 1000)
    area, ratio = (height * width / 1e6)[free], (width / height)[free]
    assert 0.079 < float(area.min()) < 0.085
    assert 0.74 < float(ratio.min()) < 0.76
    assert 1.32 < float(ratio.max()) < 1.34
    assert float(ratio.log().mean()) == pytest.approx(0, abs=0.01)
    assert float((top + height / 2).mean()) == pytest.approx(500, abs=10)
    _, _, height, width = crop_boxes(uniform, 10, 1000).T
    assert float(height.max()) == 10
    assert float(height.min()) >= 1
    extremes = torch.tensor([[0.0] * 4, [1 - 1e-12] * 4], dtype=torch.float64)
    assert crop_boxes(extremes, 8, 8).tolist() == [[0, 0, 3, 2], [1, 0, 7, 8]]


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        replace(IMAGE, **EVERYTHING, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1), scale=255.0),
        replace(FRAMES, **EVERYTHING),
        replace(FLOW, **EVERYTHING),
    ],
)
def test_a_sample_does_not_depend_on_its_batch(spec, per_frame):
    spec = replace(spec, per_frame=per_frame)
    rows, uniform = pictures(4, *spec.shape[:-2], 40, 36), numbers(spec, 4)
    together = augment(rows, spec, uniform)
    alone = [augment(rows[i : i + 1], spec, uniform[i : i + 1]) for i in range(4)]
    assert together.shape == (4, *spec.shape)
    assert torch.equal(together, torch.cat(alone))
    assert augment(rows[:0], spec, uniform[:0]).shape == (0, *spec.shape)


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("delivered", [(24, 20), (40, 36), (12, 16)])
@pytest.mark.parametrize(
    "spec",
    [
        replace(IMAGE, crop=True, flip=True, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1), scale=255),
        replace(FRAMES, crop=True),
        replace(FLOW, crop=True, flip=True, mean=(0.5, 0.5), std=(0.2, 0.3), scale=255),
        RowSpec("image", (1, 24, 20), crop=True, flip=True),
    ],
)
def test_bytes_on_a_cpu_become_what_other_rows_become(spec, per_frame, delivered):
    """One picture at a time against the batched resampling; and in the order convolutions want."""
    spec = replace(spec, per_frame=per_frame)
    rows, uniform = pictures(6, *spec.shape[:-2], *delivered), numbers(spec, 6)
    found, expected = augment(rows, spec, uniform), augment(rows.float(), spec, uniform)
    grey_level = 1 / (spec.scale * min(spec.std, default=1.0))
    torch.testing.assert_close(found, expected, atol=1e-2 * grey_level, rtol=0)
    encoded = found.reshape(-1, *spec.shape[-3:])
    assert encoded.data_ptr() == found.data_ptr()
    assert encoded.is_contiguous(memory_format=torch.channels_last)


def test_bytes_are_normalised_like_other_rows():
    """Also where nothing is drawn, as in evaluation, and for mirrored flow that is not cropped."""
    spec = replace(FLOW, flip=True, mean=(0.5, 0.4), std=(0.2, 0.3), scale=255.0)
    rows, uniform = pictures(8, *FLOW.shape), numbers(spec, 8)
    assert torch.equal(augment(rows, spec, None), augment(rows.float(), spec, None))
    assert torch.equal(augment(rows, spec, uniform), augment(rows.float(), spec, uniform))
    bare = augment(rows, FLOW, None)
    assert bare.dtype == torch.float32
    assert torch.equal(bare, rows.float())


def test_frames_of_a_clip_are_changed_alike_unless_asked_otherwise():
    alike = replace(FRAMES, **EVERYTHING)
    rows = pictures(2, 1, 3, 40, 36).expand(2, 3, 3, 40, 36)
    found = augment(rows, alike, numbers(alike, 2))
    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found[:, 0], found[:, 2])
    own = replace(alike, per_frame=True)
    uniform = numbers(own, 2)
    found = augment(rows, own, uniform)
    frame = augment(rows[:, 1], replace(IMAGE, **EVERYTHING), uniform[:, 6:12])
    assert torch.equal(found[:, 1], frame)
    assert not torch.equal(found[:, 0], found[:, 1])


def test_mirrored_flow_points_the_other_way():
    """u - 128 changes its sign, v does not; frame by frame, as released, nothing does."""
    spec = replace(FLOW, flip=True)
    rows = pictures(1, 2, 2, 24, 20)
    found = augment(rows, spec, torch.zeros(1, 1, dtype=torch.float64))
    mirrored = rows.float().flip(-1)
    assert torch.equal(found[:, :, 0] - 128, 128 - mirrored[:, :, 0])
    assert torch.equal(found[:, :, 1], mirrored[:, :, 1])
    released = augment(rows, replace(spec, per_frame=True), torch.zeros(1, 2).double())
    assert torch.equal(released, mirrored)


def test_what_a_turned_flow_leaves_empty_is_rest():
    spec = replace(FLOW, rotate_degrees=30.0)
    found = augment(pictures(1, 2, 2, 24, 20), spec, torch.zeros(1, 1, dtype=torch.float64))
    assert found[0, 0, :, 0, 0].tolist() == [128, 128]


def test_evaluation_resizes_like_torchvision_and_normalises():
    spec = replace(IMAGE, **EVERYTHING, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1), scale=255.0)
    rows = pictures(2, 3, 40, 36)
    small = reference.resize(rows.float(), [24, 20], antialias=True)
    expected = reference.normalize(small / 255, list(spec.mean), list(spec.std))
    torch.testing.assert_close(augment(rows, spec, None), expected, atol=1e-5, rtol=0)
    assert torch.equal(augment(small, IMAGE, None), small)


def test_without_crop_training_resizes_like_evaluation():
    rows, spec = pictures(2, 3, 3, 40, 36), replace(FRAMES, flip=True)
    found = augment(rows, spec, torch.full((2, 1), 0.7, dtype=torch.float64))
    assert torch.equal(found, augment(rows, spec, None))


def test_rows_are_not_changed_in_place():
    rows = pictures(2, 3, 24, 20).float()
    before = rows.clone()
    spec = replace(IMAGE, flip=True, mean=(1.0,) * 3, std=(2.0,) * 3)
    augment(rows, spec, numbers(spec, 2))
    spectrograms = torch.ones(2, 1, 30, 12)
    augment(spectrograms, AUDIO, numbers(AUDIO, 2))
    assert torch.equal(rows, before)
    assert bool((spectrograms == 1).all())


def test_normalisation_per_channel_of_a_spectrogram():
    spec = RowSpec("audio", (1, 30, 12), mean=(-4.5,), std=(10.0,))
    rows = torch.randn(2, 1, 30, 12).half()
    torch.testing.assert_close(augment(rows, spec, None), (rows.float() + 4.5) / 10)


@pytest.mark.parametrize(("axis", "shape"), [(-2, (1, 30, 12)), (-1, (1, 12, 30)), (-2, (30, 12))])
def test_masks_are_one_stripe_a_sample_along_time_and_frequency(axis, shape):
    spec = replace(AUDIO, shape=shape, time_axis=axis)
    uniform = torch.tensor([[0.99, 0.5, 0.0, 0.0], [0.5, 0.0, 0.99, 0.99]], dtype=torch.float64)
    found = augment(torch.ones(2, *shape), spec, uniform).reshape(2, *shape[-2:])
    found = found if axis == -2 else found.mT
    times, bands = (found == 0).all(dim=2), (found == 0).all(dim=1)
    assert [row.nonzero().flatten().tolist() for row in times] == [
        list(range(11, 19)),
        list(range(4)),
    ]
    assert [row.nonzero().flatten().tolist() for row in bands] == [[], list(range(8, 12))]
    assert int((found[0] == 0).sum()) == 8 * 12
    assert torch.equal(augment(torch.ones(2, *shape), spec, None), torch.ones(2, *shape))


def test_stripes_have_all_widths_up_to_the_widest_and_lie_everywhere():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(4000, 2, generator=generator, dtype=torch.float64)
    found = stripes(uniform, 10, 4)
    widths = np.bincount(found.sum(dim=1), minlength=11)
    assert widths[5:].sum() == 0
    assert widths[:5].min() > 700
    assert found.float().mean(dim=0).min() > 0.05
    assert stripes(uniform, 3, 99).sum(dim=1).max() == 3


def test_token_ids_stay_as_they_are():
    rows = torch.tensor([[5, 2**31 - 1]], dtype=torch.int32)
    assert augment(rows, RowSpec("text", (2,)), None) is rows

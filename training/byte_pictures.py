"""Pictures of bytes to what the model reads, on a CPU: crop, mirror, normalise, without rotation.

The same as the batched resampling of training/augment.py up to rounding, in a tenth of its time:
bytes are looked up in a table of normalised numbers, and OpenCV resizes plane by plane what is then
still in the cache. A picture's result does not depend on the others.

Shapes: N groups of F frames that are changed alike, C channels, X and Y of a delivered picture, H
and W of the result.
"""

import numpy as np
import torch
from torch import Tensor

LEVELS = 256


def shaped(
    bytes_NFCXY: Tensor,
    boxes: list[list[int]] | None,
    mirrored: list[bool],
    tables: tuple[np.ndarray, np.ndarray],
    size: tuple[int, int],
) -> Tensor:
    """float32 (N, F, C, H, W), every picture in channels-last memory order.

    Args:
        bytes_NFCXY: uint8, on a CPU.
        boxes: of every group top, left, height and width of the part to resize bilinearly, without
            antialiasing; None takes pictures whole, they must have the size of the result.
        mirrored: of every group, whether it is mirrored left to right.
        tables: (C, 256) float32 results of every byte, of pictures as they are and of mirrored
            ones.
        size: H and W.
    """
    import cv2  # a fifth of a second that only pictures need

    cv2.setNumThreads(torch.get_num_threads())  # else one for every core of the machine
    num_groups, num_frames, channels = bytes_NFCXY.shape[:3]
    result = torch.empty(num_groups, num_frames, *size, channels)
    for group, (rows, out) in enumerate(zip(bytes_NFCXY.numpy(), result.numpy(), strict=True)):
        mirror = mirrored[group]
        if boxes is not None:
            top, left, height, width = boxes[group]
            rows = rows[..., top : top + height, left : left + width]
        for frame, picture in zip(rows, out, strict=True):
            planes = [
                cv2.LUT(cv2.flip(plane, 1) if mirror else plane, table)
                for plane, table in zip(frame, tables[mirror], strict=True)
            ]
            if boxes is not None:
                planes = [cv2.resize(p, size[::-1], interpolation=cv2.INTER_LINEAR) for p in planes]
            cv2.merge(planes, picture)
    return result.permute(0, 1, 4, 2, 3)

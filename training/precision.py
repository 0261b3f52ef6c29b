"""Numbers of half width: where they are used, and the loss scale that float16 needs.

Encoders run under autocast; what they return is float32 again, so heads, softmax, logarithms,
similarities, statistics, losses and the optimizer never see half precision. Weights, gradients and
optimizer state are float32 (float64 with fp64).
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "bf16", "fp16", "fp64"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

HALF: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
# On CPUs narrower attention is as slow in bf16 or slower, up to twice; all else but mlp is faster.
MIN_CPU_ATTENTION = 192
AMPERE = (8, 0)
INITIAL_SCALE = 2.0**16
GROWTH_STEPS = 2000


def best_precision(device: torch.device, model: nn.Module) -> Precision:
    """bf16 where the processor is faster with it, else fp32: on GPUs from Ampere on, and on CPUs
    that multiply bf16 (AMX or AVX512_BF16), unless the model has attention narrower than
    MIN_CPU_ATTENTION."""
    if device.type == "cuda":
        good = torch.cuda.get_device_capability(device) >= AMPERE
    else:
        products = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        good = products and min(_attention_widths(model), default=math.inf) >= MIN_CPU_ATTENTION
    return "bf16" if good else "fp32"


def _attention_widths(model: nn.Module) -> Iterator[int]:
    """Of every layer of attention: torch's, and those of transformers, which have nothing in common
    but a word in their names. The networks of transformers give their own width as well."""
    for module in model.modules():
        if "Attention" in type(module).__name__:
            parts = module.children()
            yield from (part.in_features for part in parts if isinstance(part, nn.Linear))
        width = getattr(getattr(module, "config", None), "hidden_size", None)
        if isinstance(width, int):
            yield width


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Context in which convolutions and matrix products take half precision, if any."""
    if precision not in HALF:
        return nullcontext()
    return torch.autocast(device.type, HALF[precision])


class LossScale(nn.Module):
    """Factor on the loss that keeps float16 gradients from vanishing.

    Halved when a gradient is not finite, and the step is left out; doubled after GROWTH_STEPS steps
    without that. Driven by gradients that were added over ranks, so it is equal on all of them.

    Attributes:
        factor: () float32 buffer.
        good_steps: () int64 buffer, steps since the last change.
    """

    factor: Tensor
    good_steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(INITIAL_SCALE))
        self.register_buffer("good_steps", torch.tensor(0))

    def update(self, finite: Tensor) -> None:
        """Count a step; `finite` is () bool: whether its gradients were."""
        good_steps = torch.where(finite, self.good_steps + 1, 0)
        grows = good_steps == GROWTH_STEPS
        grown = torch.where(grows, self.factor * 2, self.factor)
        self.factor.copy_(torch.where(finite, grown, self.factor / 2))
        self.good_steps.copy_(torch.where(grows, 0, good_steps))

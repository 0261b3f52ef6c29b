"""Encoders, and the model built from a configuration: which network reads which modality.

Shapes: B rows, D_m features of modality m, C classes. An encoder maps (B, *shape) to (B, D_m).
"""

import difflib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from training.batchnorm import synchronise
from training.model import MultimodalModel

ModalityKind = Literal["image", "audio", "vector"]
RESNET18_FEATURES = 512
SMALL_SIDE = 64


class EncoderConfig(BaseModel):
    """Encoder of one modality."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["auto", "small_cnn", "resnet18", "mlp"] = "auto"
    """auto: mlp for vectors, small_cnn if a side is under 64, resnet18 otherwise."""

    width: PositiveInt = 32
    """small_cnn: channels of the first block; the second has twice as many."""

    hidden: PositiveInt = 256
    """mlp: units of the hidden layer."""

    features: PositiveInt | None = None
    """Output width. Default: 4 * width (small_cnn), hidden (mlp), 512 (resnet18); another width of
    resnet18 adds a linear layer."""


class ModelConfig(BaseModel):
    """Encoders and heads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoders: dict[str, EncoderConfig] = {}
    """Encoder per modality; a modality that is not named gets the defaults."""

    batchnorm: Literal["sync", "local"] = "sync"
    """Statistics of BatchNorm: of the global batch, or of each worker's part of it; local saves two
    small exchanges a layer and step, and makes the result depend on the number of workers."""

    head_hidden: NonNegativeInt = 0
    """Units of the hidden ReLU layer of every head; 0 makes heads linear."""


class Encoder(nn.Module):
    """Convert rows to the weights' type, give them the body's input shape and run the body.

    Args:
        body: (B, *input_shape) -> (B, out_features).
        input_shape: what the body expects per row; as many elements as the modality's shape.
        out_features: D_m.

    Integers are not scaled.
    """

    def __init__(self, body: nn.Module, input_shape: tuple[int, ...], out_features: int):
        super().__init__()
        # Convolutions are about 1.5 times faster on CPUs, and no slower on GPUs, in this layout.
        self.body = body.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.input_shape = input_shape
        self.out_features = out_features

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, ...) of any dtype to (B, D_m)."""
        rows = inputs.to(next(self.body.parameters()).dtype)
        rows = rows.reshape(rows.shape[0], *self.input_shape)
        if rows.dim() == 4:
            rows = rows.contiguous(memory_format=torch.channels_last)
        return self.body(rows)


def build_encoder(
    config: EncoderConfig, kind_of_modality: ModalityKind, shape: tuple[int, ...]
) -> Encoder:
    """Encoder for rows of `shape`: (C, H, W) or (H, W) for convolutions, anything for mlp.

    Raises:
        ValueError: a convolutional encoder cannot read this shape.
    """
    kind = _resolve(config, kind_of_modality, shape)
    if kind == "mlp":
        return _mlp(config, math.prod(shape))
    if len(shape) not in (2, 3):
        raise ValueError(
            f"encoder {config.kind} for {kind_of_modality} rows of shape {shape}: convolutions "
            "need (channels, height, width) or (height, width); prepare the data in that shape "
            "(audio as log-mel) or set the encoder's kind to mlp"
        )
    image_shape = (1, *shape)[-3:]
    build = _small_cnn if kind == "small_cnn" else _resnet18
    return build(config, image_shape)


def build_model(
    config: ModelConfig,
    modalities: Sequence[tuple[str, ModalityKind, tuple[int, ...]]],
    num_classes: int,
    seed: int,
) -> MultimodalModel:
    """Model with weights drawn from `seed` alone; equal on every rank, on the CPU.

    Args:
        config: encoders and heads.
        modalities: (name, kind, shape of one row), in the order of fusion.
        num_classes: C.
        seed: the caller's random state is neither read nor changed.

    Raises:
        ValueError: an encoder is configured for a modality that does not exist or cannot read it.
    """
    names = [name for name, _, _ in modalities]
    for name in config.encoders:
        _check_known(name, names)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoders: dict[str, nn.Module] = {
            name: build_encoder(config.encoders.get(name, EncoderConfig()), kind, shape)
            for name, kind, shape in modalities
        }
        model = MultimodalModel(encoders, num_classes, config.head_hidden)
    if config.batchnorm == "sync":
        synchronise(model)
    return model


def _check_known(name: str, names: list[str]) -> None:
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else "remove it"
    raise ValueError(
        f"model.encoders names modality {name!r}, which the data set does not have (it has "
        f"{', '.join(names)}); {remedy}"
    )


def _resolve(config: EncoderConfig, kind_of_modality: ModalityKind, shape: tuple[int, ...]) -> str:
    if config.kind != "auto":
        return config.kind
    if kind_of_modality == "vector":
        return "mlp"
    return "small_cnn" if min(shape[-2:]) < SMALL_SIDE else "resnet18"


def _mlp(config: EncoderConfig, in_features: int) -> Encoder:
    """Linear -> ReLU -> Linear, Xavier-normal weights, zero biases (methods.md 5.2)."""
    features = config.features or config.hidden
    body = nn.Sequential(
        nn.Linear(in_features, config.hidden), nn.ReLU(), nn.Linear(config.hidden, features)
    )
    for layer in body:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return Encoder(body, (in_features,), features)


def _small_cnn(config: EncoderConfig, shape: tuple[int, ...]) -> Encoder:
    """Three conv3x3-BN-ReLU blocks, pooling in the first two, global average pool."""
    features = config.features or 4 * config.width
    body = nn.Sequential(
        *_block(shape[0], config.width, pool=True),
        *_block(config.width, 2 * config.width, pool=True),
        *_block(2 * config.width, features, pool=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    _init_convolutions(body)
    return Encoder(body, shape, features)


def _block(in_channels: int, out_channels: int, *, pool: bool) -> list[nn.Module]:
    """Pooling stands before the ReLU: the same function, on a quarter of the elements."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    pooling = [nn.MaxPool2d(2, ceil_mode=True)] if pool else []
    return [convolution, nn.BatchNorm2d(out_channels), *pooling, nn.ReLU(inplace=True)]


def _resnet18(config: EncoderConfig, shape: tuple[int, ...]) -> Encoder:
    """torchvision's ResNet-18 from scratch for any number of channels, without its classifier."""
    from torchvision.models import resnet18  # two seconds that only this encoder needs

    features = config.features or RESNET18_FEATURES
    body = resnet18(weights=None)
    body.conv1 = nn.Conv2d(shape[0], 64, kernel_size=7, stride=2, padding=3, bias=False)
    body.fc = (  # pyright: ignore[reportAttributeAccessIssue]
        nn.Identity() if features == RESNET18_FEATURES else nn.Linear(RESNET18_FEATURES, features)
    )
    _init_convolutions(body)
    return Encoder(body, shape, features)


def _init_convolutions(body: nn.Module) -> None:
    """Kaiming fan_out convolutions, BatchNorm weights from N(1, 0.02) (methods.md 3.2)."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)

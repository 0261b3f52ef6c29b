"""Encoders, and the model built from a configuration: which network reads which modality.

Shapes: K frames of a clip, C classes. The networks are in `networks.py` and `pretrained.py`.
"""

import difflib
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from training.batchnorm import synchronise
from training.config import EncoderConfig, ModelConfig
from training.modality import CLIPS, ModalitySpec
from training.model import MultimodalModel
from training.networks import (
    RESNET18_FEATURES,
    Encoder,
    Transformer,
    after_leading_zeros,
    mlp,
    resnet18,
    small_cnn,
)

SMALL_SIDE = 64
CNN_WIDTH = 32
TRANSFORMER_WIDTH = 128
PLANES = ("image", *CLIPS, "audio")
READS: dict[str, tuple[str, ...]] = {
    "small_cnn": PLANES,
    "resnet18": PLANES,
    "mlp": (*PLANES, "vector", "sequence"),
    "transformer": ("text", "sequence"),
    "pretrained": (*PLANES, "text"),
}


def build_encoder(config: EncoderConfig, spec: ModalitySpec) -> Encoder:
    """Encoder for rows of `spec`; the random weights come from torch's default generator.

    Raises:
        ValueError: such an encoder cannot read this kind or shape, or its weights cannot be loaded.
    """
    kind = _resolve(config, spec)
    if spec.kind not in READS[kind]:
        able = ", ".join(name for name, kinds in READS.items() if spec.kind in kinds)
        raise ValueError(
            f"model.encoders.{spec.name}.kind={kind} does not read {spec.kind} rows; use auto or "
            f"one of: {able}"
        )
    if config.weights != "none" and kind != "resnet18":
        raise ValueError(
            f"model.encoders.{spec.name}.weights={config.weights!r} belongs to kind=resnet18, this "
            f"encoder is {kind}; set the kind or remove the weights"
        )
    return _BUILDERS[kind](config, spec)


def build_model(
    config: ModelConfig, modalities: Sequence[ModalitySpec], num_classes: int, seed: int
) -> MultimodalModel:
    """Model with weights drawn from `seed` alone, or loaded; equal on every rank, on the CPU.

    Args:
        config: encoders and heads.
        modalities: in the order of fusion.
        num_classes: C.
        seed: the caller's random state is neither read nor changed.

    Raises:
        ValueError: an encoder is configured for a modality that does not exist or cannot read it,
            or its weights cannot be loaded.
    """
    names = [spec.name for spec in modalities]
    for name in names:
        _check_name(name)
    for name in config.encoders:
        _check_known(name, names)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoders: dict[str, nn.Module] = {
            spec.name: build_encoder(config.encoders.get(spec.name, EncoderConfig()), spec)
            for spec in modalities
        }
        model = MultimodalModel(encoders, num_classes, config.head_hidden)
    if config.batchnorm == "sync":
        synchronise(model)
    return model


def _check_name(name: str) -> None:
    """A module of a container cannot be called as what the container has of its own."""
    if hasattr(nn.ModuleDict(), name) or "." in name or not name:
        raise ValueError(
            f"a modality cannot be called {name!r}, which torch's containers of modules use; give "
            "it another name (of your own table: --data.modalities.NEW.column)"
        )


def _check_known(name: str, names: list[str]) -> None:
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else "remove it"
    raise ValueError(
        f"model.encoders names modality {name!r}, which the data set does not have (it has "
        f"{', '.join(names)}); {remedy}"
    )


def _resolve(config: EncoderConfig, spec: ModalitySpec) -> str:
    if config.kind != "auto":
        return config.kind
    if spec.kind == "vector":
        return "mlp"
    if spec.kind in ("text", "sequence"):
        return "transformer"
    return "small_cnn" if min(spec.shape[-2:]) < SMALL_SIDE else "resnet18"


def _build_mlp(config: EncoderConfig, spec: ModalitySpec) -> Encoder:
    in_features = math.prod(spec.shape)
    features = config.features or config.hidden
    return Encoder(mlp(in_features, config.hidden, features), (in_features,), features)


def _build_small_cnn(config: EncoderConfig, spec: ModalitySpec) -> Encoder:
    num_frames, shape = _planes(config, spec)
    width = config.width or CNN_WIDTH
    features = config.features or 4 * width
    return Encoder(small_cnn(shape[0], width, features), shape, features, num_frames)


def _build_resnet18(config: EncoderConfig, spec: ModalitySpec) -> Encoder:
    num_frames, shape = _planes(config, spec)
    features = config.features or RESNET18_FEATURES
    return Encoder(resnet18(shape[0], features, config.weights), shape, features, num_frames)


def _build_transformer(config: EncoderConfig, spec: ModalitySpec) -> Encoder:
    width, is_text = config.width or TRANSFORMER_WIDTH, spec.kind == "text"
    if width % config.heads:
        raise ValueError(
            f"model.encoders.{spec.name}: width={width} is not a multiple of heads={config.heads}; "
            "change one of them"
        )
    embed = nn.Embedding(spec.vocab_size, width) if is_text else nn.Linear(spec.shape[1], width)
    is_real = partial(torch.ne, other=spec.pad) if is_text else after_leading_zeros
    features = config.features or width
    sizes = (spec.shape[0], width, config.heads, config.layers, features)
    return Encoder(Transformer(embed, is_real, *sizes), spec.shape, features, tokens=is_text)


def _build_pretrained(config: EncoderConfig, spec: ModalitySpec) -> Encoder:
    from training.pretrained import build_pretrained  # seconds that only this encoder needs

    num_frames, shape = _frames(spec)
    shape = shape[-2:] if spec.kind == "audio" else shape
    body, features = build_pretrained(config, spec, shape)
    return Encoder(body, shape, features, num_frames, tokens=spec.kind == "text")


def _frames(spec: ModalitySpec) -> tuple[int, tuple[int, ...]]:
    """Number of frames, and shape of one; a row that is no clip is one frame."""
    return (spec.shape[0], spec.shape[1:]) if spec.kind in CLIPS else (1, spec.shape)


def _planes(config: EncoderConfig, spec: ModalitySpec) -> tuple[int, tuple[int, ...]]:
    """Number of frames, and (C, H, W) of one."""
    num_frames, shape = _frames(spec)
    if len(shape) not in ((3,) if spec.kind in CLIPS else (2, 3)):
        raise ValueError(
            f"encoder {config.kind} for {spec.kind} rows of shape {spec.shape}: convolutions "
            "need (channels, height, width) or (height, width), clips with frames in front; "
            "prepare the data in that shape (audio as log-mel) or set the encoder's kind to mlp"
        )
    return num_frames, (1, *shape)[-3:]


_BUILDERS = {
    "small_cnn": _build_small_cnn,
    "resnet18": _build_resnet18,
    "mlp": _build_mlp,
    "transformer": _build_transformer,
    "pretrained": _build_pretrained,
}

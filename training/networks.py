"""Encoders, (B, *shape) -> (B, D), and the networks they are made of.

Shapes: B rows, K frames of a clip, C channels, T steps of a sequence, D features.
"""

import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

RESNET18_FEATURES = 512
INITIAL_STD = 0.02


class Encoder(nn.Module):
    """Give rows the body's type and input shape, run the body, and average over the frames of clips
    (the released code pools over frames and positions at once, which is the same).

    Args:
        body: (N, *input_shape) -> (N, out_features).
        input_shape: what the body expects per row or frame; with all frames, as many elements as
            the modality's shape.
        out_features: D.
        num_frames: K of a clip, else 1.
        tokens: the body reads int64 ids; otherwise numbers of the weights' type. Integers are not
            scaled.
    """

    def __init__(
        self,
        body: nn.Module,
        input_shape: tuple[int, ...],
        out_features: int,
        num_frames: int = 1,
        tokens: bool = False,
    ):
        super().__init__()
        # Convolutions are about 1.5 times faster on CPUs, and no slower on GPUs, in this layout.
        self.body = body.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.input_shape = input_shape
        self.out_features = out_features
        self.num_frames = num_frames
        self.tokens = tokens

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, ...) of any dtype to (B, D)."""
        num_rows = inputs.shape[0]
        rows = inputs.to(torch.int64 if self.tokens else next(self.body.parameters()).dtype)
        rows = rows.reshape(num_rows * self.num_frames, *self.input_shape)
        if rows.dim() == 4:
            rows = rows.contiguous(memory_format=torch.channels_last)
        features = self.body(rows)
        if self.num_frames == 1:
            return features
        return features.reshape(num_rows, self.num_frames, self.out_features).mean(dim=1)


def mlp(in_features: int, hidden: int, features: int) -> nn.Module:
    """Linear -> ReLU -> Linear, Xavier-normal weights, zero biases (methods.md 5.2)."""
    body = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, features))
    for layer in body:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return body


def small_cnn(channels: int, width: int, features: int) -> nn.Module:
    """Three conv3x3-BN-ReLU blocks, pooling in the first two, global average pool."""
    body = nn.Sequential(
        *_block(channels, width, pool=True),
        *_block(width, 2 * width, pool=True),
        *_block(2 * width, features, pool=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    _init_convolutions(body)
    return body


def _block(in_channels: int, out_channels: int, *, pool: bool) -> list[nn.Module]:
    """Pooling stands before the ReLU: the same function, on a quarter of the elements."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    pooling = [nn.MaxPool2d(2, ceil_mode=True)] if pool else []
    return [convolution, nn.BatchNorm2d(out_channels), *pooling, nn.ReLU(inplace=True)]


def resnet18(channels: int, features: int, weights: str) -> nn.Module:
    """torchvision's ResNet-18 without its classifier, for any number of channels.

    Args:
        channels: C. With `weights`, filters for other than 3 are the mean of those for rgb.
        features: another width than 512 adds a linear layer.
        weights: none, imagenet, or the file of a state dict of torchvision's ResNet-18, with or
            without classifier (.safetensors, or .pth with tensors only).

    Raises:
        ValueError: the weights cannot be had or do not fit.
    """
    from torchvision import models  # two seconds that only this network needs

    body = models.resnet18(weights=None)
    body.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    body.fc = (  # pyright: ignore[reportAttributeAccessIssue]
        nn.Identity() if features == RESNET18_FEATURES else nn.Linear(RESNET18_FEATURES, features)
    )
    if weights == "none":
        _init_convolutions(body)
        return body
    try:
        _load_resnet18(body, _read_state(weights))
    except (OSError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"weights={weights!r} cannot be loaded ({type(error).__name__}: {error}); they must "
            "be a state dict of torchvision's resnet18, and imagenet needs a network connection; "
            "give the path of a local .safetensors or .pth file"
        ) from error
    return body


def _read_state(weights: str) -> dict[str, Tensor]:
    if weights == "imagenet":
        from torchvision.models import ResNet18_Weights

        state = ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
        return dict(state)
    if Path(weights).suffix == ".safetensors":
        return load_file(weights)
    return torch.load(weights, map_location="cpu", weights_only=True)


def _load_resnet18(body: nn.Module, state: dict[str, Tensor]) -> None:
    """All weights but the classifier's."""
    own = body.state_dict()
    filters, shape = state["conv1.weight"], own["conv1.weight"].shape
    if filters.shape[1] != shape[1]:
        filters = filters.mean(dim=1, keepdim=True).expand(shape)
    kept = {name: value for name, value in state.items() if not name.startswith("fc.")}
    classifier = {name: value for name, value in own.items() if name.startswith("fc.")}
    body.load_state_dict({**kept, **classifier, "conv1.weight": filters})


def _init_convolutions(body: nn.Module) -> None:
    """Kaiming fan_out convolutions, BatchNorm weights from N(1, 0.02) (methods.md 3.2)."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, INITIAL_STD)


class Transformer(nn.Module):
    """Transformer encoder with learned positions; features are the mean over the real steps.

    No dropout: a step then does not depend on the number of workers. Normalisation stands before
    attention and feed-forward layers, so no warm-up of the learning rate is needed.

    Args:
        embed: rows -> (B, T, width).
        is_real: rows -> (B, T) bool, False for padding.
        num_steps: T.
        width: of every layer; the feed-forward layers are four times as wide.
        heads: a divisor of `width`.
        layers: number of layers.
        features: another width than `width` adds a linear layer.
    """

    def __init__(
        self,
        embed: nn.Module,
        is_real: Callable[[Tensor], Tensor],
        num_steps: int,
        width: int,
        heads: int,
        layers: int,
        features: int,
    ):
        super().__init__()
        self.embed = embed
        self.is_real = is_real
        self.position = nn.Parameter(torch.empty(num_steps, width))
        layer = nn.TransformerEncoderLayer(
            width,
            heads,
            dim_feedforward=4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.project = nn.Identity() if features == width else nn.Linear(width, features)
        self._init_weights()

    def _init_weights(self) -> None:
        """The layers are copies of one; each gets its own weights."""
        for weight in self.encoder.parameters():
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
        nn.init.normal_(self.position, std=INITIAL_STD)
        if isinstance(self.embed, nn.Embedding):
            nn.init.normal_(self.embed.weight, std=INITIAL_STD)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, T, ...) to (B, features)."""
        real_BT = attended(self.is_real(rows))
        steps = self.encoder(self.embed(rows) + self.position, src_key_padding_mask=~real_BT)
        total = (steps * real_BT[:, :, None]).sum(dim=1)
        return self.project(total / real_BT.sum(dim=1, keepdim=True))


def attended(real_BT: Tensor) -> Tensor:
    """Steps to attend to: the real ones, or all where a row has none, as attention needs one."""
    return real_BT | ~real_BT.any(dim=1, keepdim=True)


def after_leading_zeros(steps_BTD: Tensor) -> Tensor:
    """(B, T) bool: True from the first step on that is not all zero."""
    return (steps_BTD != 0).any(dim=2).cumsum(dim=1) > 0

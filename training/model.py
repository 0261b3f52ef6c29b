"""MultimodalModel: M encoders, M unimodal heads and one fusion head on the concatenation.

Shapes: B rows, D_m features of modality m, C classes.
"""

import warnings
from functools import partial

import torch
from torch import Tensor, nn

from training.precision import Precision, autocast
from training.turns import in_turns


class MultimodalModel(nn.Module):
    """Encoders shared by unimodal heads and a fusion head (methods.md section 1).

    Args:
        encoders: modality -> module (B, ...) -> (B, D_m) with an int attribute `out_features`.
        num_classes: C.
        head_hidden: width of one hidden ReLU layer in every head; 0 makes heads linear.

    Attributes:
        encoders: ModuleDict by modality.
        heads: ModuleDict by modality, (B, D_m) -> (B, C).
        fusion: (B, sum D_m) -> (B, C), modalities concatenated in the order of `modalities`.
        precision: of the arithmetic inside encoders; features have the type of the weights.
    """

    def __init__(self, encoders: dict[str, nn.Module], num_classes: int, head_hidden: int = 0):
        super().__init__()
        self.modalities = tuple(encoders)
        self.num_classes = num_classes
        self.precision: Precision = "fp32"
        self._compiled = False
        self.encoders = nn.ModuleDict(encoders)
        widths = {name: int(encoder.out_features) for name, encoder in encoders.items()}  # pyright: ignore[reportArgumentType]
        self.heads = nn.ModuleDict(
            {name: _head(width, num_classes, head_hidden) for name, width in widths.items()}
        )
        self.fusion = _head(sum(widths.values()), num_classes, head_hidden)

    def compile_encoders(self) -> None:
        """Compile the networks inside encoders (torch.compile) when they are first called. They no
        longer take turns: torch's compiler would follow every switch and compile its caller."""
        # It leaves the clock of exchanges to Python, as it should.
        warnings.filterwarnings("ignore", message="Dynamo does not know how to trace the builtin")
        for encoder in self.encoders.children():
            encoder.body.compile()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        self._compiled = True

    def encode(self, inputs: dict[str, Tensor], present: Tensor | None = None) -> dict[str, Tensor]:
        """modality -> (B, ...) inputs to modality -> (B, D_m) features.

        Args:
            inputs: rows that lack a modality go through its encoder like the others, so that every
                rank runs every encoder; BatchNorm counts them.
            present: (B, M) bool; features of absent modalities are zeros. None: all are there.
        """
        weight = next(self.parameters())
        with autocast(self.precision, weight.device):
            calls = [partial(self.encoders[name], inputs[name]) for name in self.modalities]
            encoded = [call() for call in calls] if self._compiled else in_turns(calls)
        features = {
            name: value.to(weight.dtype)
            for name, value in zip(self.modalities, encoded, strict=True)
        }
        if present is None:
            return features
        return {
            name: torch.where(present[:, m, None], value, 0)
            for m, (name, value) in enumerate(features.items())
        }

    def unimodal_logits(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """modality -> (B, C) logits of the unimodal heads g_m."""
        return {name: self.heads[name](features[name]) for name in self.modalities}

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        """(B, C) logits of the fusion head on concatenated features."""
        return self.fusion(torch.cat([features[name] for name in self.modalities], dim=1))

    def slice_logits(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """modality -> (B, C) share of the fusion head: `W_m f^m + bias / M`; sums to `fuse`.

        For heads with a hidden layer there is no such split; the other modalities' features are
        zeroed instead.
        """
        if isinstance(self.fusion, nn.Linear):
            widths = [features[name].shape[1] for name in self.modalities]
            weights = self.fusion.weight.split(widths, dim=1)
            bias = self.fusion.bias / len(self.modalities)
            return {
                name: nn.functional.linear(features[name], weight, bias)
                for name, weight in zip(self.modalities, weights, strict=True)
            }
        return {name: self.fuse(keep_only(features, (name,))) for name in self.modalities}


def keep_only(features: dict[str, Tensor], kept: tuple[str, ...]) -> dict[str, Tensor]:
    """Features with every modality outside `kept` set to zero."""
    return {
        name: value if name in kept else torch.zeros_like(value) for name, value in features.items()
    }


def _head(in_features: int, num_classes: int, hidden: int) -> nn.Module:
    if hidden == 0:
        return nn.Linear(in_features, num_classes)
    return nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

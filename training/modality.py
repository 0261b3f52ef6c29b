"""What a model must know of the modalities it reads."""

from dataclasses import dataclass
from typing import Literal

ModalityKind = Literal["image", "frames", "flow", "audio", "text", "vector", "sequence"]
CLIPS = ("frames", "flow")


@dataclass(frozen=True)
class ModalitySpec:
    """What an encoder must know of a modality.

    Attributes:
        name: of the modality.
        kind: image (C, H, W); frames and flow (K, C, H, W), flow with C = 2; audio (1, bands,
            frames) or (1, frames, bands); text (L,) token ids; vector (D,); sequence (T, D), padded
            with zeros in front. Images and audio may lack the first dimension.
        shape: of one row.
        pad: of a text, id of the padding token.
        vocab_size: of a text, number of ids.
    """

    name: str
    kind: ModalityKind
    shape: tuple[int, ...]
    pad: int = 0
    vocab_size: int = 0

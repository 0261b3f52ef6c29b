"""Encoders from transformers: any AutoModel, by hub name or from a local folder.

Imported by the builder that needs it: transformers takes seconds to load.

Shapes: B rows, D features.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from training.config import EncoderConfig
from training.modality import ModalityKind, ModalitySpec
from training.networks import attended

INPUTS: dict[ModalityKind, str] = {
    "text": "input_ids",
    "image": "pixel_values",
    "frames": "pixel_values",
    "flow": "pixel_values",
    "audio": "input_values",
}


class Pretrained(nn.Module):
    """A transformers network and its pooled output.

    The features are the network's `pooler_output` where that is made without weights of its own
    (AST: mean of its two class tokens; Swin, ConvNeXt: average), otherwise the last layer's first
    token (BERT, RoBERTa, ELECTRA, ViT). A pooler with weights is dropped: it belongs to the task
    of pre-training. Networks keep the dropout of their configuration.

    Args:
        network: called with the one input that `spec.kind` stands for.
        spec: rows of a text (L,) are masked where the id is `pad`; pictures (C, H, W) are taken as
            they are; audio is (frames, bands), or (bands, frames), which is transposed.
    """

    def __init__(self, network: PreTrainedModel, spec: ModalitySpec):
        super().__init__()
        pooler = getattr(network, "pooler", None)
        if isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()):
            network.register_module("pooler", None)
        self.network = network
        self.pad = spec.pad
        self.input_name = INPUTS[spec.kind]
        bands = getattr(network.config, "num_mel_bins", None)
        self.transposed = spec.kind == "audio" and bands == spec.shape[-2] != spec.shape[-1]
        self.project: nn.Module = nn.Identity()

    def forward(self, rows: Tensor) -> Tensor:
        """(B, ...) to (B, D)."""
        inputs = {self.input_name: rows.transpose(1, 2) if self.transposed else rows}
        if self.input_name == "input_ids":
            inputs["attention_mask"] = attended(rows != self.pad).long()
        output = self.network(**inputs)
        pooled = getattr(output, "pooler_output", None)
        pooled = output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
        return self.project(pooled)


def build_pretrained(
    config: EncoderConfig, spec: ModalitySpec, shape: tuple[int, ...]
) -> tuple[nn.Module, int]:
    """Network for rows of `spec`, (B, *shape) -> (B, D), and its number of features D.

    One row is sent through it, forward and backward: what it cannot read is found out here, and
    parameters that the features do not depend on are frozen, which DDP asks for.

    Raises:
        ValueError: the network cannot be loaded or does not read such rows.
    """
    assert config.name is not None
    network = _load(config.name, config.pretrained)
    _check_input(config.name, network, spec)
    body = Pretrained(network, spec)
    width = _probe(body, config.name, spec, shape)
    if config.features not in (None, width):
        body.project = nn.Linear(width, config.features)
        width = config.features
    return body, width


def _load(name: str, weights: bool) -> PreTrainedModel:
    """Network in float32; the random weights come from torch's default generator."""
    try:
        with _quiet():
            if not weights:
                return AutoModel.from_config(AutoConfig.from_pretrained(name)).float()
            network, info = AutoModel.from_pretrained(
                name, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"name={name!r} cannot be loaded: {error}; it must be a model that transformers knows, "
            "with weights in safetensors; give a local folder written by save_pretrained"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(
            f"name={name!r} has no weights for {missing[0]} and {len(missing) - 1} others; all of "
            f"{type(network).__name__} must be there; give the folder of the whole model, or set "
            "pretrained=false to draw all weights"
        )
    return network


def _check_input(name: str, network: PreTrainedModel, spec: ModalitySpec) -> None:
    if network.main_input_name != INPUTS[spec.kind]:
        raise ValueError(
            f"name={name!r} reads {network.main_input_name}, modality {spec.name} is {spec.kind}, "
            f"which needs {INPUTS[spec.kind]}; give another model"
        )
    known = getattr(network.config, "vocab_size", 0)
    pad = getattr(network.config, "pad_token_id", None)
    if spec.kind == "text" and (spec.vocab_size > known or pad not in (None, spec.pad)):
        raise ValueError(
            f"name={name!r} knows {known} tokens and pads with {pad}, the data set has "
            f"{spec.vocab_size} and pads with {spec.pad}; tokenizer and model must belong "
            f"together; prepare the data with data.modalities.{spec.name}.tokenizer={name}"
        )


def _probe(body: Pretrained, name: str, spec: ModalitySpec, shape: tuple[int, ...]) -> int:
    """Width of the features; freezes the parameters that they do not depend on."""
    rows = torch.ones(1, *shape)
    if spec.kind == "text":
        rows = torch.full((1, *shape), (spec.pad + 1) % spec.vocab_size)
    body.eval()
    try:
        with torch.enable_grad():
            features = body(rows)
            features.sum().backward()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"name={name!r} cannot read {spec.kind} rows of shape {spec.shape}: {error}; prepare "
            "the data in the shape that the model was made for (side, tokens, frames, num_mels)"
        ) from error
    for parameter in body.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    body.train()
    return features.shape[1]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no report of weights that are left out, as those of other heads are."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

"""Tiny models and batches for the method tests."""

import torch
from torch import Tensor, nn

from training.batch import Batch
from training.methods import MidasConfig, OgmGeConfig, build_method
from training.methods.base import Method
from training.model import MultimodalModel

NUM_CLASSES = 3
WIDTH = 5


class TinyEncoder(nn.Sequential):
    """(B, WIDTH) -> (B, 4)."""

    out_features = 4

    def __init__(self):
        super().__init__(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, self.out_features))


def tiny_model(num_modalities: int, head_hidden: int = 0) -> MultimodalModel:
    """The same weights at every call; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        encoders: dict[str, nn.Module] = {f"m{i}": TinyEncoder() for i in range(num_modalities)}
        return MultimodalModel(encoders, NUM_CLASSES, head_hidden)


def tiny_method(name: str, num_modalities: int = 2, warmup_epochs: int = 0, **midas) -> Method:
    sections = {
        "midas": MidasConfig(warmup_epochs=warmup_epochs, **midas),
        "ogm_ge": OgmGeConfig(strength=0.5),
    }
    return build_method(name, tiny_model(num_modalities), sections)


def make_batch(inputs: dict[str, Tensor], label, lane=None, num_lanes: int = 1) -> Batch:
    """A whole global batch in one process."""
    label = torch.as_tensor(label)
    lane = torch.zeros_like(label) if lane is None else torch.as_tensor(lane)
    sample_id = torch.arange(len(label))
    return Batch(inputs, label, sample_id, lane, num_lanes, global_rows=len(label))


def random_batch(
    seed: int, num_rows: int, num_modalities: int = 2, num_lanes: int = 4, dtype=torch.float32
) -> Batch:
    """Class means plus noise, modality by modality noisier; rows dealt evenly to lanes."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.eye(NUM_CLASSES, WIDTH, dtype=dtype) * 2
    label = torch.randint(NUM_CLASSES, (num_rows,), generator=generator)
    inputs = {
        f"m{i}": means[label]
        + (0.3 + i) * torch.randn(num_rows, WIDTH, generator=generator, dtype=dtype)
        for i in range(num_modalities)
    }
    return make_batch(inputs, label, torch.arange(num_rows) * num_lanes // num_rows, num_lanes)

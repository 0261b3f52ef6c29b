"""Tiny models and batches for the method tests."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from training.batch import Batch, Progress
from training.batchnorm import SyncBatchNorm
from training.methods import Midas, MidasConfig, OgmGeConfig, build_method
from training.methods.base import Method
from training.model import MultimodalModel

NUM_CLASSES = 3
WIDTH = 5

# methods.md 2.10
F1 = [[2.0, 0], [0, 2], [1, 1], [-1, 1]]
F2 = [[1.0, 0], [0, 1], [1, -1], [0.5, 0.5]]
LABEL = (0, 1, 2, 1)
START = Progress(seed=0, epoch=0, step=0, num_epochs=1)


class TinyEncoder(nn.Sequential):
    """(B, WIDTH) -> (B, 4)."""

    out_features = 4

    def __init__(self, *normalisation: nn.Module):
        first, last = nn.Linear(WIDTH, 6), nn.Linear(6, self.out_features)
        super().__init__(first, *normalisation, nn.Tanh(), last)


def tiny_model(
    num_modalities: int, head_hidden: int = 0, batchnorm: bool = False
) -> MultimodalModel:
    """The same weights at every call; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        encoders: dict[str, nn.Module] = {
            f"m{i}": TinyEncoder(*[SyncBatchNorm(6)] * batchnorm) for i in range(num_modalities)
        }
        return MultimodalModel(encoders, NUM_CLASSES, head_hidden)


def tiny_method(
    name: str,
    num_modalities: int = 2,
    warmup_epochs: int = 0,
    batchnorm: bool = False,
    **midas,
) -> Method:
    sections = {
        "midas": MidasConfig(warmup_epochs=warmup_epochs, **midas),
        "ogm_ge": OgmGeConfig(strength=0.5),
    }
    model = tiny_model(num_modalities, batchnorm=batchnorm)
    return build_method(name, model, sections)


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


def with_missing(batch: Batch, seed: int = 0, share: float = 0.3) -> Batch:
    """The batch with each input absent by this chance; what stands there means nothing."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(len(batch.label), len(batch.inputs), generator=generator) >= share
    inputs = {
        name: torch.where(present[:, m, None], value, 7.0)
        for m, (name, value) in enumerate(batch.inputs.items())
    }
    return replace(batch, inputs=inputs, present=present)


def select_rows(batch: Batch, rows: Tensor) -> Batch:
    """A whole global batch of these rows, (B,) bool."""
    return replace(batch.only(rows), global_rows=int(rows.sum()))


class Features(nn.Identity):
    """The inputs are the features."""

    out_features = 2


def vector_midas(**config) -> Midas:
    """The heads and alpha of methods.md 2.10, in float64."""
    model = MultimodalModel({"one": Features(), "two": Features()}, num_classes=3).double()
    weights = {
        "heads.one.weight": [[1.0, 0], [0, 1], [0.5, 0.5]],
        "heads.one.bias": [0.0, 0, 0],
        "heads.two.weight": [[0.4, 0], [0, 0.4], [0.2, -0.2]],
        "heads.two.bias": [0.0, 0, 0],
        "fusion.weight": [[0.8, 0, 0.2, 0], [0, 0.8, 0, 0.2], [0.4, 0.4, 0.1, -0.1]],
        "fusion.bias": [0.0, 0, 0.1],
    }
    model.load_state_dict(
        {name: torch.tensor(value, dtype=torch.float64) for name, value in weights.items()}
    )
    method = Midas(model, MidasConfig(**{"warmup_epochs": 0, **config}))
    method.alpha.copy_(torch.tensor([1.0, 1.2]))
    return method


def vector_batch(label=LABEL, keep=slice(None), lane=(0, 0, 1, 1)) -> Batch:
    inputs = {
        name: torch.tensor(rows, dtype=torch.float64)[keep].requires_grad_()
        for name, rows in (("one", F1), ("two", F2))
    }
    return make_batch(inputs, torch.tensor(label)[keep], torch.tensor(lane)[keep], num_lanes=2)

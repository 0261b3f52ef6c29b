"""Optimizer and learning-rate schedule from a configuration."""

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch.optim.lr_scheduler import LambdaLR

from training.methods.base import Method


class OptimConfig(BaseModel):
    """Optimizer, epochs and learning-rate steps (defaults: methods.md 2.11)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """Optimizer."""

    lr: PositiveFloat = 1e-3
    """Learning rate of the first epoch."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of sgd; adam and adamw do not use it."""

    weight_decay: NonNegativeFloat = 1e-4
    """L2 penalty of sgd and adam; decoupled decay of adamw."""

    epochs: PositiveInt = 70
    """Passes over the training split, warm-up included."""

    lr_step_epochs: PositiveInt = 50
    """Epochs between two reductions of the learning rate."""

    lr_gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor of every reduction."""

    schedule_after_warmup: bool = False
    """Count lr_step_epochs from the end of warm-up, as the authors' code does."""


def build_optimizer(config: OptimConfig, method: Method) -> torch.optim.Optimizer:
    """Fused optimizer over `method.parameter_groups()`; a group may override lr and the like."""
    groups = method.parameter_groups()
    lr, weight_decay = config.lr, config.weight_decay
    if config.name == "adam":
        return torch.optim.Adam(groups, lr=lr, weight_decay=weight_decay, fused=True)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
    sgd = torch.optim.SGD(
        groups, lr=lr, momentum=config.momentum, weight_decay=weight_decay, fused=True
    )
    if config.momentum > 0:  # fused SGD cannot have some of them; zeros change nothing
        for parameter in (p for group in sgd.param_groups for p in group["params"]):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def build_schedule(
    config: OptimConfig, optimizer: torch.optim.Optimizer, warmup_epochs: int
) -> LambdaLR:
    """Step schedule; call `step()` once after every epoch.

    Epoch e (0-based) runs at `lr * lr_gamma ** (max(e - offset, 0) // lr_step_epochs)`; the offset
    is `warmup_epochs` with `schedule_after_warmup` and 0 otherwise (methods.md 3.1, row 16). The
    state dict holds plain JSON values.
    """
    offset = warmup_epochs if config.schedule_after_warmup else 0

    def factor(epoch: int) -> float:
        return config.lr_gamma ** (max(epoch - offset, 0) // config.lr_step_epochs)

    return LambdaLR(optimizer, factor)

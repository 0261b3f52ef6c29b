"""Optimizer and learning-rate schedule from a configuration."""

import torch
from torch.optim.lr_scheduler import LambdaLR

from training.config import OptimConfig
from training.methods.base import Method


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

"""Optimizers and the schedule, against their formulas."""

import json

import pytest
import torch
from pydantic import ValidationError

from training.config import ModelConfig
from training.encoders import build_model
from training.methods.base import Method
from training.modality import ModalitySpec
from training.optim import OptimConfig, build_optimizer, build_schedule


@pytest.fixture
def method() -> Method:
    return Method(build_model(ModelConfig(), [ModalitySpec("text", "vector", (3,))], 2, seed=0))


class TwoRates(Method):
    """The fusion head learns at its own rate."""

    def parameter_groups(self):
        rest = [*self.model.encoders.parameters(), *self.model.heads.parameters()]
        return [{"params": rest}, {"params": list(self.model.fusion.parameters()), "lr": 0.5}]


def rates(config: OptimConfig, method: Method, warmup_epochs: int) -> list[float]:
    """Learning rate of every epoch."""
    optimizer = build_optimizer(config, method)
    schedule = build_schedule(config, optimizer, warmup_epochs)
    used = []
    for _ in range(config.epochs):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return used


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
def test_optimizer_has_the_settings_and_all_parameters(method, name, kind):
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.2, weight_decay=0.3), method)
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind
    assert (group["lr"], group["weight_decay"]) == (0.2, 0.3)
    assert group.get("momentum", 0.9) == 0.9
    assert len(group["params"]) == len(list(method.parameters()))


def test_groups_of_the_method_keep_their_rate(method):
    optimizer = build_optimizer(OptimConfig(lr=0.1), TwoRates(method.model))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_sgd_step_equals_the_formula(method):
    """Second step: v = momentum * g1 + g2, with g = gradient + weight_decay * weight."""
    config = OptimConfig(lr=0.1, momentum=0.5, weight_decay=0.01)
    optimizer = build_optimizer(config, method)
    weight = method.model.fusion.weight
    expected, velocity = weight.detach().clone(), torch.zeros_like(weight)
    for step in (1.0, 2.0):
        weight.grad = torch.full_like(weight, step)
        velocity = 0.5 * velocity + step + 0.01 * expected
        expected = expected - 0.1 * velocity
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


def test_rate_steps_every_lr_step_epochs(method):
    config = OptimConfig(lr=1.0, epochs=7, lr_step_epochs=3, lr_gamma=0.5)
    assert rates(config, method, warmup_epochs=2) == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]


def test_schedule_after_warmup_waits(method):
    """methods.md 3.1 row 16: with ten epochs of warm-up the drop comes at epoch 60 of 70."""
    used = rates(OptimConfig(lr=1.0, schedule_after_warmup=True), method, warmup_epochs=10)
    assert used == [1.0] * 60 + [0.1] * 10


def test_schedule_equals_torch_step_lr(method):
    config = OptimConfig(epochs=9, lr_step_epochs=2)
    optimizer = build_optimizer(config, method)
    reference = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
    expected = []
    for _ in range(9):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates(config, method, 0) == pytest.approx(expected, rel=1e-12)


def test_schedule_state_is_json(method):
    config = OptimConfig(lr=0.3, lr_step_epochs=2)
    optimizer = build_optimizer(config, method)
    schedule = build_schedule(config, optimizer, 0)
    state = schedule.state_dict()
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0),
        ("lr", float("inf")),
        ("momentum", 1),
        ("weight_decay", -1),
        ("epochs", 0),
        ("lr_step_epochs", 0),
        ("lr_gamma", 1.5),
        ("name", "lion"),
        ("learning_rate", 1),
    ],
)
def test_config_rejects_values_out_of_range(field, value):
    with pytest.raises(ValidationError, match=field):
        OptimConfig(**{field: value})

"""OGM-GE against its formula by hand (methods.md 4.2)."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests.training.toys import make_batch, random_batch, tiny_model
from training.batch import Progress
from training.distributed import reduce_sums
from training.methods import OgmGe, OgmGeConfig
from training.methods.ogm_ge import coefficients
from training.model import MultimodalModel

START = Progress(seed=0, epoch=0, step=0, num_epochs=1)


class Scale(nn.Linear):
    """(B, 2) -> (B, 2), starts as the identity."""

    def __init__(self):
        super().__init__(2, 2)
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)


def three_samples() -> tuple[MultimodalModel, dict]:
    """Two classes; modality "a" separates them, modality "b" hardly does."""
    model = MultimodalModel({"a": Scale(), "b": Scale()}, num_classes=2).double()
    with torch.no_grad():
        model.fusion.weight.copy_(torch.eye(2).repeat(1, 2))
        model.fusion.bias.copy_(torch.tensor([0.2, 0.0], dtype=torch.float64))
    inputs = {
        "a": torch.tensor([[2.0, 0], [0, 2], [1, 0]], dtype=torch.float64),
        "b": torch.tensor([[0.1, 0], [0.2, 0], [0, 0]], dtype=torch.float64),
    }
    return model, inputs


def gradients(method: OgmGe, batch, progress: Progress = START, modulate: bool = True):
    """Gradients by parameter name, and the reduced sums."""
    method.zero_grad()
    output = method(batch, progress)
    output.loss.backward()
    sums = reduce_sums(output.sums)
    if modulate:
        method.after_backward(sums, progress)
    grads = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    return grads, sums


def test_formula_by_hand_on_three_samples():
    model, inputs = three_samples()
    method = OgmGe(model, OgmGeConfig(strength=0.3, noise=False))
    batch = make_batch(inputs, [0, 1, 0])
    plain, _ = gradients(method, batch, modulate=False)
    got, sums = gradients(method, batch)

    def probability(own: float, other: float) -> float:
        return math.exp(own) / (math.exp(own) + math.exp(other))

    # slice logits: features + bias / 2, the bias is (0.2, 0)
    score_a = probability(2.1, 0) + probability(2, 0.1) + probability(1.1, 0)
    score_b = probability(0.2, 0) + probability(0, 0.3) + probability(0.1, 0)
    assert sums["scores"].tolist() == pytest.approx([score_a, score_b], abs=1e-12)
    factor = 1 - math.tanh(0.3 * score_a / score_b)
    assert 0.3 < factor < 0.6

    torch.testing.assert_close(
        got["model.encoders.a.weight"], factor * plain["model.encoders.a.weight"]
    )
    for name in plain.keys() - {"model.encoders.a.weight"}:  # the weaker side, biases, fusion
        assert torch.equal(got[name], plain[name]), name
    assert method.epoch_metrics(sums)["ogm/score/a"] == pytest.approx(score_a / 3)


def test_three_modalities_compare_with_the_lowest():
    expected = [1 - math.tanh(0.1 * 3), 1 - math.tanh(0.1 * 1.5), 1.0]
    got = coefficients(torch.tensor([6.0, 3.0, 2.0]), strength=0.1)
    assert got.tolist() == pytest.approx(expected)
    assert coefficients(torch.tensor([2.0, 2.0]), strength=0.1).tolist() == [1, 1]
    floored = coefficients(torch.tensor([1e-5, 0.0]), strength=0.1)
    assert floored.tolist() == [1, 1]


class Picture(nn.Sequential):
    """(B, 5) -> (B, 4): one convolution, one matrix."""

    out_features = 4

    def __init__(self):
        view = nn.Unflatten(1, (1, 1, 5))
        super().__init__(view, nn.Conv2d(1, 2, (1, 3)), nn.Flatten(), nn.Linear(6, 4))


def test_only_convolutions_are_modulated_where_there_are_any():
    model = tiny_model(2)
    model.encoders["m0"] = Picture()
    batch = random_batch(0, 12)
    names = {}
    for noise in (True, False):
        method = OgmGe(model, OgmGeConfig(strength=0.5, noise=noise))
        plain, _ = gradients(method, batch, modulate=False)
        got, sums = gradients(method, batch)
        names[noise] = {name for name in plain if not torch.equal(plain[name], got[name])}
        leader = int(sums["scores"].argmax())
    convolution = {"model.encoders.m0.1.weight"}
    matrices = {"model.encoders.m1.0.weight", "model.encoders.m1.2.weight"}
    assert names[True] == convolution | matrices  # noise goes to both sides
    assert names[False] == (convolution, matrices)[leader]


def test_noise_is_equal_for_equal_seed_epoch_and_step():
    method = OgmGe(tiny_model(2), OgmGeConfig(strength=0.5))
    batch = random_batch(0, 12)
    name = "model.encoders.m0.0.weight"
    first = gradients(method, batch, START)[0][name]
    torch.manual_seed(123)
    assert torch.equal(first, gradients(method, batch, START)[0][name])
    for other in (Progress(1, 0, 0, 1), Progress(0, 1, 0, 1), Progress(0, 0, 1, 1)):
        assert not torch.equal(first, gradients(method, batch, other)[0][name])


def test_noise_has_the_spread_of_the_gradient():
    plain_method = OgmGe(tiny_model(2), OgmGeConfig(strength=0.5, noise=False))
    noisy_method = OgmGe(tiny_model(2), OgmGeConfig(strength=0.5))
    batch = random_batch(0, 12)
    for m in range(2):
        name = f"model.encoders.m{m}.0.weight"
        raw = gradients(plain_method, batch, modulate=False)[0][name]
        plain = gradients(plain_method, batch)[0][name]
        noise = torch.stack(
            [
                gradients(noisy_method, batch, Progress(s, 0, 0, 1))[0][name] - plain
                for s in range(60)
            ]
        )
        assert noise.std() == pytest.approx(float(raw.std()), rel=0.1)
        assert abs(float(noise.mean())) < 0.1 * float(raw.std())


def test_modulation_runs_inside_its_window_only():
    config = OgmGeConfig(strength=0.5, start_epoch=1, end_epoch=2)
    method, batch = OgmGe(tiny_model(2), config), random_batch(0, 12)
    plain, _ = gradients(method, batch, modulate=False)
    changed = []
    for epoch in range(4):
        got, _ = gradients(method, batch, Progress(0, epoch, 0, 4))
        changed.append(any(not torch.equal(got[name], plain[name]) for name in plain))
    assert changed == [False, True, True, False]


def test_window_must_not_be_empty():
    with pytest.raises(ValidationError, match="end_epoch=1 is before start_epoch=5"):
        OgmGeConfig(start_epoch=5, end_epoch=1)

"""Half precision in the encoders: where it is, what it changes, and the loss scale of float16."""

import pytest
import torch
from torch import nn

from tests.training.toys import START, random_batch, tiny_method
from training import precision
from training.batch import Progress
from training.config import EncoderConfig, ModelConfig
from training.encoders import build_model
from training.methods import MidasConfig, build_method
from training.methods.base import HOPELESS, NonFiniteError
from training.modality import ModalitySpec
from training.optim import OptimConfig, build_optimizer
from training.precision import LossScale, best_precision

CPU = torch.device("cpu")
STEPS = 30


def losses(name: str, kind: precision.Precision, seed: int = 0) -> list[float]:
    """Mean loss of every step of a small training."""
    method = tiny_method(name)
    method.use(kind)
    optimizer = build_optimizer(OptimConfig(lr=0.05), method)
    found = []
    for step in range(STEPS):
        batch = random_batch(100 * seed + step, 32)
        sums = method.train_step(method, batch, optimizer, Progress(seed, 0, step, 1))
        found.append(float(sums["loss_sum"] / sums["rows"]))
    return found


@pytest.mark.parametrize("name", ["joint", "midas", "ogm_ge"])
@pytest.mark.parametrize(("kind", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_loss_curve_follows_float32(name, kind, tolerance):
    want, got = losses(name, "fp32"), losses(name, kind)
    assert got != want
    assert got == pytest.approx(want, rel=tolerance)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_only_what_is_inside_encoders_is_half(kind):
    method = tiny_method("midas")
    method.use(kind)
    seen = []
    encoder = method.model.encoders["m0"]
    encoder.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    features = method.model.encode(random_batch(0, 8).inputs)
    assert seen == [precision.HALF[kind]]
    assert {value.dtype for value in features.values()} == {torch.float32}
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    assert method.state_dict()["alpha"].dtype == torch.float64


def test_double_precision_is_double_throughout():
    method = tiny_method("midas")
    method.use("fp64")
    features = method.model.encode(random_batch(0, 8, dtype=torch.float64).inputs)
    assert {value.dtype for value in features.values()} == {torch.float64}


def test_auto_asks_the_processor_and_avoids_narrow_attention(monkeypatch):
    image = ModalitySpec("image", "image", (1, 8, 8))
    text = ModalitySpec("text", "text", (4,), vocab_size=10)
    narrow = ModelConfig(encoders={"text": EncoderConfig(width=64)})
    wide = ModelConfig(encoders={"text": EncoderConfig(width=256)})
    models = [
        build_model(ModelConfig(), [image], 3, 0),
        build_model(narrow, [image, text], 3, 0),
        build_model(wide, [image, text], 3, 0),
    ]
    for amx, avx in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert [best_precision(CPU, model) for model in models] == ["bf16", "fp32", "bf16"]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert [best_precision(CPU, model) for model in models] == ["fp32"] * 3


def test_loss_scale_halves_on_overflow_and_doubles_after_a_good_while(monkeypatch):
    monkeypatch.setattr(precision, "GROWTH_STEPS", 3)
    scale, factors = LossScale(), []
    for finite in (True, False, True, True, True, True):
        scale.update(torch.tensor(finite))
        factors.append(float(scale.factor) / precision.INITIAL_SCALE)
    assert factors == [1, 0.5, 0.5, 0.5, 1, 1]


def test_overflow_leaves_a_step_out_and_training_goes_on():
    method = tiny_method("joint")
    method.use("fp16")
    assert method.loss_scale is not None
    method.loss_scale.factor.fill_(2.0**126)
    optimizer = build_optimizer(OptimConfig(), method)
    before = [p.clone() for p in method.parameters()]
    sums = method.train_step(method, random_batch(0, 16), optimizer, START)
    assert (sums["finite"], sums[HOPELESS]) == (0, 0)
    assert all(map(torch.equal, before, method.parameters()))
    assert method.loss_scale.factor == 2.0**125
    method.loss_scale.factor.fill_(2.0**10)
    assert method.train_step(method, random_batch(0, 16), optimizer, START)["finite"] == 1
    assert not all(map(torch.equal, before, method.parameters()))


def test_overflow_that_no_scale_can_mend_ends_training():
    method = tiny_method("joint")
    method.use("fp16")
    optimizer = build_optimizer(OptimConfig(), method)
    batch = random_batch(0, 16)
    batch.inputs["m0"][0] = float("nan")
    with pytest.raises(NonFiniteError, match="loss is nan"):
        method.train_step(method, batch, optimizer, START)


def test_loss_scale_travels_with_the_state():
    first, second = tiny_method("joint"), tiny_method("joint")
    for method in (first, second):
        method.use("fp16")
    assert first.loss_scale is not None
    assert second.loss_scale is not None
    first.loss_scale.update(torch.tensor(False))
    second.load_state_dict(first.state_dict())
    assert second.loss_scale.factor == precision.INITIAL_SCALE / 2


def test_loss_scale_is_where_the_parameters_are():
    method = tiny_method("joint").to("meta")
    method.use("fp16")
    assert {buffer.device.type for buffer in method.buffers()} == {"meta"}


def test_convolutions_learn_in_bfloat16():
    """A small network in its channels-last layout, against float32."""
    specs = [ModalitySpec("a", "image", (1, 12, 12)), ModalitySpec("b", "audio", (1, 12, 12))]
    curves = {}
    for kind in ("fp32", "bf16"):
        model = build_model(ModelConfig(), specs, 3, seed=0)
        method = build_method("midas", model, {"midas": MidasConfig(warmup_epochs=0)})
        method.use(kind)
        optimizer = build_optimizer(OptimConfig(lr=0.02), method)
        generator = torch.Generator().manual_seed(0)
        curves[kind] = []
        for step in range(12):
            batch = random_batch(step, 24)
            pictures = torch.randn(24, 1, 12, 12, generator=generator)
            pictures += batch.label[:, None, None, None]
            batch.inputs.clear()
            batch.inputs.update(a=pictures, b=-pictures)
            sums = method.train_step(method, batch, optimizer, Progress(0, 0, step, 1))
            curves[kind].append(float(sums["loss_sum"] / sums["rows"]))
    assert curves["bf16"] == pytest.approx(curves["fp32"], rel=0.05)
    assert curves["fp32"][-1] < 0.7 * curves["fp32"][0]


def test_fused_optimizer_accepts_a_phase_that_thaws_parameters():
    """Parameters without momentum beside parameters with it."""
    method = tiny_method("midas", warmup_epochs=1)
    optimizer = build_optimizer(OptimConfig(), method)
    plain = torch.optim.SGD(
        [p.detach().clone().requires_grad_() for p in method.parameters()],
        lr=1e-3,
        momentum=0.9,
        weight_decay=1e-4,
    )
    for epoch in (0, 1, 1):
        method.set_phase(epoch)
        method.train_step(method, random_batch(epoch, 16), optimizer, Progress(0, epoch, 0, 2))
        copies = plain.param_groups[0]["params"]
        for copy, parameter in zip(copies, method.parameters(), strict=True):
            copy.grad = None if parameter.grad is None else parameter.grad.clone()
        plain.step()
    for copy, parameter in zip(plain.param_groups[0]["params"], method.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), copy.detach())
    assert isinstance(method.model.fusion, nn.Linear)

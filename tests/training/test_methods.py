"""The contract of every method, and three kinds of methods that are not in METHODS yet."""

import copy
import io
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.training.toys import NUM_CLASSES, random_batch, tiny_method, tiny_model
from training.batch import Batch, Progress, StepOutput
from training.distributed import reduce_sums, world_size
from training.loop import Hooks, Position, fit
from training.methods import METHODS, SECTIONS, JointUni, build_method
from training.methods.base import (
    EpochData,
    Method,
    NonFiniteError,
    cross_entropy_sum,
    global_mean,
    step_output,
)

STEPS_PER_EPOCH = 5
every_method = pytest.mark.parametrize("name", METHODS)


def optimizer_of(method: Method, lr: float = 0.1) -> torch.optim.Optimizer:
    groups = method.parameter_groups()
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=1e-3)


def batches(epoch: int, num_modalities: int) -> Iterator[Batch]:
    return (random_batch(step, 16, num_modalities) for step in range(STEPS_PER_EPOCH))


def run(method: Method, optimizer, start_epoch: int, num_epochs: int) -> list[dict[str, float]]:
    """Train by the loop of the service; metrics of every epoch."""
    num_modalities, history = len(method.model.modalities), []

    def fresh() -> Iterator[Batch]:
        return batches(0, num_modalities)

    hooks = Hooks(
        wrap=lambda m: m,
        train_batches=lambda epoch, resampling, step: batches(epoch, num_modalities),
        data=EpochData(train=fresh, val=fresh),
        signals=dict,
        on_step=lambda position, signals: None,
        on_trained=lambda position, validates: None,
        validate=dict,
        on_epoch=lambda epoch, metrics: history.append(metrics),
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    fit(
        method,
        optimizer,
        scheduler,
        hooks,
        Position(start_epoch),
        seed=3,
        num_epochs=num_epochs,
        eval_every_epochs=1,
    )
    return history


@every_method
@pytest.mark.parametrize("num_modalities", [2, 3])
def test_twenty_steps_lower_the_loss(name, num_modalities):
    method = tiny_method(name, num_modalities)
    history = run(method, optimizer_of(method), 0, 4)
    losses = [metrics["train/loss"] for metrics in history]
    assert all(math.isfinite(value) for metrics in history for value in metrics.values())
    assert losses[-1] < 0.8 * losses[0]

    batch = random_batch(0, 16, num_modalities)
    outputs = method.predict(method.model.encode(batch.inputs))
    assert set(outputs) == {"fused", *method.model.modalities}
    assert all(logits.shape == (16, NUM_CLASSES) for logits in outputs.values())
    assert (outputs["fused"].argmax(dim=1) == batch.label).float().mean() > 0.7


@every_method
@pytest.mark.parametrize("epoch", [0, 1])
def test_learning_parameters_get_gradients_and_frozen_ones_none(name, epoch):
    """Epoch 0 is warm-up for the methods that have one. DDP needs both halves of this."""
    method = tiny_method(name, warmup_epochs=1)
    method.set_phase(epoch)
    method.train_step(method, random_batch(0, 16), optimizer_of(method), Progress(0, epoch, 0, 2))
    for parameter_name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.abs().sum() > 0, parameter_name
        else:
            assert parameter.grad is None, parameter_name


@pytest.mark.parametrize(
    ("name", "part"),
    [("joint", "heads"), ("ogm_ge", "heads"), ("unimodal", "fusion")],
)
def test_frozen_parts_do_not_move(name, part):
    """Weight decay does not reach them either."""
    method = tiny_method(name)
    before = copy.deepcopy(getattr(method.model, part).state_dict())
    run(method, optimizer_of(method), 0, 1)
    for key, value in getattr(method.model, part).state_dict().items():
        assert torch.equal(value, before[key])


def test_midas_warmup_leaves_the_fusion_head_alone():
    method = tiny_method("midas", warmup_epochs=1)
    before = copy.deepcopy(method.state_dict())
    optimizer = optimizer_of(method)
    history = run(method, optimizer, 0, 1)
    fusion = [name for name in before if ".fusion." in name]
    assert all(torch.equal(method.state_dict()[name], before[name]) for name in fusion)
    assert set(history[0]) >= {"train/loss_uni"}
    assert "train/loss_mis" not in history[0]
    history = run(method, optimizer, 1, 2)
    assert not any(torch.equal(method.state_dict()[name], before[name]) for name in fusion)
    assert "train/loss_mis" in history[0]
    assert [method.is_main_phase(epoch) for epoch in (0, 1)] == [False, True]


@every_method
@pytest.mark.parametrize("warmup_epochs", [1, 2, 3])
def test_resumed_run_equals_straight_run(name, warmup_epochs):
    """Exactly, also when the run stopped before, at or after the end of the warm-up."""
    straight = tiny_method(name, warmup_epochs=warmup_epochs)
    run(straight, optimizer_of(straight), 0, 4)

    first = tiny_method(name, warmup_epochs=warmup_epochs)
    optimizer = optimizer_of(first)
    run(first, optimizer, 0, 2)
    file = io.BytesIO()
    torch.save({"method": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = tiny_method(name, warmup_epochs=warmup_epochs)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()  # what is not restored would be seen
    resumed.load_state_dict(saved["method"])
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    run(resumed, optimizer, 2, 4)
    for key, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    if name == "midas" and warmup_epochs < 2:
        assert not torch.equal(saved["method"]["alpha"], torch.ones(2, dtype=torch.float64))


@every_method
@pytest.mark.parametrize("num_modalities", [2, 3])
def test_batch_of_one_row(name, num_modalities):
    method = tiny_method(name, num_modalities)
    batch = random_batch(0, 1, num_modalities)
    sums = method.train_step(method, batch, optimizer_of(method), Progress(0, 0, 0, 1))
    assert sums["rows"] == 1
    assert torch.isfinite(sums["loss_sum"])
    assert all(math.isfinite(value) for value in method.epoch_metrics(sums).values())


@every_method
def test_loss_sum_is_the_loss_times_rows(name):
    method, batch = tiny_method(name), random_batch(0, 16)
    output = method(batch, Progress(0, 0, 0, 1))
    torch.testing.assert_close(output.sums["loss_sum"], output.loss.detach() * 16)
    assert output.sums["rows"] == 16
    assert not any(value.requires_grad for value in output.sums.values())


@every_method
def test_nan_input_stops_before_anything_moves(name):
    method = tiny_method(name)
    optimizer = optimizer_of(method)
    method.train_step(method, random_batch(0, 16), optimizer, Progress(0, 0, 0, 1))
    before = copy.deepcopy(method.state_dict())
    bad = random_batch(1, 16)
    bad.inputs["m0"][3, 0] = math.nan
    with pytest.raises(NonFiniteError, match="training loss is nan"):
        method.train_step(method, bad, optimizer, Progress(0, 0, 1, 1))
    for key, value in method.state_dict().items():
        assert torch.equal(value, before[key]), key


@every_method
def test_steps_leave_the_global_random_state_alone(name):
    method = tiny_method(name)
    optimizer = optimizer_of(method)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    method.train_step(method, random_batch(0, 16), optimizer, Progress(0, 0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_unimodal_fused_is_the_mean_probability():
    method, batch = tiny_method("unimodal", 3), random_batch(0, 8, 3)
    outputs = method.predict(method.model.encode(batch.inputs))
    mean = torch.stack([outputs[m].softmax(dim=1) for m in method.model.modalities]).mean(dim=0)
    torch.testing.assert_close(outputs["fused"].softmax(dim=1), mean)


def test_unknown_method_lists_the_known():
    with pytest.raises(ValueError, match="'midsa' does not exist; use one of: joint, joint_uni"):
        build_method("midsa", tiny_model(2), {})
    assert set(SECTIONS) <= set(METHODS)


# Kinds of methods that are still to come (methods.md 6.2); none needs a change of the loop


class ParetoLike(JointUni):
    """Per-loss gradients, combined to the shortest convex combination (as MMPareto does)."""

    def epoch_metrics(self, sums):
        return {}

    def train_step(self, wrapped, batch, optimizer, progress) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        features = self.model.encode(batch.inputs)
        parameters = list(self.model.encoders.parameters())
        align = cross_entropy_sum(self.model.fuse(features), batch.label)
        logits = self.model.unimodal_logits(features).values()
        uni = torch.stack([cross_entropy_sum(z, batch.label) for z in logits]).sum()
        flat = []
        for loss in (align, uni):
            scaled = global_mean(loss, batch.global_rows)
            grads = torch.autograd.grad(scaled, parameters, retain_graph=True)
            flat.append(torch.cat([g.flatten() for g in grads]) / world_size())
        global_mean(align + uni, batch.global_rows).backward()  # heads keep the plain gradient
        sums = reduce_sums(
            {"align": flat[0], "uni": flat[1], **step_output(align + uni, batch).sums}
        )
        difference = sums["align"] - sums["uni"]
        weight = (-(difference @ sums["uni"]) / difference.square().sum()).clamp(0, 1)
        combined = (sums["uni"] + weight * difference).to(flat[0].dtype)
        pieces = combined.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.reshape(parameter.shape)
        self.combined = combined
        optimizer.step()
        return sums


class PrototypeLike(JointUni):
    """Class means of every modality from a pass before the epoch, pulled at in the loss (PMR)."""

    def __init__(self, model):
        super().__init__(model)
        self.register_buffer("prototypes", torch.zeros(len(model.modalities), NUM_CLASSES, 4))

    def before_epoch(self, data: EpochData, progress: Progress) -> None:
        total, count = torch.zeros_like(self.prototypes), torch.zeros(NUM_CLASSES)
        with torch.no_grad():
            for batch in data.train():
                one_hot = nn.functional.one_hot(batch.label, NUM_CLASSES).float()
                features = self.model.encode(batch.inputs).values()
                total += torch.stack([one_hot.T @ f for f in features])
                count += one_hot.sum(dim=0)
        sums = reduce_sums({"total": total, "count": count})
        self.prototypes.copy_(sums["total"] / sums["count"].clamp_min(1)[:, None])

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        plain = super().forward(batch, progress)
        features = self.model.encode(batch.inputs).values()
        distances = [torch.cdist(f, c) for f, c in zip(features, self.prototypes, strict=True)]
        pull = sum(
            (cross_entropy_sum(-d, batch.label) for d in distances), plain.loss.new_zeros(())
        )
        return step_output(plain.loss + global_mean(pull, batch.global_rows), batch)

    def epoch_metrics(self, sums):
        return {}


class EntropyMix(JointUni):
    """Evaluation by unimodal heads, the surer the heavier (MLA)."""

    def predict(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.model.unimodal_logits(features)
        p = torch.stack([z.softmax(dim=1) for z in logits.values()])
        entropy = -(p * p.log()).sum(dim=2)
        weight = (entropy.amax(dim=0) - entropy).softmax(dim=0)
        return {"fused": (weight[..., None] * p).sum(dim=0).log(), **logits}


def test_per_loss_gradients_fit_the_interface():
    method = ParetoLike(tiny_model(2))
    optimizer = optimizer_of(method, lr=0.2)
    sums = method.train_step(method, random_batch(0, 16), optimizer, Progress(0, 0, 0, 1))
    shortest = min(float(sums["align"].norm()), float(sums["uni"].norm()))
    assert 0 < float(method.combined.norm()) <= shortest + 1e-6
    history = run(method, optimizer, 0, 4)
    assert history[-1]["train/loss"] < 0.9 * history[0]["train/loss"]


def test_prototypes_fit_the_interface():
    method = PrototypeLike(tiny_model(2))
    history = run(method, optimizer_of(method), 0, 4)
    assert history[-1]["train/loss"] < 0.8 * history[0]["train/loss"]

    method.before_epoch(
        EpochData(train=lambda: batches(0, 2), val=lambda: batches(0, 2)), Progress(0, 0, 0, 1)
    )
    rows = list(batches(0, 2))
    features = torch.cat([method.model.encode(b.inputs)["m1"] for b in rows])
    label = torch.cat([b.label for b in rows])
    torch.testing.assert_close(method.prototypes[1, 2], features[label == 2].mean(dim=0).detach())


def test_prediction_override_fits_the_interface():
    method = EntropyMix(tiny_model(2))
    run(method, optimizer_of(method), 0, 2)
    features = method.model.encode(random_batch(0, 16).inputs)
    features["m1"] = torch.zeros_like(features["m1"])  # an unsure modality
    with torch.no_grad():
        method.model.heads["m1"].bias.zero_()
    outputs = method.predict(features)
    assert torch.equal(outputs["fused"].argmax(dim=1), outputs["m0"].argmax(dim=1))
    torch.testing.assert_close(outputs["fused"].exp().sum(dim=1), torch.ones(16))

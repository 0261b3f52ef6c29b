"""Samples that lack a modality: what they give to every loss, statistic and metric."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.training.toys import (
    START,
    make_batch,
    random_batch,
    select_rows,
    tiny_method,
    tiny_model,
    with_missing,
)
from training.batch import Batch
from training.distributed import reduce_sums
from training.methods import METHODS
from training.methods.base import Method, cross_entropy_sum

every_method = pytest.mark.parametrize("name", METHODS)


def gradients(method: Method, batch: Batch) -> dict[str, Tensor]:
    """Loss and gradients of one pass, by name."""
    method.zero_grad()
    output = method(batch, START)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), **found}


def test_absent_features_are_zeros_and_get_no_gradient():
    model, batch = tiny_model(2), with_missing(random_batch(0, 12))
    plain = model.encode(batch.inputs)
    found = model.encode(batch.inputs, batch.present)
    for m, name in enumerate(model.modalities):
        here = batch.present[:, m]
        assert 0 < here.sum() < 12
        assert torch.equal(found[name][here], plain[name][here])
        assert not found[name][~here].any()
    inputs = {name: value.requires_grad_() for name, value in batch.inputs.items()}
    model.fuse(model.encode(inputs, batch.present)).sum().backward()
    reached = torch.stack([value.grad.any(dim=1) for value in inputs.values()], dim=1)
    assert torch.equal(reached, batch.present)


def test_complete_rows():
    batch = make_batch({}, [0, 1, 2])
    assert batch.complete.tolist() == [True, True, True]
    present = torch.tensor([[True, True], [True, False], [False, False]])
    assert replace(batch, present=present).complete.tolist() == [True, False, False]


@every_method
def test_nothing_missing_is_the_same_as_no_mask(name):
    batch = random_batch(0, 16, 3)
    method = tiny_method(name, 3)
    plain = gradients(method, batch)
    masked = gradients(method, replace(batch, present=torch.ones(16, 3, dtype=torch.bool)))
    assert plain.keys() == masked.keys()
    for key, value in plain.items():
        torch.testing.assert_close(masked[key], value, rtol=0, atol=1e-7, msg=key)


@every_method
def test_what_stands_in_an_absent_input_does_not_matter(name):
    batch = with_missing(random_batch(0, 16))
    other = {
        key: torch.where(batch.present[:, m, None], value, -3.0)
        for m, (key, value) in enumerate(batch.inputs.items())
    }
    method = tiny_method(name)
    first, second = (gradients(method, b) for b in (batch, replace(batch, inputs=other)))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=1e-6, msg=key)


@every_method
@pytest.mark.parametrize("modality", [0, 1])
def test_a_modality_that_all_rows_lack_still_has_gradients(name, modality):
    """DDP waits for them; the encoder's are zero, and whatever is reported is finite."""
    batch, method = random_batch(0, 16), tiny_method(name)
    present = torch.ones(16, 2, dtype=torch.bool)
    present[:, modality] = False
    found = gradients(method, replace(batch, present=present))
    learning = {key for key, p in method.named_parameters() if p.requires_grad}
    assert found.keys() - {"loss"} == learning
    for key, value in found.items():
        assert bool(value.isfinite().all()), key
        if f"encoders.m{modality}." in key:
            assert not value.any(), key
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.1)
    sums = method.train_step(method, replace(batch, present=present), optimizer, START)
    assert all(value == value for value in method.epoch_metrics(sums).values())


@pytest.mark.parametrize("name", ["joint_uni", "unimodal", "midas"])
def test_unimodal_losses_are_of_the_rows_that_have_the_modality(name):
    """Row by row, divided by all rows; MIDAS in its warm-up."""
    batch = with_missing(random_batch(0, 16))
    method = tiny_method(name, warmup_epochs=1)
    features = method.model.encode(batch.inputs, batch.present)
    logits = method.model.unimodal_logits(features)
    total = torch.zeros(())
    for row in range(16):
        one = slice(row, row + 1)
        if name == "joint_uni":
            total = total + cross_entropy_sum(method.model.fuse(features)[one], batch.label[one])
        for m, z in enumerate(logits.values()):
            if batch.present[row, m]:
                total = total + cross_entropy_sum(z[one], batch.label[one])
    torch.testing.assert_close(method(batch, START).loss, total / 16)


@pytest.mark.parametrize("variant", ["paper", "official_code"])
@pytest.mark.parametrize("pair_groups", [1, 2])
def test_midas_pairs_only_complete_rows(variant, pair_groups):
    """Misaligned loss and statistics are those of the batch of complete rows."""
    batch = with_missing(random_batch(0, 24))
    assert 4 < batch.complete.sum() < 20
    method = tiny_method("midas", variant=variant, pair_groups=pair_groups)
    found = reduce_sums(method(batch, START).sums)
    alone = reduce_sums(method(select_rows(batch, batch.complete), START).sums)
    names = ["loss_mis", "n_valid", "raw_uni", "raw_multi", "conf_uni", "conf_multi", "s_sum"]
    for name in names:
        torch.testing.assert_close(found[name], alone[name], rtol=1e-5, atol=0, msg=name)
    assert found["n_valid"] > 4
    for name in ("loss_align", "loss_uni"):
        assert found[name] > alone[name] + 0.5


@pytest.mark.parametrize("pairing", ["mismatch", "permutation", "confusion"])
def test_midas_without_complete_rows_has_no_misaligned_loss(pairing):
    batch = random_batch(0, 8)
    present = torch.tensor([[True, False], [False, True]]).repeat(4, 1)
    method = tiny_method("midas", pairing=pairing)
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.1)
    sums = method.train_step(method, replace(batch, present=present), optimizer, START)
    assert float(sums["n_valid"]) == 0
    assert float(sums["loss_mis"]) == 0
    assert method.alpha.tolist() == [1, 1]


def test_ogm_scores_are_of_the_complete_rows():
    """A modality that is often absent would look weak otherwise."""
    batch = with_missing(random_batch(0, 24))
    method = tiny_method("ogm_ge")
    found = reduce_sums(method(batch, START).sums)
    alone = reduce_sums(method(select_rows(batch, batch.complete), START).sums)
    torch.testing.assert_close(found["scores"], alone["scores"])
    assert found["complete"] == batch.complete.sum()
    assert method.epoch_metrics(found) == pytest.approx(method.epoch_metrics(alone))

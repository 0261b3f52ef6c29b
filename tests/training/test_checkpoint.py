"""Checkpoints: resuming is exact, and whatever is wrong with the files is named."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from training import checkpoint as checkpoints
from training.batch import Batch, Progress, StepOutput
from training.checkpoint import CheckpointError, pack
from training.config import EncoderConfig, ModelConfig
from training.encoders import build_model
from training.loop import Position
from training.methods.base import Method, Resampling
from training.modality import ModalitySpec
from training.optim import OptimConfig, build_optimizer, build_schedule

MODALITIES = [ModalitySpec("image", "image", (1, 8, 8)), ModalitySpec("text", "vector", (3,))]


class Stateful(Method):
    """Joint training with the kinds of state that files find hard: see the buffers."""

    scale: Tensor

    def __init__(self, width: int = 4, seed: int = 0):
        config = ModelConfig(encoders={"image": EncoderConfig(width=width)})
        super().__init__(build_model(config, MODALITIES, 3, seed))
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("strided", torch.arange(6.0).reshape(2, 3).T)
        self.register_buffer("slice", torch.arange(6.0)[2:4])
        self.register_buffer("empty", torch.zeros(0, 2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.tied = self.frozen

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        features = self.model.encode(batch.inputs)
        loss = nn.functional.cross_entropy(self.model.fuse(features) * self.scale, batch.label)
        sums = {"loss_sum": loss.detach() * 8, "rows": torch.tensor(8.0)}
        return StepOutput(loss, sums)

    def after_step(self, sums: dict[str, Tensor], progress: Progress) -> None:
        self.scale.mul_(1.01)
        self.seen.add_(8)


class WithExtraState(nn.Module):
    """A module that would need pickle."""

    def get_extra_state(self) -> dict[str, int]:
        return {"score": 1}


class Run:
    """A method with its optimizer and schedule; one optimizer step per epoch."""

    def __init__(self, name: str = "sgd", **settings):
        self.method = Stateful(**settings)
        config = OptimConfig(name=name, lr=0.01, lr_step_epochs=3, lr_gamma=0.3)
        self.optimizer = build_optimizer(config, self.method)
        self.schedule = build_schedule(config, self.optimizer, 0)

    @property
    def parts(self):
        return self.method, self.optimizer, self.schedule

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            progress = Progress(seed=0, epoch=step, step=0, num_epochs=stop)
            generator = progress.generator("rows")
            inputs = {
                "image": torch.rand(8, 1, 8, 8, generator=generator),
                "text": torch.rand(8, 3, generator=generator),
            }
            label = torch.randint(0, 3, (8,), generator=generator)
            batch = Batch(inputs, label, torch.arange(8), torch.zeros(8, dtype=torch.int64), 1, 8)
            self.method.train_step(self.method, batch, self.optimizer, progress)
            self.schedule.step()


def save(folder: Path, *parts, notes, position: Position | None = None) -> None:
    for name, content in pack(*parts, position or Position(), notes).files().items():
        (folder / name).write_bytes(content)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load(folder: Path, *parts):
    return checkpoints.load(files(folder), str(folder), *parts)


def load_weights(folder: Path, method: Method) -> None:
    checkpoints.load_weights(files(folder), str(folder), method)


@pytest.fixture
def saved(tmp_path) -> Path:
    run = Run()
    run.train(0, 2)
    save(tmp_path, *run.parts, notes={"best": 2})
    return tmp_path


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_resumed_run_equals_straight_run_bit_for_bit(name, tmp_path):
    straight, first, second = Run(name), Run(name), Run(name, seed=1)
    straight.train(0, 10)
    first.train(0, 5)
    notes = {"best": {"val/accuracy": 0.1 + 0.2}, "others": [None, True]}
    save(tmp_path, *first.parts, notes=notes)
    assert load(tmp_path, *second.parts)[1] == notes
    second.train(5, 10)
    for key, expected in straight.method.state_dict().items():
        assert torch.equal(second.method.state_dict()[key], expected), key
    resumed, reference = second.optimizer.state_dict(), straight.optimizer.state_dict()
    assert resumed["param_groups"] == reference["param_groups"]
    assert resumed["state"].keys() == reference["state"].keys()
    for key, expected in reference["state"].items():
        actual = resumed["state"][key]
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[part], value) for part, value in expected.items())
    assert second.schedule.state_dict() == straight.schedule.state_dict()
    assert second.optimizer.param_groups[0]["lr"] < 0.01


def test_fresh_run_can_be_saved(tmp_path):
    run, other = Run(), Run(seed=1)
    save(tmp_path, *run.parts, notes={})
    load(tmp_path, *other.parts)
    run.train(0, 2)
    other.train(0, 2)
    assert torch.equal(other.method.model.fusion.weight, run.method.model.fusion.weight)


def test_weights_alone(saved):
    method, optimizer, _ = Run("adam", seed=1).parts
    load_weights(saved, method)
    stored = load_file(saved / "model.safetensors")
    assert stored.keys() == method.state_dict().keys()
    assert all(torch.equal(value, stored[key]) for key, value in method.state_dict().items())
    assert int(method.seen) == 16
    assert not optimizer.state


def test_loading_keeps_the_device_and_the_objects(saved):
    run = Run(seed=1)
    before = {name: id(parameter) for name, parameter in run.method.named_parameters()}
    load(saved, *run.parts)
    assert {name: id(parameter) for name, parameter in run.method.named_parameters()} == before
    buffer = run.optimizer.state[run.method.model.fusion.weight]["momentum_buffer"]
    assert buffer.device == run.method.model.fusion.weight.device


def test_folder_holds_tensors_and_json_only(saved):
    tensors = ["model.safetensors", "optimizer.safetensors", "position.safetensors"]
    assert sorted(path.name for path in saved.iterdir()) == [*tensors, "state.json"]
    state = json.loads((saved / "state.json").read_text())
    assert state["format_version"] == 3
    digest = hashlib.sha256((saved / "optimizer.safetensors").read_bytes()).hexdigest()
    assert state["sha256"]["optimizer.safetensors"] == digest
    assert "momentum_buffer/model.fusion.weight" in load_file(saved / "optimizer.safetensors")


def test_position_travels(tmp_path):
    """Sums keep all bits, also those that are not finite; resampled rows come back."""
    run = Run()
    totals = {
        "rows": torch.tensor(0.1, dtype=torch.float64) * 3,
        "conf": torch.tensor([float("nan"), 1e-300], dtype=torch.float64),
    }
    keep = torch.tensor([[True, False], [False, True]])
    position = Position(3, 2, 11, totals, 0.1 + 0.2, Resampling(torch.tensor([5, 7]), keep))
    save(tmp_path, *run.parts, notes={}, position=position)
    back, _ = load(tmp_path, *Run().parts)
    values = ("epoch", "step", "steps_done", "seconds")
    assert [getattr(back, name) for name in values] == [3, 2, 11, 0.1 + 0.2]
    assert back.totals.keys() == totals.keys()
    for name, value in totals.items():
        torch.testing.assert_close(back.totals[name], value, atol=0, rtol=0, equal_nan=True)
    assert back.resampling is not None
    assert back.resampling.sample_id.tolist() == [5, 7]
    assert torch.equal(back.resampling.keep, keep)


def test_packed_state_does_not_follow_training(tmp_path):
    run = Run()
    packed = pack(*run.parts, Position(), {})
    before = packed.files()
    run.train(0, 2)
    assert packed.files() == before


def test_marker_comes_last():
    names = list(pack(*Run().parts, Position(), {}).files())
    assert names[-1] == "state.json"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_changed_byte_is_found(saved, name):
    content = bytearray((saved / name).read_bytes())
    content[-1] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} is corrupt.*SHA-256.*older checkpoint"):
        load(saved, *Run().parts)


def test_missing_tensor_file_is_named(saved):
    (saved / "optimizer.safetensors").unlink()
    load_weights(saved, Stateful())
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is missing"):
        load(saved, *Run().parts)


@pytest.mark.parametrize("content", ["", "[1]", "{}"])
def test_broken_state_is_named(saved, content):
    (saved / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json is corrupt"):
        load_weights(saved, Stateful())


def test_other_format_is_refused(saved):
    state = json.loads((saved / "state.json").read_text()) | {"format_version": 4}
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="format_version 4; this program reads 3"):
        load_weights(saved, Stateful())


def test_file_that_is_not_safetensors_is_named():
    """All recorded hashes are right, the content is not."""
    packed = pack(*Run().parts, Position(), {})
    junk = replace(packed, tensors=packed.tensors | {"model.safetensors": b"junk"})
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        checkpoints.load_weights(junk.files(), "memory", Stateful())


def test_changed_digit_in_the_state_is_found(saved):
    text = (saved / "state.json").read_text()
    (saved / "state.json").write_text(text.replace('"steps_done": 0', '"steps_done": 1'))
    with pytest.raises(CheckpointError, match=r"state\.json is corrupt.*older checkpoint"):
        load(saved, *Run().parts)


def test_first_different_shape_is_named_and_nothing_moves(saved):
    run = Run(width=5, seed=1)
    before = {name: value.clone() for name, value in run.method.state_dict().items()}
    name = r"model\.encoders\.image\.body\.0\.weight"
    with pytest.raises(
        CheckpointError, match=rf"'{name}' is float32 \(4, 1, 3, 3\).*\(5, 1, 3, 3\) in this model"
    ):
        load(saved, *run.parts)
    assert all(torch.equal(before[key], value) for key, value in run.method.state_dict().items())
    assert not any(entry["momentum_buffer"].any() for entry in run.optimizer.state.values())


def test_first_different_name_is_named(saved):
    method = Stateful()
    method.register_buffer("extra", torch.zeros(1))
    with pytest.raises(CheckpointError, match="'extra' is absent in .* and float32"):
        load_weights(saved, method)
    less = Stateful()
    del less.seen
    with pytest.raises(CheckpointError, match=r"'seen' is int64 \(\) in .* and absent"):
        load_weights(saved, less)


def test_other_optimizer_is_refused_and_nothing_moves(saved):
    run = Run("adam", seed=1)
    weight = run.method.model.fusion.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"state of SGD, this run uses Adam.*optim\.name"):
        load(saved, *run.parts)
    assert torch.equal(run.method.model.fusion.weight, weight)


def test_other_groups_are_refused(saved):
    method = Stateful()
    parameters = list(method.parameters())
    reversed_order = torch.optim.SGD(parameters[::-1], lr=1)
    with pytest.raises(CheckpointError, match="at parameter 'frozen' of group 0"):
        load(saved, method, reversed_order, Run().schedule)
    fewer = torch.optim.SGD(parameters[:-1], lr=1)
    last = list(dict(method.named_parameters()))[-1]
    with pytest.raises(CheckpointError, match=f"at parameter '{last}' of group 0"):
        load(saved, method, fewer, Run().schedule)


def test_state_that_is_not_a_tensor_is_refused(tmp_path):
    run = Run()
    run.method.extra = WithExtraState()
    with pytest.raises(CheckpointError, match="'extra._extra_state' is a dict.*make it a buffer"):
        save(tmp_path, *run.parts, notes={})
    assert not list(tmp_path.iterdir())

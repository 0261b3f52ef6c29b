"""What takes the steps of a run: the precision it keeps, and what it compiles."""

import os
from pathlib import Path

import pytest
import torch
from torch.cuda._utils import _get_device_index

from data.folder import Folder
from data.prepare import prepare
from data.schema import Manifest
from service.config import load_preset
from service.engine import CUBLAS_WORKSPACE, State
from service.launch import base_payload
from service.stepper import Stepper
from service.trial import _device

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder: Path = tmp_path_factory.mktemp("digits")
    return prepare(load_preset("digits").data, folder).manifest


def stepper(manifest: Manifest, **train) -> Stepper:
    preset = load_preset("digits")
    changed = preset.train.model_copy(update=train)
    return Stepper(preset.model_copy(update={"train": changed}), manifest, CPU)


@pytest.mark.parametrize("good", [True, False])
def test_auto_takes_the_best_and_a_checkpoint_keeps_what_it_had(manifest, monkeypatch, good):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: good)
    found = stepper(manifest)
    assert found.precision == ("bf16" if good else "fp32")
    for kept in ("fp32", "bf16"):
        found.keep_precision({"precision": kept})
        assert found.precision == kept


def test_a_precision_that_is_set_stays(manifest):
    found = stepper(manifest, precision="fp16")
    found.keep_precision({"precision": "bf16"})
    assert found.precision == "fp16"
    assert "loss_scale.factor" in found.method.state_dict()


def test_widened_state_is_double_and_has_no_half(manifest):
    found = stepper(manifest, precision="bf16")
    found.widen()
    assert found.precision == "fp64"
    states = [value for entry in found.optimizer.state.values() for value in entry.values()]
    assert {value.dtype for value in [*states, *found.method.parameters()]} == {torch.float64}


def test_a_deterministic_process_tells_cublas_before_it_is_used(manifest, monkeypatch, tmp_path):
    monkeypatch.setenv(CUBLAS_WORKSPACE[0], "")
    monkeypatch.delenv(CUBLAS_WORKSPACE[0])
    preset = load_preset("digits")
    train = preset.train.model_copy(update={"deterministic": True})
    settings = {"train": train, "name": "run", "storage": str(tmp_path)}
    config = preset.model_copy(update=settings)
    try:
        State(base_payload(config, manifest, Folder.at(tmp_path)), CPU)
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ[CUBLAS_WORKSPACE[0]] == ":4096:8"


def test_the_gpu_of_a_trial_has_a_number():
    """torch.cuda.set_device refuses one without."""
    assert _get_device_index(_device({"on_gpu": True})) == 0
    assert _device({"on_gpu": False}) == CPU


def test_compile_concerns_the_encoders_alone(manifest):
    plain, compiled = stepper(manifest), stepper(manifest, compile=True)
    assert plain.method.state_dict().keys() == compiled.method.state_dict().keys()
    for found, expected in ((plain, False), (compiled, True)):
        bodies = [encoder.body for encoder in found.method.model.encoders.children()]
        assert all((body._compiled_call_impl is not None) == expected for body in bodies)

"""Checkpoints: all that training needs to go on bit for bit, as tensors and JSON, never pickle.

A checkpoint is a folder with `model.safetensors` (the method's state dict, buffers included),
`optimizer.safetensors` (tensors named `<state>/<parameter>`) and `state.json`: format version,
SHA-256 of both tensor files, the rest of the optimizer's state, the schedule and the progress.
`state.json` is written last, so a folder without it is not a checkpoint.
"""

import hashlib
import json
import os
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from training.methods.base import Method

FORMAT_VERSION = 1
MODEL_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"
REMEDY = "use an older checkpoint"


class CheckpointError(ValueError):
    """A checkpoint is missing, corrupt or of another model; the message says what to do."""


def save(
    folder: Path,
    method: Method,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    progress: dict[str, Any],
) -> None:
    """Write a checkpoint into `folder`; one that is already there stops being one at once.

    Args:
        folder: created if missing.
        method: the method itself, not its DDP wrapper.
        optimizer: over parameters of `method`.
        scheduler: its state dict must hold JSON values only.
        progress: JSON values; `load` returns them.

    Raises:
        CheckpointError: the method's state dict holds something other than tensors.
    """
    optimizer_tensors, optimizer_rest = _pack_optimizer(optimizer, method)
    files = {
        MODEL_NAME: serialise_tensors(_portable(method.state_dict())),
        OPTIMIZER_NAME: serialise_tensors(_portable(optimizer_tensors)),
    }
    state = {
        "format_version": FORMAT_VERSION,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "optimizer": optimizer_rest,
        "scheduler": scheduler.state_dict(),
        "progress": progress,
    }
    files[STATE_NAME] = (json.dumps(state, indent=2) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATE_NAME).unlink(missing_ok=True)
    for name, content in files.items():
        _write(folder / name, content)


def load(
    folder: Path,
    method: Method,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
) -> dict[str, Any]:
    """Restore what is given from `folder`, onto the parameters' devices; returns the progress.

    Everything is checked before anything changes.

    Raises:
        CheckpointError: a file is missing or corrupt, or the checkpoint is of another model or
            optimizer (the first difference is named).
    """
    state = _read_state(folder)
    weights = _read_tensors(folder, MODEL_NAME, state)
    _check_weights(folder, method, weights)
    if optimizer is not None:
        tensors = _read_tensors(folder, OPTIMIZER_NAME, state)
        restored = _unpack_optimizer(folder, optimizer, method, tensors, state["optimizer"])
        optimizer.load_state_dict(restored)
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    method.load_state_dict(weights)
    return state["progress"]


def load_weights(folder: Path, method: Method) -> None:
    """Restore parameters and buffers only; raises like `load`."""
    load(folder, method)


def _portable(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Contiguous CPU copies: safetensors refuses shared memory and strides."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"state {name!r} is a {type(value).__name__}; a checkpoint holds tensors only, "
                "without pickle; make it a buffer"
            )
    return {
        name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()
    }


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _group_names(optimizer: Optimizer, method: Method) -> list[list[str]]:
    """Names of the parameters of every group, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    return [
        [names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups
    ]


def _pack_optimizer(
    optimizer: Optimizer, method: Method
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by `<state>/<parameter>`, and the rest as JSON values with names for indices."""
    state = optimizer.state_dict()
    group_names = _group_names(optimizer, method)
    names = [name for group in group_names for name in group]
    values = [
        (names[index], key, value)
        for index, entry in state["state"].items()
        for key, value in entry.items()
    ]
    rest: dict[str, dict[str, Any]] = {names[index]: {} for index in state["state"]}
    for name, key, value in values:
        if not isinstance(value, Tensor):
            rest[name][key] = value
    groups = [
        group | {"params": members}
        for group, members in zip(state["param_groups"], group_names, strict=True)
    ]
    packed = {"class": type(optimizer).__name__, "state": rest, "param_groups": groups}
    tensors = {f"{key}/{name}": value for name, key, value in values if isinstance(value, Tensor)}
    return tensors, packed


def _unpack_optimizer(
    folder: Path,
    optimizer: Optimizer,
    method: Method,
    tensors: dict[str, Tensor],
    packed: dict[str, Any],
) -> dict[str, Any]:
    """Inverse of `_pack_optimizer`: a state dict for `optimizer`."""
    if packed["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"{folder} holds the state of {packed['class']}, this run uses "
            f"{type(optimizer).__name__}; resuming needs the same optimizer; set optim.name back "
            "or start a new run"
        )
    group_names = _group_names(optimizer, method)
    _check_groups(folder, [group["params"] for group in packed["param_groups"]], group_names)
    names = [name for group in group_names for name in group]
    index = {name: position for position, name in enumerate(names)}
    state = {index[name]: dict(entry) for name, entry in packed["state"].items()}
    for full_name, value in tensors.items():
        key, name = full_name.split("/", 1)
        state[index[name]][key] = value
    own_groups = optimizer.state_dict()["param_groups"]
    groups = [
        _like(saved, own) | {"params": own["params"]}
        for saved, own in zip(packed["param_groups"], own_groups, strict=True)
    ]
    return {"state": state, "param_groups": groups}


def _like(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Group settings with JSON lists turned into tuples (Adam's betas) where `own` has them."""
    return {
        key: tuple(value) if isinstance(own.get(key), tuple) else value
        for key, value in saved.items()
    }


def _check_groups(folder: Path, saved: list[list[str]], own: list[list[str]]) -> None:
    flat_saved = [(group, name) for group, names in enumerate(saved) for name in names]
    flat_own = [(group, name) for group, names in enumerate(own) for name in names]
    for there, here in zip_longest(flat_saved, flat_own):
        if there != here:
            group, name = there or here
            raise CheckpointError(
                f"optimizer state in {folder} differs from this run's at parameter {name!r} of "
                f"group {group}; resuming needs the same parameters in the same groups and order; "
                "use the settings of the run that wrote it"
            )


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {STATE_NAME}, so it is not a checkpoint (the file is written last); "
            f"{REMEDY}"
        )
    try:
        state = json.loads(path.read_bytes())
        version = state["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is corrupt ({type(error).__name__}: {error}); it must be JSON with a "
            f"format_version; {REMEDY}"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version}; this program reads {FORMAT_VERSION}; use the "
            "program that wrote it"
        )
    return state


def _read_tensors(folder: Path, name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of a file whose bytes have the recorded SHA-256."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {STATE_NAME} lists it; {REMEDY}")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != state["sha256"][name]:
        raise CheckpointError(
            f"{path} is corrupt: its SHA-256 is {digest}, {STATE_NAME} says "
            f"{state['sha256'][name]}; {REMEDY}"
        )
    try:
        return parse_tensors(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}; {REMEDY}") from error


def _check_weights(folder: Path, method: Method, weights: dict[str, Tensor]) -> None:
    """Same names, shapes and dtypes on both sides."""
    own: dict[str, Tensor] = method.state_dict()
    for name in [*own, *weights]:
        here, there = _signature(own.get(name)), _signature(weights.get(name))
        if here != there:
            raise CheckpointError(
                f"{name!r} is {there} in {folder} and {here} in this model; names, shapes and "
                "dtypes must be equal; use the data set, model and method settings of the run "
                "that wrote it"
            )


def _signature(value: Tensor | None) -> str:
    if value is None:
        return "absent"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"

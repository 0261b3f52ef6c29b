"""Checkpoints: all that training needs to go on bit for bit, as tensors and JSON, never pickle.

A checkpoint is four files: `model.safetensors` (the method's state dict, buffers included),
`optimizer.safetensors` (tensors named `<state>/<parameter>`), `position.safetensors` (sums of the
running epoch, and its rows if they were resampled) and `state.json`: format version, SHA-256 of the
tensor files and of itself, the rest of the optimizer's state, the schedule and the position. There
is no state of random generators: all randomness is derived from (seed, epoch, step).

`state.json` is the marker: it is to be written last and removed first, so that files without it are
not a checkpoint. Where the files are kept is the caller's business.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from training.loop import Position
from training.methods.base import Method, Resampling

FORMAT_VERSION = 3
MODEL_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
POSITION_NAME = "position.safetensors"
STATE_NAME = "state.json"
STATE_HASH = "sha256_of_the_rest"
WEIGHTS_FILES = (MODEL_NAME, STATE_NAME)
REMEDY = "use an older checkpoint"


class CheckpointError(ValueError):
    """A checkpoint is missing, corrupt or of another model; the message says what to do."""


@dataclass(frozen=True)
class Packed:
    """A copy of the state of training, independent of what training does next.

    Attributes:
        tensors: name and content of the tensor files.
        state: content of the marker, without hashes.
    """

    tensors: dict[str, bytes]
    state: dict[str, Any]

    def files(self) -> dict[str, bytes]:
        """Name -> content, the marker last. Hashes everything: not for the training thread."""
        sha256 = {
            name: hashlib.sha256(content).hexdigest() for name, content in self.tensors.items()
        }
        state = self.state | {"sha256": sha256}
        marker = json.dumps(state | {STATE_HASH: _state_hash(state)}, indent=2) + "\n"
        return {**self.tensors, STATE_NAME: marker.encode()}


def _state_hash(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def pack(
    method: Method,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    position: Position,
    notes: dict[str, Any],
) -> Packed:
    """Copy all state that the steps after `position` depend on.

    Args:
        method: the method itself, not its DDP wrapper.
        optimizer: over parameters of `method`.
        scheduler: its state dict must hold JSON values only.
        position: between which steps this is.
        notes: JSON values of the caller; `load` returns them.

    Raises:
        CheckpointError: the method's state dict holds something other than tensors.
    """
    optimizer_tensors, optimizer_rest = _pack_optimizer(optimizer, method)
    tensors = {
        MODEL_NAME: serialise_tensors(_portable(method.state_dict())),
        OPTIMIZER_NAME: serialise_tensors(_portable(optimizer_tensors)),
        POSITION_NAME: serialise_tensors(_portable(_position_tensors(position))),
    }
    state = {
        "format_version": FORMAT_VERSION,
        "optimizer": optimizer_rest,
        "scheduler": scheduler.state_dict(),
        "position": {name: getattr(position, name) for name in _POSITION_VALUES},
        "notes": notes,
    }
    return Packed(tensors, state)


def load(
    files: Mapping[str, bytes],
    where: str,
    method: Method,
    optimizer: Optimizer,
    scheduler: LRScheduler,
) -> tuple[Position, dict[str, Any]]:
    """Restore a checkpoint, onto the parameters' devices; returns its position and notes.

    Everything is checked before anything changes.

    Args:
        files: content by file name.
        where: what errors call the checkpoint.

    Raises:
        CheckpointError: a file is missing or corrupt, or the checkpoint is of another model or
            optimizer (the first difference is named).
    """
    state = _read_state(files, where)
    weights = _read_tensors(files, where, MODEL_NAME, state)
    _check_weights(where, method, weights)
    tensors = _read_tensors(files, where, OPTIMIZER_NAME, state)
    restored = _unpack_optimizer(where, optimizer, method, tensors, state["optimizer"])
    position = _read_position(_read_tensors(files, where, POSITION_NAME, state), state, method)
    optimizer.load_state_dict(restored)
    _lay_out_like_parameters(optimizer)
    scheduler.load_state_dict(state["scheduler"])
    method.load_state_dict(weights)
    return position, state["notes"]


def load_weights(files: Mapping[str, bytes], where: str, method: Method) -> dict[str, Any]:
    """Restore parameters and buffers only, from WEIGHTS_FILES; returns the notes.

    Raises like `load`.
    """
    state = _read_state(files, where)
    weights = _read_tensors(files, where, MODEL_NAME, state)
    _check_weights(where, method, weights)
    method.load_state_dict(weights)
    return state["notes"]


_POSITION_VALUES = ("epoch", "step", "steps_done", "seconds")


def _position_tensors(position: Position) -> dict[str, Tensor]:
    tensors = {f"totals/{name}": value for name, value in position.totals.items()}
    if position.resampling is not None:
        tensors |= {f"resampling/{k}": v for k, v in vars(position.resampling).items()}
    return tensors


def _read_position(tensors: dict[str, Tensor], state: dict[str, Any], method: Method) -> Position:
    device = next(method.parameters()).device
    parts: dict[str, dict[str, Tensor]] = {"totals": {}, "resampling": {}}
    for full_name, value in tensors.items():
        group, name = full_name.split("/", 1)
        parts[group][name] = value.to(device)
    resampling = Resampling(**parts["resampling"]) if parts["resampling"] else None
    return Position(**state["position"], totals=parts["totals"], resampling=resampling)


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
    where: str,
    optimizer: Optimizer,
    method: Method,
    tensors: dict[str, Tensor],
    packed: dict[str, Any],
) -> dict[str, Any]:
    """Inverse of `_pack_optimizer`: a state dict for `optimizer`."""
    if packed["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"{where} holds the state of {packed['class']}, this run uses "
            f"{type(optimizer).__name__}; resuming needs the same optimizer; set optim.name back "
            "or start a new run"
        )
    group_names = _group_names(optimizer, method)
    _check_groups(where, [group["params"] for group in packed["param_groups"]], group_names)
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


def _lay_out_like_parameters(optimizer: Optimizer) -> None:
    """Give state the memory layout of its parameter: fused kernels go by places in memory."""
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entry[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _like(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Group settings with JSON lists turned into tuples (Adam's betas) where `own` has them."""
    return {
        key: tuple(value) if isinstance(own.get(key), tuple) else value
        for key, value in saved.items()
    }


def _check_groups(where: str, saved: list[list[str]], own: list[list[str]]) -> None:
    flat_saved = [(group, name) for group, names in enumerate(saved) for name in names]
    flat_own = [(group, name) for group, names in enumerate(own) for name in names]
    for there, here in zip_longest(flat_saved, flat_own):
        if there != here:
            group, name = there or here
            raise CheckpointError(
                f"optimizer state in {where} differs from this run's at parameter {name!r} of "
                f"group {group}; resuming needs the same parameters in the same groups and order; "
                "use the settings of the run that wrote it"
            )


def _read_state(files: Mapping[str, bytes], where: str) -> dict[str, Any]:
    if STATE_NAME not in files:
        raise CheckpointError(
            f"{where} has no {STATE_NAME}, so it is not a checkpoint (the file is written last); "
            f"{REMEDY}"
        )
    try:
        state = json.loads(files[STATE_NAME])
        version = state["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where}/{STATE_NAME} is corrupt ({type(error).__name__}: {error}); it must be JSON "
            f"with a format_version; {REMEDY}"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format_version {version}; this program reads {FORMAT_VERSION}; use the "
            "program that wrote it"
        )
    if state.pop(STATE_HASH, None) != _state_hash(state):
        raise CheckpointError(
            f"{where}/{STATE_NAME} is corrupt: it does not have the SHA-256 it names; {REMEDY}"
        )
    return state


def _read_tensors(
    files: Mapping[str, bytes], where: str, name: str, state: dict[str, Any]
) -> dict[str, Tensor]:
    """Tensors of a file whose bytes have the recorded SHA-256."""
    if name not in files:
        raise CheckpointError(f"{where}/{name} is missing; {STATE_NAME} lists it; {REMEDY}")
    digest = hashlib.sha256(files[name]).hexdigest()
    if digest != state["sha256"][name]:
        raise CheckpointError(
            f"{where}/{name} is corrupt: its SHA-256 is {digest}, {STATE_NAME} says "
            f"{state['sha256'][name]}; {REMEDY}"
        )
    try:
        return parse_tensors(files[name])
    except SafetensorError as error:
        raise CheckpointError(
            f"{where}/{name} is not a safetensors file: {error}; {REMEDY}"
        ) from error


def _check_weights(where: str, method: Method, weights: dict[str, Tensor]) -> None:
    """Same names, shapes and dtypes on both sides."""
    own: dict[str, Tensor] = method.state_dict()
    for name in [*own, *weights]:
        here, there = _signature(own.get(name)), _signature(weights.get(name))
        if here != there:
            raise CheckpointError(
                f"{name!r} is {there} in {where} and {here} in this model; names, shapes and "
                "dtypes must be equal; use the data set, model and method settings of the run "
                "that wrote it"
            )


def _signature(value: Tensor | None) -> str:
    if value is None:
        return "absent"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"

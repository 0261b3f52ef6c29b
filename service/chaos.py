"""`midas train ... --chaos FAULTS`: break a run on purpose, let it recover, compare the outcome.

The run is trained by the same command a user types, started again whenever it ends without a
result. Faults that need nodes get a Ray cluster of several nodes on this machine, where a lost
node is replaced, as a cluster manager would.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load as parse_tensors

from service import launch
from service.capacity import num_cores
from service.cluster import Nodes, local_nodes
from service.config import ConfigError, RunConfig, RunError
from service.environment import environment
from service.faults import DRAIN, DRAIN_SECONDS, RESIZE, Fault, parse_faults, read_trace, struck
from service.files import RESULT_NAME, read_json
from service.storage import CheckpointStore
from training.checkpoint import MODEL_NAME

if TYPE_CHECKING:
    from service.console import Console

POLL_SECONDS = 0.2
# Other numbers of workers add in another order: weights may differ by this, in double precision.
ROUNDING = 1e-6
SPARE_ATTEMPTS = 2


def run_chaos(
    config: RunConfig, arguments: Sequence[str], faults: str, console: "Console"
) -> dict[str, Any]:
    """Train once unbroken and once with faults; returns the card, flat.

    Args:
        config: of the run; gives the name.
        arguments: of `midas train` for the run: preset and settings.
        faults: see `parse_faults`.

    Returns:
        `chaos/recovered`, `chaos/final_weights_equal`, `chaos/max_weight_difference`,
        `chaos/order_equal`, `chaos/seconds_to_first_new_step` and `chaos/steps_replayed` (the
        worst), and both per fault, `chaos/<fault>/...`.

    Raises:
        ConfigError: FAULTS cannot be read, or needs nodes on a cluster that is not ours.
        RunError: the unbroken run failed.
    """
    try:
        planned = parse_faults(faults)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    broken = launch.resolve(config)
    unbroken = broken.model_copy(update={"name": f"{broken.name}-unbroken"})
    command = [sys.executable, "-m", "service", "train", *arguments]
    with _nodes(config, planned) as nodes:
        console.status(f"unbroken run {unbroken.name}")
        _attempt([*command, *_place(unbroken)], Path(unbroken.storage) / str(unbroken.name), None)
        if _result(unbroken) is None:
            raise RunError(f"the unbroken run {unbroken.name} ended without a result; see above")
        attempts = _until_finished(command, broken, planned, nodes, console)
    card = _card(broken, planned)
    return {
        **card,
        **_compare(
            launch.checkpoint_store(broken),
            launch.checkpoint_store(unbroken),
            ROUNDING if any(fault.action == RESIZE for fault in planned) else 0.0,
        ),
        "chaos/order_equal": _same(broken, unbroken, "order_chain"),
        "chaos/loss_equal": _same(broken, unbroken, "loss_chain"),
        "chaos/attempts": attempts,
        "name": broken.name,
    }


def _until_finished(
    command: list[str],
    config: RunConfig,
    faults: list[Fault],
    nodes: Nodes | None,
    console: "Console",
) -> int:
    """Start the same command until the run has a result; returns how often that was."""
    folder = Path(config.storage) / str(config.name)
    text = ",".join(fault.name for fault in faults)
    for attempt in range(1, len(faults) + SPARE_ATTEMPTS + 1):
        console.status(f"run {config.name}, attempt {attempt}")
        sizes = [f["target"] for f in struck(folder) if f["action"] == RESIZE]
        resized = ["--scaling.num-workers", sizes[-1]] if sizes else []
        _attempt([*command, *resized, *_place(config), "--faults", text], folder, nodes)
        if _result(config) is not None:
            return attempt
    return len(faults) + SPARE_ATTEMPTS


def _place(config: RunConfig) -> list[str]:
    return ["--name", str(config.name), "--storage", config.storage]


def _attempt(command: list[str], folder: Path, nodes: Nodes | None) -> None:
    """Run a command to its end; nodes that it kills are replaced."""
    lost = len(_lost_nodes(folder))
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env=nodes.environment if nodes else None
    ) as process:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            for fault in _lost_nodes(folder)[lost:]:
                assert nodes, "_nodes started some"
                nodes.replace()
                lost += 1
                if fault["action"] == DRAIN:  # the notice comes first, then the end
                    threading.Timer(DRAIN_SECONDS, _kill, (fault["raylet"],)).start()


def _lost_nodes(folder: Path) -> list[dict[str, Any]]:
    return [fault for fault in struck(folder) if fault["target"] == "node"]


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


@contextlib.contextmanager
def _nodes(config: RunConfig, faults: list[Fault]) -> Iterator[Nodes | None]:
    """A cluster of several nodes on this machine, if a fault needs one."""
    sizes = [int(fault.target) for fault in faults if fault.action == RESIZE]
    workers = max([config.scaling.max_workers, *sizes])
    cpus = config.scaling.cpus_per_worker
    if workers * cpus <= num_cores() and all(fault.target != "node" for fault in faults):
        yield None
        return
    if environment()["RAY_ADDRESS"]:
        raise ConfigError(
            "--chaos with node faults or more workers than cores starts a cluster of its own; "
            "unset RAY_ADDRESS, or break your cluster's nodes yourself"
        )
    with local_nodes(workers, cpus) as nodes:
        yield nodes


def _result(config: RunConfig) -> dict[str, Any] | None:
    return read_json(Path(config.storage) / str(config.name) / RESULT_NAME)


def _same(left: RunConfig, right: RunConfig, key: str) -> bool:
    one, other = _result(left), _result(right)
    return one is not None and other is not None and one[key] == other[key]


def _card(config: RunConfig, faults: list[Fault]) -> dict[str, Any]:
    """What happened to each fault, from the marks and the trace in the run folder."""
    folder = Path(config.storage) / str(config.name)
    trace = read_trace(folder)
    card: dict[str, Any] = {"chaos/faults": len(faults)}
    finished = _result(config) is not None
    seconds, replayed = [], []
    for fault in struck(folder):
        recovery = recovery_from(fault, trace)
        key = f"chaos/{fault['action']}:{fault['target']}@{fault['place']}={fault['number']}"
        card[f"{key}/recovered"] = recovery is not None or finished
        if recovery:
            seconds.append(recovery["seconds_to_first_new_step"])
            replayed.append(recovery["steps_replayed"])
            card |= {f"{key}/{name}": value for name, value in recovery.items()}
    card["chaos/recovered"] = finished and len(struck(folder)) == len(faults)
    card["chaos/seconds_to_first_new_step"] = max(seconds, default=None)
    card["chaos/steps_replayed"] = max(replayed, default=None)
    return card


def recovery_from(
    fault: dict[str, Any], trace: list[dict[str, Any]]
) -> dict[str, float | int] | None:
    """How a run came back from one fault; None if it did not take another step.

    Args:
        fault: its mark.
        trace: events of rank 0 in order of time.

    Returns:
        `seconds_to_resume` (until a process had the checkpoint), `seconds_to_first_new_step`
        (until a step was done that had not been done before) and `steps_replayed`.
    """
    done = max(
        [fault["steps_done"]]
        + [event["steps_done"] for event in trace if event["time"] <= fault["time"]]
    )
    after = [event for event in trace if event["time"] > fault["time"]]
    resumed = next((event for event in after if event["event"] == "resumed"), None)
    if resumed is None:
        return None
    later = after[after.index(resumed) :]
    before = [e["steps_done"] for e in after[: after.index(resumed)] if e["event"] == "step"]
    done = max([done, *before])  # a graceful stop may take a step more
    new = next((e for e in later if e["event"] == "step" and e["steps_done"] > done), None)
    if new is None:
        return None
    return {
        "seconds_to_resume": resumed["time"] - fault["time"],
        "seconds_to_first_new_step": new["time"] - fault["time"],
        "steps_replayed": done - resumed["steps_done"],
    }


def _compare(
    broken: CheckpointStore, unbroken: CheckpointStore, tolerance: float
) -> dict[str, Any]:
    """Weights and buffers of the last checkpoints of two runs."""
    if not (broken.names() and unbroken.names()):
        return {"chaos/final_weights_equal": False, "chaos/max_weight_difference": None}
    left, right = (
        parse_tensors(store.load(store.names()[-1], [MODEL_NAME])[MODEL_NAME])
        for store in (broken, unbroken)
    )
    common = left.keys() & right.keys()
    spread = max(float(np.abs(left[name] - right[name]).max(initial=0)) for name in common)
    equal = left.keys() == right.keys() and spread <= tolerance
    return {"chaos/final_weights_equal": equal, "chaos/max_weight_difference": spread}

"""Faults on purpose, struck by the workers themselves after an exact step: for `--chaos`.

A fault strikes once in a run: its file in the run folder says when it did. Without faults nothing
here does anything.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service.files import FAULTS_NAME, read_history, read_json, write_text
from training.distributed import rank, world_size

TARGETS = ("worker", "node", "driver")
FAULT = re.compile(r"(?P<action>\w+):(?P<target>\w+)@step=(?P<step>\d+)")
DRAIN, DRAIN_SECONDS = "drain", 10
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGTERM}
RESIZE = "workers"
TRACE_NAME = "trace.jsonl"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        action: kill (SIGKILL), term or stop (SIGTERM); drain, a notice that the node will be taken
            away in DRAIN_SECONDS; or workers, to stop the driver and go on
            with another number of them.
        target: the worker of the last rank, the node it is on (its Ray process), or the driver;
            or the number of workers.
        step: steps of the run after which it strikes.
    """

    action: str
    target: str
    step: int

    @property
    def name(self) -> str:
        """`action:target@step=N`."""
        return f"{self.action}:{self.target}@step={self.step}"


def parse_faults(text: str) -> list[Fault]:
    """Faults from `kill:worker@step=40, stop:driver@step=80`, ordered by step.

    Raises:
        ValueError: the text is not a list of faults.
    """
    faults = []
    for part in (part.strip() for part in text.split(",")):
        found = FAULT.fullmatch(part)
        if not found or not _is_known(found["action"], found["target"]):
            raise ValueError(
                f"{part!r} is not a fault; write ACTION:TARGET@step=N, with an action of "
                f"{', '.join(SIGNALS)} and a target of {', '.join(TARGETS)}, drain:node@step=N, "
                "or workers:NUMBER@step=N, separated by commas"
            )
        faults.append(Fault(found["action"], found["target"], int(found["step"])))
    if len(set(faults)) < len(faults):
        raise ValueError(f"{text!r} names a fault twice; each strikes once; give another step")
    return sorted(faults, key=lambda fault: fault.step)


def _is_known(action: str, target: str) -> bool:
    if action == DRAIN:
        return target == "node"
    if action == RESIZE:
        return target.isdecimal() and int(target) > 0
    return action in SIGNALS and target in TARGETS


class Faults:
    """The faults of a run, in a worker.

    Args:
        plan: `faults` (of `asdict(Fault)`) and `driver`, the driver's process id; None for no
            faults.
        folder: run folder, on shared storage.
        node: id of this process's node, and address of its cluster.
    """

    def __init__(self, plan: dict[str, Any] | None, folder: Path, node: tuple[str, str]):
        self._node = node
        self._faults = [Fault(**fault) for fault in plan["faults"]] if plan else []
        self._driver = plan["driver"] if plan else 0
        self._folder = folder / FAULTS_NAME
        if self._faults:
            self._folder.mkdir(exist_ok=True)

    def resumed(self, steps_done: int) -> None:
        """Note from which step this process goes on."""
        self._trace("resumed", steps_done)

    def strike(self, steps_done: int) -> None:
        """Strike the faults that are due; may not return."""
        self._trace("step", steps_done)
        for fault in self._faults:
            mark = self._folder / f"{fault.name}.json"
            if fault.step <= steps_done and rank() == world_size() - 1 and not mark.exists():
                record = {"time": time.time(), "steps_done": steps_done, **asdict(fault)}
                write_text(mark, json.dumps(record | {"raylet": os.getppid()}))
                if fault.action == DRAIN:
                    self._drain()
                    continue
                known = {"worker": os.getpid(), "node": os.getppid()}
                number = SIGNALS.get(fault.action, signal.SIGTERM)
                os.kill(known.get(fault.target, self._driver), number)

    def _drain(self) -> None:
        node, address = self._node
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        command += ["--address", address, "--node-id", node]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "chaos"]
        command += ["--deadline-remaining-seconds", str(DRAIN_SECONDS)]
        subprocess.run(command, check=True, capture_output=True)

    def _trace(self, event: str, steps_done: int) -> None:
        if self._faults and rank() == 0:
            line = {"event": event, "steps_done": steps_done, "time": time.time()}
            with (self._folder / TRACE_NAME).open("a") as file:
                file.write(json.dumps(line) + "\n")


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """What rank 0 noted of the steps of a run with faults, in order of time."""
    return read_history(folder / FAULTS_NAME / TRACE_NAME)


def struck(folder: Path) -> list[dict[str, Any]]:
    """Records of the faults that have struck a run, in order of time."""
    found = [read_json(path) for path in (folder / FAULTS_NAME).glob("*@step=*.json")]
    return sorted((record for record in found if record), key=lambda record: record["time"])

"""Faults on purpose, struck by the workers themselves at an exact place: for `--chaos`.

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
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service.files import FAULTS_NAME, read_history, read_json, write_text
from training.distributed import rank, world_size

TARGETS = ("worker", "node", "driver")
STEP, VALIDATION = "step", "validation"
FAULT = re.compile(
    rf"(?P<action>\w+):(?P<target>\w+)@(?P<place>{STEP}|{VALIDATION})=(?P<number>\d+)"
)
DRAIN, DRAIN_SECONDS = "drain", 10
# A validation that is struck takes as long as one of much data.
VALIDATION_SECONDS = 60
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
        place: STEP, or VALIDATION.
        number: steps of the run after which it strikes; or epochs, and then it strikes in the
            middle of the validation that follows.
    """

    action: str
    target: str
    place: str
    number: int

    @property
    def name(self) -> str:
        """`action:target@place=N`."""
        return f"{self.action}:{self.target}@{self.place}={self.number}"


def parse_faults(text: str) -> list[Fault]:
    """Faults from `kill:worker@step=40, term:worker@validation=3`, ordered by number.

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
                "or workers:NUMBER@step=N, separated by commas; @validation=N strikes in the "
                "validation after epoch N"
            )
        faults.append(Fault(found["action"], found["target"], found["place"], int(found["number"])))
    if len(set(faults)) < len(faults):
        raise ValueError(f"{text!r} names a fault twice; each strikes once; give another number")
    return sorted(faults, key=lambda fault: fault.number)


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
        """Strike the faults that are due after a step; may not return."""
        self._trace("step", steps_done)
        self._strike(STEP, steps_done, steps_done)

    def validating(self, chunks: Iterable[Any], epoch: int, steps_done: int) -> Iterator[Any]:
        """Hand on what is validated; strike the faults that are due in this validation."""
        for chunk in chunks:
            yield chunk
            if self._strike(VALIDATION, epoch + 1, steps_done):
                time.sleep(VALIDATION_SECONDS)

    def _strike(self, place: str, number: int, steps_done: int) -> bool:
        found = False
        for fault in self._faults:
            mark = self._folder / f"{fault.name}.json"
            due = fault.place == place and fault.number <= number
            if due and rank() == world_size() - 1 and not mark.exists():
                found = True
                if fault.action == DRAIN:
                    self._drain()  # takes seconds; its time counts from the end
                record = {"time": time.time(), "steps_done": steps_done, **asdict(fault)}
                write_text(mark, json.dumps(record | {"raylet": os.getppid()}))
                known = {"worker": os.getpid(), "node": os.getppid()}
                hit = SIGNALS.get(fault.action, signal.SIGTERM)
                if fault.action != DRAIN:
                    os.kill(known.get(fault.target, self._driver), hit)
        return found

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
    found = [read_json(path) for path in (folder / FAULTS_NAME).glob("*@*.json")]
    return sorted((record for record in found if record), key=lambda record: record["time"])

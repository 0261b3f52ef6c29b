"""Faults that a run does to itself: what they are, that they strike, and that they do so once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from service.faults import Fault, Faults, parse_faults, read_trace, struck

ROOT = Path(__file__).parents[2]


def faults_of(text: str, folder: Path, driver: int = 0) -> Faults:
    """Faults in a process that no cluster started."""
    plan = {"faults": [asdict(fault) for fault in parse_faults(text)], "driver": driver}
    return Faults(plan, folder, node=("", ""))


@pytest.fixture
def driver() -> Iterator[subprocess.Popen[bytes]]:
    """A process that can be hit."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def steps(folder: Path, event: str = "step") -> list[int]:
    return [line["steps_done"] for line in read_trace(folder) if line["event"] == event]


def test_faults_are_ordered_by_step_and_read_back_from_their_names():
    text = "stop:driver@step=80, kill:worker@step=9,workers:3@step=40,term:node@step=100"
    text += ",drain:node@step=101, term:worker@validation=102"
    faults = parse_faults(text)
    assert faults == [
        Fault("kill", "worker", "step", 9),
        Fault("workers", "3", "step", 40),
        Fault("stop", "driver", "step", 80),
        Fault("term", "node", "step", 100),
        Fault("drain", "node", "step", 101),
        Fault("term", "worker", "validation", 102),
    ]
    assert parse_faults(",".join(fault.name for fault in faults)) == faults


@pytest.mark.parametrize(
    "part",
    [
        *("", "kill", "kill:worker", "kill:worker@40", "kill:worker@step=", "kill:worker@step=x"),
        *("kil:worker@step=4", "kill:head@step=4", "kill:3@step=4", "kill:worker@step=-4"),
        *("workers:0@step=4", "workers:two@step=4", "drain:worker@step=4", "kill:worker@step=4;"),
        *("kill:worker@epoch=4", "kill:worker@validation"),
    ],
)
def test_what_is_not_a_fault_is_said_with_the_rule(part: str):
    message = rf"^'{part}' is not a fault; write ACTION:TARGET@step=N, with an action of kill, term"
    with pytest.raises(ValueError, match=message):
        parse_faults(f"kill:worker@step=3, {part} ,stop:driver@step=5")


@pytest.mark.parametrize(
    ("fault", "number"),
    [
        ("kill:driver@step=3", signal.SIGKILL),
        ("term:driver@step=3", signal.SIGTERM),
        ("stop:driver@step=3", signal.SIGTERM),
        ("workers:3@step=3", signal.SIGTERM),
    ],
)
def test_the_driver_gets_its_signal_after_the_step(
    tmp_path: Path, driver: subprocess.Popen[bytes], fault: str, number: int
):
    faults = faults_of(fault, tmp_path, driver.pid)
    faults.strike(1)
    faults.strike(2)
    assert struck(tmp_path) == []
    assert driver.poll() is None
    before = time.time()
    faults.strike(3)
    assert driver.wait(timeout=20) == -number
    assert (tmp_path / "faults" / f"{fault}.json").is_file()
    (mark,) = struck(tmp_path)
    assert before <= mark.pop("time") <= time.time()
    assert mark.pop("raylet") == os.getppid()
    assert mark == {"steps_done": 3, **asdict(parse_faults(fault)[0])}


def test_the_driver_gets_its_signal_in_the_middle_of_a_validation(
    tmp_path: Path, driver: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("service.faults.VALIDATION_SECONDS", 0)
    faults = faults_of("stop:driver@validation=2", tmp_path, driver.pid)
    faults.strike(9)
    assert list(faults.validating("abc", 0, 10)) == ["a", "b", "c"]
    assert struck(tmp_path) == []
    chunks = faults.validating("abc", 1, 20)
    assert next(chunks) == "a"
    assert driver.poll() is None
    assert next(chunks) == "b"
    assert driver.wait(timeout=20) == -signal.SIGTERM
    assert [(mark["place"], mark["steps_done"]) for mark in struck(tmp_path)] == [
        ("validation", 20)
    ]


def test_a_fault_strikes_once_in_a_run(tmp_path: Path, driver: subprocess.Popen[bytes]):
    text = "stop:driver@step=2"
    with subprocess.Popen(["sleep", "60"]) as first:
        faults_of(text, tmp_path, first.pid).strike(2)
        assert first.wait(timeout=20) == -signal.SIGTERM
    continued = faults_of(text, tmp_path, driver.pid)
    for step in (2, 3, 4):
        continued.strike(step)
    with pytest.raises(subprocess.TimeoutExpired):
        driver.wait(timeout=0.2)
    assert len(struck(tmp_path)) == 1


def test_a_fault_whose_step_was_passed_strikes_at_the_next(
    tmp_path: Path, driver: subprocess.Popen[bytes]
):
    text = "stop:driver@step=2,term:driver@step=6,kill:driver@step=9"
    faults_of(text, tmp_path, driver.pid).strike(7)
    assert driver.wait(timeout=20) == -signal.SIGTERM
    assert [(mark["action"], mark["steps_done"]) for mark in struck(tmp_path)] == [
        ("stop", 7),
        ("term", 7),
    ]


def test_the_trace_tells_where_a_run_went_on_and_every_step(
    tmp_path: Path, driver: subprocess.Popen[bytes]
):
    assert read_trace(tmp_path) == []
    for start, stop in ((0, 3), (2, 5)):
        faults = faults_of("kill:driver@step=99", tmp_path, driver.pid)
        faults.resumed(start)
        for step in range(start, stop):
            faults.strike(step + 1)
    trace = read_trace(tmp_path)
    assert [line["event"] for line in trace] == ["resumed", *["step"] * 3] * 2
    assert [line["steps_done"] for line in trace] == [0, 1, 2, 3, 2, 3, 4, 5]
    times = [line["time"] for line in trace]
    assert times == sorted(times)


def test_without_faults_nothing_is_written(tmp_path: Path):
    for plan in (None, {"faults": [], "driver": os.getpid()}):
        faults = Faults(plan, tmp_path, node=("", ""))
        faults.resumed(0)
        faults.strike(1)
    assert list(tmp_path.iterdir()) == []
    assert (read_trace(tmp_path), struck(tmp_path)) == ([], [])


RANK = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from tests.service.test_faults import faults_of
folder, text, rank, meeting = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=2)
Path(f"{meeting}.{rank}").touch()
while not all(Path(f"{meeting}.{other}").exists() for other in (0, 1)):
    time.sleep(0.01)
faults = faults_of(text, Path(folder))
faults.resumed(0)
for step in (1, 2, 3):
    faults.strike(step)
os._exit(0)
"""


def attempt(folder: Path, text: str, number: int) -> list[int]:
    """Two ranks take three steps; returns their exit codes."""
    command = [sys.executable, "-c", RANK, str(folder), text]
    meeting = str(folder / f"meeting{number}")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen([*command, str(rank), meeting], cwd=ROOT, env=environment)
        for rank in (0, 1)
    ]
    return [rank.wait(timeout=120) for rank in ranks]


@pytest.mark.ray
def test_the_worker_of_the_last_rank_dies_once_and_rank_zero_keeps_the_trace(tmp_path: Path):
    text = "kill:worker@step=2"
    assert attempt(tmp_path, text, 1) == [0, -signal.SIGKILL]
    assert [(mark["action"], mark["steps_done"]) for mark in struck(tmp_path)] == [("kill", 2)]
    assert attempt(tmp_path, text, 2) == [0, 0]
    assert steps(tmp_path) == [1, 2, 3] * 2
    assert steps(tmp_path, "resumed") == [0, 0]


@pytest.mark.ray
def test_the_node_of_a_worker_is_the_process_that_started_it(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from tests.service.test_faults import faults_of\n"
        "faults_of('kill:node@step=1', Path(sys.argv[1])).strike(1)"
    )
    worker = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}, sys.argv[1]])"
    )
    node = [sys.executable, "-c", worker, str(tmp_path)]
    done = subprocess.run(
        node, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert [mark["target"] for mark in struck(tmp_path)] == ["node"]

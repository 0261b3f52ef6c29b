"""Checkpoints on real file systems: complete or absent, tried again, written in a thread."""

import errno
import logging
import math
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs

from service import storage
from service.storage import CheckpointStore, CheckpointWriter, checkpoint_name, file_system
from tests.training.toys import random_batch, tiny_method
from training import checkpoint as checkpoints
from training.batch import Progress
from training.chain import StepRecord
from training.checkpoint import Packed, pack
from training.loop import Position
from training.methods.base import Method
from training.optim import OptimConfig, build_optimizer, build_schedule

ROOT = Path(__file__).parents[2]
FILES = {"model.safetensors": bytes(range(256)) * 400, "state.json": b'{"format_version": 2}'}
PACKED = Packed({"model.safetensors": b"weights"}, {"format_version": 2})
FIRST, SECOND, THIRD, FOURTH = (checkpoint_name(steps) for steps in (90, 100, 200, 1000))
MODEL = "model.safetensors"
MARKER = "state.json"


class Disk(fs.FSSpecHandler):
    """A real disk that does something before a file is written or a folder removed."""

    def __init__(self, before: Callable[[str], None]):
        super().__init__(LocalFileSystem())
        self.before = before

    def open_output_stream(self, path, metadata):
        self.before(path)
        return super().open_output_stream(path, metadata)

    def delete_dir(self, path):
        self.before(path)
        super().delete_dir(path)


def disk(root: Path, before: Callable[[str], None]) -> CheckpointStore:
    return CheckpointStore(fs.PyFileSystem(Disk(before)), str(root))


def failing(name: str, times: float = math.inf) -> Callable[[str], None]:
    """The first `times` uses of files and folders of this name fail."""
    failed = 0

    def before(path: str) -> None:
        nonlocal failed
        if Path(path).name == name and failed < times:
            failed += 1
            raise OSError(errno.EIO, "the storage is away", path)

    return before


def record(step: int, loss: float = 0.5, workers: int = 2) -> StepRecord:
    return StepRecord(step // 4, step % 4, f"{step:016x}", loss, workers)


def records(start: int, stop: int, **values) -> list[StepRecord]:
    return [record(step, **values) for step in range(start, stop)]


def write(writer: CheckpointWriter, name: str, keep: str | None = None) -> None:
    writer.submit(name, PACKED, 0, [], keep)
    writer.wait()


@pytest.fixture(params=["folder", "file URI", "memory", "fsspec folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    root = tmp_path / "with space" / "run"
    if request.param == "fsspec folder":
        inside = DirFileSystem(str(tmp_path), LocalFileSystem())
        return CheckpointStore(fs.PyFileSystem(fs.FSSpecHandler(inside)), "deeper/run")
    uris = {"folder": str(root), "file URI": root.as_uri(), "memory": f"memory://{tmp_path}"}
    return CheckpointStore.at(uris[request.param])


def test_a_checkpoint_reads_back_from_every_file_system(store: CheckpointStore):
    assert (store.names(), store.load(FIRST), store.num_steps()) == ([], {}, 0)
    for name in (FOURTH, FIRST, SECOND):
        store.save(name, FILES | {"position.safetensors": name.encode()})
    assert store.names() == [FIRST, SECOND, FOURTH]
    assert store.load(SECOND) == FILES | {"position.safetensors": SECOND.encode()}
    assert store.load(SECOND, ["state.json", "none"]) == {"state.json": FILES[MARKER]}
    assert store.where(SECOND).endswith(f"/{SECOND}")
    store.remove(SECOND)
    assert (store.names(), store.load(SECOND)) == ([FIRST, FOURTH], {})
    store.save(FIRST, FILES | {MODEL: b"new"})
    assert store.load(FIRST, [MODEL]) == {MODEL: b"new"}


def test_step_records_read_back_from_every_file_system(store: CheckpointStore):
    store.save_steps(0, records(0, 5))
    store.save_steps(5, records(5, 7, workers=1))
    assert store.steps(0, 99) == records(0, 5) + records(5, 7, workers=1)
    assert store.steps(3, 6) == records(3, 5) + records(5, 6, workers=1)
    assert store.num_steps() == 7
    assert store.names() == []


def test_a_writer_keeps_the_newest_on_every_file_system(store: CheckpointStore):
    writer = CheckpointWriter(store, 2)
    for name in (FIRST, SECOND, THIRD, FOURTH):
        write(writer, name, keep=FIRST)
    assert writer.error is None
    assert store.names() == [FIRST, THIRD, FOURTH]
    assert store.load(FOURTH) == PACKED.files()


def test_a_relative_path_is_below_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    CheckpointStore.at("kept/run").save(FIRST, FILES)
    assert (tmp_path / "kept" / "run" / FIRST / MODEL).read_bytes() == FILES[MODEL]


def test_an_unknown_scheme_is_said_with_the_remedy():
    message = r"s4://b/run cannot be used: Protocol not known: s4; give a fold"
    with pytest.raises(ValueError, match=message):
        file_system("s4://b/run")


@pytest.mark.parametrize("before", [[], [FIRST]])
def test_a_save_that_fails_between_two_files_leaves_no_checkpoint(tmp_path: Path, before: list):
    store = CheckpointStore.at(str(tmp_path))
    for name in before:
        store.save(name, FILES)
    (tmp_path / FIRST / "optimizer.safetensors").mkdir(parents=True)  # in the place of the file
    files = {MODEL: b"new", "optimizer.safetensors": b"", MARKER: b"{}"}
    with pytest.raises(IsADirectoryError):
        store.save(FIRST, files)
    assert (tmp_path / FIRST / MODEL).read_bytes() == b"new"
    assert store.names() == []
    assert store.folders() == {FIRST: False}
    with pytest.raises(checkpoints.CheckpointError, match=r"has no state\.json, so it is not a ch"):
        checkpoints.load_weights(store.load(FIRST), FIRST, tiny_method("joint"))


def test_there_is_no_checkpoint_while_one_is_overwritten(tmp_path: Path):
    seen: list[tuple[str, list[str]]] = []
    store = disk(tmp_path, lambda path: seen.append((Path(path).name, store.names())))
    for _ in range(2):
        store.save(FIRST, FILES)
    assert seen == [(MODEL, []), (MARKER, [])] * 2
    assert store.names() == [FIRST]


def test_a_checkpoint_is_none_as_soon_as_its_removal_begins(tmp_path: Path):
    store = disk(tmp_path, failing(FIRST))
    store.save(FIRST, FILES)
    with pytest.raises(OSError, match="the storage is away"):
        store.remove(FIRST)
    assert store.names() == []
    assert store.load(FIRST) == {MODEL: FILES[MODEL]}


@pytest.mark.parametrize("uri", ["{}", "memory://{}"])
def test_what_is_not_a_checkpoint_is_ignored(tmp_path: Path, uri: str):
    system, root = file_system(uri.format(tmp_path / "run"))
    store = CheckpointStore(system, root + "/")
    for name in (SECOND, FIRST, f"{SECOND}.bak", f"old_{SECOND}", "step_7"):
        store.save(name, FILES)
    system.create_dir(f"{root}/{THIRD}")
    system.create_dir(f"{root}/steps")
    for name in (FOURTH, "steps/0000000000.csv.part", "steps/note.csv"):
        with system.open_output_stream(f"{root}/{name}") as stream:
            stream.write(b"no checkpoint")
    assert store.names() == [FIRST, SECOND]
    assert store.folders() == {FIRST: True, SECOND: True, THIRD: False}
    assert store.num_steps() == 0
    write(CheckpointWriter(store, 1), checkpoint_name(2000))
    assert system.get_file_info(f"{root}/{SECOND}.bak/{MODEL}").size == len(FILES[MODEL])


def test_old_checkpoints_go_only_when_the_new_one_is_safe(tmp_path: Path):
    seen: list[tuple[str, list[str]]] = []
    store = disk(tmp_path, lambda path: seen.append((Path(path).name, store.names())))
    store.save(FIRST, FILES)
    store.save(SECOND, FILES)
    seen.clear()
    write(CheckpointWriter(store, 1), THIRD, keep=SECOND)
    old = [FIRST, SECOND]
    steps = "0000000000.csv"
    assert seen == [(steps, old), (MODEL, old), (MARKER, old), (FIRST, [SECOND, THIRD])]
    assert store.names() == [SECOND, THIRD]


def test_a_newer_checkpoint_is_not_counted_when_a_run_had_to_go_back(tmp_path: Path):
    store = CheckpointStore.at(str(tmp_path))
    for name in (FIRST, SECOND, FOURTH):
        store.save(name, FILES)
    write(CheckpointWriter(store, 2), THIRD)
    assert store.names() == [SECOND, THIRD, FOURTH]


def test_removal_that_fails_is_a_warning_and_is_made_up_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    store = disk(tmp_path, failing(FIRST, times=1))
    writer = CheckpointWriter(store, 1)
    write(writer, FIRST)
    write(writer, SECOND)
    assert writer.error is None
    assert caplog.text.count("old checkpoints could not be removed and fill the storage") == 1
    assert store.folders() == {FIRST: False, SECOND: True}
    write(writer, THIRD)
    assert store.folders() == {THIRD: True}


def test_what_a_killed_process_left_half_written_is_removed_later(tmp_path: Path):
    code = f"""
import os, signal
from pathlib import Path
from tests.service.test_storage import FILES, FIRST, SECOND, disk
def die(path):
    if path.endswith("{SECOND}/state.json"):
        os.kill(os.getpid(), signal.SIGKILL)
store = disk(Path("{tmp_path}"), die)
store.save(FIRST, FILES)
store.save(SECOND, FILES)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=False)
    assert done.returncode == -signal.SIGKILL
    store = CheckpointStore.at(str(tmp_path))
    assert store.folders() == {FIRST: True, SECOND: False}
    assert (tmp_path / SECOND / MODEL).read_bytes() == FILES[MODEL]
    write(CheckpointWriter(store, 5), THIRD)
    assert store.folders() == {FIRST: True, THIRD: True}


def environment() -> dict[str, str]:
    """The environment of a process that imports this file."""
    return os.environ | {"PYTHONPATH": str(ROOT)}


def bits(values: list[float]) -> list[bytes]:
    return [struct.pack("<d", value) for value in values]


def test_step_records_keep_all_bits_of_the_loss(tmp_path: Path):
    generator = random.Random(0)
    drawn = [struct.unpack("<d", generator.randbytes(8))[0] for _ in range(1000)]
    float32 = torch.rand(100, generator=torch.Generator().manual_seed(0)).tolist()
    losses = [loss for loss in drawn if not math.isnan(loss)]
    losses += [*float32, 0.1 + 0.2, -0.0, 5e-324, math.inf, -math.inf]
    store = CheckpointStore.at(str(tmp_path))
    store.save_steps(0, [record(step, loss) for step, loss in enumerate(losses)])
    found = store.steps(0, len(losses))
    assert bits([step.loss for step in found]) == bits(losses)
    assert [step.order for step in found] == [f"{step:016x}" for step in range(len(losses))]


def test_step_records_end_at_a_gap(tmp_path: Path):
    store = CheckpointStore.at(str(tmp_path))
    store.save_steps(0, records(0, 3))
    store.save_steps(5, records(5, 8))
    assert store.steps(0, 8) == records(0, 3)
    assert store.steps(3, 8) == []
    assert store.steps(6, 99) == records(6, 8)
    assert store.num_steps() == 3


def test_step_records_are_those_of_the_attempt_that_goes_on(tmp_path: Path):
    store = CheckpointStore.at(str(tmp_path))
    for start in (0, 10, 20, 30):
        store.save_steps(start, records(start, start + 10, workers=2))
    store.save_steps(10, records(10, 25, workers=3))  # it went back to step 10, with a worker more
    workers = [step.workers for step in store.steps(0, 99)]
    assert workers == [2] * 10 + [3] * 15
    store.save_steps(20, records(20, 30, workers=1))
    workers = [step.workers for step in store.steps(0, 99)]
    assert workers == [2] * 10 + [3] * 10 + [1] * 10


def test_a_record_that_was_cut_off_is_left_out(tmp_path: Path):
    store = CheckpointStore.at(str(tmp_path))
    store.save_steps(0, records(0, 4))
    path = tmp_path / "steps" / "0000000000.csv"
    for cut in (1, 5, 20):
        path.write_bytes(path.read_bytes()[:-cut])
        assert store.steps(0, 4) == records(0, 3)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(storage, "LONGEST_PAUSE_SECONDS", 0.04)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["0000000007.csv", MODEL, MARKER])
def test_a_storage_that_is_away_for_a_while_gets_its_checkpoint(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "service.storage")
    store = disk(tmp_path, failing(name, times=5))
    writer = CheckpointWriter(store, 3)
    writer.submit(FIRST, PACKED, 7, records(7, 9), None)
    writer.wait()
    assert writer.error is None
    assert store.load(FIRST) == PACKED.files()
    assert store.steps(7, 9) == records(7, 9)
    said = [entry.getMessage() for entry in caplog.records if entry.name == "service.storage"]
    assert len(said) == 2
    assert f"checkpoint {tmp_path}/{FIRST} failed and is tried again: [Errno 5] the st" in said[0]
    assert f"checkpoint {tmp_path}/{FIRST} succeeded after 0 s" in said[1]


@pytest.mark.usefixtures("quick")
def test_errors_of_network_clients_are_tried_again_and_others_are_not():
    base = type("ConnectionError", (Exception,), {"__module__": "botocore.exceptions"})
    refused = type("EndpointConnectionError", (base,), {"__module__": "botocore.exceptions"})
    errors: list[Exception] = [refused("no answer"), OSError("reset"), refused("no answer")]

    def action() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert storage.retried(action, "it") == "done"
    errors = [ValueError("a bug"), refused("no answer")]
    with pytest.raises(ValueError, match="a bug"):
        storage.retried(action, "it")


@pytest.mark.usefixtures("quick")
def test_a_storage_that_does_not_come_back_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.2)
    store = disk(tmp_path, failing(MARKER))
    writer = CheckpointWriter(store, 3)
    began = time.monotonic()
    write(writer, FIRST)
    assert 0.1 < time.monotonic() - began < 5
    assert "the storage is away" in str(writer.error)
    assert store.folders() == {}


class Run:
    """A method with its optimizer and schedule."""

    def __init__(self):
        self.method = tiny_method("joint")
        config = OptimConfig(name="adam", lr=0.01, lr_step_epochs=1, lr_gamma=0.5)
        self.optimizer = build_optimizer(config, self.method)
        self.schedule = build_schedule(config, self.optimizer, 0)

    @property
    def parts(self):
        return self.method, self.optimizer, self.schedule

    def train(self, steps: int) -> None:
        for step in range(steps):
            progress = Progress(seed=0, epoch=step, step=0, num_epochs=steps)
            self.method.train_step(self.method, random_batch(step, 8), self.optimizer, progress)
            self.schedule.step()

    def pack(self, position: Position) -> Packed:
        return pack(*self.parts, position, {"best": None})


def weights(method: Method) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in method.state_dict().items()}


def system_of(kind: str) -> fs.FileSystem:
    return {"arrow": fs.LocalFileSystem(), "fsspec": fs.PyFileSystem(Disk(lambda path: None))}[kind]


@pytest.mark.parametrize("kind", ["arrow", "fsspec"])
@pytest.mark.parametrize(
    "file", [f"{SECOND}/{MODEL}", f"{SECOND}/{MARKER}", "steps/0000000000.csv"]
)
def test_a_full_disk_is_final_at_once_and_spares_the_older_checkpoint(
    tmp_path: Path, kind: str, file: str
):
    run, store = Run(), CheckpointStore(system_of(kind), str(tmp_path))
    writer = CheckpointWriter(store, 1)
    run.train(2)
    saved = weights(run.method)
    writer.submit(FIRST, run.pack(Position(steps_done=90)), 0, [], None)
    writer.wait()
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).unlink(missing_ok=True)
    (tmp_path / file).symlink_to("/dev/full")
    run.train(1)
    began = time.monotonic()
    writer.submit(SECOND, run.pack(Position(steps_done=100)), 0, records(0, 9), None)
    writer.wait()
    assert time.monotonic() - began < 5  # not RETRY_SECONDS
    message = str(writer.error)
    assert f"checkpoint {tmp_path}/{SECOND} could not be written: " in message
    assert "No space left on device" in message
    assert "the checkpoints before it are intact; make room or restore the storage" in message
    assert "the same command continues" in message
    assert store.folders() == {FIRST: True}  # what was written of the new one is gone
    assert Path("/dev/full").is_char_device()

    fresh = Run()
    position, _ = checkpoints.load(store.load(FIRST), FIRST, *fresh.parts)
    assert position.steps_done == 90
    assert weights(fresh.method) == saved
    (tmp_path / file).unlink(missing_ok=True)  # there is room again
    writer = CheckpointWriter(store, 1)
    write(writer, SECOND)
    assert (writer.error, store.names()) == (None, [SECOND])


def test_a_checkpoint_is_written_beside_training_and_holds_the_moment_of_submit(tmp_path: Path):
    proceed = threading.Event()
    store = disk(tmp_path, lambda path: Path(path).name != MODEL or proceed.wait(60))
    writer, run = CheckpointWriter(store, 3), Run()
    assert not writer.busy
    run.train(2)
    saved, lr = weights(run.method), run.schedule.get_last_lr()
    position = Position(epoch=1, step=2, steps_done=6, totals={"rows": torch.tensor(3.0)})
    writer.submit(FIRST, run.pack(position), 0, records(0, 2), None)
    run.train(3)
    position.add({"rows": torch.tensor(4.0)})
    assert writer.busy
    assert store.folders() == {FIRST: False}
    assert weights(run.method) != saved

    proceed.set()
    writer.wait()
    assert not writer.busy
    fresh = Run()
    found, notes = checkpoints.load(store.load(FIRST), FIRST, *fresh.parts)
    assert (found.epoch, found.step, found.steps_done, notes) == (1, 2, 6, {"best": None})
    assert found.totals == {"rows": 3.0}
    assert weights(fresh.method) == saved
    assert fresh.schedule.get_last_lr() == lr


def test_a_checkpoint_waits_for_the_one_before(tmp_path: Path):
    seen: list[tuple[str, list[str]]] = []

    def slowly(path: str) -> None:
        seen.append((Path(path).parent.name, store.names()))
        time.sleep(0.05)

    store = disk(tmp_path, slowly)
    writer = CheckpointWriter(store, 3)
    for name in (FIRST, SECOND):
        writer.submit(name, PACKED, 0, [], None)
    assert store.names() == [FIRST]
    writer.wait()
    assert seen == [(n, []) for n in ("steps", FIRST, FIRST)] + [
        (n, [FIRST]) for n in ("steps", SECOND, SECOND)
    ]


def test_a_process_that_ends_finishes_its_checkpoint(tmp_path: Path):
    code = f"""
import sys, time
from pathlib import Path
from service.storage import CheckpointWriter
from tests.service.test_storage import FIRST, PACKED, disk, records
store = disk(Path("{tmp_path}"), lambda path: time.sleep(0.3))
CheckpointWriter(store, 3).submit(FIRST, PACKED, 0, records(0, 3), None)
assert store.names() == []
sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=False)
    assert done.returncode == 7
    store = CheckpointStore.at(str(tmp_path))
    assert store.load(FIRST) == PACKED.files()
    assert store.steps(0, 9) == records(0, 3)

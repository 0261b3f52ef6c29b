"""Shared warm-ups: which configs share one, and what a trial takes over."""

from pathlib import Path

import pytest

from service.config import load_preset, with_values
from service.files import HISTORY_NAME, read_history
from service.storage import CheckpointStore
from service.warmup import Warmups, warmup_key
from training.chain import StepRecord

DIGITS = load_preset("digits")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("midas.eta", 0.3),
        ("midas.lambda_mis", 2.0),
        ("midas.warmup_epochs", 7),
        ("midas.pairing", "permutation"),
        ("optim.epochs", 50),
        ("checkpoint.keep", 1),
        ("scaling.num_workers", 1),
    ],
)
def test_settings_of_the_main_phase_do_not_matter(name: str, value: object):
    changed = with_values(DIGITS, {name: value})  # pyright: ignore[reportArgumentType]
    assert warmup_key(changed, "d") == warmup_key(DIGITS, "d")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim.lr", 0.3),
        ("optim.lr_step_epochs", 3),
        ("train.seed", 1),
        ("train.global_batch_size", 128),
        ("model.encoders.image.width", 8),
        ("midas.uni_reduction", "mean"),
        ("midas.variant", "official_code"),
    ],
)
def test_settings_of_the_warm_up_do(name: str, value: object):
    changed = with_values(DIGITS, {name: value})  # pyright: ignore[reportArgumentType]
    assert warmup_key(changed, "d") != warmup_key(DIGITS, "d")


def test_data_matters():
    assert warmup_key(DIGITS, "d") != warmup_key(DIGITS, "e")


def trained(folder: Path, epochs: int) -> CheckpointStore:
    """A run of two steps an epoch that stands at the end of its warm-up."""
    store = CheckpointStore.at(str(folder / "checkpoints"))
    steps = range(2 * epochs)
    store.save_steps(0, [StepRecord(step // 2, step % 2, "ab", 0.5) for step in steps])
    name = f"step_{2 * epochs:010d}"
    store.save(name, {"model.safetensors": b"w" * epochs, "state.json": b"{}"})
    rows = [f'{{"epoch": {epoch}, "time/epoch_seconds": 1.5}}\n' for epoch in range(epochs)]
    (folder / HISTORY_NAME).write_text("".join(rows))
    return store


def begin(folder: Path) -> CheckpointStore:
    folder.mkdir()
    return CheckpointStore.at(str(folder / "checkpoints"))


def test_a_trial_takes_the_longest_warm_up_that_is_not_too_long(tmp_path: Path):
    warmups = Warmups(tmp_path / "warmups", "key")
    for epochs in (2, 4, 6):
        folder = tmp_path / f"run{epochs}"
        folder.mkdir()
        warmups.publish(trained(folder, epochs), folder, epochs)
    store = begin(tmp_path / "new")
    assert warmups.fork(store, tmp_path / "new", 5) == (4, 6.0)
    assert store.names() == ["step_0000000008"]
    assert store.load("step_0000000008")["model.safetensors"] == b"wwww"
    assert store.num_steps() == 8
    assert len(read_history(tmp_path / "new" / HISTORY_NAME)) == 4
    # It has begun, and is left alone.
    assert warmups.fork(store, tmp_path / "new", 6) == (0, 0.0)


def test_there_may_be_none(tmp_path: Path):
    warmups = Warmups(tmp_path / "warmups", "key")
    assert warmups.fork(begin(tmp_path / "a"), tmp_path / "a", 9) == (0, 0.0)
    folder = tmp_path / "run"
    folder.mkdir()
    warmups.publish(trained(folder, 3), folder, 3)
    assert warmups.fork(begin(tmp_path / "b"), tmp_path / "b", 2) == (0, 0.0)
    other = Warmups(tmp_path / "warmups", "other")
    assert other.fork(begin(tmp_path / "c"), tmp_path / "c", 9) == (0, 0.0)


def test_a_warm_up_is_put_down_once_and_whole(tmp_path: Path):
    warmups = Warmups(tmp_path / "warmups", "key")
    folder = tmp_path / "run"
    folder.mkdir()
    store = trained(folder, 3)
    warmups.publish(store, folder, 3)
    warmups.publish(store, folder, 3)
    assert [path.name for path in (tmp_path / "warmups" / "key").iterdir()] == ["0003"]

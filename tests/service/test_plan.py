"""The plan of --dry-run, against numbers worked out by hand."""

import csv
from pathlib import Path
from typing import Any

import pytest

from data.prepare import default_folder, prepare
from data.schema import DataError
from service.config import RunConfig, load_preset
from service.plan import make_plan


def plan(storage: Path, **values: Any) -> dict[str, Any]:
    """Plan of the digits preset with top-level sections replaced."""
    base = load_preset("digits").model_dump()
    merged = {k: base[k] | v if isinstance(v, dict) else v for k, v in values.items()}
    return make_plan(RunConfig.model_validate(base | merged | {"storage": str(storage)}))


def test_digits_by_hand(tmp_path: Path):
    found = plan(tmp_path / "runs")
    # 1797 digits; a test split of 20 % and a validation split of 10 %, rounded class by class.
    assert [found[f"rows/{split}"] for split in ("train", "val", "test")] == [1259, 179, 359]
    assert found["batch_size_per_worker"] == 64 // 2
    assert found["steps_per_epoch"] == 20  # 19 full batches
    assert found["rows_in_last_batch"] == 1259 - 19 * 64
    assert (found["epochs"], found["warmup_epochs"], found["steps"]) == (30, 5, 600)
    # small_cnn of width 16, three convolutions without bias, each with a BatchNorm; linear heads.
    encoder = 9 * (1 * 16 + 16 * 32 + 32 * 64) + 2 * (16 + 32 + 64)
    heads = 2 * (64 * 10 + 10) + (128 * 10 + 10)
    assert found["parameters"] == 2 * encoder + heads == 49406
    row_bytes = (8 * 8 + 40 * 25) * 4
    windows = 2 * (1259 // 2) * row_bytes
    assert found["worker_memory_mib/shuffle_windows"] == pytest.approx(windows / 2**20, abs=0.05)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("batch", "steps", "last"),
    [
        (128, 10, 107),  # 9 * 128 + 107
        (96, 13, 107),  # 13 * 96 + 11: fewer than two rows a lane, so merged into the one before
        (2048, 1, 1259),
    ],
)
def test_last_batch_is_short_or_merged(tmp_path: Path, batch: int, steps: int, last: int):
    found = plan(tmp_path, train={"global_batch_size": batch})
    assert (found["steps_per_epoch"], found["rows_in_last_batch"]) == (steps, last)
    assert found["steps"] == 30 * steps


@pytest.mark.parametrize(("workers", "rows"), [(1, 64), (3, 24), (5, 16), (8, 8)])
def test_the_worker_with_most_lanes_is_planned_for(tmp_path: Path, workers: int, rows: int):
    found = plan(tmp_path, scaling={"num_workers": workers})
    assert (found["workers"], found["max_workers"]) == (workers, workers)
    assert found["batch_size_per_worker"] == rows  # of 8 lanes with 8 rows each


def test_memory_grows_with_optimizer_states_and_ddp(tmp_path: Path):
    alone = {"scaling": {"num_workers": 1}, "method": "joint"}
    encoders = {"image": {"kind": "mlp", "hidden": 4096}}  # large enough to show in 0.1 MiB
    key = "worker_memory_mib/weights_gradients_optimizer"
    sgd = plan(tmp_path, **alone, model={"encoders": encoders})
    adam = plan(tmp_path, **alone, model={"encoders": encoders}, optim={"name": "adam"})
    ddp = plan(tmp_path, method="joint", model={"encoders": encoders})
    mib = sgd["parameters"] * 4 / 2**20
    assert sgd[key] == pytest.approx(3 * mib, abs=0.06)
    assert adam[key] == pytest.approx(4 * mib, abs=0.06)
    assert ddp[key] == pytest.approx(4 * mib, abs=0.06)
    assert ddp["worker_memory_mib/activations"] == pytest.approx(
        sgd["worker_memory_mib/activations"] / 2, abs=0.06
    )


def test_plan_is_the_same_before_and_after_prepare(tmp_path: Path):
    config = load_preset("digits").model_copy(update={"storage": str(tmp_path)})
    before = make_plan(config)
    assert list(tmp_path.iterdir()) == []
    prepare(config.data, default_folder(config.data, tmp_path))
    after = make_plan(config)
    assert (before.pop("data_prepared"), after.pop("data_prepared")) == (False, True)
    assert before == after


def test_too_many_lanes_for_the_data_is_said(tmp_path: Path):
    with pytest.raises(DataError, match="the split has 1259 rows; 1024 lanes need at least two"):
        plan(tmp_path, train={"global_batch_size": 1024, "lanes": 1024})


def test_encoder_of_an_unknown_modality_is_said(tmp_path: Path):
    with pytest.raises(ValueError, match="names modality 'sound', .*it has image, audio"):
        plan(tmp_path, model={"encoders": {"sound": {"kind": "mlp"}}})


def test_method_that_cannot_take_three_modalities_is_said(tmp_path: Path):
    for part, rows in (("tr", 40), ("te", 10)):
        labels = [[row % 2] for row in range(rows)]
        for stem, table in [("labels", labels), *((m, [[0.5] * 200] * rows) for m in "123")]:
            with (tmp_path / f"{stem}_{part}.csv").open("w") as file:
                csv.writer(file).writerows(table)
    config = RunConfig.model_validate(
        {
            "data": {"name": "rosmap", "root": str(tmp_path)},
            "midas": {"variant": "official_code"},
            "train": {"global_batch_size": 16},
            "storage": str(tmp_path / "runs"),
        }
    )
    with pytest.raises(ValueError, match="defined for 2 modalities, the data has 3; use"):
        make_plan(config)

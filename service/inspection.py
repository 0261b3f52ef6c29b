"""Looking at runs again: evaluate their best checkpoint, take their steps once more."""

import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from data.folder import Folder
from data.schema import Manifest, Split, load_manifest, verify_shards
from service.cluster import ray_session, run_workers
from service.config import ConfigError, RunConfig, ScalingConfig
from service.files import CONFIG_NAME, RESULT_NAME, RUN_NAME, read_json
from service.launch import base_payload, checkpoint_store
from training.chain import StepRecord

VERIFIED_STEPS = 20
LOSS_TOLERANCE = 1e-6


def evaluate(
    run: str, storage: str, split: Split, scaling: ScalingConfig, *, debug: bool = False
) -> dict[str, Any]:
    """Evaluate the best checkpoint of a finished run on a split.

    Args:
        run: run name under `storage`, or the run's folder.
        scaling: workers to evaluate with; the result does not depend on it.

    Raises:
        ConfigError: there is no such finished run, or its data is not there any more.
    """
    folder = find_run(run, storage, RESULT_NAME)
    result = read_json(folder / RESULT_NAME)
    assert result is not None
    config, payload = _of_run(folder, scaling)
    payload |= {"checkpoint": result["checkpoint"], "split": split}
    began = time.monotonic()
    returned = _run("evaluate_worker", config, folder, payload, debug=debug)
    seconds = time.monotonic() - began
    return {
        **returned["metrics"],
        "name": config.name,
        "split": result["split"],
        "seconds": seconds,
    }


def verify(
    run: str,
    storage: str,
    steps: tuple[int, int] | None,
    workers: int | None,
    *,
    debug: bool = False,
) -> dict[str, Any]:
    """Take steps of a run again, from the nearest checkpoint before them, and compare.

    Rows and their places must be those on record. By as many workers as the steps were taken, every
    bit of the losses must be, too. Sums over another number of ranks round differently, and the
    differences grow from step to step; so, for other workers, the steps are taken twice in double
    precision, by the run's workers and by the others, and these losses must agree to
    LOSS_TOLERANCE.

    Args:
        run: run name under `storage`, or the run's folder; it may be unfinished.
        steps: first step of the run to compare, and the one behind the last; None takes the last
            VERIFIED_STEPS that are recorded.
        workers: None takes as many as the run had.

    Returns:
        `verify/equal`, `verify/steps`, `verify/max_loss_difference`, and for the first step that
        differs `verify/first_difference`, `verify/differs_in`, `verify/expected`, `verify/got`.

    Raises:
        ConfigError: there is no such run, or it has no records of these steps.
    """
    folder = find_run(run, storage, RUN_NAME)
    stored = RunConfig.model_validate(yaml.safe_load((folder / CONFIG_NAME).read_text()))
    stored = stored.model_copy(update={"storage": str(folder.parent), "name": folder.name})
    store = checkpoint_store(stored)
    start, stop = steps or _last_steps(store.num_steps(), folder)
    expected = store.steps(start, stop)
    if len(expected) < stop - start or start >= stop:
        raise ConfigError(
            f"run {folder.name} has records of {store.num_steps()} steps, --steps {start}:{stop} "
            "asks for others; steps are recorded up to the newest checkpoint; give A:B with "
            "0 <= A < B within them"
        )
    before = [name for name in store.names() if _steps_done(name) <= start]
    where = {"checkpoint": before[-1] if before else None, "start": start, "stop": stop}
    recorded = expected[-1].workers
    number = workers or recorded
    exact = all(record.workers == number for record in expected)
    began = time.monotonic()
    sizes = [number] if exact else [recorded, number]
    replays = []
    largest = stored.scaling.model_copy(update={"num_workers": max(sizes)})
    with ray_session(stored.model_copy(update={"scaling": largest}), debug=debug):
        for size in sizes:
            scaling = stored.scaling.model_copy(update={"num_workers": size})
            config, payload = _of_run(folder, scaling)
            payload |= where | {"widen": not exact}
            returned = _run("verify_worker", config, folder, payload, debug=debug)
            replays.append([StepRecord(**record) for record in returned["records"]])
    if not exact:  # rows as they were recorded, losses in double precision
        pairs = zip(expected, replays[0], strict=True)
        expected = [replace(old, loss=wide.loss) for old, wide in pairs]
    return {
        **compare_steps(start, expected, replays[-1], 0.0 if exact else LOSS_TOLERANCE),
        "verify/from": where["checkpoint"] or "start",
        "verify/workers": number,
        "name": stored.name,
        "seconds": time.monotonic() - began,
    }


def compare_steps(
    start: int, expected: list[StepRecord], got: list[StepRecord], tolerance: float
) -> dict[str, Any]:
    """Compare records of the same steps; see `verify` for the names.

    Args:
        start: number of the first step in the run.
        tolerance: largest difference of losses, relative where they are above 1.
    """
    result: dict[str, Any] = {
        "verify/steps": len(expected),
        "verify/equal": len(expected) == len(got),
        "verify/exact": tolerance == 0,
        "verify/max_loss_difference": 0.0,
    }
    for number, (old, new) in enumerate(zip(expected, got, strict=False), start):
        same_rows = (old.epoch, old.step, old.order) == (new.epoch, new.step, new.order)
        difference = abs(old.loss - new.loss)
        result["verify/max_loss_difference"] = max(result["verify/max_loss_difference"], difference)
        if not same_rows or difference > tolerance * max(1.0, abs(old.loss)):
            return result | {
                "verify/equal": False,
                "verify/first_difference": number,
                "verify/differs_in": "loss" if same_rows else "rows",
                "verify/expected": old.loss if same_rows else old.order,
                "verify/got": new.loss if same_rows else new.order,
            }
    return result


def _last_steps(recorded: int, folder: Path) -> tuple[int, int]:
    if recorded == 0:
        raise ConfigError(
            f"run {folder.name} has no checkpoint yet, so none of its steps is recorded; let it "
            "train on, or lower checkpoint.every_seconds"
        )
    return max(0, recorded - VERIFIED_STEPS), recorded


def _steps_done(checkpoint: str) -> int:
    return int(checkpoint.rpartition("_")[2])


def find_run(run: str, storage: str, needed: str) -> Path:
    """Folder of a run, named or given as a path, that has the file `needed`."""
    folder = (Path(run) if (Path(run) / needed).is_file() else Path(storage) / run).resolve()
    if not (folder / needed).is_file():
        found = sorted(path.parent.name for path in Path(storage).glob(f"*/{needed}"))
        kind = "finished run" if needed == RESULT_NAME else "run"
        raise ConfigError(
            f"{folder} holds no {needed}; a {kind} has one; {kind}s under {storage}: "
            f"{', '.join(found) or 'none'}; the command that started a run continues it"
        )
    return folder


def _of_run(folder: Path, scaling: ScalingConfig) -> tuple[RunConfig, dict[str, Any]]:
    """Config of a run, with other workers, and what they need to load its checkpoints."""
    stored = RunConfig.model_validate(yaml.safe_load((folder / CONFIG_NAME).read_text()))
    moved = {"scaling": scaling, "storage": str(folder.parent), "name": folder.name}
    config = stored.model_copy(update=moved)
    manifest, data_folder = data_of(folder)
    verify_shards(manifest, data_folder)
    return config, base_payload(config, manifest, data_folder)


def data_of(folder: Path) -> tuple[Manifest, Folder]:
    """The data a run was trained on; looked for where it was, and beside the run. Shards are not
    read.

    Raises:
        ConfigError: there is other data.
        DataError: there is none.
    """
    run = read_json(folder / RUN_NAME) or {}
    data_folder = Folder.at(run["data_folder"])
    if data_folder.is_local and not data_folder.path.is_dir():
        data_folder = Folder.at(folder.parent / "shards" / data_folder.path.name)
    manifest = load_manifest(data_folder)
    if manifest.digest != run["data_digest"]:
        raise ConfigError(
            f"the data in {data_folder} has digest {manifest.digest[:12]}, the run was trained on "
            f"{run['data_digest'][:12]}; use the data of the run"
        )
    return manifest, data_folder


def _run(
    loop: str, config: RunConfig, folder: Path, payload: dict[str, Any], *, debug: bool
) -> dict[str, Any]:
    scratch = folder.parent / f".{loop}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    try:
        with ray_session(config, debug=debug):
            return run_workers(loop, config.scaling, scratch, payload)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

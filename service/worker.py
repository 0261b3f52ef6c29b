"""What one Ray Train worker does: its rows in, the loop, reports out. The only bridge between
Ray and training/.

Everything a worker needs arrives in one JSON-like payload; what it returns (from rank 0) is
`{"metrics": {...}}`, or `{"error": message}` for failures that all ranks agree on.
"""

import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from data.order import Order
from data.pipeline import ShardReader, columns, eval_stream, train_stream
from data.schema import Manifest, Split
from service.config import RunConfig
from service.files import HISTORY_NAME, PROGRESS_NAME, write_text
from service.tracking import RunLogger
from training import checkpoint as checkpoints
from training.batch import Batch, Progress
from training.distributed import rank, world_size
from training.encoders import build_model
from training.evaluation import EVAL_CHUNK, evaluate
from training.loop import Hooks, fit
from training.methods import build_method
from training.methods.base import EpochData, Method, NonFiniteError
from training.optim import build_optimizer, build_schedule

PROGRESS_SECONDS = 0.5
EVAL_CACHE_BYTES = 256 << 20
SELECTION = "selection"


def make_order(config: RunConfig, manifest: Manifest) -> Order:
    """Order of the training split; a function of the config and the manifest only."""
    train = config.train
    window_rows = (train.shuffle_window_mib << 20) // max(1, manifest.row_nbytes)
    return Order(
        group_rows=tuple(n for shard in manifest.splits["train"] for n in shard.row_groups),
        global_batch_size=train.global_batch_size,
        lanes=train.lanes,
        window_batches=max(1, window_rows // train.global_batch_size),
        seed=train.seed,
    )


def make_method(config: RunConfig, manifest: Manifest) -> Method:
    """The model, initialised from the training seed, inside its method."""
    model = build_model(
        config.model,
        [(m.name, m.kind, m.shape) for m in manifest.modalities],
        len(manifest.classes),
        config.train.seed,
    )
    return build_method(config.method, model, config.method_sections)


class _Rows:
    """This rank's rows of a prepared data set, as batches on the device."""

    def __init__(self, config: RunConfig, manifest: Manifest, folder: str, device: torch.device):
        self._config = config
        self._manifest = manifest
        self._folder = folder
        self._device = device
        self._order = make_order(config, manifest)
        self._stream: Iterator[pa.Table] | None = None
        self._cache: dict[Split, list[Batch]] = {}

    def train(self, epoch: int) -> Iterator[Batch]:
        """This rank's part of every global batch of `epoch`; epochs must be asked for in turn."""
        if self._stream is None:
            # One execution for all epochs: reading ahead does not stop at the end of an epoch.
            self._stream = train_stream(
                ShardReader(self._folder, self._manifest, "train"),
                self._order,
                rank=rank(),
                world_size=world_size(),
                epochs=range(epoch, self._config.optim.epochs),
            )
        every_lane = range(self._order.lanes)
        for step, table in enumerate(islice(self._stream, self._order.num_steps)):
            rows = self._order.batch_rows(step, every_lane)
            yield self._batch(table, self._order.lanes, rows)

    def evaluation(self, split: Split) -> Iterator[Batch]:
        """This rank's fixed chunks of `split`; kept in memory after the first pass if small."""
        if split in self._cache:
            yield from self._cache[split]
            return
        rows = self._manifest.rows(split)
        small = rows * self._manifest.row_nbytes <= EVAL_CACHE_BYTES * world_size()
        kept: list[Batch] = []
        window_rows = (self._config.train.shuffle_window_mib << 20) // self._manifest.row_nbytes
        stream = eval_stream(
            ShardReader(self._folder, self._manifest, split),
            chunk_rows=EVAL_CHUNK,
            rank=rank(),
            world_size=world_size(),
            task_rows=window_rows // world_size(),
        )
        for table in stream:
            batch = self._batch(table, -(-rows // EVAL_CHUNK), rows)
            if small:
                kept.append(batch)
            yield batch
        if small:
            self._cache[split] = kept

    def _batch(self, table: pa.Table, num_lanes: int, global_rows: int) -> Batch:
        arrays = {name: self._tensor(a) for name, a in columns(table, self._manifest).items()}
        label, sample_id, lane = (arrays.pop(name) for name in ("label", "sample_id", "lane"))
        return Batch(arrays, label, sample_id, lane, num_lanes, global_rows)

    def _tensor(self, array: np.ndarray) -> Tensor:
        with warnings.catch_warnings():  # views of the object store are read only; nobody writes
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array).to(self._device, non_blocking=True)


class _Reporter:
    """Rank 0's files and MLflow metrics, and the report to Ray that every rank makes."""

    def __init__(self, payload: dict[str, Any], start_epoch: int, steps: "_Steps"):
        self._folder = Path(payload["run_folder"])
        self._steps = steps
        self._last = 0.0
        self._record: dict[str, Any] = {}
        self._logger: RunLogger | None = None
        if rank() == 0:
            self._logger = RunLogger(**payload["tracking"])
            history = self._folder / HISTORY_NAME
            lines = history.read_text().splitlines() if history.is_file() else []
            kept = [line for line in lines if json.loads(line)["epoch"] < start_epoch]
            write_text(history, "".join(line + "\n" for line in kept))

    def step(self, progress: Progress, sums: dict[str, Tensor]) -> None:
        """Write the progress record, at most every PROGRESS_SECONDS."""
        if rank() == 0 and time.monotonic() - self._last > PROGRESS_SECONDS:
            loss = float(sums["loss_sum"] / sums["rows"])
            self._progress(progress.epoch, progress.step + 1, {"train/loss": loss})

    def epoch(self, epoch: int, metrics: dict[str, float], checkpoint: Path | None) -> None:
        """Log the metrics of an epoch; with a checkpoint, report it to Ray (all ranks together)."""
        metrics["epoch"] = epoch
        if self._logger:
            with (self._folder / HISTORY_NAME).open("a") as file:
                file.write(json.dumps(metrics, sort_keys=True) + "\n")
            self._logger.log(metrics, step=epoch)
            alpha = {
                k.removeprefix("alpha/"): v for k, v in metrics.items() if k.startswith("alpha/")
            }
            shown = {k: metrics[k] for k in ("train/loss", "val/accuracy") if k in metrics}
            self._progress(epoch, self._steps.per_epoch, {"alpha": alpha, **shown})
        if "val/accuracy" in metrics:
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint(str(checkpoint)) if checkpoint else None,
                checkpoint_dir_name=f"epoch_{epoch:04d}",
                delete_local_checkpoint_after_upload=True,
            )

    def phase(self, phase: str) -> None:
        """Show a phase other than training."""
        if rank() == 0:
            self._progress(self._steps.num_epochs - 1, self._steps.per_epoch, {}, phase)

    def close(self) -> None:
        """Send what is still to be sent to MLflow."""
        if self._logger:
            self._logger.close()

    def _progress(
        self, epoch: int, step: int, values: dict[str, Any], phase: str | None = None
    ) -> None:
        self._last = time.monotonic()
        main = epoch >= self._steps.warmup_epochs
        self._record |= values | {
            "phase": phase or ("main" if main else "warm-up"),
            "epoch": epoch,
            "num_epochs": self._steps.num_epochs,
            "step": step,
            "steps_per_epoch": self._steps.per_epoch,
        }
        write_text(self._folder / PROGRESS_NAME, json.dumps(self._record))


class _Steps:
    """Sizes of the run that the progress line needs."""

    def __init__(self, config: RunConfig, manifest: Manifest):
        self.per_epoch = make_order(config, manifest).num_steps
        self.num_epochs = config.optim.epochs
        self.warmup_epochs = config.warmup_epochs


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Train, then evaluate the best checkpoint on the test split.

    Args:
        payload: `config` and `manifest` (JSON values), `data_folder`, `run_folder` (shared
            storage) and `tracking` (arguments of RunLogger).
    """
    config = RunConfig.model_validate(payload["config"])
    manifest = Manifest.model_validate(payload["manifest"])
    device = ray.train.torch.get_device()
    rows = _Rows(config, manifest, payload["data_folder"], device)
    method = make_method(config, manifest).to(device)
    optimizer = build_optimizer(config.optim, method)
    scheduler = build_schedule(config.optim, optimizer, config.warmup_epochs)
    start_epoch = 0
    if last := ray.train.get_checkpoint():
        with last.as_directory() as folder:
            state = checkpoints.load(Path(folder), method, optimizer, scheduler)
        start_epoch = int(state["epoch"]) + 1  # pyright: ignore[reportArgumentType]
    reporter = _Reporter(payload, start_epoch, _Steps(config, manifest))

    def validate() -> dict[str, float]:
        metrics = evaluate(
            method, rows.evaluation("val"), seed=config.train.seed, subsets=False, device=device
        )
        return {_val_name(name): value for name, value in metrics.items()}

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        folder = None
        if "val/accuracy" in metrics:
            main = method.is_main_phase(epoch)
            metrics[SELECTION] = metrics["val/accuracy"] if main else -1.0
            if rank() == 0:
                folder = Path(tempfile.mkdtemp(prefix="midas-checkpoint-"))
                checkpoints.save(folder, method, optimizer, scheduler, {"epoch": epoch})
        reporter.epoch(epoch, metrics, folder)

    hooks = Hooks(
        wrap=_wrap,
        train_batches=rows.train,
        data=EpochData(lambda: rows.evaluation("train"), lambda: rows.evaluation("val")),
        validate=validate,
        on_step=reporter.step,
        on_epoch=on_epoch,
    )
    try:
        fit(
            method,
            optimizer,
            scheduler,
            hooks,
            seed=config.train.seed,
            start_epoch=start_epoch,
            num_epochs=config.optim.epochs,
            eval_every_epochs=config.train.eval_every_epochs,
        )
        reporter.phase("evaluate")
        return _test_best(method, rows, config, device)
    except NonFiniteError as error:  # reduced first, so every rank is here
        return {"error": str(error)}
    finally:
        reporter.close()


def evaluate_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Evaluate a checkpoint folder on one split.

    Args:
        payload: as for `train_worker`, plus `checkpoint` (folder) and `split`.
    """
    config = RunConfig.model_validate(payload["config"])
    manifest = Manifest.model_validate(payload["manifest"])
    device = ray.train.torch.get_device()
    rows = _Rows(config, manifest, payload["data_folder"], device)
    method = make_method(config, manifest).to(device)
    checkpoints.load_weights(Path(payload["checkpoint"]), method)
    return {"metrics": _evaluate_split(method, rows, payload["split"], config, device)}


def _test_best(
    method: Method, rows: _Rows, config: RunConfig, device: torch.device
) -> dict[str, Any]:
    """Load the checkpoint with the best validation accuracy of the main phase and test it."""
    best = max(
        ray.train.get_all_reported_checkpoints(), key=lambda report: report.metrics[SELECTION]
    )
    with best.checkpoint.as_directory() as folder:
        checkpoints.load_weights(Path(folder), method)
    chosen = {name: best.metrics[name] for name in best.metrics if name.startswith("val/")}
    test = _evaluate_split(method, rows, "test", config, device)
    return {
        "metrics": {**chosen, **test, "best_epoch": best.metrics["epoch"]},
        "checkpoint": Path(best.checkpoint.path).name,
    }


def _evaluate_split(
    method: Method, rows: _Rows, split: Split, config: RunConfig, device: torch.device
) -> dict[str, float]:
    metrics = evaluate(
        method, rows.evaluation(split), seed=config.train.seed, subsets=True, device=device
    )
    return {f"{split}/{name}": value for name, value in metrics.items()}


def _wrap(method: Method) -> nn.Module:
    return ray.train.torch.prepare_model(
        method, parallel_strategy_kwargs={"gradient_as_bucket_view": True}
    )


def _val_name(name: str) -> str:
    """Validation metrics, named as the paper's diagnostics where it plots them."""
    special = {"misaligned_top2": "mis_val_top2", "misaligned_confidence": "mis_val_conf"}
    head, _, tail = name.partition("/")
    return f"{special[head]}{'/' if tail else ''}{tail}" if head in special else f"val/{name}"

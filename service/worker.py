"""What one Ray Train worker does: its rows in, the loop, reports out. The only bridge between
Ray and training/.

Everything a worker needs arrives in one JSON-like payload; what it returns (from rank 0) is
`{"metrics": {...}}`, or `{"error": message}` for failures that all ranks agree on.
"""

import json
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from data.order import Entries, Order
from data.pipeline import (
    SampleIndex,
    ShardReader,
    columns,
    eval_stream,
    locate,
    sample_index,
    train_stream,
)
from data.schema import Manifest, Split
from service.config import ConfigError, RunConfig
from service.files import HISTORY_NAME, PROGRESS_NAME, read_history, write_text
from service.tracking import RunLogger
from training import checkpoint as checkpoints
from training.batch import Batch, Progress
from training.distributed import rank, world_size
from training.encoders import ModalityKind, build_model
from training.evaluation import EVAL_CHUNK, evaluate
from training.loop import Hooks, fit
from training.methods import build_method
from training.methods.base import EpochData, Method, NonFiniteError, Resampling
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
    """The model, initialised from the training seed, inside its method.

    Raises:
        ConfigError: model or method settings do not fit the data set.
    """
    parts: list[tuple[str, ModalityKind, tuple[int, ...]]] = [
        (m.name, m.kind, m.shape) for m in manifest.modalities
    ]
    try:
        model = build_model(config.model, parts, len(manifest.classes), config.train.seed)
        return build_method(config.method, model, config.method_sections)
    except ValueError as error:  # settings that do not fit this data set
        raise ConfigError(str(error)) from error


class WorkerRows:
    """This rank's rows of a prepared data set, as batches on the device."""

    def __init__(self, config: RunConfig, manifest: Manifest, folder: str, device: torch.device):
        self._config = config
        self._manifest = manifest
        self._folder = folder
        self._device = device
        self._order = make_order(config, manifest)
        self._train_reader = ShardReader(folder, manifest, "train")
        self._stream: Iterator[pa.Table] | None = None
        self._index: SampleIndex | None = None
        self._cache: dict[Split, list[Batch]] = {}

    def train(self, epoch: int, resampling: Resampling | None) -> Iterator[Batch]:
        """This rank's part of every global batch of `epoch`; epochs must be asked for in turn."""
        if resampling is not None:
            self._stream = None  # it would deliver this epoch's rows in the next one
            return self._resampled(epoch, resampling)
        if self._stream is None:
            # One execution for all epochs: reading ahead does not stop at the end of an epoch.
            epochs = range(epoch, self._config.optim.epochs)
            self._stream = self._tables(self._order, epochs, None)
        return self._batches(islice(self._stream, self._order.num_steps), self._order)

    def _resampled(self, epoch: int, resampling: Resampling) -> Iterator[Batch]:
        if self._index is None:
            self._index = sample_index(self._train_reader)
        bits = 1 << torch.arange(resampling.keep.shape[1])
        keep = (resampling.keep.cpu().long() * bits).sum(dim=1)
        entries = locate(self._index, resampling.sample_id.cpu().numpy(), keep.numpy())
        order = replace(self._order, group_rows=entries.group_rows)
        return self._batches(self._tables(order, range(epoch, epoch + 1), entries), order)

    def _tables(self, order: Order, epochs: range, entries: Entries | None) -> Iterator[pa.Table]:
        return train_stream(
            self._train_reader,
            order,
            rank=rank(),
            world_size=world_size(),
            epochs=epochs,
            entries=entries,
        )

    def _batches(self, tables: Iterable[pa.Table], order: Order) -> Iterator[Batch]:
        every_lane = range(order.lanes)
        for step, table in enumerate(tables):
            yield self._batch(table, order.lanes, order.batch_rows(step, every_lane))

    def evaluation(self, split: Split) -> Iterator[Batch]:
        """This rank's fixed chunks of `split`; kept in memory after the first pass if small."""
        if split in self._cache:
            yield from self._cache[split]
            return
        rows = self._manifest.rows(split)
        size = rows * self._manifest.row_nbytes
        small = split == "val" and size <= EVAL_CACHE_BYTES * world_size()
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
            if small:  # copied: a view would hold the object store's blocks
                inputs = {name: value.clone() for name, value in batch.inputs.items()}
                kept.append(replace(batch, inputs=inputs))
            yield batch
        if small:
            self._cache[split] = kept

    def _batch(self, table: pa.Table, num_lanes: int, global_rows: int) -> Batch:
        arrays = {name: self._tensor(a) for name, a in columns(table, self._manifest).items()}
        label, sample_id, lane = (arrays.pop(name) for name in ("label", "sample_id", "lane"))
        keep = arrays.pop("keep", None)
        if keep is not None:
            keep = (keep[:, None] >> torch.arange(len(arrays), device=keep.device) & 1).bool()
        return Batch(arrays, label, sample_id, lane, num_lanes, global_rows, keep)

    def _tensor(self, array: np.ndarray) -> Tensor:
        with warnings.catch_warnings():  # views of the object store are read only; nobody writes
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array).to(self._device, non_blocking=True)


class _Reporter:
    """Rank 0's files and MLflow metrics, and the report to Ray that every rank makes.

    Rows of history are written only when the checkpoint that covers them is safe, and they travel
    in it: a restarted run neither loses nor repeats one.
    """

    def __init__(self, payload: dict[str, Any], steps: "_Steps", done: list[dict[str, float]]):
        """`done`: rows of the last checkpoint's interval, empty at the start of a run."""
        self._folder = Path(payload["run_folder"])
        self._steps = steps
        self._shown = 0.0
        self._record: dict[str, Any] = {}
        self._rows: list[dict[str, float]] = []
        self._logger: RunLogger | None = None
        if rank() == 0:
            self._logger = RunLogger(**payload["tracking"])
            before = done[0]["epoch"] if done else 0
            rows = read_history(self._folder / HISTORY_NAME)
            self._write([row for row in rows if row["epoch"] < before], "w")
            self._flush(done)

    @property
    def rows(self) -> list[dict[str, float]]:
        """Rows since the last checkpoint, to be saved with the next."""
        return self._rows

    def step(self, progress: Progress, sums: dict[str, Tensor]) -> None:
        """Write the progress record, at most every PROGRESS_SECONDS."""
        if rank() == 0 and time.monotonic() - self._shown > PROGRESS_SECONDS:
            loss = float(sums["loss_sum"] / sums["rows"])
            self._progress(progress.epoch, progress.step + 1, {"train/loss": loss})

    def epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Take the metrics of an epoch."""
        self._rows.append(metrics | {"epoch": epoch, "time": time.time()})
        alpha = {k.removeprefix("alpha/"): v for k, v in metrics.items() if k.startswith("alpha/")}
        shown = {k: metrics[k] for k in ("train/loss", "val/accuracy") if k in metrics}
        if rank() == 0:
            self._progress(epoch, self._steps.per_epoch, {"alpha": alpha, **shown})

    def checkpoint(self, epoch: int, folder: Path | None) -> None:
        """Report a checkpoint to Ray, all ranks together, then log the rows it covers."""
        ray.train.report(
            self._rows[-1],
            checkpoint=ray.train.Checkpoint(str(folder)) if folder else None,
            checkpoint_dir_name=f"epoch_{epoch:04d}",
            delete_local_checkpoint_after_upload=True,
        )
        self._flush(self._rows)
        self._rows = []

    def phase(self, phase: str) -> None:
        """Show a phase other than training."""
        if rank() == 0:
            self._progress(self._steps.num_epochs - 1, self._steps.per_epoch, {}, phase)

    def close(self) -> int:
        """Send what is still to be sent to MLflow; returns how many metrics it did not take."""
        return self._logger.close() + self._logger.num_dropped if self._logger else 0

    def _flush(self, rows: list[dict[str, float]]) -> None:
        if self._logger:
            self._write(rows, "a")
            for row in rows:
                self._logger.log(row, step=int(row["epoch"]), seconds=row["time"])

    def _write(self, rows: list[dict[str, float]], mode: str) -> None:
        with (self._folder / HISTORY_NAME).open(mode) as file:
            file.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows)

    def _progress(
        self, epoch: int, step: int, values: dict[str, Any], phase: str | None = None
    ) -> None:
        self._shown = time.monotonic()
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
    rows = WorkerRows(config, manifest, payload["data_folder"], device)
    method = make_method(config, manifest).to(device)
    optimizer = build_optimizer(config.optim, method)
    scheduler = build_schedule(config.optim, optimizer, config.warmup_epochs)
    state: dict[str, Any] = {"epoch": -1, "rows": []}
    if last := ray.train.get_checkpoint():
        with last.as_directory() as folder:
            state = checkpoints.load(Path(folder), method, optimizer, scheduler)
    reporter = _Reporter(payload, _Steps(config, manifest), state["rows"])

    def validate() -> dict[str, float]:
        metrics = evaluate(
            method, rows.evaluation("val"), seed=config.train.seed, subsets=False, device=device
        )
        return {_val_name(name): value for name, value in metrics.items()}

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        validated = "val/accuracy" in metrics
        if validated:
            main = method.is_main_phase(epoch)
            metrics[SELECTION] = metrics["val/accuracy"] if main else -1.0
        reporter.epoch(epoch, metrics)
        if validated:
            folder = None
            if rank() == 0:
                folder = Path(tempfile.mkdtemp(prefix="midas-checkpoint-"))
                progress = {"epoch": epoch, "rows": reporter.rows}
                checkpoints.save(folder, method, optimizer, scheduler, progress)
            reporter.checkpoint(epoch, folder)

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
            start_epoch=state["epoch"] + 1,
            num_epochs=config.optim.epochs,
            eval_every_epochs=config.train.eval_every_epochs,
        )
        reporter.phase("evaluate")
        result = _test_best(method, rows, config, device)
    except NonFiniteError as error:  # reduced first, so every rank is here
        result = {"error": str(error)}
    return result | {"lost_metrics": reporter.close()}


def evaluate_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Evaluate a checkpoint folder on one split.

    Args:
        payload: as for `train_worker`, plus `checkpoint` (folder) and `split`.
    """
    config = RunConfig.model_validate(payload["config"])
    manifest = Manifest.model_validate(payload["manifest"])
    device = ray.train.torch.get_device()
    rows = WorkerRows(config, manifest, payload["data_folder"], device)
    method = make_method(config, manifest).to(device)
    checkpoints.load_weights(Path(payload["checkpoint"]), method)
    return {"metrics": _evaluate_split(method, rows, payload["split"], config, device)}


def _test_best(
    method: Method, rows: WorkerRows, config: RunConfig, device: torch.device
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
    method: Method, rows: WorkerRows, split: Split, config: RunConfig, device: torch.device
) -> dict[str, float]:
    metrics = evaluate(
        method, rows.evaluation(split), seed=config.train.seed, subsets=True, device=device
    )
    return {f"{split}/{name}": value for name, value in metrics.items()}


def _wrap(method: Method) -> nn.Module:
    # Buffers: running statistics are not read in training, the loop synchronises them every epoch,
    # and what steers a method is equal on every rank by construction.
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    return ray.train.torch.prepare_model(method, parallel_strategy_kwargs=options)


def _val_name(name: str) -> str:
    """Validation metrics, named as the paper's diagnostics where it plots them."""
    special = {"misaligned_top2": "mis_val_top2", "misaligned_confidence": "mis_val_conf"}
    head, _, tail = name.partition("/")
    return f"{special[head]}{'/' if tail else ''}{tail}" if head in special else f"val/{name}"

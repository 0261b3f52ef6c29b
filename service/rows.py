"""This rank's rows of a prepared data set, as batches on the device."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data.draws import uniform
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
from data.schema import Manifest, Modality, Split
from service.config import RunConfig
from training.augment import RowSpec, augment, num_uniform
from training.batch import Batch
from training.distributed import rank, world_size
from training.evaluation import EVAL_CHUNK
from training.methods.base import Resampling

EVAL_CACHE_BYTES = 256 << 20


def make_order(config: RunConfig, manifest: Manifest) -> Order:
    """Order of the training split; a function of the config and the manifest only."""
    train = config.train
    window_rows = (train.shuffle_window_mib << 20) // max(1, manifest.row_nbytes("train"))
    return Order(
        group_rows=tuple(n for shard in manifest.splits["train"] for n in shard.row_groups),
        global_batch_size=train.global_batch_size,
        lanes=train.lanes,
        window_batches=max(1, window_rows // train.global_batch_size),
        seed=train.seed,
    )


def row_spec(modality: Modality, config: RunConfig) -> RowSpec | None:
    """How delivered rows become the model's inputs; None for those that are it already."""
    changes = config.augment.get(modality.name)
    random = modality.augment.model_dump()
    if changes is not None:
        random |= changes.model_dump(exclude_none=True)
    if modality.kind in ("text", "vector", "sequence"):
        return None
    return RowSpec(
        kind=modality.kind,
        shape=modality.shape,
        mean=modality.mean,
        std=modality.std,
        scale=modality.scale,
        time_axis=modality.time_axis,
        **random,
    )


class WorkerRows:
    """Batches of this rank, for training in order and for evaluation."""

    def __init__(self, config: RunConfig, manifest: Manifest, folder: str, device: torch.device):
        self._config = config
        self._manifest = manifest
        self._folder = folder
        self._device = device
        self._order = make_order(config, manifest)
        self._train_reader = ShardReader(folder, manifest, "train", config.train.seed)
        self._specs = {m.name: row_spec(m, config) for m in manifest.modalities}
        self._stream: Iterator[pa.Table] | None = None
        self._index: SampleIndex | None = None
        self._cache: dict[Split, list[Batch]] = {}

    def train(self, epoch: int, resampling: Resampling | None, step: int) -> Iterator[Batch]:
        """This rank's part of the global batches of `epoch` from `step` on.

        Epochs must be asked for in turn; only the first may start at another step than 0.
        """
        if resampling is not None:
            self._stream = None  # it would deliver this epoch's rows in the next one
            return self._resampled(epoch, resampling, step)
        if self._stream is None:
            # One execution for all epochs: reading ahead does not stop at the end of an epoch.
            epochs = range(epoch, self._config.optim.epochs)
            self._stream = self._tables(self._order, epochs, None, step)
        tables = islice(self._stream, self._order.num_steps - step)
        return self._batches(tables, self._order, step, epoch)

    def _resampled(self, epoch: int, resampling: Resampling, step: int) -> Iterator[Batch]:
        if self._index is None:
            self._index = sample_index(self._train_reader)
        bits = 1 << torch.arange(resampling.keep.shape[1])
        keep = (resampling.keep.cpu().long() * bits).sum(dim=1)
        entries = locate(self._index, resampling.sample_id.cpu().numpy(), keep.numpy())
        order = replace(self._order, group_rows=entries.group_rows)
        tables = self._tables(order, range(epoch, epoch + 1), entries, step)
        return self._batches(tables, order, step, epoch)

    def _tables(
        self, order: Order, epochs: range, entries: Entries | None, step: int
    ) -> Iterator[pa.Table]:
        return train_stream(
            self._train_reader,
            order,
            rank=rank(),
            world_size=world_size(),
            epochs=epochs,
            step=step,
            entries=entries,
        )

    def _batches(
        self, tables: Iterable[pa.Table], order: Order, first: int, epoch: int
    ) -> Iterator[Batch]:
        every_lane = range(order.lanes)
        for step, table in enumerate(tables, first):
            rows = order.batch_rows(step, every_lane)
            yield self._batch(table, "train", order.lanes, rows, epoch)

    def evaluation(self, split: Split) -> Iterator[Batch]:
        """This rank's fixed chunks of `split`; kept in memory after the first pass if small."""
        if split in self._cache:
            yield from self._cache[split]
            return
        rows = self._manifest.rows(split)
        row_nbytes = self._manifest.row_nbytes(split)
        # Of the rows as the model gets them: float32, also where bytes were delivered.
        size = rows * sum(4 * math.prod(m.shape) for m in self._manifest.modalities)
        small = split == "val" and size <= EVAL_CACHE_BYTES * world_size()
        kept: list[Batch] = []
        window_rows = (self._config.train.shuffle_window_mib << 20) // row_nbytes
        stream = eval_stream(
            ShardReader(self._folder, self._manifest, split),
            chunk_rows=EVAL_CHUNK,
            rank=rank(),
            world_size=world_size(),
            task_rows=window_rows // world_size(),
        )
        for table in stream:
            batch = self._batch(table, split, -(-rows // EVAL_CHUNK), rows, None)
            if small:  # copied: a view would hold the object store's blocks
                inputs = {name: value.clone() for name, value in batch.inputs.items()}
                kept.append(replace(batch, inputs=inputs))
            yield batch
        if small:
            self._cache[split] = kept

    def _batch(
        self, table: pa.Table, split: Split, num_lanes: int, global_rows: int, epoch: int | None
    ) -> Batch:
        """Rows on the device, as the model gets them; `epoch` if they are to be augmented."""
        arrays = columns(table, self._manifest, split)
        sample_id = arrays["sample_id"]
        inputs = {name: self._rows(name, arrays[name], sample_id, epoch) for name in self._specs}
        return Batch(
            inputs,
            self._tensor(arrays["label"]),
            self._tensor(sample_id),
            self._tensor(arrays["lane"]),
            num_lanes,
            global_rows,
            keep=self._mask(arrays.get("keep")),
            present=self._mask(arrays.get("present")),
        )

    def _rows(
        self, name: str, array: np.ndarray, sample_id: np.ndarray, epoch: int | None
    ) -> Tensor:
        rows, spec = self._tensor(array), self._specs[name]
        if spec is None:
            return rows
        numbers = None
        if epoch is not None and (count := num_uniform(spec)):
            draw = uniform(self._config.train.seed, f"augment/{name}", epoch, sample_id, count)
            numbers = torch.from_numpy(draw).to(self._device, non_blocking=True)
        return augment(rows, spec, numbers)

    def _mask(self, bits: np.ndarray | None) -> Tensor | None:
        """(B, M) bool from bit masks (B,)."""
        if bits is None:
            return None
        value = self._tensor(bits)
        places = torch.arange(len(self._specs), device=value.device)
        return (value[:, None] >> places & 1).bool()

    def _tensor(self, array: np.ndarray) -> Tensor:
        with warnings.catch_warnings():  # views of the object store are read only; nobody writes
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array).to(self._device, non_blocking=True)

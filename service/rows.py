"""This rank's rows of a prepared data set, as batches on the device."""

import math
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data.draws import uniform
from data.order import Entries, Order
from data.pipeline import ReadAhead, eval_stream, node_resources, train_stream
from data.reader import SampleIndex, ShardReader, columns, locate, sample_index
from data.schema import Manifest, Split
from service.config import RunConfig
from service.feed import Feed, FeedMeter, Node, local_workers
from service.stepper import row_spec
from training.augment import augment, num_uniform
from training.batch import Batch
from training.distributed import rank, world_size
from training.evaluation import EVAL_CHUNK
from training.methods.base import Resampling

EVAL_CACHE_BYTES = 256 << 20
T = TypeVar("T")


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


class WorkerRows:
    """Batches of this rank, for training in order and for evaluation.

    On a GPU each batch is prepared (copied and augmented) in a thread, while the one before is in
    use.

    Attributes:
        prepare_seconds: time that training batches were prepared in the thread that asked for them;
            the rest of its wait for a batch is for the reader. 0 on a GPU.
    """

    def __init__(self, config: RunConfig, manifest: Manifest, folder: str, device: torch.device):
        self._config = config
        self._manifest = manifest
        self._folder = folder
        self._device = device
        self._order = make_order(config, manifest)
        self._train_reader = ShardReader(folder, manifest, "train", config.train.seed)
        self._specs = {m.name: row_spec(m, config) for m in manifest.modalities}
        self._meter: FeedMeter | None = None
        self._stream: Iterator[pa.Table] | None = None
        self._stream_ahead: ReadAhead | None = None
        self._index: SampleIndex | None = None
        self._cache: dict[Split, list[Batch]] = {}
        self.prepare_seconds = 0.0

    @property
    def feed(self) -> Feed | None:
        """What was measured of reading and training, once training has begun."""
        return self._meter and self._meter.feed

    def train(self, epoch: int, resampling: Resampling | None, step: int) -> Iterator[Batch]:
        """This rank's part of the global batches of `epoch` from `step` on.

        Epochs must be asked for in turn; only the first may start at another step than 0.
        """
        self._meter = meter = self._meter or self._make_meter()
        if resampling is not None:
            self._stream = None  # it would deliver this epoch's rows in the next one
            order, tables = self._resampled(epoch, resampling, step, meter)
        else:
            order, tables = self._order, self._planned(epoch, step, meter)
        return self._timed(self._in_time(self._batches(tables, order, step, epoch)), meter)

    def _make_meter(self) -> FeedMeter:
        lanes = self._order.lanes_of(rank(), world_size())
        rows = self._order.window_rows(0, lanes)
        window_nbytes = rows * self._manifest.row_nbytes("train")
        node = Node(*node_resources(), local_workers(), self._config.scaling.cpus_per_worker)
        return FeedMeter(self._train_reader, window_nbytes, node, self._config.feed)

    def _planned(self, epoch: int, first: int, meter: FeedMeter) -> Iterator[pa.Table]:
        """Every row once, through one execution for all epochs: reading ahead does not stop at the
        end of an epoch. The execution begins again, at the step where it is, to read further
        ahead."""
        epochs = range(epoch, self._config.optim.epochs)
        for step in range(first, self._order.num_steps):
            if self._stream is None or self._stream_ahead != meter.feed.ahead:
                self._stream_ahead = meter.feed.ahead
                self._stream = self._tables(self._order, epochs, None, step, self._stream_ahead)
            yield next(self._stream)

    def _resampled(
        self, epoch: int, resampling: Resampling, step: int, meter: FeedMeter
    ) -> tuple[Order, Iterator[pa.Table]]:
        if self._index is None:
            self._index = sample_index(self._train_reader)
        bits = 1 << torch.arange(resampling.keep.shape[1])
        keep = (resampling.keep.cpu().long() * bits).sum(dim=1)
        entries = locate(self._index, resampling.sample_id.cpu().numpy(), keep.numpy())
        order = replace(self._order, group_rows=entries.group_rows)
        epochs = range(epoch, epoch + 1)
        return order, self._tables(order, epochs, entries, step, meter.feed.ahead)

    def _tables(
        self, order: Order, epochs: range, entries: Entries | None, step: int, ahead: ReadAhead
    ) -> Iterator[pa.Table]:
        return train_stream(
            self._train_reader,
            order,
            rank=rank(),
            world_size=world_size(),
            epochs=epochs,
            step=step,
            entries=entries,
            ahead=ahead,
        )

    def _in_time(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """On a CPU a thread beside the training would take its time from it."""
        return one_ahead(batches, self._device) if self._on_gpu else batches

    def _timed(self, batches: Iterator[Batch], meter: FeedMeter) -> Iterator[Batch]:
        for batch in batches:
            began = time.perf_counter()
            yield batch
            meter.step(len(batch.label), time.perf_counter() - began)

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _batches(
        self, tables: Iterable[pa.Table], order: Order, first: int, epoch: int
    ) -> Iterator[Batch]:
        for step, table in enumerate(tables, first):
            began = time.perf_counter()
            lanes = (range(lane, lane + 1) for lane in range(order.lanes))
            lane_rows = tuple(order.batch_rows(step, lane) for lane in lanes)
            batch = self._batch(table, "train", order.lanes, sum(lane_rows), epoch)
            batch = replace(batch, lane_rows=lane_rows)
            if not self._on_gpu:
                self.prepare_seconds += time.perf_counter() - began
            yield batch

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
            ahead=self._meter.feed.ahead if self._meter else ReadAhead(),
        )
        num_chunks = -(-rows // EVAL_CHUNK)
        batches = (self._batch(table, split, num_chunks, rows, None) for table in stream)
        for batch in self._in_time(batches):
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
            chunk=int(arrays["lane"][0]) if epoch is None else None,
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
            numbers = self._tensor(draw)
        return augment(rows, spec, numbers)

    def _mask(self, bits: np.ndarray | None) -> Tensor | None:
        """(B, M) bool from bit masks (B,)."""
        if bits is None:
            return None
        value = self._tensor(bits)
        places = torch.arange(len(self._specs), device=value.device)
        return (value[:, None] >> places & 1).bool()

    def _tensor(self, array: np.ndarray) -> Tensor:
        if self._on_gpu:  # from memory that is not pinned the copy would wait for the device
            dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
            pinned = torch.empty(array.shape, dtype=dtype, pin_memory=True)
            np.copyto(pinned.numpy(), array)
            return pinned.to(self._device, non_blocking=True)
        with warnings.catch_warnings():  # views of the object store are read only; nobody writes
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array)


def one_ahead(items: Iterator[T], device: torch.device) -> Iterator[T]:
    """`items`, each made in a thread while the one before is in use.

    An exception comes out where its item was due. When the iterator is closed, the thread ends
    after the item it is making.

    Args:
        device: a GPU, made the thread's own, or a CPU.
    """
    end = object()
    thread = ThreadPoolExecutor(1, "prepare", initializer=_enter, initargs=(device,))
    try:
        due = thread.submit(next, items, end)
        while (item := due.result()) is not end:
            due = thread.submit(next, items, end)
            yield item  # pyright: ignore[reportReturnType]
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def _enter(device: torch.device) -> None:
    """Which GPU is the current one is a matter of each thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)

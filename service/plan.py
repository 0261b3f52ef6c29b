"""`--dry-run`: what a run would do, computed without starting anything or writing a file."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.prepare import SPLITS, default_folder
from data.schema import MANIFEST_NAME, Manifest, Shard, Split, load_manifest
from data.sources import build_source
from service.config import RunConfig
from service.rows import make_order
from service.stepper import make_method
from training.model import MultimodalModel

OPTIMIZER_STATES = {"sgd": 1, "adam": 2, "adamw": 2}


def make_plan(config: RunConfig) -> dict[str, Any]:
    """Flat plan of a run: data, steps, workers, batch arithmetic, estimated memory of a worker.

    An elastic run is planned with its fewest workers, which need the most memory each.

    Raises:
        DataError: the raw data is not there, or the order's rules do not hold.
    """
    folder = default_folder(config.data, Path(config.storage))
    manifest = manifest_of(config)
    order = make_order(config, manifest)
    workers, batch = config.scaling.min_workers, config.train.global_batch_size
    share = max(len(order.lanes_of(rank, workers)) for rank in range(workers))
    worker_rows = batch // order.lanes * share
    method = make_method(config, manifest)
    parameters = sum(p.numel() for p in method.parameters())
    activations = _activation_bytes(method.model, manifest) * worker_rows
    weights = parameters * 4 * (2 + OPTIMIZER_STATES[config.optim.name] + int(workers > 1))
    window_rows = min(order.window_batches * batch, order.num_rows) // workers
    return {
        "method": config.method,
        "data": config.data.name,
        "data_folder": str(folder),
        "data_prepared": folder.has(MANIFEST_NAME),
        "split": manifest.split_rule,
        **{f"rows/{split}": manifest.rows(split) for split in SPLITS},
        "modalities": ", ".join(f"{m.name} {m.dtype}{list(m.shape)}" for m in manifest.modalities),
        "classes": len(manifest.classes),
        "workers": workers,
        "max_workers": config.scaling.max_workers,
        "device": config.scaling.device,
        "global_batch_size": batch,
        "batch_size_per_worker": worker_rows,
        "lanes": order.lanes,
        "steps_per_epoch": order.num_steps,
        "rows_in_last_batch": order.batch_rows(order.num_steps - 1, range(order.lanes)),
        "epochs": config.optim.epochs,
        "warmup_epochs": config.warmup_epochs,
        "steps": order.num_steps * config.optim.epochs,
        "parameters": parameters,
        "worker_memory_mib/weights_gradients_optimizer": _mib(weights),
        "worker_memory_mib/activations": _mib(activations),
        "worker_memory_mib/shuffle_windows": _mib(2 * window_rows * manifest.row_nbytes("train")),
        "storage": str(Path(config.storage).resolve()),
    }


def manifest_of(config: RunConfig) -> Manifest:
    """Of the prepared set; else one with the sizes that prepare will make."""
    folder = default_folder(config.data, Path(config.storage))
    if folder.has(MANIFEST_NAME):
        return load_manifest(folder)
    source = build_source(config.data)
    items = source.items()
    train_rows = sum(item.split == "train" for item in items)
    row_nbytes = sum(modality.stored_nbytes("train") for modality in source.modalities)
    splits: dict[Split, tuple[Shard, ...]] = {}
    for split in SPLITS:
        rows = sum(item.split == split for item in items)
        size = config.data.group_rows(train_rows, row_nbytes)
        groups = [size] * (rows // size) + [rows % size] * (rows % size > 0)
        splits[split] = (
            Shard(path="planned", rows=rows, row_groups=tuple(groups), num_bytes=0, sha256=""),
        )
    return Manifest(
        name=source.name,
        source={},
        split_rule=source.split_rule,
        modalities=source.modalities,
        classes=source.classes,
        splits=splits,
        class_counts={},
    )


def _activation_bytes(model: MultimodalModel, manifest: Manifest) -> int:
    """Bytes of all module outputs for one row: the part of a step's memory that grows with it."""
    sizes: list[int] = []

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        sizes.append(output.numel() * output.element_size())

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(count) for module in leaves]
    with torch.no_grad():
        model.eval().encode(
            {
                m.name: torch.ones(1, *m.shape, dtype=torch.int32 if m.kind == "text" else None)
                for m in manifest.modalities
            }
        )
    for hook in hooks:
        hook.remove()
    return sum(sizes)


def _mib(num_bytes: int) -> float:
    return round(num_bytes / 2**20, 1)

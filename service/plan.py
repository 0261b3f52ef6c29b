"""`--dry-run`: what a run would do, computed without starting anything or writing a file."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.order import Order
from data.prepare import default_folder
from data.schema import MANIFEST_NAME, load_manifest
from data.sources import build_source, rows_per_group
from service.config import RunConfig
from service.worker import make_order
from training.encoders import build_model
from training.methods import build_method

OPTIMIZER_STATES = {"sgd": 1, "adam": 2, "adamw": 2}


def make_plan(config: RunConfig) -> dict[str, Any]:
    """Flat plan of a run: data, steps, workers, batch arithmetic, estimated memory of a worker.

    Raises:
        DataError: the raw data is not there, or the order's rules do not hold.
    """
    folder = default_folder(config.data, Path(config.storage))
    if (folder / MANIFEST_NAME).is_file():
        manifest = load_manifest(folder)
        rows = {split: manifest.rows(split) for split in manifest.splits}
        modalities, classes, order = (
            manifest.modalities,
            manifest.classes,
            make_order(config, manifest),
        )
    else:
        source = build_source(config.data)
        items = source.items()
        rows = {s: sum(item.split == s for item in items) for s in ("train", "val", "test")}
        modalities, classes = source.modalities, source.classes
        order = _order_before_prepare(config, rows["train"], sum(m.nbytes for m in modalities))
    order.lanes_of(0, config.scaling.num_workers)
    workers, batch = config.scaling.num_workers, config.train.global_batch_size
    parts = [(m.name, m.kind, m.shape) for m in modalities]
    model = build_model(config.model, parts, len(classes), config.train.seed)
    method = build_method(config.method, model, config.method_sections)
    parameters = sum(p.numel() for p in method.parameters())
    activations = _activation_bytes(model, parts) * batch // workers
    weights = parameters * 4 * (2 + OPTIMIZER_STATES[config.optim.name] + int(workers > 1))
    window = order.window_batches * batch * sum(m.nbytes for m in modalities) // workers
    return {
        "method": config.method,
        "data": config.data.name,
        "data_folder": str(folder),
        "data_prepared": (folder / MANIFEST_NAME).is_file(),
        **{f"rows/{split}": count for split, count in rows.items()},
        "modalities": ", ".join(f"{m.name} {m.dtype}{list(m.shape)}" for m in modalities),
        "classes": len(classes),
        "workers": workers,
        "device": config.scaling.device,
        "global_batch_size": batch,
        "batch_size_per_worker": batch // workers,
        "lanes": order.lanes,
        "steps_per_epoch": order.num_steps,
        "rows_in_last_batch": order.batch_rows(order.num_steps - 1, range(order.lanes)),
        "epochs": config.optim.epochs,
        "warmup_epochs": config.warmup_epochs,
        "steps": order.num_steps * config.optim.epochs,
        "parameters": parameters,
        "worker_memory_mib/weights_gradients_optimizer": round(weights / 2**20, 1),
        "worker_memory_mib/activations": round(activations / 2**20, 1),
        "worker_memory_mib/shuffle_windows": round(
            2 * min(window, rows["train"] * window) / 2**20, 1
        ),
        "storage": str(Path(config.storage).resolve()),
    }


def _order_before_prepare(config: RunConfig, rows: int, row_nbytes: int) -> Order:
    per_group = rows_per_group(config.data, rows)
    groups = [per_group] * (rows // per_group) + ([rows % per_group] if rows % per_group else [])
    batch = config.train.global_batch_size
    window = max(1, (config.train.shuffle_window_mib << 20) // row_nbytes // batch)
    return Order(tuple(groups), batch, config.train.lanes, window, config.train.seed)


def _activation_bytes(model: nn.Module, parts: list[tuple[str, Any, tuple[int, ...]]]) -> int:
    """Bytes of all module outputs for one row, the part of a step's memory that grows with it."""
    total = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, torch.Tensor) and not list(module.children()):
            total += output.numel() * output.element_size() // 2

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    with torch.no_grad():
        model.encode({name: torch.zeros(2, *shape) for name, _, shape in parts})  # pyright: ignore[reportCallIssue]
    for hook in hooks:
        hook.remove()
    return total

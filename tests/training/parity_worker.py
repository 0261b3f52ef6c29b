"""Trains every case on fixed global batches, as one process or as one of two gloo ranks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.training.toys import (
    START,
    random_batch,
    tiny_method,
    vector_batch,
    vector_midas,
    with_missing,
)
from training.batch import Batch
from training.batchnorm import SyncBatchNorm
from training.distributed import (
    COMPRESSIONS,
    Compression,
    data_parallel,
    gather_rows,
    rank,
    reduce_sums,
    row_counts,
    world_size,
)
from training.loop import Hooks, Position, fit
from training.methods.base import EpochData, Method

NUM_LANES, NUM_EPOCHS, WARMUP_EPOCHS = 4, 4, 2
ROWS_A, ROWS_B = 2, 3

CASES: dict[str, dict[str, Any]] = {
    "joint": {"name": "joint"},
    "joint_uni": {"name": "joint_uni"},
    "unimodal": {"name": "unimodal"},
    "ogm_ge": {"name": "ogm_ge"},
    "midas": {"name": "midas"},
    "midas_groups": {"name": "midas", "pair_groups": 2},
    "midas_four_groups": {"name": "midas", "pair_groups": 4, "num_modalities": 3},
    "midas_uneven_groups": {"name": "midas", "pair_groups": 3, "num_modalities": 3},
    "midas_official": {"name": "midas", "variant": "official_code"},
    "midas_input": {
        "name": "midas",
        "mix_level": "input",
        "pairing": "confusion",
        "alpha_flip": "carry",
        "num_modalities": 3,
    },
    "midas_batchnorm": {"name": "midas", "batchnorm": True},
    "ogm_ge_missing": {"name": "ogm_ge", "missing": True},
    "midas_missing": {"name": "midas", "missing": True, "batchnorm": True},
    "midas_groups_missing": {
        "name": "midas",
        "missing": True,
        "pair_groups": 2,
        "variant": "official_code",
    },
    "midas_micro_batches": {"name": "midas", "micro_batches": 2, "batchnorm": True},
    "midas_known_lanes": {"name": "midas", "micro_batches": 1, "pair_groups": 2},
}


def global_batches(num_modalities: int, missing: bool) -> list[Batch]:
    """Five batches: even; rank 0 with one class only; one class only; two uneven ones.

    With `missing`, a third of the inputs is absent, and rank 0 has no m0 at all in the second.
    """
    even, one_class, equal, *uneven = (
        random_batch(seed, rows, num_modalities, NUM_LANES, torch.float64)
        for seed, rows in enumerate((12, 12, 12, 7, 9))
    )
    one_class.label[one_class.lane < 2] = 0
    equal.label[:] = 1
    lanes = ([0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, 2, 3, 3, 3])  # 7 and 0, 3 and 6 rows
    uneven = [
        replace(batch, lane=torch.tensor(lane)) for batch, lane in zip(uneven, lanes, strict=True)
    ]
    batches = [even, one_class, equal, *uneven]
    if not missing:
        return batches
    batches = [with_missing(batch, seed) for seed, batch in enumerate(batches)]
    assert batches[1].present is not None
    batches[1].present[batches[1].lane < 2, 0] = False
    return batches


def own_part(batch: Batch) -> Batch:
    """This rank's rows: the lanes it owns."""
    return batch.only(batch.lane * world_size() // batch.num_lanes == rank())


def with_lane_rows(batch: Batch) -> Batch:
    """The whole batch, with the rows of every lane."""
    rows = torch.bincount(batch.lane, minlength=batch.num_lanes).tolist()
    return replace(batch, lane_rows=tuple(rows))


def wrap(method: Method, compression: Compression = "none") -> nn.Module:
    return data_parallel(
        method,
        in_rank_order=False,
        compression=compression,
        launched=lambda: method.clock.mark("backward"),
    )


def compressed() -> dict[str, Tensor]:
    """Gradients of one step, averaged in half precision."""
    grads = {}
    for kind in COMPRESSIONS:
        method = tiny_method("joint")
        optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.1)
        batch = own_part(random_batch(0, 12))
        method.train_step(wrap(method, kind), batch, optimizer, START)
        learned = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
        grads[kind] = torch.cat(learned)
    return grads


def train(
    name: str,
    num_modalities: int = 2,
    missing: bool = False,
    micro_batches: int | None = None,
    **midas,
) -> dict[str, Any]:
    """State before and after 20 steps, metrics of the epochs, alpha after every epoch."""
    method = tiny_method(name, num_modalities, warmup_epochs=WARMUP_EPOCHS, **midas).double()
    method.micro_batches = micro_batches or 1
    before = {key: value.clone() for key, value in method.state_dict().items()}
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.1, momentum=0.9)
    metrics, steps = [], []

    def batches(epoch: int) -> Iterator[Batch]:
        whole = global_batches(num_modalities, missing)
        known = whole if micro_batches is None else map(with_lane_rows, whole)
        return iter([own_part(batch) for batch in known])

    fit(
        method,
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0),
        Hooks(
            wrap=wrap,
            train_batches=lambda epoch, resampling, step: batches(epoch),
            data=EpochData(train=lambda: batches(0), val=lambda: batches(0)),
            signals=lambda: {"ranks": torch.ones(())},
            on_step=lambda position, signals: steps.append(signals),
            on_trained=lambda position, validates: None,
            validate=dict,
            on_epoch=lambda epoch, values: metrics.append(values),
        ),
        Position(),
        seed=1,
        num_epochs=NUM_EPOCHS,
        eval_every_epochs=1,
    )
    return {"before": before, "state": method.state_dict(), "metrics": metrics, "steps": steps}


def gather_loss(rows: Tensor, part: int) -> Tensor:
    """A loss over all gathered rows that differs from rank to rank."""
    weights = torch.linspace(-1, 1, rows.numel(), dtype=rows.dtype).reshape(rows.shape)
    return (rows.square() * weights.roll(part, dims=0)).sum() * (part + 1)


def gather_gradient() -> dict[str, Tensor]:
    """Gathered rows and the gradient of this rank's rows, of the sum of all ranks' losses."""
    everything = torch.arange(10.0, dtype=torch.float64).reshape(ROWS_A + ROWS_B, 2)
    own = everything.split([ROWS_A, ROWS_B])[rank()] if world_size() > 1 else everything
    own = own.clone().requires_grad_()
    gathered = gather_rows(own, row_counts(len(own), own.device))
    parts = [rank()] if world_size() > 1 else [0, 1]
    torch.stack([gather_loss(gathered, part) for part in parts]).sum().backward()
    assert own.grad is not None
    return {"rows": gathered.detach(), "grad": own.grad}


def vector_c(labels: tuple[int, ...]) -> dict[str, Tensor]:
    """Reduced sums of one step on vector C of methods.md, and alpha after it."""
    method = vector_midas(pair_groups=2)
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.1)
    batch = own_part(vector_batch(labels))
    return method.train_step(wrap(method), batch, optimizer, START)


def batchnorm(dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, gradients and running statistics of SyncBatchNorm on this rank's images."""
    generator = torch.Generator().manual_seed(3)
    everything = torch.randn(2, ROWS_A + ROWS_B, 4, 3, 3, generator=generator, dtype=dtype) * 3 + 1
    own = slice(None) if world_size() == 1 else (slice(0, ROWS_A), slice(ROWS_A, None))[rank()]
    layer = SyncBatchNorm(4).to(dtype)
    layer.weight.data = torch.linspace(0.5, 2, 4, dtype=dtype)
    images = everything[0, own].to(memory_format=torch.channels_last).requires_grad_()
    output = layer(images)
    (output * everything[1, own]).sum().backward()
    grads = reduce_sums({"weight": layer.weight.grad, "bias": layer.bias.grad})
    buffers = {name: value.clone() for name, value in layer.named_buffers()}
    return {"output": output.detach(), "input": images.grad, **grads, **buffers}


def collectives(**config) -> list[str]:
    """Names of the collectives of one main-phase step, without those of DDP."""
    called = []
    plain = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast")}

    def recorded(name: str):
        def call(*args, **kwargs):
            called.append(name)
            return plain[name](*args, **kwargs)

        return call

    method = tiny_method("midas", **config)
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.1)
    for name in plain:
        setattr(dist, name, recorded(name))
    method.train_step(method, own_part(random_batch(0, 12)), optimizer, START)
    for name, function in plain.items():
        setattr(dist, name, function)
    return called


def gradient_storages() -> tuple[int, int]:
    """In how many pieces of memory gradients lie after a step, and how many they are."""
    method = tiny_method("joint")
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.1)
    method.train_step(wrap(method), own_part(random_batch(0, 12)), optimizer, START)
    grads = [p.grad for p in method.parameters() if p.grad is not None]
    return len({grad.untyped_storage().data_ptr() for grad in grads}), len(grads)


def travels() -> list[str]:
    """Starts and ends of the collectives of one step in encoders with BatchNorm, without those of
    DDP."""
    events = []
    plain = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    class Travel:
        def __init__(self, work: dist.Work):
            self._work = work

        def wait(self) -> None:
            events.append("wait")
            self._work.wait()

    def recorded(name: str):
        def call(*args, **kwargs):
            events.append(name)
            work = plain[name](*args, **kwargs)
            return work if work is None else Travel(work)

        return call

    method = tiny_method("joint", num_modalities=3, batchnorm=True)
    # Its BatchNorm has no use for the gradient of its input.
    method.model.encoders["m2"].get_submodule("0").requires_grad_(False)
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.1)
    for name in plain:
        setattr(dist, name, recorded(name))
    method.train_step(method, own_part(random_batch(0, 12, 3)), optimizer, START)
    for name, function in plain.items():
        setattr(dist, name, function)
    return events


def run_cases() -> dict[str, Any]:
    torch.set_num_threads(1)
    results: dict[str, Any] = {name: train(**case) for name, case in CASES.items()}
    results["vector_c"] = {labels: vector_c(labels) for labels in ((0, 1, 2, 1), (0, 0, 2, 1))}
    results["collectives"] = {n: collectives(pair_groups=n) for n in (1, 2)}
    results["gradient_storages"] = gradient_storages()
    results["travels"] = travels()
    results["compressed"] = compressed()
    results["batchnorm"] = {dtype: batchnorm(dtype) for dtype in (torch.float32, torch.float64)}
    return results | {"gather": gather_gradient()}


def main(process: int, folder: str) -> None:
    """Entry of a spawned rank: results go to `folder`/<rank>.pt."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=2
    )
    torch.save(run_cases(), Path(folder) / f"{process}.pt")
    dist.destroy_process_group()

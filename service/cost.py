"""What a trial will take, from a few steps and one validation on made-up rows, in this process.

Reading is not in it: that goes on beside, and is measured by `midas bench`.
"""

import time
from collections.abc import Callable
from statistics import median

import torch

from data.schema import Manifest
from service.config import RunConfig
from service.rows import make_order
from service.stepper import Stepper
from training.batch import Batch, Progress
from training.evaluation import EVAL_CHUNK, evaluate

STEPS = 3


def trial_seconds(config: RunConfig, manifest: Manifest) -> float:
    """Seconds that all epochs of a trial take, without reading and exchanges between workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.scaling.cpus_per_worker)
    try:
        return _measured(config, manifest)
    finally:
        torch.set_num_threads(threads)


def _measured(config: RunConfig, manifest: Manifest) -> float:
    gpu = config.scaling.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    stepper = Stepper(config, manifest, device)
    workers = config.scaling.max_workers
    batch = _rows(manifest, config.train.global_batch_size // workers, config.train.lanes, device)
    method, optimizer = stepper.method, stepper.optimizer

    def step_seconds(epoch: int) -> float:
        method.set_phase(epoch)
        method.train()
        wrapped = stepper.wrap(method)
        progress = Progress(config.train.seed, epoch, 0, config.optim.epochs)
        return _timed(lambda: method.train_step(wrapped, batch, optimizer, progress), device)

    rows = min(EVAL_CHUNK, manifest.rows("val"))
    chunk = _rows(manifest, rows, 1, device)

    def validate() -> None:
        evaluate(method, [chunk], seed=0, subsets=False, device=device)

    validation = _timed(validate, device) * manifest.rows("val") / rows / workers
    steps, warmup = make_order(config, manifest).num_steps, config.warmup_epochs
    trained = steps * (config.optim.epochs - warmup) * step_seconds(warmup)
    if warmup:
        trained += steps * warmup * step_seconds(0)
    return trained + validation * config.optim.epochs / config.train.eval_every_epochs


def _timed(action: Callable[[], object], device: torch.device) -> float:
    """Median of STEPS times, after one that does not count."""
    found = []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return median(found[1:])


def _rows(manifest: Manifest, count: int, lanes: int, device: torch.device) -> Batch:
    inputs = {
        m.name: torch.ones(count, *m.shape, dtype=torch.int32 if m.kind == "text" else None)
        for m in manifest.modalities
    }
    number = torch.arange(count)
    return Batch(
        {name: value.to(device) for name, value in inputs.items()},
        (number % len(manifest.classes)).to(device),
        number.to(device),
        (number * lanes // count).to(device),
        lanes,
        count,
        lane_rows=tuple(int(((number * lanes // count) == lane).sum()) for lane in range(lanes)),
    )

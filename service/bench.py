"""`midas bench`: how fast a configuration trains here, and what keeps it from being faster.

The driver's half: it starts the contenders of `service/contest.py` and turns their numbers into a
report.
"""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from data.folder import Folder
from data.schema import load_manifest
from service import launch
from service.capacity import check_local_capacity
from service.cluster import ray_session, run_workers
from service.config import RunConfig
from service.environment import MEMORY_ENVIRONMENT, environment
from service.files import write_text

log = logging.getLogger(__name__)

Turns = dict[str, list[dict[str, float]]]
Command = list[str]

ROOT = Path(__file__).parent.parent
END_SECONDS = 20.0
# A share of the step's time that is worth saying.
NOTABLE = 0.03
# The reader is no limit while it is this much faster than training.
AMPLE = 1.5
# Products of dense bf16 matrices, TFLOP/s by data sheet; names as the driver gives them.
PEAK_TFLOPS = {
    "NVIDIA H200": 989.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
}


def bench(
    config: RunConfig,
    data_folder: Folder,
    *,
    seconds: float,
    debug: bool,
    others: Mapping[str, Command] | None = None,
) -> dict[str, Any]:
    """Measure a configuration; nothing of it is kept.

    Without a cluster address, processes without Ray take turns with the workers: a group of as
    many, groups of 2, 4, 8, ... below that and one alone, each process with the rows of one worker,
    and as many apart, which do not talk to each other.

    Args:
        config: from `launch.resolve`; its largest number of workers is measured.
        data_folder: from `launch.ensure_prepared`.
        seconds: for the turns of all contenders, after the start.
        others: more contenders by name; see `contest.Turns`. They are given the folder where
            contenders meet as last argument, and `<name>_over`, samples a second of the loop over
            theirs, is reported.

    Returns:
        Medians over turns; ratios are taken turn by turn:
        `samples_per_second` of the loop under Ray Train with its data from Ray Data,
        `model_samples_per_second` and `model_step_seconds` of bare steps on batches in memory,
        `model_tflops`, TFLOP/s of their convolutions and products of matrices (`peak_share`: over
        what that many GPUs give dense bf16, where that is known), `rows_per_second` of the reader
        alone, `midas_over_joint` and `midas_over_joint_uni` (time of a step), `ray_over_bare`
        (samples a second against a process group without Ray, with data in memory), `scaling` (of
        that group against one process; `scaling_2`, `scaling_4`, ... of the smaller groups),
        `apart_scaling` (the same of processes that do not talk, all of which then take the same
        number of steps, and `slowest_scaling` if each were as slow as the slowest, as those that
        wait for each other are), shares of the loop's time, seconds of the first step and of a
        step, peak memory, and `limit`, a sentence. With every median come the lowest and the
        highest turn, `<name>_min` and `<name>_max`.
    """
    began = time.monotonic()
    manifest = load_manifest(data_folder)
    workers = config.scaling.max_workers
    scaling = config.scaling.model_copy(update={"num_workers": workers})
    config = config.model_copy(update={"scaling": scaling})
    check_local_capacity(scaling)
    launch.check_plan(config, manifest)
    bare = bare_contenders(workers) if environment()["RAY_ADDRESS"] is None else {}
    payload = launch.base_payload(config, manifest, data_folder) | {"seconds": seconds}
    payload["others"] = bare | {name: [name] for name in others or {}}
    with _folder(config) as folder, ray_session(config, debug=debug):
        payload["folder"] = str(folder)
        with _contenders(folder, payload, workers if bare else 0, others or {}, debug=debug):
            returned = run_workers("bench_worker", scaling, folder, payload)
    report = summary(returned["turns"], list(others or {}))
    return {
        **report,
        **work(returned["flops"], report["model_step_seconds"], returned["gpu"], workers),
        **returned["peak"],
        **{name: returned[name] for name in ("first_step_seconds", "precision", "device")},
        "workers": workers,
        "limit": limit(report, workers),
        "seconds": time.monotonic() - began,
    }


def bare_contenders(workers: int) -> dict[str, list[str]]:
    """Contenders without Ray -> the processes that are called: of a group the first.

    `bare` is the group of as many, `group_2`, `group_4`, ... are the smaller ones, `alone` is one
    process, `apart` are as many that do not talk to each other.
    """
    if workers == 1:
        return {"bare": ["single_0"]}
    apart = [f"single_{place}" for place in range(workers)]
    smaller = {f"group_{size}": [f"group_{size}"] for size in _group_sizes(workers)[:-1]}
    return {"bare": [f"group_{workers}"], "alone": apart[:1], "apart": apart, **smaller}


def _group_sizes(workers: int) -> list[int]:
    """2, 4, 8, ... and as many as there are, if they are several."""
    powers = [1 << power for power in range(1, workers.bit_length())]
    return [size for size in powers if size < workers] + [workers] * (workers > 1)


@contextlib.contextmanager
def _folder(config: RunConfig) -> Iterator[Path]:
    folder = Path(config.storage) / f".bench-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _contenders(
    folder: Path,
    payload: dict[str, Any],
    workers: int,
    others: Mapping[str, Command],
    *,
    debug: bool,
) -> Iterator[None]:
    """Processes without Ray, for so many workers, that wait for their turns while the body runs."""
    scaling = RunConfig.model_validate(payload["config"]).scaling
    write_text(folder / "payload.json", json.dumps(payload))
    env = {**os.environ, "OMP_NUM_THREADS": str(scaling.cpus_per_worker), "PYTHONPATH": str(ROOT)}
    output = None if debug else subprocess.DEVNULL
    called = [(f"single_{place}", place, 1) for place in range(workers)]
    for size in _group_sizes(workers):
        called += [(f"group_{size}", place, size) for place in range(size)]
    commands = [
        [sys.executable, "-m", "service.contest", str(folder), *map(str, arguments)]
        for arguments in called
    ]
    processes = [
        subprocess.Popen(command, env=env, stdout=output, stderr=output) for command in commands
    ]
    plain = {name: value for name, value in env.items() if name not in MEMORY_ENVIRONMENT}
    processes += [
        subprocess.Popen([*command, str(folder)], env=plain, stdout=output, stderr=output)
        for command in others.values()
    ]
    try:
        yield
        for process in processes:
            process.wait(timeout=END_SECONDS)
    finally:
        for process in processes:
            process.kill()


def summary(turns: Turns, others: Sequence[str] = ()) -> dict[str, Any]:
    """Medians and ratios from the contenders' turns, with lowest and highest; see `bench`."""
    loop, memory = turns["loop"], turns["memory"]
    found: dict[str, list[float]] = {}

    def rates(name: str) -> list[float]:
        return [turn["rows"] / turn["seconds"] for turn in turns[name]]

    def ratio(over: list[float], under: list[float]) -> list[float]:
        return [a / b for a, b in zip(over, under, strict=True)]

    found["samples_per_second"] = rates("loop")
    found["model_samples_per_second"] = [turn["rows"] / turn["midas"] for turn in memory]
    found["model_step_seconds"] = [turn["midas"] for turn in memory]
    found["rows_per_second"] = [turn["rows_per_second"] for turn in turns["reader"]]
    for control in ("joint", "joint_uni"):
        found[f"midas_over_{control}"] = [turn["midas"] / turn[control] for turn in memory]
    if "bare" in turns:
        found["ray_over_bare"] = ratio(rates("loop"), rates("bare"))
        found["bare_samples_per_second"] = rates("bare")
    if "bare" in turns and "alone" in turns:
        one, apart = rates("alone"), turns["apart"]
        found["scaling"] = ratio(rates("bare"), one)
        found["apart_scaling"] = ratio([turn["rate"] for turn in apart], one)
        found["slowest_scaling"] = ratio([turn["slowest_rate"] for turn in apart], one)
        for name in sorted(turns, key=len):
            if name.startswith("group_"):
                found[f"scaling_{name.removeprefix('group_')}"] = ratio(rates(name), one)
    for name in others:
        found[f"{name}_over"] = ratio(rates("loop"), rates(name))
        found[f"{name}_samples_per_second"] = rates(name)
    for share in ("wait", "prepare", "exchange", "optimizer"):
        name = "data_wait" if share == "wait" else share
        found[f"{name}_share"] = [turn.get(f"{share}_share", 0.0) for turn in loop]
    for name in ("step_p50", "step_p95"):
        found[f"{name}_seconds"] = [turn[name] for turn in loop]
    lowest = {f"{name}_min": min(values) for name, values in found.items()}
    highest = {f"{name}_max": max(values) for name, values in found.items()}
    return {
        **{name: median(values) for name, values in found.items()},
        **lowest,
        **highest,
        "rounds": len(loop),
        "steps_per_turn": loop[0]["steps"],
    }


def work(flops: int, seconds: float, gpu: str | None, workers: int) -> dict[str, Any]:
    """What bare steps do in a second, and its share of what the GPUs could do, if they are known.

    Args:
        flops: of a step, on all workers.
        seconds: of a step.
        gpu: name of each worker's, if they have any.
        workers: how many.
    """
    found: dict[str, Any] = {"model_tflops": flops / seconds / 1e12}
    if gpu is not None:
        found["gpu"] = gpu
        if gpu in PEAK_TFLOPS:
            found["peak_share"] = found["model_tflops"] / (workers * PEAK_TFLOPS[gpu])
    return found


def limit(report: Mapping[str, Any], workers: int) -> str:
    """What keeps training by so many workers from being faster, in a sentence."""
    reader, trained = report["rows_per_second"], report["samples_per_second"]
    if report["data_wait_share"] > NOTABLE or reader < AMPLE * trained:
        return (
            f"reading: {report['data_wait_share']:.0%} of the time waits for data; the reader "
            f"alone gives {reader:,.0f} rows a second, training takes {trained:,.0f}; give it "
            "cores (feed.readers), or store smaller rows"
        )
    if report["exchange_share"] > 3 * NOTABLE:
        slowest = ""
        if "slowest_scaling" in report:
            slowest = (
                f", of which the machine has its part: {workers} processes that do not talk are "
                f"as fast as {report['apart_scaling']:.2f}, at the pace of the slowest as "
                f"{report['slowest_scaling']:.2f}"
            )
        return (
            f"exchange between workers: {report['exchange_share']:.0%} of the time{slowest}; "
            "larger batches, model.batchnorm=local, midas.pair_groups and "
            "train.gradient_compression lower it"
        )
    for share, name, remedy in (
        ("prepare_share", "augmentation", "store smaller pictures"),
        ("optimizer_share", "the optimizer", "take larger batches"),
    ):
        if report[share] > 3 * NOTABLE:
            return f"{name}: {report[share]:.0%} of the time; {remedy}, or give workers more cores"
    return (
        f"the model: the reader could feed {reader / trained:,.1f} times as much; faster "
        "processors, train.precision or train.compile would raise it"
    )

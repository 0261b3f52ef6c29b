"""`midas tune`: plan a sweep, run or continue it, say how it stands, confirm its best."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.schema import load_manifest
from service import launch, record, sending, study, tracking
from service.capacity import Nodes, num_cores, places, total, trial_scaling, uses_gpu
from service.cluster import (
    lazy_session,
    node_resources,
    on_a_worker,
    ray_session,
    signals_ignored,
)
from service.compare import summarize, train_all
from service.config import ConfigError, RunConfig, check_search, load_preset
from service.environment import environment
from service.files import BEST_NAME, RESULT_NAME, read_json
from service.record import TOP
from service.sweep import Sweep

if TYPE_CHECKING:
    from service.console import Console


def slots(config: RunConfig, nodes: Nodes) -> int:
    """Trials at a time that nodes with these resources hold, at most those asked for."""
    scaling = trial_scaling(config)
    fitting = places(scaling, nodes) // scaling.max_workers
    return min(fitting, config.search.concurrent or fitting, study.num_trials(config.search))


def _of_trial(config: RunConfig) -> RunConfig:
    """The config with the workers of one trial."""
    return config.model_copy(update={"scaling": trial_scaling(config)})


def make_plan(config: RunConfig, seconds: float, nodes: Nodes, done: int = 0) -> dict[str, Any]:
    """Flat plan of a sweep: trials, how many at a time, and how long they will take.

    Args:
        seconds: of a trial, see service/cost.py.
        nodes: resources of each.
        done: trials that have ended before.

    Raises:
        ConfigError: it does not fit the cluster, or its hours.
    """
    search, count, have = config.search, slots(config, nodes), total(nodes)
    scaling = trial_scaling(config)
    on_gpu = uses_gpu(scaling, have)
    if count < 1:
        raise ConfigError(
            f"a trial needs {scaling.max_workers} x {scaling.cpus_per_worker} CPUs"
            f"{f' and {scaling.max_workers} GPUs' if on_gpu else ''}; the cluster has "
            f"{have['CPU']:g} CPUs and {have['GPU']:g} GPUs on {len(nodes)} nodes; lower "
            "search.workers_per_trial or scaling.cpus_per_worker, or add nodes"
        )
    trials = study.num_trials(search) - done
    reseeded = search.num_reseeds * min(TOP, study.num_trials(search))
    hours = math.ceil((trials + reseeded) / count) * seconds / 3600
    if search.hours is not None and search.hours < seconds / 3600:
        raise ConfigError(
            f"search.hours={search.hours:g} is less than one trial takes, about "
            f"{seconds / 3600:.3g} hours here; give more hours, or trials with fewer optim.epochs"
        )
    fitting = math.floor(search.hours * 3600 / seconds) * count if search.hours else trials
    return {
        "sweep": config.name,
        "searcher": search.searcher,
        "scheduler": search.scheduler,
        "trials": trials,
        "trials_reseeded": reseeded,
        "concurrent": count,
        "workers_per_trial": scaling.max_workers,
        "cpus_per_trial": scaling.max_workers * scaling.cpus_per_worker,
        "gpus_per_trial": scaling.max_workers * on_gpu,
        "seconds_per_trial": round(seconds, 1),
        "hours_without_pruning": round(hours, 4),
        "hours_limit": search.hours,
        "complete_trials_in_limit": min(trials, fitting),
        "rungs_in_main_epochs": ", ".join(map(str, _rungs(config))) or "none",
        **{f"space/{name}": _range(found) for name, found in search.space.items()},
    }


def _rungs(config: RunConfig) -> list[int]:
    search, rungs = config.search, []
    rung = search.grace_epochs
    while search.scheduler in ("asha", "pbt") and rung < config.optim.epochs - config.warmup_epochs:
        rungs.append(rung)
        rung = (
            rung * search.reduction_factor
            if search.scheduler == "asha"
            else (rung + search.grace_epochs)
        )
    return rungs


def _range(distribution: Any) -> str:
    if distribution.values:
        return f"{distribution.kind} of {', '.join(map(str, distribution.values))}"
    return f"{distribution.kind} from {distribution.low:g} to {distribution.high:g}"


def dry_run(config: RunConfig, *, debug: bool) -> dict[str, Any]:
    """The plan of a sweep; joins the cluster at RAY_ADDRESS to see what it has, starts nothing."""
    from service.cost import trial_seconds
    from service.plan import manifest_of

    check_search(config)
    manifest = manifest_of(config)
    launch.check_plan(_of_trial(config), manifest)
    asked = (_of_trial(config), manifest)
    if environment()["RAY_ADDRESS"] is None:
        return make_plan(config, trial_seconds(*asked), [{"CPU": num_cores()}])
    with ray_session(asked[0], debug=debug):
        seconds = on_a_worker(asked[0].scaling, trial_seconds, *asked)
        return make_plan(config, seconds, node_resources())


def tune(config: RunConfig, console: "Console", *, debug: bool) -> dict[str, Any]:
    """Run a sweep to its end; the same name continues.

    Args:
        config: from `resolve`, with a search block.

    Returns:
        `record.summary`, and where the MLflow runs are.

    Raises:
        ConfigError: something is wrong before anything has started.
        RunError: the sweep cannot go on; what it has is kept.
        KeyboardInterrupt: a signal; what ran has saved.
    """
    from service.cost import trial_seconds

    check_search(config)
    folder = record.sweep_folder(config)
    if record.is_sweep(config):
        record.check_same(config)
        if ended := record.ended_result(config):
            console.status(f"sweep {config.name} had ended before; no trial was run")
            return ended
    with console.counter("preparing") as progress:
        data_folder = launch.ensure_prepared(config, progress, debug=debug).folder
    manifest = load_manifest(data_folder)
    launch.check_plan(_of_trial(config), manifest)
    began = time.time()
    remote = environment()["RAY_ADDRESS"] is not None
    try:
        with launch.locked(folder), lazy_session(_of_trial(config), debug=debug) as session:
            session.start()
            asked = (_of_trial(config), manifest)
            seconds = 0.0 if remote else trial_seconds(*asked)
            _load(config)
            session.ready()
            if remote:  # where trials will run, this machine is not
                seconds = on_a_worker(asked[0].scaling, trial_seconds, *asked)
            nodes = node_resources()
            driven = Sweep(
                config,
                manifest,
                data_folder,
                slots=slots(config, nodes),
                on_gpu=uses_gpu(trial_scaling(config), total(nodes)),
            )
            console.status(_sentence(make_plan(config, seconds, nodes, driven.record.num_ended)))
            driven.open(began)
            return _run(driven, console)
    except KeyboardInterrupt as stop:
        result = read_json(folder / RESULT_NAME) or {}
        best = result.get(f"best/{study.OBJECTIVE}")
        so_far = f"best so far {best:.4f}; " if best is not None else ""
        raise KeyboardInterrupt(
            f"{stop}; {so_far}midas tune --resume {config.name} continues the sweep"
        ) from stop


def _load(config: RunConfig) -> None:
    """Import what takes seconds, while Ray starts."""
    from service import tuner  # noqa: F401

    sending.load(tracking.tracking_uri(Path(config.storage), environment()["MLFLOW_TRACKING_URI"]))


def _sentence(plan: Mapping[str, Any]) -> str:
    more = f" and {plan['trials_reseeded']} with other seeds" if plan["trials_reseeded"] else ""
    hours = plan["hours_without_pruning"]
    most = f"{60 * hours:.0f} minutes" if hours < 2 else f"{hours:.0f} hours"
    return (
        f"{plan['trials']} trials{more}, {plan['concurrent']} at a time, about "
        f"{plan['seconds_per_trial']:g} s each: at most {most}, less what is pruned"
    )


def _run(driven: Sweep, console: "Console") -> dict[str, Any]:
    from service import tuner

    seconds = driven.config.search.hours and driven.config.search.hours * 3600
    if seconds is not None:
        seconds -= driven.record.wall_seconds
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        with console.sweep_view(driven.progress):
            if not driven.is_complete:
                tuner.run_trials(driven, seconds=seconds)
        driven.check_hope()
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        with signals_ignored():
            driven.close(status)
    return driven.result()


def extended(config: RunConfig, more: int) -> RunConfig:
    """The config of a sweep that gets `more` trials."""
    trials = config.search.trials + more
    return config.model_copy(update={"search": config.search.model_copy(update={"trials": trials})})


def status(config: RunConfig) -> dict[str, Any]:
    """How a sweep stands, from its record; another command may be running it."""
    folder = record.sweep_folder(config)
    return record.summary(config, record.Record(folder), folder)


def table(config: RunConfig) -> dict[str, Any]:
    """The trials of a sweep, see `record.sweep_table`."""
    folder = record.sweep_folder(config)
    return record.sweep_table(config, record.Record(folder), folder)


def confirm(config: RunConfig, seeds: int, console: "Console", *, debug: bool) -> dict[str, Any]:
    """Train the best of a sweep and the config it began with over seeds, and test each once.

    Runs are named `<sweep>-best-seed0` and `<sweep>-default-seed0`; finished ones are not run
    again. The seeds begin behind the one that trials were trained with.

    Raises:
        ConfigError: the sweep has no best yet.
    """
    path = record.sweep_folder(config) / BEST_NAME
    if not path.is_file():
        raise ConfigError(
            f"sweep {config.name} has no {BEST_NAME}: no trial is complete; "
            f"midas tune --resume {config.name} goes on with it"
        )
    base = {"best": load_preset(str(path)), "default": config}
    first = config.train.seed + 1
    labels, runs = [], []
    for label, variant in base.items():
        for seed in range(first, first + seeds):
            train = variant.train.model_copy(update={"seed": seed})
            name = f"{config.name}-{label}-seed{seed}"
            labels.append(label)
            changed = {"train": train, "name": name, "storage": config.storage}
            runs.append(launch.resolve(variant.model_copy(update=changed)))
    results = train_all(runs, console, debug=debug)
    labelled = [{**r, "method": label} for r, label in zip(results, labels, strict=True)]
    found = summarize(labelled)
    console.comparison(found, list(base), seeds)
    return {**found, "seeds": seeds, "best_config": str(path), "split": results[0]["split"]}

"""`midas compare`: methods times seeds on one preset, one Ray session, one table."""

import statistics
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from data.schema import load_manifest
from service import launch
from service.capacity import check_local_capacity
from service.cluster import ray_session
from service.config import ConfigError, RunConfig, check, explain
from service.files import RESULT_NAME, read_json
from service.inspection import find_run

if TYPE_CHECKING:
    from service.console import Console


def variants(config: RunConfig, methods: list[str], seeds: list[int]) -> list[RunConfig]:
    """One config per method and seed, named `<name or data set>-<method>-seed<seed>`.

    Raises:
        ConfigError: a method does not exist, or a setting does not fit it.
    """
    base = config.model_dump(mode="json")
    found = []
    for method in methods:
        for seed in seeds:
            name = f"{config.name or config.data.name}-{method}-seed{seed}"
            train = base["train"] | {"seed": seed}
            changed = base | {"method": method, "train": train, "name": name}
            try:
                run = RunConfig.model_validate(changed)
            except ValidationError as error:
                raise ConfigError(f"cannot compare {method}: {explain(error)}") from error
            check(run)
            found.append(run)
    return found


def summarize(results: list[dict[str, Any]]) -> dict[str, float]:
    """`<method>/<metric>/mean` and `/std` (sample standard deviation) over runs of a method."""
    summary: dict[str, float] = {}
    for method in dict.fromkeys(result["method"] for result in results):
        runs = [result for result in results if result["method"] == method]
        for key in runs[0]:
            values = [run[key] for run in runs if isinstance(run.get(key), int | float)]
            if key.startswith("test/") and len(values) == len(runs):
                summary[f"{method}/{key}/mean"] = statistics.fmean(values)
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                summary[f"{method}/{key}/std"] = spread
    return summary


def compare(
    config: RunConfig, methods: list[str], seeds: list[int], console: "Console", *, debug: bool
) -> dict[str, Any]:
    """Train every method with every seed; finished runs of the same names are not run again.

    Returns:
        `summarize` of all results, plus `runs`.
    """
    runs = [launch.resolve(run) for run in variants(config, methods, seeds)]
    return _compared(train_all(runs, console, debug=debug), console)


def train_all(runs: list[RunConfig], console: "Console", *, debug: bool) -> list[dict[str, Any]]:
    """Train runs that share data and workers, one after the other, in one Ray session.

    Args:
        runs: from `resolve`.

    Returns:
        Their results.
    """
    check_local_capacity(runs[0].scaling)
    with console.counter("preparing") as progress:
        folder = launch.ensure_prepared(runs[0], progress, debug=debug).folder
    manifest = load_manifest(folder)
    for run in runs:
        launch.check_plan(run, manifest)
    results = []
    unfinished = any(launch.finished(run) is None for run in runs)
    with ray_session(runs[0], debug=debug) if unfinished else nullcontext():
        for number, run in enumerate(runs, 1):
            console.status(f"run {number} of {len(runs)}: {run.name}")
            outcome = launch.train(run, folder, view=console.progress, debug=debug)
            results.append(outcome.result)
    return results


def compare_runs(runs: list[str], storage: str, console: "Console") -> dict[str, Any]:
    """Compare finished runs, by method; the same table and values as `compare`.

    Raises:
        ConfigError: a run is not there or not finished, or their data or splits differ.
    """
    results = []
    for run in runs:
        result = read_json(find_run(run, storage, RESULT_NAME) / RESULT_NAME)
        assert result
        results.append(result)
    return _compared(results, console)


def _compared(results: list[dict[str, Any]], console: "Console") -> dict[str, Any]:
    first = results[0]
    for other in results[1:]:
        if other["data_digest"] != first["data_digest"]:
            raise ConfigError(
                f"run {other['name']} (split {other['split']}, data {other['data_digest'][:12]}) "
                f"cannot be compared with {first['name']} (split {first['split']}, data "
                f"{first['data_digest'][:12]}): their test sets differ; train both on one "
                "prepared set"
            )
    methods = list(dict.fromkeys(result["method"] for result in results))
    summary = summarize(results)
    console.comparison(summary, methods, len(results) // len(methods))
    console.status(f"split: {first['split']}")
    return {**summary, "runs": len(results), "split": first["split"]}

"""Verbs that prepare, train, search and look at runs."""

import argparse
from typing import TYPE_CHECKING, Any

from service.verbs.arguments import overridden, run_config, stored_config

if TYPE_CHECKING:
    from service.console import Console
    from service.faults import Fault


def prepare(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Turn raw files into shards."""
    from service import launch

    config = launch.resolve(run_config(args, rest))
    with console.counter("preparing") as progress:
        report = launch.ensure_prepared(config, progress, debug=args.debug)
    console.prepared(report)
    return {
        "read": report.read,
        "written": report.written,
        "rejected": len(report.rejected),
        "reused": report.reused,
        "folder": str(report.folder),
        "digest": report.manifest.digest,
        "split": report.manifest.split_rule,
        "seconds": report.seconds,
    }


def train(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Train, pick the best checkpoint, test it."""
    from service import launch
    from service.capacity import check_local_capacity
    from service.cluster import lazy_session

    config = run_config(args, rest)
    if args.register_as:
        from service import registry

        registry.check_name(args.register_as)
    if args.chaos:
        from service.chaos import run_chaos

        table = ["--manifest", args.manifest] if args.manifest else []
        report = run_chaos(config, [args.preset, *table, *rest], args.chaos, console)
        console.chaos(report)
        return report
    if args.dry_run:
        from service.plan import make_plan

        plan = make_plan(launch.resolve(config))
        console.plan(plan)
        return plan
    config = launch.resolve(config)
    outcome = launch.finished(config)
    if outcome is None:
        check_local_capacity(config.scaling)
        console.status(f"run {config.name}")
        faults = _faults(args.faults)
        with lazy_session(config, debug=args.debug) as session:
            with console.counter("preparing") as progress:
                prepared = launch.ensure_prepared(
                    config, progress, session=session, debug=args.debug
                )
            outcome = launch.train(
                config, prepared.folder, view=console.progress, faults=faults, session=session
            )
    console.summary(outcome)
    if not args.register_as:
        return outcome.result
    from service import models

    version = models.register(str(outcome.folder), config.storage, args.register_as)
    console.status(f"registered as {version['model']}")
    return outcome.result | {"model": version["model"]}


def _faults(text: str | None) -> "list[Fault]":
    if not text:
        return []
    from service.faults import parse_faults

    return parse_faults(text)


def compare(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Train methods over seeds, or compare finished runs."""
    from service.config import ConfigError

    if args.runs:
        from service.compare import compare_runs

        parser = argparse.ArgumentParser("midas compare --runs RUN ...", allow_abbrev=False)
        parser.add_argument("--storage", default="runs", help="folder of the runs")
        storage = parser.parse_args(rest).storage
        if args.preset:
            raise ConfigError(
                f"midas compare {args.preset} --runs names a preset and finished runs; the runs "
                "have their settings; leave the preset out"
            )
        return compare_runs(args.runs, storage, console)
    config = run_config(args, rest)
    from service.compare import compare

    return compare(config, args.methods, args.seeds, console, debug=args.debug)


def bench(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Measure a configuration."""
    from service import launch
    from service.bench import bench

    config = launch.resolve(run_config(args, rest))
    with console.counter("preparing") as progress:
        prepared = launch.ensure_prepared(config, progress, debug=args.debug)
    console.status(f"measuring for {args.seconds:g} s, after about half a minute to start")
    result = bench(config, prepared.folder, seconds=args.seconds, debug=args.debug)
    console.bench(result)
    return result


def tune(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Search settings, go on with a search, or say how one stands."""
    from service import launch, tune
    from service.config import ConfigError

    name = args.resume or args.status
    if args.preset and name:
        raise ConfigError(f"sweep {name} has its config; leave {args.preset} out")
    if args.status:
        config = stored_config(name, rest)
        result = tune.status(config)
        console.sweep(result, tune.table(config))
        return result
    if args.resume:
        config = overridden(args, rest, stored_config(name, rest))
        config = launch.resolve(tune.extended(config, args.extend or 0))
    else:
        config = launch.resolve(run_config(args, rest))
    if args.dry_run:
        plan = tune.dry_run(config, debug=args.debug)
        console.plan(plan)
        return plan
    console.status(f"sweep {config.name}")
    result = tune.tune(config, console, debug=args.debug)
    console.sweep(result, tune.table(config))
    if args.confirm:
        result |= tune.confirm(config, args.confirm, console, debug=args.debug)
    return result


def evaluate(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Evaluate the best checkpoint of a run."""
    from service import inspection
    from service.config import ScalingConfig

    console.status(f"evaluating {args.run} on {args.split}")
    scaling = ScalingConfig(num_workers=args.workers, device=args.device)
    result = inspection.evaluate(args.run, args.storage, args.split, scaling, debug=args.debug)
    console.metrics_table(result)
    return result


def verify(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Take steps of a run again."""
    from service import inspection

    console.status(f"taking steps of {args.run} again")
    steps = _steps(args.steps) if args.steps else None
    result = inspection.verify(args.run, args.storage, steps, args.workers, debug=args.debug)
    console.verified(result)
    return result


def _steps(text: str) -> tuple[int, int]:
    from service.config import ConfigError

    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal()):
        raise ConfigError(f"--steps {text} must be two numbers A:B, as in --steps 100:120")
    return int(start), int(stop)

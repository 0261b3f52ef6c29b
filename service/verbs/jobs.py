"""Verbs about jobs on a cluster."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.verbs.arguments import JOB_VERBS, PRESET_VERBS, make_parser, run_config, with_preset

if TYPE_CHECKING:
    from service.config import ScalingConfig
    from service.console import Console
    from service.jobs import Job, Jobs


def submit(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Run a verb as a job; what can be checked here is checked before anything is sent."""
    from service import jobs, submission
    from service.capacity import check_cluster_capacity, total

    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words or words[0] in (*JOB_VERBS, "ui"):
        make_parser().error(
            "submit takes its own flags, then what is to run: midas submit --follow train digits"
        )
    submission.check_arguments(words)
    scaling, paths, name = _needs(words)
    submission.check_paths(paths)
    cluster = jobs.Jobs(args.address, insecure=args.insecure)
    nodes = cluster.nodes()
    if scaling:
        check_cluster_capacity(scaling, nodes)
    share = submission.head_share(scaling, total(nodes), all_of_it=words[0] == "tune")
    job = cluster.submit(
        words,
        Path.cwd(),
        name=name,
        share=share,
        uv=args.uv,
        with_secrets=args.with_secrets,
    )
    console.submitted(job, cluster.url if args.address else None)
    if args.follow:
        return _follow(cluster, job, console)
    return {"job": job, "address": cluster.url}


def _needs(words: list[str]) -> "tuple[ScalingConfig | None, dict[str, str | None], str]":
    """Workers, paths by their flags, and name of the run that a command line asks for.

    Raises:
        ConfigError, SystemExit: the command line would fail.
    """
    from service.capacity import trial_scaling
    from service.config import ScalingConfig

    args, rest = make_parser().parse_known_args(with_preset(words))
    stored = getattr(args, "resume", None) or getattr(args, "status", None)
    if stored or getattr(args, "runs", None):
        return None, {"--storage": _flag(rest, "--storage", "runs")}, stored or ""
    if args.verb in PRESET_VERBS:
        config = run_config(args, rest)
        paths = {
            "--storage": config.storage,
            "--data.root": config.data.root,
            "--manifest": config.data.table,
            "--data.storage": config.data.storage,
            "--checkpoint.storage": config.checkpoint.storage,
        }
        few = args.verb == "prepare" or getattr(args, "dry_run", False)
        scaling = trial_scaling(config) if args.verb == "tune" else config.scaling
        return None if few else scaling, paths, config.name or ""
    if rest:
        make_parser().error(f"unknown arguments for {args.verb}: {' '.join(rest)}")
    workers = getattr(args, "workers", None)
    asked = {"num_workers": workers, "device": getattr(args, "device", "auto")}
    scaling = ScalingConfig.model_validate(asked) if workers else None
    paths = {f"--{name}": getattr(args, name, None) for name in ("storage", "input", "output")}
    return scaling, paths, getattr(args, "run", "")


def _flag(words: list[str], name: str, default: str) -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, dest="value", default=default)
    return parser.parse_known_args(words)[0].value


def _follow(cluster: "Jobs", job: str, console: "Console") -> dict[str, Any]:
    try:
        ended = cluster.follow(job, console.raw)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"following ended, job {job} goes on; midas logs {job} --follow follows it again, "
            f"midas stop {job} stops it"
        ) from None
    return _ended(ended, console)


def _ended(job: "Job", console: "Console") -> dict[str, Any]:
    console.job_ended(job.id, job.state, job.exit_code, job.reason)
    return {"job": job.id, "state": job.state, "exit_code": job.exit_code}


def jobs(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """List the jobs of a cluster."""
    from service import jobs

    found = jobs.Jobs(args.address, insecure=args.insecure).all()
    console.jobs(found)
    return jobs.jobs_record(found)


def logs(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Show what a job writes."""
    from service import jobs

    cluster = jobs.Jobs(args.address, insecure=args.insecure)
    if args.follow:
        return _follow(cluster, args.job, console)
    console.raw(cluster.logs(args.job))
    found = cluster.get(args.job)
    return {"job": found.id, "state": found.state}


def stop(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Stop a job."""
    from service import jobs

    cluster = jobs.Jobs(args.address, insecure=args.insecure)
    console.status(f"stopping {args.job}; a training saves its state first")
    found = cluster.stop(args.job)
    console.job_ended(found.id, found.state, found.exit_code, found.reason)
    return {"job": found.id, "state": found.state}

"""Verbs about MLflow and the machine."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.console import Console


def ui(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Become the MLflow UI."""
    from service import mlflow_server, tracking
    from service.environment import environment

    uri = tracking.tracking_uri(Path(args.storage), environment()["MLFLOW_TRACKING_URI"])
    command, env = mlflow_server.ui_command(uri, Path(args.storage), args.host, args.port)
    console.status(f"MLflow UI of {uri}: http://{args.host}:{args.port} (Ctrl-C ends it)")
    os.execvpe(command[0], command, {**os.environ, **env})


def sync(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Send MLflow what it missed."""
    from service import tracking
    from service.environment import environment

    uri = tracking.tracking_uri(Path(args.storage), environment()["MLFLOW_TRACKING_URI"])
    folders = tracking.unsent(Path(args.storage))
    sent = left = 0
    for folder in folders:
        done, rest_of_it = tracking.sync(uri, folder)
        sent, left = sent + done, left + rest_of_it
        state = f"{rest_of_it} left" if rest_of_it else "complete"
        console.status(f"{folder.name}: {done} events sent, {state}")
    console.status(f"{len(folders)} runs had something to send to {uri}")
    return {"sync/runs": len(folders), "sync/sent": sent, "sync/left": left} | {
        "sync/complete": left == 0
    }


def migrate(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Copy the MLflow file into PostgreSQL."""
    from service import migration

    console.status(f"copying {args.storage}/mlflow.db")
    counts = migration.migrate(Path(args.storage))
    runs, metrics = counts["runs"], counts["metrics"]
    console.status(f"{runs} runs and {metrics} metrics are in the new store, counts are equal")
    return {f"rows/{table}": count for table, count in counts.items()}


def doctor(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Check this machine."""
    from service import doctor, exposure

    look = exposure.exposure if args.security else doctor.examine
    findings = look(Path(args.storage))
    console.findings(findings)
    return doctor.summary(findings)

"""`midas`: verbs and exit codes. Heavy imports happen in the verbs."""

import argparse
import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from service.verbs import jobs, models, runs, upkeep
from service.verbs.arguments import JOB_VERBS, PRESET_VERBS, make_parser, with_preset

if TYPE_CHECKING:
    from service.console import Console

# Results that are an answer; "no" exits with 1.
VERDICTS = ("verify/equal", "chaos/recovered", "promote/promoted", "doctor/ok", "sync/complete")


VERBS: dict[str, Callable[[argparse.Namespace, list[str], "Console"], dict[str, Any]]] = {
    "prepare": runs.prepare,
    "train": runs.train,
    "compare": runs.compare,
    "bench": runs.bench,
    "tune": runs.tune,
    "evaluate": runs.evaluate,
    "verify": runs.verify,
    "register": models.register,
    "promote": models.promote,
    "predict": models.predict,
    "export": models.export,
    "ui": upkeep.ui,
    "sync": upkeep.sync,
    "migrate": upkeep.migrate,
    "doctor": upkeep.doctor,
    "submit": jobs.submit,
    "jobs": jobs.jobs,
    "logs": jobs.logs,
    "stop": jobs.stop,
}


def command() -> NoReturn:
    """The `midas` command: `main`, and an end without a second of taking modules apart."""
    try:
        code = main()
    except SystemExit as stop:  # argparse, tyro
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(code)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `midas` command; returns the exit code."""
    args, rest = make_parser().parse_known_args(with_preset(sys.argv[1:] if argv is None else argv))
    if rest and args.verb not in PRESET_VERBS:
        make_parser().error(f"unknown arguments for {args.verb}: {' '.join(rest)}")
    from service.console import Console
    from service.environment import check_submitter, configure_client, configure_ray

    configure_client() if args.verb in JOB_VERBS else configure_ray()
    console = Console(json_mode=args.json)
    console.setup_logging()
    try:
        check_submitter()
        result = VERBS[args.verb](args, rest, console)
    except KeyboardInterrupt as stop:
        console.error_panel(str(stop) or "stopped")
        return 130
    except Exception as error:
        from data.schema import DataError
        from service.cluster import HeadLostError
        from service.config import ConfigError, RunError

        if args.debug:
            console.trace(error)
        expected = isinstance(error, DataError | ConfigError | RunError)
        kind = "" if expected else f"{type(error).__name__}: "
        hint = "" if expected else "; this is unexpected, --debug shows where it happened"
        console.error_panel(f"{kind}{error}{hint}")
        if isinstance(error, HeadLostError):
            os._exit(1)  # Ray crashes when a process without a head ends in the usual way
        return 1
    if args.json:
        console.json_line(result)
    if "exit_code" in result:
        return result["exit_code"]
    return int(any(result.get(name) is False for name in VERDICTS))


if __name__ == "__main__":
    command()

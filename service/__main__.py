"""`midas`: verbs, flags and exit codes. Heavy imports happen in the verbs."""

import argparse
import atexit
import contextlib
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from service.config import RunConfig, ScalingConfig
    from service.console import Console
    from service.faults import Fault
    from service.jobs import Job, Jobs

DESCRIPTION = """\
Train multimodal models that use all their modalities: MIDAS and its rivals on Ray.

  midas train digits                      prepare data, train with 2 workers, test
  midas train digits --method joint       a control, same harness
  midas train digits --optim.lr 3e-3      change any setting
  midas train digits --dry-run            show the plan, start nothing
  midas tune digits                       search eta, learning rate and warm-up
  midas bench digits                      how fast it trains here, and what limits it
  midas verify RUN                        take its last steps again and compare
  midas register RUN                      make its best checkpoint a version of a model
  midas promote NAME VERSION              make it champion, if it is better
  midas predict models:/NAME@champion --input DIR --output out.parquet
  midas ui                                look at the runs
  midas doctor                            is this machine fit for it, and is it safe
  midas submit train digits               the same, as a job on a cluster
"""


PRESET_VERBS = ("prepare", "train", "compare", "bench", "tune")
# Results that are an answer; "no" exits with 1.
VERDICTS = ("verify/equal", "chaos/recovered", "promote/promoted", "doctor/ok", "sync/complete")
PLAIN_FLAGS = ("--json", "--debug", "--dry-run")
JOB_VERBS = ("submit", "jobs", "logs", "stop")


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
    args, rest = _parser().parse_known_args(_with_preset(sys.argv[1:] if argv is None else argv))
    if rest and args.verb not in PRESET_VERBS:
        _parser().error(f"unknown arguments for {args.verb}: {' '.join(rest)}")
    from service.console import Console
    from service.environment import configure_client, configure_ray

    configure_client() if args.verb in JOB_VERBS else configure_ray()
    console = Console(json_mode=args.json)
    console.setup_logging()
    try:
        result = VERBS[args.verb](args, rest, console)
    except KeyboardInterrupt as stop:
        console.error_panel(str(stop) or "stopped")
        return 130
    except Exception as error:
        from data.schema import DataError
        from service.cluster import HeadLostError, RunError
        from service.config import ConfigError

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


def _with_preset(argv: list[str]) -> list[str]:
    """The arguments with the preset behind the verb: "" for none, `table` for a table of one's own.

    Only the first word may be it; argparse would take the value of a setting it does not know.
    """
    if not argv or argv[0] not in PRESET_VERBS:
        return argv
    flags = list(itertools.takewhile(lambda word: word in PLAIN_FLAGS, argv[1:]))
    rest = argv[1 + len(flags) :]
    if rest and not rest[0].startswith("-"):
        return [argv[0], rest[0], *flags, *rest[1:]]
    tabled = any(word.partition("=")[0] == "--manifest" for word in rest)
    return [argv[0], "table" if tabled else "", *argv[1:]]


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument(
        "--json", action="store_true", help="print one flat JSON object as last line"
    )
    common.add_argument("--debug", action="store_true", help="show traces and Ray's own output")
    parser = argparse.ArgumentParser(
        "midas", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, text: str, *, preset: bool, parent: argparse.ArgumentParser | None = None
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=text,
            description=f"{text}.",
            parents=[common, parent] if parent else [common],
            allow_abbrev=False,
            add_help=not preset,  # tyro shows it, above all settings
            usage=argparse.SUPPRESS if preset else None,
        )
        if preset:
            sub.add_argument("preset", nargs="?", help="name in tune_configs/, or a YAML file")
            sub.set_defaults(verb_help=sub.format_help)
        return sub

    table = argparse.ArgumentParser(add_help=False)
    table.add_argument(
        "--manifest",
        metavar="TABLE",
        help="your own data: a csv, jsonl or parquet file with a row per sample",
    )
    verb("prepare", "turn raw files into shards and a manifest", preset=True, parent=table)
    train = verb("train", "train, pick the best checkpoint, test it", preset=True, parent=table)
    train.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
    train.add_argument(
        "--chaos",
        metavar="FAULTS",
        help="break the run on purpose and compare it with an unbroken one: "
        "kill:worker@step=40,stop:driver@step=80",
    )
    train.add_argument(
        "--register-as", metavar="NAME", help="in the end register the model, as midas register"
    )
    train.add_argument("--faults", help=argparse.SUPPRESS)  # of a run that --chaos starts
    compare = verb(
        "compare", "train methods over seeds and print a table", preset=True, parent=table
    )
    compare.add_argument(
        "--runs", nargs="+", metavar="RUN", help="compare these finished runs, train nothing"
    )
    methods, seeds = ["joint", "joint_uni", "midas"], [0, 1, 2]
    compare.add_argument(
        "--methods", nargs="+", default=methods, help="default: joint joint_uni midas"
    )
    compare.add_argument("--seeds", nargs="+", type=int, default=seeds, help="default: 0 1 2")
    bench = verb("bench", "measure how fast a configuration trains here", preset=True, parent=table)
    bench.add_argument(
        "--seconds", type=float, default=60.0, help="time to measure, after the start (default: 60)"
    )
    tune = verb(
        "tune", "search settings, as the config's search block says", preset=True, parent=table
    )
    tune.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
    tune.add_argument("--resume", metavar="NAME", help="go on with a sweep")
    tune.add_argument("--extend", type=int, metavar="N", help="with --resume: N more trials")
    tune.add_argument(
        "--confirm",
        type=int,
        metavar="SEEDS",
        help="in the end train the best and the default config over so many seeds, and test them",
    )
    tune.add_argument("--status", metavar="NAME", help="say how a sweep stands")
    evaluate = verb("evaluate", "evaluate the best checkpoint of a run", preset=False)
    evaluate.add_argument("run", help="run name, or its folder")
    evaluate.add_argument("--split", choices=["train", "val", "test"], default="test")
    evaluate.add_argument("--storage", default="runs", help="folder of the runs (default: runs)")
    evaluate.add_argument("--workers", type=int, default=1, help="worker processes (default: 1)")
    evaluate.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    verify = verb("verify", "take steps of a run again and compare them", preset=False)
    verify.add_argument("run", help="run name, or its folder")
    verify.add_argument("--steps", metavar="A:B", help="steps A to B-1 (default: the last 20)")
    verify.add_argument("--workers", type=int, help="worker processes (default: as the run had)")
    verify.add_argument("--storage", default="runs", help="folder of the runs (default: runs)")
    _add_model_verbs(verb)
    ui = verb("ui", "open the MLflow UI on this machine", preset=False)
    ui.add_argument("--storage", default="runs", help="folder of the runs (default: runs)")
    ui.add_argument("--port", type=int, default=5000, help="port (default: 5000)")
    ui.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default: 127.0.0.1); others only with MLflow's login set up",
    )
    sync = verb("sync", "send MLflow what it missed of the runs", preset=False)
    sync.add_argument("--storage", default="runs", help="folder of the runs (default: runs)")
    migrate = verb("migrate", "copy the MLflow file into PostgreSQL", preset=False)
    migrate.add_argument("--storage", default="runs", help="folder of the runs (default: runs)")
    doctor = verb("doctor", "check this machine, and say what to do", preset=False)
    doctor.add_argument("--storage", default="runs", help="folder of the runs (default: runs)")
    doctor.add_argument(
        "--security", action="store_true", help="list what is open, and to whom; check nothing else"
    )
    _add_job_verbs(verb)
    return parser


def _add_job_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument(
        "--address",
        metavar="URL",
        help="dashboard of the cluster's head (default: RAY_API_SERVER_ADDRESS, or "
        "http://127.0.0.1:8265)",
    )
    place.add_argument(
        "--insecure", action="store_true", help="send the token in clear to another machine"
    )
    submit = verb("submit", "run a verb as a job on a cluster", preset=False, parent=place)
    submit.add_argument("--follow", action="store_true", help="show its output until it ends")
    submit.add_argument(
        "--uv",
        action="store_true",
        help="run in the environment that `uv run` makes of this folder, not in the image's",
    )
    submit.add_argument(
        "--with-secrets",
        action="store_true",
        help="send passwords of this environment, which the cluster's users can read",
    )
    submit.add_argument("words", nargs=argparse.REMAINDER, metavar="VERB ...")
    verb("jobs", "list the jobs of a cluster", preset=False, parent=place)
    logs = verb("logs", "show what a job writes", preset=False, parent=place)
    logs.add_argument("job", metavar="JOB")
    logs.add_argument(
        "--follow", action="store_true", help="until it ends; the exit code is that of the job"
    )
    stop = verb("stop", "stop a job; a training saves its state", preset=False, parent=place)
    stop.add_argument("job", metavar="JOB")
def _add_model_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """What is done with trained models."""
    of_model = "run name, its folder, models:/NAME@champion or models:/NAME/VERSION"
    register = verb("register", "make a run's best checkpoint a version of a model", preset=False)
    register.add_argument("run", help="run name, or its folder")
    register.add_argument(
        "--as", dest="name", metavar="NAME", help="registered model (default: the data set's name)"
    )
    promote = verb("promote", "make a version champion, if the gate lets it", preset=False)
    promote.add_argument("name", help="registered model")
    promote.add_argument("version", help="number of the version")
    promote.add_argument(
        "--margin",
        type=float,
        default=0.005,
        help="least gain of validation accuracy over the champion (default: 0.005)",
    )
    promote.add_argument(
        "--floor",
        nargs="+",
        metavar="VALUE",
        help="least validation accuracy of every modality, or NAME=VALUE for single ones "
        "(default: a tenth of the way from chance to 1)",
    )
    promote.add_argument(
        "--floor-metric",
        choices=["head_accuracy", "zero_out_accuracy"],
        default="head_accuracy",
        help="of its own head, or of the fused prediction from its features alone",
    )
    promote.add_argument(
        "--new-data", metavar="REASON", help="why a champion of other data is to be replaced"
    )
    predict = verb("predict", "run a model over raw files or shards", preset=False)
    predict.add_argument("model", help=of_model)
    predict.add_argument(
        "--input", required=True, help="raw folder or table as the model's, or a folder of shards"
    )
    predict.add_argument("--output", required=True, help="Parquet file for the predictions")
    predict.add_argument("--split", choices=["train", "val", "test"], help="default: all rows")
    predict.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    predict.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    predict.add_argument(
        "--conflict",
        type=float,
        default=0.5,
        help="modalities that are at least this sure of different classes are in conflict "
        "(default: 0.5)",
    )
    export = verb("export", "write a model as a graph of torch.export", preset=False)
    export.add_argument("model", help=of_model)
    export.add_argument("--output", required=True, help="file, model.pt2")
    for parser in (register, promote, predict, export):
        parser.add_argument("--storage", default="runs", help="folder of the runs (default: runs)")


def _config(args: argparse.Namespace, rest: list[str]) -> "RunConfig":
    """Preset, overridden by the remaining flags."""
    from service.config import ConfigError, RunConfig, load_preset, preset_names

    if not args.preset and not {"-h", "--help"} & set(rest):
        raise ConfigError(
            f"midas {args.verb} needs a preset ({', '.join(preset_names())}) or a YAML file first, "
            "or --manifest with a table of your own data"
        )
    default = load_preset(args.preset) if args.preset else RunConfig()
    if args.manifest:
        own = {"name": "table", "table": args.manifest}
        default = default.model_copy(update={"data": default.data.model_copy(update=own)})
    return _overridden(args, rest, default)


def _overridden(args: argparse.Namespace, rest: list[str], default: "RunConfig") -> "RunConfig":
    """The config, changed by flags, and checked."""
    import tyro

    from service.config import RunConfig, check, named

    config = tyro.cli(
        RunConfig,
        default=named(default, rest),
        args=rest,
        prog=f"midas {args.verb} {args.preset or 'PRESET'}",
        description=args.verb_help(),
    )
    check(config)
    return config


def _prepare(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    from service import launch

    config = launch.resolve(_config(args, rest))
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


def _train(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    from service import launch
    from service.cluster import check_local_capacity, lazy_session

    config = _config(args, rest)
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


def _compare(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
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
    config = _config(args, rest)
    from service.compare import compare

    return compare(config, args.methods, args.seeds, console, debug=args.debug)


def _bench(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    from service import launch
    from service.bench import bench

    config = launch.resolve(_config(args, rest))
    with console.counter("preparing") as progress:
        prepared = launch.ensure_prepared(config, progress, debug=args.debug)
    console.status(f"measuring for {args.seconds:g} s, after about half a minute to start")
    result = bench(config, prepared.folder, seconds=args.seconds, debug=args.debug)
    console.bench(result)
    return result


def _tune(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    from service import launch, tune
    from service.config import ConfigError

    name = args.resume or args.status
    if args.preset and name:
        raise ConfigError(f"sweep {name} has its config; leave {args.preset} out")
    if args.status:
        config = _stored(name, rest)
        result = tune.status(config)
        console.sweep(result, tune.table(config))
        return result
    if args.resume:
        config = _overridden(args, rest, _stored(name, rest))
        config = launch.resolve(tune.extended(config, args.extend or 0))
    else:
        config = launch.resolve(_config(args, rest))
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


def _stored(name: str, rest: list[str]) -> "RunConfig":
    from service import record

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--storage", default="runs")
    return record.stored_config(name, parser.parse_known_args(rest)[0].storage)


def _evaluate(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    from service import inspection
    from service.config import ScalingConfig

    console.status(f"evaluating {args.run} on {args.split}")
    scaling = ScalingConfig(num_workers=args.workers, device=args.device)
    result = inspection.evaluate(args.run, args.storage, args.split, scaling, debug=args.debug)
    console.metrics_table(result)
    return result


def _verify(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
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


def _register(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    from service import models

    result = models.register(args.run, args.storage, args.name)
    console.plan(result)
    return result


def _promote(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    from service import gate, models

    floor, floors = _floors(args.floor or [])
    rules = gate.Rules(args.margin, floor, floors, args.floor_metric, args.new_data)
    result = models.promote(args.name, args.version, args.storage, rules)
    console.plan(result)
    if not result["promote/promoted"]:
        console.error_panel(
            f"version {args.version} of {args.name} is not promoted: {result['promote/reason']}"
        )
    return result


def _floors(words: list[str]) -> tuple[float | None, dict[str, float]]:
    """`0.2`, for all modalities, and `audio=0.3`."""
    from service.config import ConfigError

    general, single = None, {}
    for word in words:
        name, _, value = word.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            raise ConfigError(
                f"--floor {word} must be a number, or NAME=NUMBER, as in --floor 0.2 audio=0.3"
            ) from None
        if name:
            single[name] = number
        else:
            general = number
    return general, single


def _predict(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    from service.config import ScalingConfig
    from service.prediction import predict

    with console.counter("predicting") as progress:
        result = predict(
            args.model,
            args.input,
            args.output,
            storage=args.storage,
            split=args.split,
            scaling=ScalingConfig(num_workers=args.workers, device=args.device),
            conflict=args.conflict,
            progress=progress,
            debug=args.debug,
        )
    console.plan(result)
    return result


def _export(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    from service.export import export

    result = export(args.model, args.output, args.storage)
    console.plan(result)
    return result


def _ui(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    from service import tracking
    from service.environment import environment

    uri = tracking.tracking_uri(Path(args.storage), environment()["MLFLOW_TRACKING_URI"])
    command, env = tracking.ui_command(uri, args.host, args.port)
    console.status(f"MLflow UI of {uri}: http://{args.host}:{args.port} (Ctrl-C ends it)")
    os.execvpe(command[0], command, {**os.environ, **env})


def _sync(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
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


def _migrate(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    from service import migration

    console.status(f"copying {args.storage}/mlflow.db")
    counts = migration.migrate(Path(args.storage))
    runs, metrics = counts["runs"], counts["metrics"]
    console.status(f"{runs} runs and {metrics} metrics are in the new store, counts are equal")
    return {f"rows/{table}": count for table, count in counts.items()}


def _doctor(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    from service import doctor, exposure

    look = exposure.exposure if args.security else doctor.examine
    findings = look(Path(args.storage))
    console.findings(findings)
    return doctor.summary(findings)
def _submit(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    """Everything that can be checked here is checked before anything is sent."""
    from service import jobs
    from service.cluster import check_cluster_capacity

    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words or words[0] in (*JOB_VERBS, "ui"):
        verbs = ", ".join(name for name in VERBS if name not in (*JOB_VERBS, "ui"))
        _parser().error(f"submit takes its own flags, then what is to run: {verbs}")
    jobs.check_arguments(words)
    scaling, paths, name = _needs(words)
    jobs.check_paths(paths)
    cluster = jobs.Jobs(args.address, insecure=args.insecure)
    have = cluster.resources()
    if scaling and have:
        check_cluster_capacity(scaling, have)
    share = jobs.head_share(scaling, have, all_of_it=words[0] == "tune")
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
    from service.config import ScalingConfig

    args, rest = _parser().parse_known_args(_with_preset(words))
    stored = getattr(args, "resume", None) or getattr(args, "status", None)
    if stored or getattr(args, "runs", None):
        return None, {"--storage": _flag(rest, "--storage", "runs")}, stored or ""
    if args.verb in PRESET_VERBS:
        config = _config(args, rest)
        paths = {
            "--storage": config.storage,
            "--data.root": config.data.root,
            "--manifest": config.data.table,
            "--data.storage": config.data.storage,
            "--checkpoint.storage": config.checkpoint.storage,
        }
        return None if args.verb == "prepare" else config.scaling, paths, config.name or ""
    if rest:
        _parser().error(f"unknown arguments for {args.verb}: {' '.join(rest)}")
    device, workers = getattr(args, "device", "auto"), getattr(args, "workers", None)
    scaling = ScalingConfig(num_workers=workers, device=device) if workers else None
    return scaling, {"--storage": getattr(args, "storage", None)}, getattr(args, "run", "")


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


def _jobs(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    from service import jobs

    found = jobs.Jobs(args.address, insecure=args.insecure).all()
    console.jobs(found)
    return jobs.jobs_record(found)


def _logs(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    from service import jobs

    cluster = jobs.Jobs(args.address, insecure=args.insecure)
    if args.follow:
        return _follow(cluster, args.job, console)
    console.raw(cluster.logs(args.job))
    found = cluster.get(args.job)
    return {"job": found.id, "state": found.state}


def _stop(args: argparse.Namespace, rest: list[str], console: "Console") -> dict[str, Any]:
    from service import jobs

    cluster = jobs.Jobs(args.address, insecure=args.insecure)
    console.status(f"stopping {args.job}; a training saves its state first")
    found = cluster.stop(args.job)
    console.job_ended(found.id, found.state, found.exit_code, found.reason)
    return {"job": found.id, "state": found.state}


VERBS: dict[str, Callable[[argparse.Namespace, list[str], "Console"], dict[str, Any]]] = {
    "prepare": _prepare,
    "train": _train,
    "compare": _compare,
    "bench": _bench,
    "tune": _tune,
    "evaluate": _evaluate,
    "verify": _verify,
    "register": _register,
    "promote": _promote,
    "predict": _predict,
    "export": _export,
    "ui": _ui,
    "sync": _sync,
    "migrate": _migrate,
    "doctor": _doctor,
    "submit": _submit,
    "jobs": _jobs,
    "logs": _logs,
    "stop": _stop,
}

if __name__ == "__main__":
    command()

"""What the `midas` command takes: verbs, flags, and the config that they make."""

import argparse
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.config import RunConfig

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
JOB_VERBS = ("submit", "jobs", "logs", "stop")
NewVerb = Callable[..., argparse.ArgumentParser]
PLAIN_FLAGS = ("--json", "--debug", "--dry-run")


def with_preset(argv: list[str]) -> list[str]:
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


def make_parser() -> argparse.ArgumentParser:
    """All verbs with their flags; settings of a config are left to `run_config`."""
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

    _add_preset_verbs(verb)
    _add_run_verbs(verb)
    _add_model_verbs(verb)
    _add_upkeep_verbs(verb)
    _add_job_verbs(verb)
    return parser


def _add_preset_verbs(verb: NewVerb) -> None:
    """Prepare, train, search."""
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


def _add_run_verbs(verb: NewVerb) -> None:
    """Look at runs."""
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


def _add_model_verbs(verb: NewVerb) -> None:
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


def _add_upkeep_verbs(verb: NewVerb) -> None:
    """MLflow and the machine."""
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


def _add_job_verbs(verb: NewVerb) -> None:
    """Jobs on a cluster."""
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


def run_config(args: argparse.Namespace, rest: list[str]) -> "RunConfig":
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
    return overridden(args, rest, default)


def overridden(args: argparse.Namespace, rest: list[str], default: "RunConfig") -> "RunConfig":
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


def stored_config(name: str, rest: list[str]) -> "RunConfig":
    """The config of a sweep, by its name and `--storage`."""
    from service import record

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--storage", default="runs")
    return record.stored_config(name, parser.parse_known_args(rest)[0].storage)

"""The command line up to where Ray would start: help, flags, plans, errors and exit codes."""

import contextlib
import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import ray

from service import __main__ as cli
from service.verbs import runs
from service.verbs.arguments import with_preset

DRY = ("train", "digits", "--dry-run", "--json")
SIZES = ("--scaling.num-workers", "--train.lanes", "--train.global-batch-size")
TOO_MANY = [text for flag in SIZES for text in (flag, "512")]


class Done(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of stdout."""
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])


def midas(*args: str | Path) -> Done:
    """Run a command in this process, with its own stdout, stderr and log handlers."""
    out, err = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    handlers = list(root.handlers)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(arg) for arg in args])
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            root.handlers[:] = handlers
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch):
    """Nothing here starts Ray, or joins a cluster that the environment names."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not ray.is_initialized()
    yield
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A storage folder with the digits, and what the command said."""
    storage = tmp_path_factory.mktemp("runs")
    return storage, midas("prepare", "digits", "--storage", storage, "--json")


HEAVY = {"torch", "ray", "mlflow", "pandas", "matplotlib", "sklearn", "transformers"}


@pytest.mark.parametrize(
    ("args", "light"),
    [
        (["--help"], {"pydantic", "numpy", "rich", "tyro"}),
        (["train", "digits", "--help"], set()),
        (["prepare", "digits", "--help"], set()),
        (["compare", "digits", "--help"], set()),
        (["train", "digits", "--optim.lrr", "1"], set()),
        (["train", "digits", "--train.lanes", "7"], set()),
        (["ui", "--help"], {"pydantic", "numpy"}),
    ],
)
def test_what_needs_nothing_heavy_imports_nothing_heavy(args: list[str], light: set[str]):
    code = f"""
import sys
from service.__main__ import main
try:
    main({args})
except SystemExit:
    pass
heavy = {HEAVY | light} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if args == ["--help"]:
        for verb in cli.VERBS:
            assert f"\n    {verb} " in done.stdout


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("prepare", ["--json", "--debug", "--data.root", "--storage"]),
        ("train", ["--json", "--debug", "--dry-run", "--optim.lr", "--midas.warmup-epochs"]),
        ("compare", ["--json", "--debug", "--methods", "--seeds", "--optim.lr"]),
        ("evaluate", ["--json", "--debug", "--split", "--storage"]),
        ("ui", ["--json", "--debug", "--port", "--host", "--storage"]),
        ("sync", ["--json", "--debug", "--storage"]),
        ("migrate", ["--json", "--debug", "--storage"]),
        ("doctor", ["--json", "--debug", "--security", "--storage"]),
    ],
)
def test_help_of_every_verb_shows_its_flags(verb: str, words: list[str]):
    done = midas(verb, "--help")
    assert (done.code, done.err) == (0, "")
    assert [word for word in words if word not in done.out] == []


def test_help_of_a_preset_shows_its_values():
    done = midas("train", "digits", "--help")
    assert done.code == 0
    assert "--data.noise.audio FLOAT" in done.out
    assert "(default: 30)" in done.out  # epochs of the preset


@pytest.mark.parametrize("verb", ["prepare", "train", "compare"])
def test_a_missing_preset_is_asked_for(verb: str):
    done = midas(verb)
    assert done.code == 1
    assert f"midas {verb} needs a preset (avdigits, avmnist, brca, cremad, digits" in done.err


def test_an_unknown_preset_names_the_nearest():
    done = midas("train", "digit")
    assert done.code == 1
    assert "there is no preset 'digit' (did you mean digits?)" in done.err


def test_the_preset_is_the_first_word_whatever_settings_follow():
    first = with_preset(["train", "--json", "digits", "--optim.lr", "1"])
    assert first == ["train", "digits", "--json", "--optim.lr", "1"]
    assert with_preset(["train", "--data.name", "digits"])[1] == ""
    tabled = with_preset(["prepare", "--manifest", "t.csv", "--data.label-column", "course"])
    assert tabled[:3] == ["prepare", "table", "--manifest"]
    assert with_preset(["verify", "--steps", "1:2"]) == ["verify", "--steps", "1:2"]


def test_a_setting_of_a_new_entry_has_a_flag(tmp_path: Path):
    changed = ("--augment.audio.time-mask", "3", "--model.encoders.audio.width", "8")
    plain, other = (midas(*DRY, *more, "--storage", tmp_path).json for more in ((), changed))
    assert other["parameters"] < plain["parameters"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "digits", "--optim.lrr", "1"], "--optim.lr FLOAT"),
        (["train", "digits", "--optim.lr", "fast"], "could not convert string to float: 'fast'"),
        (["train", "digits", "--method", "mides"], "invalid choice 'mides'"),
        (["prepare", "digits", "--dry-run"], "--dry-run"),
        (["compare", "digits", "--seeds", "one"], "invalid int value: 'one'"),
        (["evaluate", "run", "--splt", "val"], "unknown arguments for evaluate: --splt val"),
        (["ui", "--bogus"], "unknown arguments for ui: --bogus"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "the following arguments are required: VERB"),
    ],
)
def test_a_wrong_flag_exits_with_two(args: list[str], message: str):
    done = midas(*args)
    assert done.code == 2
    assert message in done.err
    assert done.out == ""


def seen_config(monkeypatch: pytest.MonkeyPatch, *args: str) -> dict[str, Any]:
    """The config that `midas train --dry-run` makes of its flags."""
    seen: list[Any] = []
    original: Callable[..., Any] = runs.run_config

    def record(*given: Any) -> Any:
        seen.append(original(*given))
        return seen[-1]

    monkeypatch.setattr(runs, "run_config", record)
    assert midas(*DRY, *args).code == 0
    return seen[0].model_dump()


def test_flags_override_the_preset_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    plain = seen_config(monkeypatch)
    flags = ["--method", "joint", "--optim.lr", "3e-3", "--data.noise.image", "0.5"]
    flags += ["--midas.no-hard-sample-weighting", "--name", "mine", "--midas.alpha-cap", "10"]
    changed = seen_config(monkeypatch, *flags)
    plain |= {"method": "joint", "name": "mine"}
    plain["optim"]["lr"] = 3e-3
    plain["data"]["noise"] = {"image": 0.5, "audio": 4.0}
    plain["midas"] |= {"hard_sample_weighting": False, "alpha_cap": 10.0}
    assert changed == plain


def test_flags_reach_the_plan(tmp_path: Path):
    plan = midas(*DRY, "--method", "joint", "--storage", tmp_path).json
    other = midas(*DRY, "--data.noise.image", "0.5", "--storage", tmp_path).json
    assert (plan["method"], plan["warmup_epochs"]) == ("joint", 0)
    assert (other["method"], other["warmup_epochs"]) == ("midas", 5)
    assert plan["data_folder"] != other["data_folder"]  # noise makes another data set


def test_workers_are_one_number_or_two_on_the_command_line(tmp_path: Path):
    def planned(*numbers: str) -> tuple[int, int, int]:
        plan = midas(*DRY, "--scaling.num-workers", *numbers, "--storage", tmp_path).json
        return plan["workers"], plan["max_workers"], plan["batch_size_per_worker"]

    assert planned("3") == (3, 3, 24)  # shares of 2, 3 and 3 lanes with 8 rows each
    assert planned("1", "4") == (1, 4, 64)  # one worker alone may have to hold it all
    done = midas(*DRY, "--scaling.num-workers", "4", "1")
    assert (done.code, done.out) == (2, "")
    assert "num_workers=(4, 1) must be two numbers from 1 up" in done.err


def test_checkpoint_settings_are_flags(monkeypatch: pytest.MonkeyPatch):
    flags = ["--checkpoint.every-steps", "50", "--checkpoint.storage", "s3://bucket/a"]
    found = seen_config(monkeypatch, *flags)["checkpoint"]
    assert found == {"every_steps": 50, "every_seconds": 300.0, "keep": 3, "storage": flags[-1]}


def test_a_yaml_file_is_a_preset_too(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {epochs: 12}\nmodel: {encoders: {image: {kind: mlp}}}\n")
    done = midas("train", path, "--dry-run", "--json", "--storage", tmp_path / "runs")
    assert done.json["epochs"] == 12
    path.write_text("optim: {epoch: 12}\n")
    done = midas("train", path, "--dry-run")
    assert done.code == 1
    assert "mine.yaml: unknown key optim.epoch (did you mean epochs?)" in done.err


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path):
    storage = tmp_path / "runs"
    done = midas("train", "digits", "--dry-run", "--storage", storage)
    assert done.code == 0
    rows = dict(line.split(maxsplit=1) for line in done.out.splitlines() if len(line.split()) > 1)
    assert rows["steps_per_epoch"].strip() == "20"
    assert rows["parameters"].strip() == "49406"
    assert not storage.exists()


def test_json_of_a_dry_run_is_flat_and_alone_on_stdout(tmp_path: Path):
    done = midas(*DRY, "--storage", tmp_path)
    assert len(done.out.splitlines()) == 1
    assert done.json["steps"] == 600
    assert all(isinstance(v, str | int | float) for v in done.json.values())


def test_json_of_prepare(prepared: tuple[Path, Done]):
    storage, done = prepared
    assert len(done.out.splitlines()) == 1
    assert (done.json["read"], done.json["written"], done.json["rejected"]) == (1797, 1797, 0)
    assert not done.json["reused"]
    assert Path(done.json["folder"]).parent == storage / "shards"


def test_prepare_again_reuses_the_set(prepared: tuple[Path, Done]):
    storage, first = prepared
    again = midas("prepare", "digits", "--storage", storage, "--json")
    assert again.json["reused"]
    assert again.json["digest"] == first.json["digest"]
    assert "already prepared, every shard verified" in again.err
    said = midas("prepare", "digits", "--storage", storage)
    assert "already prepared" in said.out
    assert midas(*DRY, "--storage", storage).json["data_prepared"]


@pytest.mark.parametrize("command", [("prepare",), ("train",), ("train", "--dry-run")])
@pytest.mark.parametrize(("preset", "wanted"), [("avdigits", "fsdd/"), ("rosmap", "1_tr.csv")])
def test_wrong_raw_folder_is_named_with_the_remedy(
    tmp_path: Path, command: tuple[str, ...], preset: str, wanted: str
):
    verb, *flags = command
    args = [verb, preset, *flags, "--storage", str(tmp_path / "runs")]
    for root, rule in ((tmp_path / "none", "is not a folder"), (tmp_path, "lacks ")):
        done = midas(*args, "--data.root", root)
        assert (done.code, done.out) == (1, "")
        assert f"data.root={root} {rule}" in done.err
        assert f"`--data.root DIR` with {wanted}" in done.err
        assert "Traceback" not in done.err
        assert "unexpected" not in done.err
    assert f"data.root is not set, and {preset} reads raw files" in midas(*args).err


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_more_workers_than_cores_is_said(prepared: tuple[Path, Done], verb: str):
    storage, _ = prepared
    done = midas(verb, "digits", *TOO_MANY, "--name", "huge", "--storage", storage)
    assert done.code == 1
    assert "scaling.num_workers=512 with scaling.cpus_per_worker=1 need 512 cores; this" in done.err
    assert "use fewer workers, or point RAY_ADDRESS at a cluster" in done.err
    assert "Traceback" not in done.err
    assert [path.name for path in storage.iterdir()] == ["shards"]


def test_settings_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path):
    done = midas("train", "digits", "--scaling.num-workers", "9", "--storage", tmp_path / "runs")
    assert done.code == 1
    assert "train.lanes=8 must be at least scaling.num_workers=9 and divide" in done.err
    assert not (tmp_path / "runs").exists()


def test_compare_refuses_an_unknown_method_before_anything_is_written(tmp_path: Path):
    done = midas("compare", "digits", "--methods", "mides", "--storage", tmp_path / "runs")
    assert done.code == 1
    assert "cannot compare mides" in done.err
    assert not (tmp_path / "runs").exists()


def test_evaluate_lists_the_finished_runs(tmp_path: Path):
    done = midas("evaluate", "gone", "--storage", tmp_path)
    assert done.code == 1
    assert "gone holds no result.json" in done.err
    assert f"finished runs under {tmp_path}: none" in done.err


def test_ui_becomes_the_server_of_the_local_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    started: list[tuple[list[str], dict[str, str]]] = []

    def become(file: str, args: list[str], env: dict[str, str]) -> NoReturn:
        started.append((args, env))
        sys.exit(0)  # like the other program, it does not come back

    monkeypatch.setattr(cli.os, "execvpe", become)
    done = midas("ui", "--storage", tmp_path, "--port", "5432")
    assert (done.code, done.out) == (0, "")
    assert f"MLflow UI of sqlite:///{tmp_path}/mlflow.db: http://127.0.0.1:5432" in done.err
    [(words, env)] = started
    assert {"mlflow", "server", "5432"} <= set(words)
    assert env["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{tmp_path}/mlflow.db"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    done = midas("ui")
    assert done.code == 1
    assert "http://mlflow:5000 is a running MLflow server: open" in done.err
    assert len(started) == 1


def failing(error: BaseException) -> Callable[..., dict[str, Any]]:
    def verb(*args: Any) -> dict[str, Any]:
        raise error

    return verb


@pytest.mark.parametrize(("flags", "traces"), [([], 0), (["--debug"], 1)])
def test_only_debug_shows_a_traceback(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], traces: int
):
    done = midas("train", "digit", *flags)
    assert (done.code, done.err.count("Traceback")) == (1, traces)
    assert "unexpected" not in done.err
    monkeypatch.setitem(cli.VERBS, "train", failing(KeyError("lost")))
    done = midas("train", "digits", *flags)
    assert (done.code, done.err.count("Traceback")) == (1, traces)
    assert "Error: KeyError: 'lost'; this is unexpected, --debug shows where" in done.err


def test_an_interrupted_command_exits_with_130(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(cli.VERBS, "train", failing(KeyboardInterrupt("stopped; how to go on")))
    done = midas("train", "digits", "--json")
    assert (done.code, done.out) == (130, "")
    assert "stopped; how to go on" in done.err
    assert "Traceback" not in done.err


def test_a_failed_command_prints_no_json(tmp_path: Path):
    done = midas("train", "rosmap", "--json", "--storage", tmp_path)
    assert (done.code, done.out) == (1, "")

"""`midas tune` on real Ray Tune and real MLflow, as a user runs it."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from service.cluster import local_nodes
from service.config import load_preset
from service.files import TRIALS_NAME, read_history
from service.record import Record
from tests.service.cli import SMALL, finish, last_json, midas, start, until

pytestmark = pytest.mark.ray

SWEEP = [
    "tune",
    "digits",
    *SMALL,
    "--search.trials",
    "6",
    "--search.concurrent",
    "2",
    "--search.grace-epochs",
    "1",
    "--search.space.midas.warmup-epochs.low",
    "1",
    "--search.space.midas.warmup-epochs.high",
    "2",
    "--json",
]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def swept(storage: Path) -> dict[str, Any]:
    return last_json(midas(*SWEEP, "--name", "whole", storage=storage))


def outcome(storage: Path, name: str) -> list[Any]:
    record = Record(storage / name)
    return [(e.name, e.values, e.state, e.scores) for e in record.all()]


def test_a_sweep_ends_with_something_to_use(swept: dict[str, Any], storage: Path):
    assert swept["trials_finished"] == 6
    assert swept["trials_complete"] >= 1
    assert swept["trials_failed"] == 0
    assert 0.1 < swept["best/val/accuracy"] <= 1
    assert swept["wall_over_ideal"] > 1
    best = load_preset(swept["best_config"])
    assert best.optim.lr == pytest.approx(swept["best/optim.lr"], abs=1e-6)
    trained = last_json(
        midas("train", swept["best_config"], "--name", "again", "--json", storage=storage)
    )
    # One worker and two compute the same, up to rounding.
    assert trained["val/accuracy"] == pytest.approx(swept["best/val/accuracy"], abs=0.02)


def test_mlflow_shows_the_trials_inside_the_sweep(swept: dict[str, Any]):
    client = MlflowClient(swept["mlflow_uri"])
    parent = client.get_run(swept["mlflow_run_id"])
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )
    assert len(children) == 6 + swept["trials_reseeded"]
    assert {child.info.status for child in children} == {"FINISHED"}
    assert {f"trial-{n:04d}" for n in range(6)} < {child.info.run_name for child in children}
    assert sum(child.data.tags["best"] == "true" for child in children) == 1
    for child in children:
        assert client.get_metric_history(child.info.run_id, "train/loss")
        assert not any(name.startswith("test/") for name in child.data.metrics)


@pytest.mark.slow
def test_a_killed_driver_loses_nothing(swept: dict[str, Any], storage: Path):
    process = start(*SWEEP, "--name", "killed", storage=storage)
    record = storage / "killed" / TRIALS_NAME
    until(lambda: sum("score" in event for event in read_history(record)) >= 4)
    process.send_signal(signal.SIGKILL)
    finish(process)
    result = last_json(midas("tune", "--resume", "killed", "--json", storage=storage))
    assert result["trials_finished"] == 6
    assert outcome(storage, "killed") == outcome(storage, "whole")


@pytest.mark.slow
def test_ctrl_c_saves_and_says_the_best_so_far(swept: dict[str, Any], storage: Path):
    process = start(*SWEEP, "--name", "stopped", storage=storage)
    record = storage / "stopped" / TRIALS_NAME
    until(lambda: any(event.get("state") == "complete" for event in read_history(record)))
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.returncode == 130, done.stderr
    assert "best so far 0." in done.stderr
    assert "midas tune --resume stopped" in done.stderr
    assert "Traceback" not in done.stderr
    result = last_json(midas(*SWEEP, "--name", "stopped", storage=storage))
    assert result["trials_finished"] == 6
    assert outcome(storage, "stopped") == outcome(storage, "whole")


@pytest.mark.slow
def test_a_killed_trial_goes_on(swept: dict[str, Any], storage: Path):
    process = start(*SWEEP, "--name", "struck", storage=storage)
    record = storage / "struck" / TRIALS_NAME
    until(lambda: any("score" in event for event in read_history(record)))
    os.kill(trial_process(process.pid), signal.SIGKILL)
    result = last_json(finish(process))
    assert result["trials_finished"] == 6
    assert outcome(storage, "struck") == outcome(storage, "whole")


@pytest.mark.slow
def test_a_lost_node_loses_nothing(swept: dict[str, Any], storage: Path):
    record = storage / "node" / TRIALS_NAME
    with local_nodes(2, 1) as nodes:
        address = {"RAY_ADDRESS": nodes.environment["RAY_ADDRESS"]}
        process = start(*SWEEP, "--name", "node", storage=storage, **address)
        until(lambda: any("score" in event for event in read_history(record)))
        nodes.lose()
        result = last_json(finish(process))
    assert result["trials_finished"] == 6
    assert result["concurrent"] == 2
    assert outcome(storage, "node") == outcome(storage, "whole")


def trial_process(driver: int) -> int:
    """A process of a trial of this driver's cluster."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text()
            names[int(path.name)] = (path / "cmdline").read_text()
        except OSError:
            continue
        parents[int(path.name)] = int(stat.rpartition(")")[2].split()[1])

    def is_below(pid: int) -> bool:
        return pid == driver or (pid > 1 and is_below(parents.get(pid, 0)))

    found = [pid for pid, name in names.items() if "run_trial" in name or "ImplicitFunc" in name]
    return next(pid for pid in found if is_below(pid))


@pytest.mark.slow
def test_shared_warm_up_changes_no_result(storage: Path):
    one_lr = ["--search.space.optim.lr.kind", "choice", "--search.space.optim.lr.values", "0.01"]
    one_lr += ["--search.space.optim.lr.low", "None", "--search.space.optim.lr.high", "None"]
    results = {}
    for name, flag in (("shared", "--search.share-warmup"), ("own", "--search.no-share-warmup")):
        results[name] = last_json(midas(*SWEEP, *one_lr, flag, "--name", name, storage=storage))
    assert outcome(storage, "shared") == outcome(storage, "own")
    assert results["shared"]["warmup/forked_trials"] >= 3
    assert results["shared"]["warmup/saved_seconds"] > 0
    assert results["own"]["warmup/forked_trials"] == 0
    for entry in Record(storage / "own").all():
        if entry.state == "complete":
            paths = [storage / name / entry.name / "result.json" for name in results]
            chains = [json.loads(path.read_text())["loss_chain"] for path in paths]
            assert chains[0] == chains[1]


def test_a_trial_of_two_workers_computes_what_one_does(swept: dict[str, Any], storage: Path):
    flags = ("--search.workers-per-trial", "2", "--search.trials", "3", "--search.reseeds", "0")
    pairs = last_json(midas(*SWEEP, *flags, "--name", "pairs", storage=storage))
    assert pairs["trials_finished"] == 3
    assert pairs["concurrent"] == 1
    for one, two in zip(outcome(storage, "whole"), outcome(storage, "pairs"), strict=False):
        assert two[:2] == one[:2]
        for epoch in one[3].keys() & two[3].keys():  # pruned at other times: one at a time
            assert two[3][epoch] == pytest.approx(one[3][epoch], abs=0.02)


PBT = [*SWEEP, "--search.scheduler", "pbt", "--search.trials", "4"]


def test_a_population_goes_on_from_its_best(storage: Path):
    result = last_json(midas(*PBT, "--name", "population", storage=storage))
    assert result["trials_finished"] == 4
    assert result["trials_reseeded"] == 0
    events = read_history(storage / "population" / TRIALS_NAME)
    generations = [event["members"] for event in events if event["event"] == "generation"]
    assert len(generations) >= 1
    members = generations[-1].items()
    number, donor = next((int(n), m["donor"]) for n, m in members if int(n) != m["donor"])
    pasts = []
    for trial in range(4):
        steps = storage / "population" / f"trial-{trial:04d}" / "checkpoints" / "steps"
        pasts.append((steps / "0000000000.csv").read_text().splitlines()[:9])
    assert pasts[number] == pasts[donor]
    assert any(past != pasts[donor] for past in pasts)


@pytest.mark.slow
def test_a_killed_population_loses_nothing(storage: Path):
    last_json(midas(*PBT, "--name", "unbroken", storage=storage))
    process = start(*PBT, "--name", "broken", storage=storage)
    record = storage / "broken" / TRIALS_NAME
    until(lambda: any(event["event"] == "generation" for event in read_history(record)))
    process.send_signal(signal.SIGKILL)
    finish(process)
    last_json(midas("tune", "--resume", "broken", "--json", storage=storage))
    assert outcome(storage, "broken") == outcome(storage, "unbroken")


@pytest.mark.slow
def test_hours_end_a_sweep_and_more_hours_go_on(swept: dict[str, Any], storage: Path):
    last_json(midas(*SWEEP, "--search.hours", "0.003", "--name", "hours", storage=storage))
    assert outcome(storage, "hours") != outcome(storage, "whole")
    more = ("tune", "--resume", "hours", "--search.hours", "1", "--json")
    assert last_json(midas(*more, storage=storage))["trials_finished"] == 6
    assert outcome(storage, "hours") == outcome(storage, "whole")


@pytest.mark.slow
def test_extend_confirm_and_status(swept: dict[str, Any], storage: Path):
    flags = ("--search.trials", "2", "--search.reseeds", "0", "--name", "more")
    last_json(midas(*SWEEP, *flags, storage=storage))
    more = ("tune", "--resume", "more", "--extend", "2", "--confirm", "2", "--json")
    result = last_json(midas(*more, storage=storage))
    assert result["trials_finished"] == 4
    assert outcome(storage, "more") == outcome(storage, "whole")[:4]
    assert result["seeds"] == 2
    assert 0 < result["best/test/accuracy/mean"] <= 1
    assert 0 < result["default/test/accuracy/mean"] <= 1
    status = last_json(midas("tune", "--status", "more", "--json", storage=storage))
    assert status["trials_finished"] == 4
    again = midas("tune", "--resume", "more", "--json", storage=storage)
    assert last_json(again)["trials_finished"] == 4
    assert "had ended before; no trial was run" in again.stderr

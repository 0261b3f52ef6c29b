"""Runs that are broken on purpose: they come back and compute what unbroken ones do."""

import json
import shutil
import signal
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from safetensors.numpy import load

from service.cluster import local_nodes
from service.faults import VALIDATION_SECONDS
from service.files import FAULTS_NAME, read_history, read_json
from service.inspection import compare_steps
from service.storage import CheckpointStore
from tests.service.cli import SMALL, finish, last_json, midas, start, tracked, until, weights
from tests.service.object_store import ENVIRONMENT, serving
from training.chain import StepRecord

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

EVERY_5 = ("--checkpoint.every-steps", "5")
ROOM = ("--scaling.start-timeout-seconds", "10")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("broken")


@pytest.fixture(scope="module")
def card(storage: Path) -> dict:
    faults = "kill:worker@step=13, term:worker@step=22, kill:driver@step=31"
    return last_json(
        midas(
            *("train", "digits", *SMALL, *EVERY_5, "--name", "c", "--chaos", faults, "--json"),
            storage=storage,
        )
    )


def test_killed_and_terminated_workers_and_a_killed_driver_change_nothing(card: dict):
    assert card["chaos/recovered"] is True
    assert card["chaos/final_weights_equal"] is True
    assert card["chaos/order_equal"] is True
    assert card["chaos/loss_equal"] is True
    assert card["chaos/attempts"] == 2
    assert card["chaos/term:worker@step=22/steps_replayed"] == 0
    assert card["chaos/kill:worker@step=13/steps_replayed"] <= 5
    assert card["chaos/steps_replayed"] <= 10  # one checkpoint may have been on its way
    assert 0 < card["chaos/seconds_to_first_new_step"] < 200


def test_a_broken_run_has_one_history_and_one_mlflow_run(card: dict, storage: Path):
    rows = read_history(storage / "c" / "history.jsonl")
    unbroken = read_history(storage / "c-unbroken" / "history.jsonl")
    timings = ("time", "speed/", "memory/")
    for row, other in zip(rows, unbroken, strict=True):
        assert {k: v for k, v in row.items() if not k.startswith(timings)} == {
            k: v for k, v in other.items() if not k.startswith(timings)
        }
    client, run = tracked(storage, "c")
    assert run.info.status == "FINISHED"
    logged = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in logged] == [0, 1, 2, 3]


def test_few_checkpoints_stay_and_all_steps_are_recorded(card: dict, storage: Path):
    store = CheckpointStore.at(str(storage / "c" / "checkpoints"))
    newest = [f"step_00000000{steps}" for steps in (30, 35, 40)]
    assert set(newest) <= set(store.names())
    assert len(store.names()) <= 4
    unbroken = CheckpointStore.at(str(storage / "c-unbroken" / "checkpoints"))
    assert store.steps(0, 40) == unbroken.steps(0, 40)
    assert store.num_steps() == 40


def test_verify_takes_steps_again(card: dict, storage: Path):
    same = last_json(midas("verify", "c", "--json", storage=storage))
    assert same["verify/equal"] is True
    assert same["verify/exact"] is True
    assert same["verify/steps"] == 20
    other = last_json(
        midas("verify", "c", "--workers", "1", "--steps", "36:40", "--json", storage=storage)
    )
    assert other["verify/equal"] is True
    assert other["verify/from"] == "step_0000000035"
    assert other["verify/max_loss_difference"] < 1e-9


def test_verify_names_the_step_that_differs(card: dict, storage: Path):
    shutil.copytree(storage / "c", storage / "forged")
    path = storage / "forged" / "checkpoints" / "steps" / "0000000035.csv"
    lines = path.read_text().splitlines()
    epoch, step, order, loss, workers = lines[2].split(",")
    lines[2] = ",".join([epoch, step, order, repr(float(np.nextafter(float(loss), 9))), workers])
    path.write_text("\n".join(lines) + "\n")
    done = midas("verify", "forged", "--steps", "35:40", "--json", storage=storage)
    assert done.returncode == 1
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["verify/first_difference"] == 37
    assert result["verify/differs_in"] == "loss"


def test_steps_that_are_not_recorded_cannot_be_verified(card: dict, storage: Path):
    done = midas("verify", "c", "--steps", "30:50", storage=storage)
    assert done.returncode == 1
    assert "records of 40 steps" in done.stderr
    assert "Traceback" not in done.stderr


def test_comparison_of_steps_names_rows_before_losses():
    old = [StepRecord(0, step, "a" * 16, 1.0) for step in range(3)]
    assert compare_steps(7, old, old, 0.0)["verify/equal"]
    rows = [*old[:1], StepRecord(0, 1, "b" * 16, 1.0), old[2]]
    assert compare_steps(7, old, rows, 0.0)["verify/differs_in"] == "rows"
    assert compare_steps(7, old, rows, 0.0)["verify/first_difference"] == 8
    near = [*old[:2], StepRecord(0, 2, "a" * 16, 1.0 + 1e-7)]
    assert compare_steps(0, old, near, 1e-6)["verify/equal"]
    assert not compare_steps(0, old, near, 0.0)["verify/equal"]
    assert not compare_steps(0, old, old[:2], 0.0)["verify/equal"]


def test_corrupt_checkpoint_and_full_disk(card: dict, storage: Path):
    """A killed run; its newest checkpoint is damaged, and the disk is full when it saves again."""
    command = ("train", "digits", *SMALL, *EVERY_5, "--name", "d")
    once = ("--faults", "kill:worker@step=23", "--scaling.max-failures", "0")
    killed = midas(*command, *once, storage=storage)
    assert killed.returncode == 1
    assert "--name d continues at the last checkpoint" in killed.stderr.replace("\n", " ")
    folder = storage / "d" / "checkpoints"
    store = CheckpointStore.at(str(folder))
    last = store.names()[-1]
    assert last == "step_0000000020"
    newest = folder / last / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    full = folder / "step_0000000025" / "model.safetensors"
    full.parent.mkdir(exist_ok=True)
    full.symlink_to("/dev/full")

    stopped = midas(*command, storage=storage)
    assert stopped.returncode == 1
    assert "No space left" in stopped.stderr
    assert "intact" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert tracked(storage, "d")[1].info.status == "FAILED"
    assert store.names()[-1] == last  # written again

    assert not full.parent.exists()  # what could not be written whole was removed
    result = last_json(midas(*command, "--json", storage=storage))
    unbroken = read_json(storage / "c-unbroken" / "result.json")
    assert unbroken
    assert result["loss_chain"] == unbroken["loss_chain"]
    for name, value in weights(storage, "c-unbroken").items():
        assert (value == weights(storage, "d")[name]).all(), name


def test_checkpoints_that_are_all_corrupt_stop_the_run(card: dict, storage: Path):
    shutil.copytree(storage / "c", storage / "ruined")
    (storage / "ruined" / "result.json").unlink()
    shutil.rmtree(storage / "ruined" / FAULTS_NAME)
    for path in (storage / "ruined" / "checkpoints").glob("step_*/model.safetensors"):
        path.write_bytes(b"")
    done = midas("train", "digits", *SMALL, *EVERY_5, "--name", "ruined", storage=storage)
    assert done.returncode == 1
    assert "step_0000000040/model.safetensors is corrupt" in done.stderr.replace("\n", "")


@pytest.mark.slow
def test_a_lost_node_and_other_numbers_of_workers(storage: Path):
    """A node killed and replaced; then one, two and three workers on the way through a run."""
    node = last_json(
        midas(
            *("train", "digits", *SMALL, *EVERY_5, "--name", "n", "--json"),
            *("--chaos", "kill:node@step=17"),
            storage=storage,
        )
    )
    assert node["chaos/final_weights_equal"] is True
    assert node["chaos/attempts"] == 1
    sizes = last_json(
        midas(
            *("train", "digits", *SMALL, *EVERY_5, "--name", "w", "--json"),
            *("--scaling.num-workers", "1", "--train.precision", "fp64"),
            *("--chaos", "workers:2@step=13, workers:3@step=27"),
            storage=storage,
        )
    )
    assert sizes["chaos/order_equal"] is True
    assert sizes["chaos/steps_replayed"] == 0
    assert sizes["chaos/max_weight_difference"] < 1e-9


@pytest.mark.slow
def test_announced_departures_lose_no_step_and_are_no_failures(storage: Path):
    """SIGTERM in the warm-up and in the middle of a long validation; then a node with a notice."""
    result = last_json(
        midas(
            *("train", "digits", *SMALL, "--scaling.max-failures", "0", "--name", "t", "--json"),
            *("--chaos", "term:worker@step=5, term:worker@validation=2"),
            storage=storage,
        )
    )
    assert result["chaos/recovered"] is True
    assert result["chaos/final_weights_equal"] is True
    assert result["chaos/attempts"] == 1
    assert result["chaos/steps_replayed"] == 0
    resumed = result["chaos/term:worker@validation=2/seconds_to_resume"]
    assert resumed < VALIDATION_SECONDS  # the end of the validation was not waited for
    drained = last_json(
        midas(
            *("train", "digits", "--optim.epochs", "14", "--scaling.max-failures", "0"),
            *("--name", "drained", "--json", "--chaos", "drain:node@step=27"),
            storage=storage,
            timeout=600,
        )
    )
    assert drained["chaos/final_weights_equal"] is True
    assert drained["chaos/attempts"] == 1
    assert drained["chaos/steps_replayed"] <= 1


@pytest.mark.slow
def test_ten_kills_at_random_steps(storage: Path):
    steps = np.random.default_rng(0).choice(np.arange(2, 39), 10, replace=False)
    targets = ("worker", "driver")
    faults = ",".join(f"kill:{targets[i % 2]}@step={step}" for i, step in enumerate(steps))
    result = last_json(
        midas(
            *("train", "digits", *SMALL, *EVERY_5, "--scaling.max-failures", "20"),
            *("--name", "ten", "--json", "--chaos", faults),
            storage=storage,
            timeout=1500,
        )
    )
    assert result["chaos/recovered"] is True
    assert result["chaos/final_weights_equal"] is True
    assert result["chaos/steps_replayed"] <= 10


@pytest.mark.slow
def test_a_node_lost_for_good_ends_a_fixed_run_and_shrinks_an_elastic_one(storage: Path):
    command = ("train", "digits", *SMALL, *EVERY_5, *ROOM)
    fault = ("--faults", "kill:node@step=13")
    with local_nodes(2, 1) as nodes:
        environment = {"RAY_ADDRESS": nodes.environment["RAY_ADDRESS"]}
        done = midas(*command, *fault, "--name", "lost", storage=storage, **environment)
        assert done.returncode == 1
        assert "2 workers with 1 each need 2" in done.stderr.replace("\n", " ")
        assert "not replaced" in done.stderr
    with local_nodes(2, 1) as nodes:
        environment = {"RAY_ADDRESS": nodes.environment["RAY_ADDRESS"]}
        elastic = ("--scaling.num-workers", "1", "2", "--name", "elastic", "--json")
        result = last_json(midas(*command, *fault, *elastic, storage=storage, **environment))
    store = CheckpointStore.at(str(storage / "elastic" / "checkpoints"))
    workers = [record.workers for record in store.steps(0, 40)]
    assert (workers[0], workers[-1]) == (2, 1)
    whole = last_json(
        midas("train", "digits", *SMALL, "--name", "whole", "--json", storage=storage)
    )
    assert result["order_chain"] == whole["order_chain"]
    assert result["test/accuracy"] == pytest.approx(whole["test/accuracy"], abs=0.01)


@pytest.mark.slow
def test_a_storage_that_is_away_for_a_while(storage: Path, tmp_path: Path):
    """S3 that does not answer for 10 s, refuses connections for 30 s, and comes back."""
    whole = last_json(
        midas("train", "digits", *SMALL, "--name", "whole", "--json", storage=storage)
    )
    with serving(tmp_path / "objects") as server:
        kept = ("--checkpoint.storage", server.uri, *EVERY_5, "--scaling.max-failures", "0")
        process = start(
            *("train", "digits", *SMALL, *kept, "--name", "s3", "--json"),
            storage=storage,
            **ENVIRONMENT,
        )
        until(lambda: any(server.folder.glob("*state.json")))
        server.send(signal.SIGSTOP)
        time.sleep(10)
        server.kill()
        time.sleep(30)
        assert process.poll() is None
        server.start()
        result = last_json(finish(process))
    assert result["loss_chain"] == whole["loss_chain"]
    key = f"runs/s3/{result['checkpoint']}/model.safetensors"
    found = load((server.folder / quote(key, safe="")).read_bytes())
    for name, value in weights(storage, "whole").items():
        assert (value == found[name]).all(), name


@pytest.mark.slow
def test_a_lost_head_ends_the_command_and_the_same_command_continues(storage: Path):
    whole = last_json(
        midas("train", "digits", *SMALL, "--name", "whole", "--json", storage=storage)
    )
    command = ("train", "digits", *SMALL, *EVERY_5, "--name", "headless", "--json")
    store = CheckpointStore.at(str(storage / "headless" / "checkpoints"))
    with local_nodes(2, 1) as nodes:
        address = nodes.environment["RAY_ADDRESS"]
        process = start(*command, storage=storage, RAY_ADDRESS=address)
        until(lambda: len(store.names()) > 0)
        nodes.kill_head()
        done = finish(process, timeout=120)
    assert done.returncode == 1
    assert f"the head of the Ray cluster, {address}, has not answered" in one_line(done.stderr)
    assert "the same command continues at the last checkpoint" in one_line(done.stderr)
    assert "Traceback" not in done.stderr
    assert tracked(storage, "headless")[1].info.status == "FAILED"
    assert not (storage / "headless" / "result.json").exists()
    with local_nodes(2, 1) as nodes:
        address = nodes.environment["RAY_ADDRESS"]
        result = last_json(midas(*command, storage=storage, RAY_ADDRESS=address))
    assert result["loss_chain"] == whole["loss_chain"]
    for name, value in weights(storage, "whole").items():
        assert (value == weights(storage, "headless")[name]).all(), name


def one_line(text: str) -> str:
    return " ".join(text.split())

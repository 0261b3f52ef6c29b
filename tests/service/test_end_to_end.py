"""The command line on real Ray, real MLflow and the embedded data set, as a user runs it."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from data.schema import load_manifest
from service.files import read_history
from tests.service.cli import SMALL, finish, last_json, midas, start, tracked, until, weights

pytestmark = pytest.mark.ray

STOPPED_EPOCHS = 30


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def command(storage: Path) -> subprocess.CompletedProcess[str]:
    return midas("train", "digits", *SMALL, "--name", "whole", "--json", storage=storage)


@pytest.fixture(scope="module")
def trained(command: subprocess.CompletedProcess[str]) -> dict:
    return last_json(command)


def test_what_a_run_chose_is_printed(command: subprocess.CompletedProcess[str]):
    assert re.search(r"workers: 2 on cpu, threads each: 1, (bf16|fp32)\n", command.stderr)
    assert re.search(r"feed: one reader gives .* rows/s, training takes .* ahead\n", command.stderr)


def test_result_has_the_promised_names(trained: dict):
    for name in ("accuracy", "f1_macro", "f1_macro_batch64", "misaligned_top2"):
        assert 0 <= trained[f"test/{name}"] <= 1
    for modality in ("image", "audio"):
        assert 0 <= trained[f"test/head_accuracy/{modality}"] <= 1
        assert 0 <= trained[f"test/zero_out_accuracy/{modality}"] <= 1
    assert trained["test/accuracy"] > 0.3
    assert trained["seconds"] > 0


def test_run_folder_is_complete(trained: dict, storage: Path):
    folder = storage / "whole"
    assert {"config.yaml", "result.json", "checkpoints"} <= {p.name for p in folder.iterdir()}
    checkpoint = folder / "checkpoints" / trained["checkpoint"]
    files = {path.suffix for path in checkpoint.iterdir()}
    assert files == {".safetensors", ".json"}
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == [0, 1, 2, 3]
    assert [row["main_phase"] for row in history] == [0, 1, 1, 1]
    for row in history:
        shares = ("wait", "prepare", "exchange", "optimizer", "report")
        assert all(0 <= row[f"speed/{name}_share"] < 1 for name in shares)
        seconds = ("speed/step_p50_seconds", "speed/step_p95_seconds", "time/epoch_seconds")
        for name in ("speed/samples_per_second", *seconds, "memory/peak_mib"):
            assert row[name] > 0
        assert 0 < row["time/validate_seconds"] < row["time/epoch_seconds"]
    best = max(history[1:], key=lambda row: row["val/accuracy"])
    assert trained["val/accuracy"] == pytest.approx(best["val/accuracy"], abs=1e-5)


def test_mlflow_has_one_finished_run(trained: dict, storage: Path):
    client, run = tracked(storage, "whole")
    assert run.info.status == "FINISHED"
    assert run.data.params["midas.warmup_epochs"] == "1"
    assert run.data.params["optim.epochs"] == "4"
    assert run.data.tags["data_digest"] == trained["data_digest"]
    if (Path(__file__).parents[2] / ".git").exists():
        assert re.match(r"[0-9a-f]{40}", run.data.tags["git_commit"])
    assert run.data.metrics["test/accuracy"] == pytest.approx(trained["test/accuracy"])
    for name in ("alpha/image", "conf_uni/audio", "conf_multi/audio", "mis_val_top2"):
        assert len(client.get_metric_history(run.info.run_id, name)) >= 3
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"alpha.png", "confidences.png", "config.yaml", "result.json"} <= artifacts
    cards = {item.path for item in client.list_artifacts(run.info.run_id, "data")}
    assert cards == {"data/card.html", "data/card.md"}


def test_finished_run_is_not_run_again_and_a_changed_one_is_refused(trained: dict, storage: Path):
    began = time.monotonic()
    again = last_json(
        midas("train", "digits", *SMALL, "--name", "whole", "--json", storage=storage)
    )
    assert again == trained
    assert time.monotonic() - began < 20
    changed = midas(
        "train", "digits", *SMALL, "--name", "whole", "--optim.lr", "0.5", storage=storage
    )
    assert changed.returncode == 1
    assert "optim.lr: 0.01 -> 0.5" in changed.stderr.replace("\n", " ")


def test_evaluate_repeats_the_test_result(trained: dict, storage: Path):
    result = last_json(midas("evaluate", "whole", "--json", storage=storage))
    for name, value in trained.items():
        if name.startswith("test/"):
            assert result[name] == pytest.approx(value, abs=1e-6), name


def test_stopped_run_is_killed_and_the_same_command_continues_it_exactly(storage: Path):
    # So many epochs that both signals find it training: on a fast machine four end within 2 s.
    train = ("train", "digits", *SMALL, "--optim.epochs", str(STOPPED_EPOCHS), "--json")
    whole = last_json(midas(*train, "--name", "unbroken", storage=storage))
    history = storage / "halted" / "history.jsonl"
    for number in (signal.SIGTERM, signal.SIGINT):
        rows = len(read_history(history))
        process = start(*train, "--name", "halted", storage=storage)
        until(lambda rows=rows: len(read_history(history)) > rows)
        process.send_signal(number)
        done = finish(process, timeout=60)
        assert done.returncode == 130, done.stderr
        assert "--name halted" in done.stderr
        assert "Traceback" not in done.stderr
        client, run = tracked(storage, "halted")
        assert run.info.status == "KILLED"

    result = last_json(midas(*train, "--name", "halted", storage=storage))
    for chain in ("order_chain", "loss_chain"):
        assert result[chain] == whole[chain]
    assert client.get_run(run.info.run_id).info.status == "FINISHED"
    for name, value in weights(storage, "unbroken").items():
        assert (value == weights(storage, "halted")[name]).all(), name
    assert result["test/accuracy"] == pytest.approx(whole["test/accuracy"], abs=1e-6)
    epochs = list(range(STOPPED_EPOCHS))
    assert [row["epoch"] for row in read_history(history)] == epochs
    for name in ("train/loss", "val/accuracy"):
        logged = client.get_metric_history(run.info.run_id, name)
        assert [metric.step for metric in logged] == epochs


def test_diverging_run_stops_and_is_closed_as_failed(storage: Path):
    done = midas("train", "digits", *SMALL, "--optim.lr", "1e30", "--name", "nan", storage=storage)
    assert done.returncode == 1
    assert "finite" in done.stderr
    assert "Traceback" not in done.stderr
    assert tracked(storage, "nan")[1].info.status == "FAILED"
    assert not (storage / "nan" / "result.json").exists()


def test_corrupt_shard_is_found_before_anything_starts(trained: dict, tmp_path: Path):
    assert midas("prepare", "digits", storage=tmp_path).returncode == 0
    folder = next((tmp_path / "shards").iterdir())
    shard = folder / load_manifest(folder).splits["val"][0].path
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = midas("train", "digits", *SMALL, "--name", "bad", storage=tmp_path)
    assert done.returncode == 1
    assert "corrupt" in done.stderr
    assert not (tmp_path / "bad").exists()


def test_compare_prints_a_table_and_does_not_repeat_finished_runs(storage: Path):
    command = ("compare", "digits", *SMALL, "--name", "c", "--methods", "joint", "ogm_ge")
    first = midas(*command, "--seeds", "0", storage=storage)
    assert first.returncode == 0, first.stderr
    assert "ogm_ge" in first.stdout
    assert "± " in first.stdout
    began = time.monotonic()
    again = last_json(midas(*command, "--seeds", "0", "--json", storage=storage))
    assert time.monotonic() - began < 60
    assert again["runs"] == 2
    result = json.loads((storage / "c-joint-seed0" / "result.json").read_text())
    assert again["joint/test/accuracy/mean"] == pytest.approx(result["test/accuracy"], abs=1e-5)


def test_avdigits_on_real_speech_and_handwriting(storage: Path, shared_data: Path):
    short = ("--optim.epochs", "2", "--midas.warmup-epochs", "1")
    mlp = ("--model.encoders.image.kind", "mlp", "--model.encoders.audio.kind", "mlp")
    result = last_json(
        midas(
            *("train", "avdigits", "--data.root", str(shared_data), *short, *mlp),
            *("--data.noise.image", "0", "--name", "av", "--json"),
            storage=storage,
        )
    )
    assert result["test/accuracy"] > 0.6


def test_rosmap_on_real_omics(storage: Path, shared_data: Path):
    root = str(shared_data / "rosmap")
    short = ("--optim.epochs", "30", "--midas.warmup-epochs", "10", "--model.head-hidden", "64")
    result = last_json(
        midas(
            "train",
            "rosmap",
            "--data.root",
            root,
            *short,
            "--name",
            "ros",
            "--json",
            storage=storage,
        )
    )
    assert {
        f"test/zero_out_accuracy/{m}" for m in ("mrna", "methylation", "mirna")
    } <= result.keys()
    assert result["test/auroc"] > 0.5


@pytest.mark.slow
def test_compiled_encoders_compute_the_same(trained: dict, storage: Path):
    command = ("train", "digits", *SMALL, "--train.compile", "--name", "compiled", "--json")
    compiled = last_json(midas(*command, storage=storage))
    rows = [read_history(storage / name / "history.jsonl") for name in ("whole", "compiled")]
    for plain, other in zip(*rows, strict=True):
        assert other["train/loss"] == pytest.approx(plain["train/loss"], rel=0.02)
    assert compiled["test/accuracy"] == pytest.approx(trained["test/accuracy"], abs=0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bf16_learns_what_fp32_learns(storage: Path):
    """Over three seeds: loss curves, and the test accuracy within its noise."""
    curves, accuracy, spread = {}, {}, {}
    for precision in ("fp32", "bf16"):
        command = ("compare", "digits", "--methods", "midas", "--seeds", "0", "1", "2")
        flags = ("--train.precision", precision, "--name", precision, "--json")
        found = last_json(midas(*command, *flags, storage=storage))
        runs = [storage / f"{precision}-midas-seed{seed}" / "history.jsonl" for seed in range(3)]
        curves[precision] = np.array(
            [[row["train/loss"] for row in read_history(run)] for run in runs]
        ).mean(axis=0)
        accuracy[precision] = found["midas/test/accuracy/mean"]
        spread[precision] = found["midas/test/accuracy/std"]
    np.testing.assert_allclose(curves["bf16"], curves["fp32"], rtol=0.1)
    noise = 2 * max(*spread.values(), 0.01)
    assert accuracy["bf16"] == pytest.approx(accuracy["fp32"], abs=noise)

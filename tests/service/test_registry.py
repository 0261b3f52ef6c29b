"""Registry, promotion, prediction and export on real MLflow and Ray, as a user runs them."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from mlflow import MlflowClient

from data.schema import MANIFEST_NAME, load_manifest
from service import gate
from service.config import ConfigError
from service.models import promote
from tests.service.cli import SMALL, last_json, midas

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

NO_PICKLE = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one configuration, with seeds 0 and 1; the second is registered by its training,
    and one on other data."""
    storage = tmp_path_factory.mktemp("runs")
    train = ("train", "digits", *SMALL, "--json", "--scaling.num-workers", "1")
    last_json(midas(*train, "--name", "first", storage=storage))
    second = ("--name", "second", "--train.seed", "1", "--register-as", "tones")
    assert last_json(midas(*train, *second, storage=storage))["model"] == "models:/tones/1"
    return storage


@pytest.fixture(scope="module")
def registered(storage: Path) -> dict[str, Any]:
    """`first` as version 1 of `digits`, the default name, champion."""
    made = last_json(midas("register", "first", "--json", storage=storage))
    promote = ("promote", "digits", "1", "--floor", "0", "--json")
    assert last_json(midas(*promote, storage=storage))["promote/promoted"]
    return made


@pytest.fixture(scope="module")
def evaluated(storage: Path) -> dict[str, Any]:
    return last_json(midas("evaluate", "first", "--split", "val", "--json", storage=storage))


@pytest.fixture(scope="module")
def shards(storage: Path) -> Path:
    [found] = (storage / "shards").iterdir()
    return found


def client(storage: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{storage}/mlflow.db")


def predict(storage: Path, model: str, place: Path, output: Path, *flags: str) -> dict[str, Any]:
    command = ("predict", model, "--input", str(place), "--output", str(output), *flags, "--json")
    return last_json(midas(*command, storage=storage))


def test_a_run_is_registered_once(storage: Path, registered: dict[str, Any]):
    assert (registered["name"], registered["version"]) == ("digits", "1")
    again = last_json(midas("register", "first", "--json", storage=storage))
    assert again == registered
    version = client(storage).get_model_version("digits", "1")
    result = json.loads((storage / "first" / "result.json").read_text())
    assert version.run_id == result["mlflow_run_id"]
    assert version.tags["data_digest"] == result["data_digest"]
    for name in ("val/accuracy", "val/head_accuracy/audio", "val/zero_out_accuracy/image"):
        assert float(version.tags[name]) == pytest.approx(result[name])


def artifacts(storage: Path, name: str, version: str) -> Path:
    place = client(storage).get_model_version_download_uri(name, version)
    return Path(place.removeprefix("file://"))


def test_a_version_holds_no_pickle(storage: Path, registered: dict[str, Any]):
    folder = artifacts(storage, "digits", "1")
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    kept = {"config.yaml", "manifest.json", "model.safetensors", "result.json", "state.json"}
    assert names == {
        *("MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "pyfunc_model.py"),
        *("input_example.json", "serving_input_example.json"),
        *(f"artifacts/model/{name}" for name in kept),
    }
    about = yaml.safe_load((folder / "MLmodel").read_text())
    assert "python_model" not in about["flavors"]["python_function"]
    inputs = json.loads(about["signature"]["inputs"])
    assert [(i["name"], i["tensor-spec"]["shape"]) for i in inputs] == [
        ("image", [-1, 1, 8, 8]),
        ("audio", [-1, 1, 40, 25]),
    ]
    example = json.loads((folder / "input_example.json").read_text())
    assert [len(example[name]) for name in ("image", "audio")] == [2, 2]


def test_predictions_are_those_that_evaluate_counts(
    storage: Path,
    registered: dict[str, Any],
    evaluated: dict[str, Any],
    shards: Path,
    tmp_path: Path,
):
    output = tmp_path / "out.parquet"
    result = predict(storage, "models:/digits@champion", shards, output, "--split", "val")
    assert (result["rows"], result["predicted"], result["rejected"]) == (179, 179, 0)
    assert result["accuracy"] == pytest.approx(evaluated["val/accuracy"], abs=1e-9)
    for name in ("image", "audio"):
        expected = evaluated[f"val/head_accuracy/{name}"]
        assert result[f"accuracy/{name}"] == pytest.approx(expected, abs=1e-9)
    table = pq.read_table(output)
    probabilities = np.array(table.column("probabilities").to_pylist())
    assert probabilities.shape == (179, 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-5)
    classes = json.loads(table.schema.metadata[b"classes"])
    said = [classes[i] for i in probabilities.argmax(axis=1)]
    assert said == table.column("predicted").to_pylist()
    chosen = probabilities.max(axis=1)
    np.testing.assert_allclose(table.column("confidence").to_numpy(), chosen, atol=1e-6)
    label = table.column("label").to_pylist()
    loss = -np.mean(
        [np.log(p[classes.index(name)]) for p, name in zip(probabilities, label, strict=True)]
    )
    assert loss == pytest.approx(evaluated["val/loss"], rel=1e-4)
    assert result["conflicts"] == sum(table.column("conflict").to_pylist())


def test_a_run_predicts_without_the_registry_and_all_rows(
    storage: Path, shards: Path, registered: dict[str, Any], tmp_path: Path
):
    by_run = predict(storage, "first", shards, tmp_path / "run.parquet", "--workers", "2")
    assert (by_run["rows"], by_run["predicted"]) == (1797, 1797)
    table = pq.read_table(tmp_path / "run.parquet")
    assert table.num_rows == len(set(table.column("key").to_pylist())) == 1797
    predict(storage, "models:/digits/1", shards, tmp_path / "model.parquet")
    assert pq.read_table(tmp_path / "model.parquet").equals(table)


def test_mlflow_loads_it_in_a_fresh_process_with_pickle_off(
    storage: Path, registered: dict[str, Any], shards: Path, tmp_path: Path
):
    predict(storage, "models:/digits@champion", shards, tmp_path / "out.parquet", "--split", "val")
    code = f"""
import json, mlflow, numpy as np, pyarrow.parquet as pq
mlflow.set_tracking_uri("sqlite:///{storage}/mlflow.db")
model = mlflow.pyfunc.load_model("models:/digits@champion")
from data.reader import ShardReader, read_chunks, tensors
from data.schema import load_manifest
manifest = load_manifest({str(shards)!r})
[table] = read_chunks(ShardReader({str(shards)!r}, manifest, "val"), 1, 0, 100)
rows = {{k: np.array(v) for k, v in tensors(table, manifest.modalities, "val").items()}}
said = model.predict(rows)
told = pq.read_table({str(tmp_path / "out.parquet")!r}).slice(0, 100).to_pandas()
assert list(said["predicted"]) == list(told["predicted"])
assert np.abs(said["confidence/audio"] - told["confidence/audio"]).max() < 1e-5
assert len(model.input_example["image"]) == 2
assert len(model.predict(model.input_example)) == 2
print("loaded", model.metadata.signature.outputs.input_names())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **NO_PICKLE},
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "loaded ['predicted', 'confidence', 'conflict', 'predicted/image'" in done.stdout


@pytest.fixture
def tampered(storage: Path, registered: dict[str, Any], tmp_path: Path) -> Any:
    """The folder of version 1, put back afterwards."""
    folder = artifacts(storage, "digits", "1")
    shutil.copytree(folder, tmp_path / "copy")
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def refused(storage: Path, shards: Path, tmp_path: Path) -> str:
    """What `midas predict` says; it must fail, and write nothing."""
    output = tmp_path / "out.parquet"
    command = (
        "predict",
        "models:/digits@champion",
        "--input",
        str(shards),
        "--output",
        str(output),
    )
    done = midas(*command, storage=storage)
    assert done.returncode == 1, done.stdout
    assert not output.exists()
    assert not (tmp_path / "taken").exists()
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def test_a_hostile_pickle_beside_the_model_is_refused(
    storage: Path, tampered: Path, shards: Path, tmp_path: Path
):
    hostile = pickle.dumps(Hostile(tmp_path / "taken"))
    (tampered / "python_model.pkl").write_bytes(hostile)
    assert "holds python_model.pkl, which is no part of a model" in refused(
        storage, shards, tmp_path
    )
    about = yaml.safe_load((tampered / "MLmodel").read_text())
    flavor = about["flavors"]["python_function"]
    del flavor["model_code_path"]
    flavor |= {"loader_module": "mlflow.pyfunc.model", "python_model": "python_model.pkl"}
    (tampered / "MLmodel").write_text(yaml.safe_dump(about))
    code = f"""
import mlflow
mlflow.set_tracking_uri("sqlite:///{storage}/mlflow.db")
mlflow.pyfunc.load_model("models:/digits@champion")
"""
    environment = {**os.environ, **NO_PICKLE}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert "Deserializing model using pickle is disallowed" in done.stderr
    assert not (tmp_path / "taken").exists()
    (tampered / "python_model.pkl").unlink()
    assert "its files are not those that were registered" in refused(storage, shards, tmp_path)


def test_a_pickle_in_the_place_of_weights_is_refused(
    storage: Path, tampered: Path, shards: Path, tmp_path: Path
):
    weights = tampered / "artifacts" / "model" / "model.safetensors"
    weights.write_bytes(pickle.dumps(Hostile(tmp_path / "taken")))
    said = refused(storage, shards, tmp_path)
    assert "its files are not those that were registered" in said
    done = midas("promote", "digits", "1", storage=storage)
    assert done.returncode == 1
    assert "its files are not those that were registered" in " ".join(done.stderr.split())


def test_promotion_goes_through_the_gate(storage: Path, registered: dict[str, Any]):
    registry = client(storage)
    second = last_json(midas("register", "second", "--json", storage=storage))
    assert second["version"] == "2"
    results = [json.loads((storage / n / "result.json").read_text()) for n in ("first", "second")]
    gain = results[1]["val/accuracy"] - results[0]["val/accuracy"]

    def promote(*flags: str) -> tuple[int, str]:
        done = midas("promote", "digits", "2", *flags, storage=storage)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    def champion() -> str:
        return str(registry.get_model_version_by_alias("digits", "champion").version)

    for flags, reason in (
        (("--floor", "0", "--margin", str(gain + 0.1)), "by the margin of"),
        (("--floor", "0", "audio=0.999", "--margin", "-1"), "modality audio has collapsed"),
        (("--floor", "1.1", "--floor-metric", "zero_out_accuracy"), "val/zero_out_accuracy/image"),
    ):
        code, said = promote(*flags)
        assert code == 1
        assert reason in said
        assert champion() == "1"
        assert registry.get_model_version("digits", "2").tags["verdict"] == "refused"
    registry.set_model_version_tag("digits", "2", "data_digest", "0" * 64)
    code, said = promote("--floor", "0")
    assert code == 1
    assert "it was validated on data with digest 000000000000" in said
    code, said = promote("--floor", "0", "--new-data", "recorded again")
    assert code == 0, said
    assert champion() == "2"
    tags = registry.get_model_version("digits", "2").tags
    decisions = [json.loads(v) for k, v in sorted(tags.items()) if k.startswith("decision/")]
    assert [d["promote/promoted"] for d in decisions] == [False, False, False, False, True]
    assert decisions[-1]["promote/new_data"] == "recorded again"
    assert "@" in decisions[-1]["promote/by"]
    assert decisions[0]["gain"] == pytest.approx(gain, abs=1e-6)
    registry.set_registered_model_alias("digits", "champion", "1")


def test_of_two_promotions_at_once_one_is_refused_and_recorded_so(
    storage: Path, registered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    registry, rules = client(storage), gate.Rules(-1.0, 0.0, new_data="again")
    decide = gate.decide

    def meanwhile(*args: Any) -> gate.Decision:
        registry.set_registered_model_alias("digits", "champion", "2")
        return decide(*args)

    monkeypatch.setattr(gate, "decide", meanwhile)
    with pytest.raises(ConfigError, match="changed while version 2 was compared"):
        promote("digits", "2", str(storage), rules)
    monkeypatch.undo()
    tags = registry.get_model_version("digits", "2").tags
    last = max(name for name in tags if name.startswith("decision/"))
    assert (tags["verdict"], json.loads(tags[last])["promote/promoted"]) == ("refused", False)
    registry.set_registered_model_alias("digits", "champion", "1")


def test_what_is_not_there_is_named(storage: Path, registered: dict[str, Any], tmp_path: Path):
    shards = str(storage / "shards")
    output = ("--input", shards, "--output", str(tmp_path / "out.parquet"))
    for command, reason in (
        (("predict", "models:/digits@nobody", *output), "could not find models:/digits@nobody"),
        (("predict", "models:/digits", *output), "names no model; write models:/NAME@champion"),
        (("predict", "gone", *output), "gone holds no result.json"),
        (("predict", "first", "--input", "gone", *output[2:]), "gone does not exist"),
        (("promote", "digits", "99"), "could not find models:/digits/99"),
        (("promote", "nothing", "1"), "could not find models:/nothing/1"),
        (("promote", "digits", "1", "--floor", "high"), "--floor high must be a number"),
        (("register", "gone"), "gone holds no result.json"),
        (("export", "first", "--output", "no/such/folder/m.pt2"), "folder is not a folder"),
    ):
        done = midas(*command, storage=storage)
        assert done.returncode == 1, command
        assert reason in " ".join(done.stderr.split())
        assert "unexpected" not in done.stderr


def test_an_exported_graph_says_what_predict_says(
    storage: Path, registered: dict[str, Any], shards: Path, tmp_path: Path
):
    path = tmp_path / "model.pt2"
    command = ("export", "models:/digits@champion", "--output", str(path), "--json")
    result = last_json(midas(*command, storage=storage))
    assert result["export/max_difference"] < 1e-5
    predict(storage, "models:/digits@champion", shards, tmp_path / "out.parquet", "--split", "val")
    trained = json.loads((storage / "first" / "result.json").read_text())
    limit = 1e-5 if trained["precision"] == "fp32" else 0.05  # the graph is in fp32
    code = f"""
import sys, torch, numpy as np, pyarrow.parquet as pq
program = torch.export.load({str(path)!r}).module()
assert "training" not in sys.modules
from data.reader import ShardReader, read_chunks, tensors
from data.schema import load_manifest
manifest = load_manifest({str(shards)!r})
[table] = read_chunks(ShardReader({str(shards)!r}, manifest, "val"), 1, 0, 100)
rows = tensors(table, manifest.modalities, "val")
said = program({{k: torch.from_numpy(np.array(v)) for k, v in rows.items()}})["fused"]
told = pq.read_table({str(tmp_path / "out.parquet")!r}).column("probabilities").to_pylist()[:100]
gaps = np.abs(said.detach().numpy() - np.array(told))
assert gaps.max() < {limit} and gaps.mean() < {limit} / 20, (gaps.max(), gaps.mean())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def table_run(storage: Path) -> Path:
    """A run on a table of vectors and texts, of which some rows lack the text."""
    folder = storage / "raw"
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = ("the cat sat on the mat", "a dog ran in the park", "eels swim far out at sea")
    rows = []
    for number in range(150):
        kind = number % 3
        values = rng.normal(100 + 10 * kind, 8, size=4).round(3).tolist()
        text = None if number % 10 == 7 else f"{words[kind]} {number}"
        rows.append({"id": f"row-{number}", "label": "cde"[kind], "note": text, "sizes": values})
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    flags = [
        *("--manifest", str(folder / "table.parquet"), "--method", "joint_uni"),
        *("--data.modalities.note.kind", "text", "--data.modalities.note.optional"),
        *("--data.modalities.note.tokens", "12", "--data.modalities.sizes.kind", "vector"),
        *("--optim.epochs", "2", "--train.global-batch-size", "32", "--optim.lr", "0.01"),
        *("--model.encoders.note.width", "16", "--model.encoders.note.heads", "2"),
        *("--scaling.num-workers", "1", "--name", "table"),
    ]
    last_json(midas("train", *flags, "--json", storage=storage))
    return folder


def test_raw_rows_are_shaped_as_in_training(storage: Path, table_run: Path, tmp_path: Path):
    evaluated = last_json(midas("evaluate", "table", "--split", "test", "--json", storage=storage))
    last_json(midas("register", "table", "--as", "notes", "--json", storage=storage))
    raw = table_run / "table.parquet"
    result = predict(storage, "models:/notes/1", raw, tmp_path / "raw.parquet", "--split", "test")
    assert result["accuracy"] == pytest.approx(evaluated["test/accuracy"], abs=1e-9)
    assert result["accuracy/note"] == pytest.approx(evaluated["test/head_accuracy/note"], abs=1e-9)
    run = json.loads((storage / "table" / "run.json").read_text())
    shards = Path(run["data_folder"])
    assert result["rows"] == load_manifest(shards).rows("test")
    predict(storage, "table", shards, tmp_path / "shards.parquet", "--split", "test")
    by_raw, by_shards = (
        pq.read_table(tmp_path / f"{name}.parquet").sort_by("key") for name in ("raw", "shards")
    )
    assert by_raw.column("key").equals(by_shards.column("key"))
    for name in ("predicted", "label", "conflict", "predicted/note"):
        assert by_raw.column(name).equals(by_shards.column(name)), name
    gaps = np.array(by_raw["probabilities"].to_pylist()) - np.array(
        by_shards["probabilities"].to_pylist()
    )
    assert np.abs(gaps).max() < 1e-5
    lacking = [k.endswith("7") for k in by_raw.column("key").to_pylist()]
    assert [v is None for v in by_raw.column("confidence/note").to_pylist()] == lacking


def test_rejects_are_counted_named_and_reported(storage: Path, table_run: Path, tmp_path: Path):
    rows = pq.read_table(table_run / "table.parquet").to_pylist()[:20]
    for row in rows:
        del row["label"]
    rows[3]["sizes"] = [1.0, 2.0]
    rows[4]["sizes"] = None
    rows[5]["sizes"] = [1.0, float("nan"), 2.0, 3.0]
    rows[6]["id"] = rows[2]["id"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "new.parquet")
    output = tmp_path / "out.parquet"
    result = predict(storage, "table", tmp_path / "new.parquet", output)
    assert (result["rows"], result["predicted"], result["rejected"]) == (20, 16, 4)
    assert result["labelled"] == 0
    assert "accuracy" not in result
    listed = [
        json.loads(line) for line in Path(f"{output}.rejected.jsonl").read_text().splitlines()
    ]
    reasons = {row["key"]: row["reason"] for row in listed}
    assert reasons.keys() == {"row-2", "row-3", "row-4", "row-5"}
    assert "keys are unique" in reasons["row-2"]
    assert "has shape (2,), (4,) expected" in reasons["row-3"]
    assert reasons["row-4"].startswith("sizes is missing")
    assert "1 values that are not finite" in reasons["row-5"]
    told = pq.read_table(output)
    assert told.column("label").null_count == told.num_rows == 16
    assert MANIFEST_NAME not in {path.name for path in tmp_path.iterdir()}

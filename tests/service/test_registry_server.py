"""The registry behind an MLflow server that asks for a login, and that is away when a run ends."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.mlflow_server import SERVER_ENVIRONMENT
from tests.service.cli import SMALL, last_json, midas, until
from tests.service.test_tracking import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

PASSWORD = "a-long-password-1"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def login() -> dict[str, str]:
    """Environment of commands; nothing listens at the address yet."""
    return {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}",
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
    }


@pytest.fixture(scope="module")
def unheard(storage: Path, login: dict[str, str]) -> str:
    """A run that MLflow does not know, and what its command said in the end."""
    train = ("train", "digits", *SMALL, "--scaling.num-workers", "1", "--name", "first")
    done = midas(*train, "--register-as", "tones", storage=storage, **login)
    assert done.returncode == 1
    assert json.loads((storage / "first" / "result.json").read_text())["mlflow_run_id"] == ""
    return " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def server(
    login: dict[str, str], unheard: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[bytes]]:
    """It comes up after the run has ended."""
    folder, url = tmp_path_factory.mktemp("mlflow"), login["MLFLOW_TRACKING_URI"]
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{folder}/auth.db\n"
        f"admin_username = admin\nadmin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    own = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 32,
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    command += ["--port", url.rpartition(":")[2]]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | SERVER_ENVIRONMENT | own, cwd=folder, stdout=log, stderr=log
        )
    until(lambda: _is_up(url))
    yield process
    process.terminate()
    process.wait(timeout=30)


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def refused(*command: str, storage: Path, **environment: str) -> str:
    done = midas(*command, storage=storage, **environment)
    assert done.returncode == 1, done.stdout
    assert "unexpected" not in done.stderr
    assert PASSWORD not in done.stderr + done.stdout
    return " ".join(done.stderr.split())


def test_a_model_is_not_registered_before_its_run(
    storage: Path, login: dict[str, str], unheard: str
):
    said = refused("register", "first", storage=storage, **login)
    for text in (said, unheard):
        assert "does not have all of run first" in text
        assert f"`midas sync --storage {storage}`" in text.replace(" / ", "/")


@pytest.mark.usefixtures("server")
def test_a_wrong_password_registers_nothing(storage: Path, login: dict[str, str]):
    wrong = login | {"MLFLOW_TRACKING_PASSWORD": "another-password"}
    assert "does not have all of run first" in refused(
        "register", "first", storage=storage, **wrong
    )
    assert "could not find models:/digits@champion" in refused(
        *("predict", "models:/digits@champion", "--input", ".", "--output", "x.parquet"),
        storage=storage,
        **wrong,
    )


def test_all_verbs_work_through_the_server(
    storage: Path,
    login: dict[str, str],
    server: subprocess.Popen[bytes],
    tmp_path: Path,
):
    made = last_json(midas("register", "first", "--json", storage=storage, **login))
    assert made["model"] == "models:/digits/1"
    assert last_json(midas("sync", "--json", storage=storage, **login))["sync/complete"]
    again = last_json(midas("register", "first", "--json", storage=storage, **login))
    assert again == made
    promote = ("promote", "digits", "1", "--floor", "0", "--json")
    decision = last_json(midas(*promote, storage=storage, **login))
    assert decision["promote/promoted"]
    assert decision["promote/by"].startswith("admin@")
    [shards] = (storage / "shards").iterdir()
    command = ("predict", "models:/digits@champion", "--input", str(shards), "--split", "val")
    output = ("--output", str(tmp_path / "out.parquet"), "--json")
    said = last_json(midas(*command, *output, storage=storage, **login))
    result = json.loads((storage / "first" / "result.json").read_text())
    assert said["accuracy"] == pytest.approx(result["val/accuracy"], abs=1e-5)
    assert (said["rows"], said["predicted"]) == (179, 179)
    code = """
import mlflow
model = mlflow.pyfunc.load_model("models:/digits@champion")
assert len(model.predict(model.input_example)) == 2
"""
    environment = {**os.environ, **login, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=tmp_path)
    server.terminate()
    server.wait(timeout=30)
    text = refused(*command, *output, storage=storage, **login)
    assert "could not find models:/digits@champion" in text
    assert "repeat the command when it answers" in text

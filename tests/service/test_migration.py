"""From SQLite to PostgreSQL: a real database, where it is installed."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from service import tracking
from service.config import ConfigError
from service.migration import TARGET_VARIABLE, migrate
from service.tracking import RunLogger, finish_run, open_run, tracking_uri
from tests.service.cli import last_json, midas, until
from tests.service.test_tracking import DATA, PARAMS, free_port

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
INITDB = shutil.which("initdb") or (BINARIES and str(BINARIES[-1] / "initdb"))


def test_a_folder_or_target_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(TARGET_VARIABLE, "mysql://u:hidden@h/d")
    with pytest.raises(ConfigError, match=r"mlflow.db is not there"):
        migrate(tmp_path)
    (tmp_path / "mlflow.db").touch()
    with pytest.raises(ConfigError, match=r"mysql://u:\*\*\*@h/d must be the address of an empty"):
        migrate(tmp_path)


def test_a_target_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mlflow.db").touch()
    monkeypatch.setenv(TARGET_VARIABLE, f"postgresql://u:hidden@127.0.0.1:{free_port()}/d")
    with pytest.raises(ConfigError, match=r"u:\*\*\*@127.0.0.1.* does not let this user in"):
        migrate(tmp_path)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an empty database of a server of its own."""
    if not INITDB:
        pytest.skip("no PostgreSQL on this machine; apt-get install postgresql")
    folder = tmp_path_factory.mktemp("postgres")
    user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
    for path in (folder, *folder.parents[:3]):
        path.chmod(path.stat().st_mode | 0o011)
    if user:
        shutil.chown(folder, **user)
    password = folder / "password"
    password.write_text("pass/wo:rd")
    if user:
        shutil.chown(password, **user)
    data = folder / "data"
    words = ["--username=midas", f"--pwfile={password}", "--auth=scram-sha-256", "--no-sync"]
    initdb = [str(INITDB), "-D", str(data), *words]
    subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **user)
    port = free_port()
    server = subprocess.Popen(
        [str(Path(str(INITDB)).resolve().parent / "postgres"), "-D", str(data), "-p", str(port)]
        + ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}"],
        cwd=folder,
        stderr=subprocess.DEVNULL,
        **user,
    )
    uri = f"postgresql://midas:pass%2Fwo%3Ard@127.0.0.1:{port}/postgres"
    try:
        until(lambda: _answers(uri), timeout=60)
        yield uri
    finally:
        server.send_signal(signal.SIGINT)  # ends also while clients are connected
        server.wait(timeout=30)


def _answers(uri: str) -> bool:
    import psycopg

    try:
        psycopg.connect(uri).close()
    except psycopg.OperationalError:
        time.sleep(0.2)
        return False
    return True


def contents(uri: str) -> dict[str, object]:
    """All that a user sees of a store."""
    client = MlflowClient(uri)
    experiments = {e.experiment_id: e.name for e in client.search_experiments()}
    runs = {}
    for run in client.search_runs(list(experiments)):
        run_id = run.info.run_id
        history = {key: _points(client, run_id, key) for key in run.data.metrics}
        about = run.to_dictionary()
        about["inputs"] = str(about["inputs"])
        runs[run_id] = (about, history)
    models = [
        (version.name, version.version, version.run_id, sorted(version.tags.items()))
        for version in client.search_model_versions()
    ]
    return {"experiments": experiments, "runs": runs, "models": models}


def _points(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float, int]]:
    points = client.get_metric_history(run_id, key)
    return sorted((point.step, point.value, point.timestamp) for point in points)


@pytest.mark.ray
def test_a_store_moves_to_postgresql_with_all_that_is_in_it(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = tracking_uri(tmp_path)
    folders = [tmp_path / name for name in ("one", "two")]
    for number, folder in enumerate(folders):
        open_run(source, folder, tmp_path, f"exp{number}", folder.name, PARAMS, {"t": "1"}, DATA)
        logger = RunLogger(source, folder)
        logger.log_many(({"a": 0.1 * s, "b/c": 1e-300}, s, 1.7e9 + s) for s in range(500))
        logger.close()
        finish_run(source, folder, "FINISHED", {"end": 1.0}, dict, {"x.txt": "x"})
    client = MlflowClient(source)
    client.create_registered_model("digits")
    client.create_model_version("digits", "file:///x", tracking.run_id(folders[0]), {"k": "v"})
    client.set_registered_model_alias("digits", "champion", "1")

    result = last_json(midas("migrate", "--json", storage=tmp_path, **{TARGET_VARIABLE: postgres}))
    assert (result["rows/runs"], result["rows/metrics"]) == (2, 2 * 1001)
    assert contents(postgres) == contents(source)
    moved = MlflowClient(postgres)
    assert int(moved.get_model_version_by_alias("digits", "champion").version) == 1
    assert [a.path for a in moved.list_artifacts(tracking.run_id(folders[0]))] == ["x.txt"]

    # New experiments and runs get numbers of their own, and an old run goes on.
    assert moved.create_experiment("new") not in contents(source)["experiments"]  # type: ignore[operator]
    again = open_run(postgres, folders[0], tmp_path, "exp0", "one", {}, {}, DATA)
    assert again == tracking.run_id(folders[0])
    logger = RunLogger(postgres, folders[0])
    logger.log({"a": 500.0}, 500, 1.7e9)
    assert logger.close() == 0
    assert len(moved.get_metric_history(again, "a")) == 501

    monkeypatch.setenv(TARGET_VARIABLE, postgres)
    with pytest.raises(ConfigError, match=r"postgresql://midas:\*\*\*@.* has runs in it already"):
        migrate(tmp_path)

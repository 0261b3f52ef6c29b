"""Registered models in MLflow: how a run becomes a version, and how a version is read again.

Like `service/tracking.py` it imports mlflow inside functions only, and uses `MlflowClient` with
explicit ids. A version's folder holds what MLflow writes (MLmodel, requirements, input example, the
script `service/pyfunc_model.py`) and below `artifacts/model` what `service/served.py` reads.
`fetch` runs nothing of it, and refuses a folder with anything else in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.kept import PREFIXES
from service import sending
from service.config import ConfigError
from service.files import RESULT_NAME
from service.redaction import redact
from service.served import NEEDED, read_files

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
NAME = re.compile(r"[\w .-]+")
REFERENCE = re.compile(
    rf"models:/(?P<name>{NAME.pattern})(?:@(?P<alias>{NAME.pattern})|/(?P<version>\d+))"
)
SCRIPT = Path(__file__).parent / "pyfunc_model.py"
ARTIFACTS = "artifacts/model"
# What MLflow writes; the last one when it copies a registered model.
WRITTEN = (
    *("MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", SCRIPT.name),
    *("input_example.json", "serving_input_example.json", "registered_model_meta"),
)
REQUIRED = ("midas", "mlflow", "torch", "numpy", "pyarrow", "safetensors")
FILES_TAG, RUN_TAG, CHECKPOINT_TAG, DIGEST_TAG = (
    *("files_sha256", "run", "checkpoint", "data_digest"),
)
SECONDS = 60  # for a request; weights take longer than metrics


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        tags: with the validation metrics of its run.
    """

    name: str
    version: str
    run_id: str
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        """As `midas predict` and MLflow take it."""
        return f"models:/{self.name}/{self.version}"


def is_reference(model: str) -> bool:
    """Whether this names a registered model, not a run."""
    return model.startswith("models:")


def check_name(name: str) -> None:
    """Raise ConfigError unless a model can have this name."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a registered model; use letters, digits, spaces, "
            "dots, dashes and underscores"
        )


def register(
    uri: str,
    name: str,
    run_id: str,
    files: Mapping[str, bytes],
    tags: Mapping[str, str],
    example: Mapping[str, np.ndarray],
    description: str,
) -> Version:
    """Make a version of a run's model, or find the one there is of the same run and checkpoint.

    Args:
        uri: of the MLflow store.
        name: of the registered model, which is made if there is none.
        run_id: MLflow run that trained it.
        files: of the model, by name.
        tags: RUN_TAG, CHECKPOINT_TAG, DIGEST_TAG, and numbers for people and for the gate.
        example: two or more rows.

    Raises:
        ConfigError: MLflow refuses.
    """
    from mlflow.entities import LoggedModelOutput

    check_name(name)
    with _asking(uri, f"register run {tags[RUN_TAG]} as {name}") as client:
        experiment = client.get_run(run_id).info.experiment_id
        for found in client.search_model_versions(f"name='{name}'"):
            same = (found.run_id, found.tags.get(CHECKPOINT_TAG)) == (run_id, tags[CHECKPOINT_TAG])
            if same and found.status == "READY":
                return _version(found)
        _create_name(client, name)
        model = client.create_logged_model(experiment, "model", run_id, model_type="midas")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "version"
            _write(folder, Path(scratch), model.model_id, run_id, files, example)
            client.log_model_artifacts(model.model_id, str(folder))
            tags = {**tags, FILES_TAG: files_digest(folder)}
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        made = client.create_model_version(
            name,
            f"models:/{model.model_id}",
            run_id,
            tags=tags,
            description=description,
            await_creation_for=SECONDS,
            model_id=model.model_id,
        )
        return _version(made)


def find(uri: str, reference: str) -> Version:
    """The version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` stands for.

    Raises:
        ConfigError: there is none.
    """
    if not (parts := REFERENCE.fullmatch(reference)):
        raise ConfigError(
            f"{reference} names no model; write models:/NAME@{CHAMPION} or models:/NAME/VERSION"
        )
    with _asking(uri, f"find {reference}") as client:
        if parts["alias"]:
            return _version(client.get_model_version_by_alias(parts["name"], parts["alias"]))
        return _version(client.get_model_version(parts["name"], parts["version"]))


def champion(uri: str, name: str) -> Version | None:
    """The version that has the alias; None if no version has."""
    with _asking(uri, f"find model {name}") as client:
        number = client.get_registered_model(name).aliases.get(CHAMPION)
        return None if number is None else _version(client.get_model_version(name, number))


def make_champion(uri: str, new: Version, before: Version | None) -> None:
    """Move the alias.

    Raises:
        ConfigError: it is not where it was when the versions were compared.
    """
    now = champion(uri, new.name)
    if (now and now.version) != (before and before.version):
        raise ConfigError(
            f"the champion of {new.name} changed while version {new.version} was compared with it; "
            "repeat the command"
        )
    with _asking(uri, f"promote {new.uri}") as client:
        client.set_registered_model_alias(new.name, CHAMPION, new.version)


def set_tags(uri: str, of: Version, tags: Mapping[str, str]) -> None:
    """Set tags of a version."""
    with _asking(uri, f"write tags of {of.uri}") as client:
        for key, value in tags.items():
            client.set_model_version_tag(of.name, of.version, key, value)


def fetch(uri: str, of: Version) -> dict[str, bytes]:
    """Files of a version's model, by name, after a look at everything in its folder.

    Raises:
        ConfigError: the folder has other files than a model of ours, or other content than when it
            was registered.
    """
    with tempfile.TemporaryDirectory() as scratch:
        from mlflow.artifacts import download_artifacts

        with _asking(uri, f"download {of.uri}"):
            place = download_artifacts(
                artifact_uri=of.uri, dst_path=scratch, tracking_uri=uri, registry_uri=uri
            )
        folder = Path(place)
        check_folder(folder, of)
        return read_files(folder / ARTIFACTS)


def check_folder(folder: Path, of: Version) -> None:
    """Look at the folder of a version without running or unpickling any of it.

    Raises:
        ConfigError: see `fetch`.
    """
    remedy = "do not load it; register its run again, and look who can write to the artifact store"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or _is_known(name)):
            raise ConfigError(
                f"{of.uri} holds {name}, which is no part of a model of ours (weights are "
                f"safetensors, all else JSON and YAML); {remedy}"
            )
    if files_digest(folder) != of.tags.get(FILES_TAG):
        raise ConfigError(f"{of.uri}: its files are not those that were registered; {remedy}")


def files_digest(folder: Path) -> str:
    """SHA-256 over names and content of all files but those that MLflow adds to copies."""
    hashes = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != WRITTEN[-1]
    }
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _is_known(name: str) -> bool:
    place, _, file = name.rpartition("/")
    if place == ARTIFACTS:
        kept = file.startswith(PREFIXES) and file.endswith(".json")
        return kept or file in (*NEEDED, RESULT_NAME)
    return name in WRITTEN


def _write(
    folder: Path,
    scratch: Path,
    model_id: str,
    run_id: str,
    files: Mapping[str, bytes],
    example: Mapping[str, np.ndarray],
) -> None:
    """Write the folder of a version."""
    import mlflow.pyfunc
    from mlflow import environment_variables as variables
    from mlflow.models import Model, infer_signature

    content = scratch / Path(ARTIFACTS).name
    content.mkdir()
    for name, data in files.items():
        (content / name).write_bytes(data)
    with warnings.catch_warnings(), _set(variables.MLFLOW_UV_AUTO_DETECT, False):
        # Of type hints, which cannot say what a dict of arrays holds; the signature does.
        warnings.simplefilter("ignore")
        answer = _answer(files, example)
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(SCRIPT),
            artifacts={content.name: str(content)},
            mlflow_model=Model(model_id=model_id, model_uuid=model_id, run_id=run_id),
            signature=infer_signature(dict(example), answer),
            input_example=dict(example),
            pip_requirements=[f"{name}=={installed(name)}" for name in REQUIRED],
        )
    for cache in folder.rglob("__pycache__"):
        for path in cache.iterdir():
            path.unlink()
        cache.rmdir()


def _answer(files: Mapping[str, bytes], example: Mapping[str, np.ndarray]) -> Any:
    """What the registered model will say to the example."""
    from service.pyfunc_model import Midas
    from service.served import Served

    model = Midas()
    model.model = Served(files, "the run's model", "cpu")
    return model.predict(None, example)


@contextlib.contextmanager
def _set(variable: Any, value: object) -> Iterator[None]:
    """An MLflow setting, for the body."""
    before = variable.get_raw()
    variable.set(value)
    try:
        yield
    finally:
        variable.unset() if before is None else variable.set(before)


@contextlib.contextmanager
def _current(uri: str) -> Iterator[None]:
    """The store is MLflow's global one in the body: for logged models and downloads of versions it
    looks there, whatever store it is told. The environment variable, which MLflow changes with it,
    is as before afterwards."""
    from mlflow.environment_variables import MLFLOW_TRACKING_URI
    from mlflow.tracking._tracking_service.utils import _use_tracking_uri

    with _set(MLFLOW_TRACKING_URI, uri), _use_tracking_uri(uri):
        yield


def _create_name(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise


def _version(found: ModelVersion) -> Version:
    return Version(found.name, str(found.version), found.run_id or "", dict(found.tags))


@contextlib.contextmanager
def _asking(uri: str, what: str) -> Iterator[MlflowClient]:
    """A client; what MLflow refuses becomes a sentence."""
    from mlflow import environment_variables as variables
    from mlflow.exceptions import MlflowException

    variables.MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    for name in ("mlflow.pyfunc", "mlflow.models.model", "mlflow.utils.environment"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with _set(variables.MLFLOW_HTTP_REQUEST_TIMEOUT, SECONDS), _current(uri):
            yield sending.connect(uri)
    except (MlflowException, OSError) as error:  # OSError: of files, or of their way to a server
        remedy = (
            "repeat the command when it answers"
            if sending.is_away(uri, error)
            else "check the name, the login, and that it is the store of the run "
            "(MLFLOW_TRACKING_URI; unset means mlflow.db in the storage folder)"
        )
        said = redact(str(getattr(error, "message", error)))
        raise ConfigError(f"MLflow at {redact(uri)} could not {what}: {said}; {remedy}") from error

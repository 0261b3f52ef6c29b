"""Trained models: of a finished run, or from the registry; registering and promoting them."""

import contextlib
import getpass
import json
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from data.reader import PRESENT, ShardReader, read_chunks, tensors
from data.schema import MANIFEST_NAME, Manifest
from service import gate, registry, tracking
from service.config import ConfigError, parse_config
from service.environment import environment
from service.files import CONFIG_NAME, RESULT_NAME, read_json
from service.inspection import data_of, find_run
from service.launch import checkpoint_store
from service.redaction import redact
from service.served import bits
from training.checkpoint import WEIGHTS_FILES

EXAMPLE_ROWS = 2
MAX_TAG_CHARACTERS = 5000
VAL = "val/"


@dataclass(frozen=True)
class TrainedModel:
    """Files of a model by name, and what errors call it."""

    files: dict[str, bytes]
    where: str


def find(model: str, storage: str) -> TrainedModel:
    """The model that a run, or `models:/NAME@ALIAS`, stands for.

    Raises:
        ConfigError: there is none, or it is not one of ours.
    """
    if registry.is_reference(model):
        uri = store_uri(storage)
        version = registry.find(uri, model)
        return TrainedModel(registry.fetch(uri, version), version.uri)
    return of_run(find_run(model, storage, RESULT_NAME))


def of_run(folder: Path) -> TrainedModel:
    """The best checkpoint of a finished run, with the run's config, manifest and result.

    Raises:
        ConfigError: its checkpoint or its data are not there any more.
    """
    text = (folder / CONFIG_NAME).read_text()
    moved = {"storage": str(folder.parent), "name": folder.name}
    config = parse_config(text, str(folder / CONFIG_NAME)).model_copy(update=moved)
    result = read_json(folder / RESULT_NAME) or {}
    manifest, data_folder = data_of(folder)
    store, name = checkpoint_store(config), result["checkpoint"]
    weights = store.load(name, WEIGHTS_FILES)
    if missing := set(WEIGHTS_FILES) - weights.keys():
        raise ConfigError(
            f"{store.where(name)} lacks {', '.join(sorted(missing))}; the best checkpoint of run "
            f"{folder.name} is needed; restore it, or train again"
        )
    files = {
        CONFIG_NAME: text.encode(),
        MANIFEST_NAME: manifest.to_json().encode(),
        RESULT_NAME: (folder / RESULT_NAME).read_bytes(),
        **weights,
        **{name: data_folder.read(name) for name in manifest.files},
    }
    return TrainedModel(files, str(folder))


def store_uri(storage: str) -> str:
    """The MLflow store that commands on this storage use."""
    return tracking.tracking_uri(Path(storage), environment()["MLFLOW_TRACKING_URI"])


def register(run: str, storage: str, name: str | None) -> dict[str, Any]:
    """Register the best checkpoint of a finished run; the same one only once.

    Args:
        run: run name under `storage`, or the run's folder.
        name: of the registered model; None takes the name of the data set.

    Raises:
        ConfigError: there is no such run, or MLflow refuses.
    """
    folder = find_run(run, storage, RESULT_NAME)
    model = of_run(folder)
    result = json.loads(model.files[RESULT_NAME])
    manifest, data_folder = data_of(folder)
    uri = store_uri(str(folder.parent))
    version = registry.register(
        uri,
        name or manifest.name,
        _recorded(uri, folder, result),
        model.files,
        _tags(folder.name, result, manifest),
        _example(ShardReader(str(data_folder), manifest, "val")),
        f"{result['method']} on {manifest.name} ({manifest.split_rule}), run {folder.name}: "
        f"{gate.ACCURACY} {result[gate.ACCURACY]:.4f}",
    )
    return {
        "name": version.name,
        "version": version.version,
        "model": version.uri,
        "run": version.tags[registry.RUN_TAG],
        "checkpoint": version.tags[registry.CHECKPOINT_TAG],
        gate.ACCURACY: float(version.tags[gate.ACCURACY]),
    }


def _recorded(uri: str, folder: Path, result: Mapping[str, Any]) -> str:
    """MLflow's id of the run, after sending what MLflow did not have of it."""
    if tracking.unsent(folder) and (left := tracking.sync(uri, folder)[1]):
        raise ConfigError(
            f"MLflow at {redact(uri)} does not have all of run {folder.name} ({left} records wait "
            f"in {folder}); a model belongs to a run; see that MLflow answers, send them with "
            f"`midas sync --storage {folder.parent}`, and repeat the command"
        )
    return tracking.run_id(folder) or result["mlflow_run_id"]


def _tags(run: str, result: Mapping[str, Any], manifest: Manifest) -> dict[str, str]:
    counts = manifest.class_counts["val"]
    numbers = {
        name: value
        for name, value in result.items()
        if name.startswith(VAL) and isinstance(value, int | float)
    }
    return {
        registry.RUN_TAG: run,
        registry.CHECKPOINT_TAG: result["checkpoint"],
        registry.DIGEST_TAG: result["data_digest"],
        "method": result["method"],
        "split": result["split"],
        "chance": repr(max(counts) / sum(counts)),
        **{name: repr(float(value)) for name, value in numbers.items()},
    }


def _example(reader: ShardReader) -> dict[str, np.ndarray]:
    """The first rows of a split, as a model is given them."""
    manifest = reader.manifest
    [table] = read_chunks(reader, 1, 0, min(EXAMPLE_ROWS, manifest.rows(reader.split)))
    rows = tensors(table.combine_chunks(), manifest.modalities, reader.split)
    rows = {name: np.array(np.resize(v, (EXAMPLE_ROWS, *v.shape[1:]))) for name, v in rows.items()}
    if manifest.has_optional:
        present = np.resize(table.column(PRESENT).to_numpy(), EXAMPLE_ROWS)
        rows[PRESENT] = bits(present, len(manifest.modalities))
    return rows


def promote(name: str, number: str, storage: str, rules: gate.Rules) -> dict[str, Any]:
    """Let a version become champion if the gate lets it; the decision is recorded either way.

    Returns:
        `promote/promoted`, `promote/reason`, who and when, and the numbers that were compared.

    Raises:
        ConfigError: there is no such version, its files are not those that were registered, or
            MLflow refuses.
    """
    uri = store_uri(storage)
    new = registry.find(uri, f"models:/{name}/{number}")
    registry.fetch(uri, new)  # it must be whole
    before = registry.champion(uri, name)
    decision = gate.decide(_contender(new), before and _contender(before), rules)
    record = {
        "promote/promoted": decision.promoted,
        "promote/reason": "; ".join(decision.refusals) or "all rules are met",
        "promote/by": f"{_user()}@{socket.gethostname()}",
        "promote/at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **({"promote/new_data": rules.new_data} if rules.new_data else {}),
        **decision.numbers,
    }
    told = {name: value for name, value in record.items() if name != "promote/at"}
    text = json.dumps({k: _finite(v) for k, v in told.items()})[:MAX_TAG_CHARACTERS]
    verdict = "promoted" if decision.promoted else "refused"
    tags = {f"decision/{record['promote/at']}".replace("+00:00", "Z"): text, "verdict": verdict}
    registry.set_tags(uri, new, tags)
    if decision.promoted:
        try:
            registry.make_champion(uri, new, before)
        except ConfigError as error:
            at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            failed = json.dumps({"promote/promoted": False, "promote/reason": str(error)})
            failure = {f"decision/{at}": failed[:MAX_TAG_CHARACTERS], "verdict": "refused"}
            with contextlib.suppress(ConfigError):  # the server may be away
                registry.set_tags(uri, new, failure)
            raise
    return {"name": name, "version": number, **record}


def _user() -> str:
    """As MLflow knows them, else as this machine does."""
    name = os.environ.get("MLFLOW_TRACKING_USERNAME")
    try:
        return name or getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.getuid())


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _contender(of: registry.Version) -> gate.Contender:
    numbers = {key: float(value) for key, value in of.tags.items() if key.startswith(VAL)}
    if missing := [tag for tag in ("chance", registry.DIGEST_TAG) if tag not in of.tags]:
        raise ConfigError(
            f"{of.uri} has no tag {missing[0]}; versions that `midas register` made have it; "
            "register its run with it"
        )
    chance, digest = float(of.tags["chance"]), of.tags[registry.DIGEST_TAG]
    return gate.Contender(of.version, numbers, chance, digest)

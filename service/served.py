"""A trained model as it answers: its files, its predictions, and the actor that makes them.

Needs torch, but neither Ray nor MLflow. Nothing is unpickled, and nothing of a model is executed:
weights are safetensors, all else is YAML and JSON, and the code is that of this package.

Shapes: B rows, C classes, M modalities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data.kept import PREFIXES
from data.reader import PRESENT, tensors
from data.requests import CHUNK
from data.schema import MANIFEST_NAME, Manifest, Split
from service.config import ConfigError, RunConfig, parse_config
from service.files import CONFIG_NAME
from service.stepper import make_method, row_spec
from training.augment import augment
from training.checkpoint import WEIGHTS_FILES, CheckpointError, load_weights
from training.methods.base import wide

NEEDED = (CONFIG_NAME, MANIFEST_NAME, *WEIGHTS_FILES)
CONFLICT = 0.5


@dataclass(frozen=True)
class Answers:
    """What a model says about rows.

    Attributes:
        probability_BC: fused, float32.
        predicted_B: class of the highest fused logit, int64.
        modality_MBC: probabilities of each modality's own head, or of what the method has in its
            place (see `Method.predict`), float32.
        modality_predicted_BM: class that each modality alone would choose, int64.
        present_BM: which modalities the rows have.
    """

    probability_BC: np.ndarray
    predicted_B: np.ndarray
    modality_MBC: np.ndarray
    modality_predicted_BM: np.ndarray
    present_BM: np.ndarray

    def modality_confidence_BM(self, class_B: np.ndarray) -> np.ndarray:
        """Probability that each modality gives to a class of every row."""
        return np.take_along_axis(self.modality_MBC, class_B[None, :, None], axis=2)[..., 0].T

    def conflicts(self, confidence: float) -> np.ndarray:
        """(B,) bool: two modalities that are there are sure of different classes.

        Args:
            confidence: probability from which on a modality is sure.
        """
        own_BM = self.modality_predicted_BM
        highest_BM = self.modality_MBC.max(axis=2).T
        sure_BM = self.present_BM & (highest_BM >= confidence)
        high = np.where(sure_BM, own_BM, -1).max(axis=1)
        low = np.where(sure_BM, own_BM, np.iinfo(np.int64).max).min(axis=1)
        return sure_BM.any(axis=1) & (low != high)


class Served:
    """A trained model.

    Args:
        files: content by name: NEEDED, and what data/kept.py names.
        where: what errors call the model.

    Attributes:
        config: of its run.
        manifest: of the data it was trained on.
        method: in eval mode, on `device`.
        kept: files that raw data are shaped with.
        specs: modality -> how delivered rows become inputs.

    Raises:
        ConfigError: a file is missing or is not what its name says.
    """

    def __init__(self, files: Mapping[str, bytes], where: str, device: torch.device | str):
        if missing := [name for name in NEEDED if name not in files]:
            raise ConfigError(
                f"{where} lacks {', '.join(missing)}; a model has {', '.join(NEEDED)}; register "
                "its run again"
            )
        self.config = _self_contained(
            parse_config(files[CONFIG_NAME].decode(), f"{where}/{CONFIG_NAME}")
        )
        try:
            self.manifest = Manifest.model_validate_json(files[MANIFEST_NAME])
        except ValueError as error:
            raise ConfigError(f"{where}/{MANIFEST_NAME} is no manifest: {error}") from error
        self.kept = {n: c.decode() for n, c in files.items() if n.startswith(PREFIXES)}
        self.device = torch.device(device)
        precision = self.config.train.precision
        self.method = make_method(self.config, self.manifest)
        self.method.use("fp32" if precision == "auto" else precision)
        try:
            notes = load_weights(files, where, self.method)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        if precision == "auto":
            self.method.model.precision = notes["precision"]
        self.method.to(self.device).eval()
        self.specs = {m.name: row_spec(m, self.config) for m in self.manifest.modalities}

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names, in the order of bits and columns."""
        return tuple(self.specs)

    @torch.no_grad()
    def __call__(self, rows: Mapping[str, np.ndarray], present_BM: np.ndarray) -> Answers:
        """Predict rows as the reader delivers them, a chunk of CHUNK at a time."""
        if not len(present_BM):  # networks of transformers fail without a row
            return self._of_none(rows, present_BM)
        parts = [
            self._chunk({n: v[i : i + CHUNK] for n, v in rows.items()}, present_BM[i : i + CHUNK])
            for i in range(0, len(present_BM), CHUNK)
        ]
        fused, own = (torch.cat(values) for values in zip(*parts, strict=True))
        probability_BC, own_BMC = (wide(z).softmax(dim=-1).float().numpy() for z in (fused, own))
        return Answers(
            probability_BC,
            fused.argmax(dim=1).numpy(),
            own_BMC.transpose(1, 0, 2),
            own.argmax(dim=2).numpy(),
            present_BM,
        )

    def _of_none(self, rows: Mapping[str, np.ndarray], present_BM: np.ndarray) -> Answers:
        one = {name: np.zeros((1, *value.shape[1:]), value.dtype) for name, value in rows.items()}
        answers = self(one, np.ones((1, present_BM.shape[1]), bool))
        return Answers(
            answers.probability_BC[:0],
            answers.predicted_B[:0],
            answers.modality_MBC[:, :0],
            answers.modality_predicted_BM[:0],
            present_BM,
        )

    def _chunk(
        self, rows: Mapping[str, np.ndarray], present_BM: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Logits of the fused prediction, (B, C), and of the modalities, (B, M, C)."""
        inputs = {name: self._input(name, rows[name]) for name in self.modalities}
        optional = self.manifest.has_optional
        present = torch.from_numpy(present_BM).to(self.device) if optional else None
        logits = self.method.predict(self.method.model.encode(inputs, present))
        own = torch.stack([logits[name].double() for name in self.modalities], dim=1)
        return logits["fused"].double().cpu(), own.cpu()

    def _input(self, name: str, rows: np.ndarray) -> Tensor:
        value = torch.from_numpy(np.array(rows)).to(self.device)  # a copy: others are read only
        spec = self.specs[name]
        return value if spec is None else augment(value, spec, None)


def _self_contained(config: RunConfig) -> RunConfig:
    """Without weights to begin training with, which the model's own replace."""
    encoders = {
        name: encoder.model_copy(update={"weights": "none", "pretrained": False})
        for name, encoder in config.model.encoders.items()
    }
    model = config.model.model_copy(update={"encoders": encoders})
    return config.model_copy(update={"model": model})


@dataclass(frozen=True)
class Predictor:
    """Makes, in whatever process, a function from tables of rows to tables of predictions.

    Attributes:
        files, where: see `Served`.
        device: cpu or cuda.
        threads: of torch, on a CPU.
        split: whose form the rows have.
        conflict: see `Answers.conflicts`.
    """

    files: Mapping[str, bytes]
    where: str
    device: str
    threads: int
    split: Split
    conflict: float = CONFLICT

    def __call__(self) -> "Predicting":
        torch.set_num_threads(self.threads)
        return Predicting(Served(self.files, self.where, self.device), self.split, self.conflict)


class Predicting:
    """From a table of rows (data/requests.py) to one of predictions; rows that cannot be used keep
    their reason and come last."""

    def __init__(self, model: Served, split: Split, conflict: float):
        self._model = model
        self._split: Split = split
        self._conflict = conflict
        self._schema = prediction_schema(model.manifest)

    def __call__(self, table: pa.Table) -> pa.Table:
        reason = table.column("reason")
        sound, rejected = table.filter(reason.is_null()), table.filter(reason.is_valid())
        parts = []
        if sound.num_rows:
            modalities = self._model.manifest.modalities
            rows = tensors(sound.combine_chunks(), modalities, self._split)
            present_B = sound.column(PRESENT).to_numpy()
            answers = self._model(rows, bits(present_B, len(modalities)))
            parts.append(self._table(sound, answers))
        if rejected.num_rows:
            missing = {
                field.name: pa.nulls(rejected.num_rows, field.type) for field in self._schema
            }
            told = {name: rejected.column(name) for name in ("key", "label", "reason")}
            parts.append(pa.table(missing | told, schema=self._schema))
        return pa.concat_tables(parts)

    def _table(self, sound: pa.Table, answers: Answers) -> pa.Table:
        labels = sound.column("label").to_pylist()
        told = {name: sound.column(name) for name in ("key", "label", "reason")}
        said = prediction_columns(self._model.manifest, answers, self._conflict, labels)
        return pa.table(told | said, schema=self._schema)


def bits(present_B: np.ndarray, num_modalities: int) -> np.ndarray:
    """(B, M) bool from bit masks."""
    return (present_B[:, None] >> np.arange(num_modalities) & 1).astype(bool)


def prediction_schema(manifest: Manifest) -> pa.Schema:
    """Columns of predictions; `reason` is null in all rows that have some."""
    text, number = pa.string(), pa.float32()
    fields = [("key", text), ("label", text), ("reason", text), ("predicted", text)]
    fields += [("confidence", number), ("conflict", pa.bool_())]
    for m in manifest.modalities:
        fields += [(f"predicted/{m.name}", text), (f"confidence/{m.name}", number)]
        fields += [(f"label_confidence/{m.name}", number)]
    return pa.schema([*fields, ("probabilities", pa.list_(number))])


def prediction_columns(
    manifest: Manifest,
    answers: Answers,
    conflict: float,
    labels: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """Columns of `prediction_schema` but `key`, `label` and `reason`; without labels, also but
    `label_confidence/<m>`. What a missing modality would say is null."""
    classes = np.array(manifest.classes, dtype=object)
    place = {name: number for number, name in enumerate(manifest.classes)}
    rows = np.arange(len(answers.predicted_B))
    predicted_B = answers.predicted_B
    columns: dict[str, Any] = {
        "predicted": pa.array(classes[predicted_B], pa.string()),
        "confidence": pa.array(answers.probability_BC[rows, predicted_B]),
        "conflict": pa.array(answers.conflicts(conflict)),
    }
    own_BM = answers.modality_predicted_BM
    sure_BM = answers.modality_confidence_BM(predicted_B)
    known_B = label_B = np.zeros(len(rows), np.int64)
    if labels is not None:
        known_B = np.array([label in place for label in labels])
        label_B = np.array([place.get(label or "", 0) for label in labels])
    true_BM = answers.modality_confidence_BM(label_B)
    for m, modality in enumerate(manifest.modalities):
        absent_B, name = ~answers.present_BM[:, m], modality.name
        columns[f"predicted/{name}"] = pa.array(classes[own_BM[:, m]], pa.string(), mask=absent_B)
        columns[f"confidence/{name}"] = pa.array(sure_BM[:, m], mask=absent_B)
        if labels is not None:
            unknown_B = absent_B | ~known_B
            columns[f"label_confidence/{name}"] = pa.array(true_BM[:, m], mask=unknown_B)
    columns["probabilities"] = pa.array(list(answers.probability_BC), pa.list_(pa.float32()))
    return columns


def read_files(folder: Path) -> dict[str, bytes]:
    """Content of a model's files, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

"""`midas predict`: rows through a trained model on Ray Data, into one Parquet file."""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.requests import Requests, requests
from data.schema import DataError, Manifest, Split
from data.sources import Rejection
from service import models
from service.cluster import ray_session, total_cpus, uses_gpu_now
from service.config import ConfigError, RunConfig, ScalingConfig
from service.environment import environment
from service.served import Predictor, Served, prediction_schema

SHOWN = 5


def predict(
    model: str,
    place: str,
    output: str,
    *,
    storage: str,
    split: Split | None,
    scaling: ScalingConfig,
    conflict: float,
    progress: Callable[[int, int], None],
    debug: bool = False,
) -> dict[str, Any]:
    """Predict every row of a place, and write what the model says.

    Args:
        model: a run, or models:/NAME@ALIAS.
        place: see `data.requests.requests`.
        output: Parquet file, replaced when all rows are in it; beside it comes
            `<output>.rejected.jsonl` if samples were rejected.
        split: one of the place's own splits; None takes all rows.
        scaling: actors to predict with.
        conflict: see `Answers.conflicts`.

    Returns:
        `rows`, `predicted`, `rejected`, `conflicts`, `rows_per_second` and, over the rows whose
        label the model knows, `accuracy` and `accuracy/<modality>`.

    Raises:
        ConfigError, DataError: there is no such model, no such rows, or none can be used.
    """
    began = time.monotonic()
    target = _target(output)
    found = models.find(model, storage)
    served = Served(found.files, found.where, "cpu")
    wanted = requests(place, served.config.data, served.manifest, served.kept, split)
    total = sum(sum(part.rows) + len(part.rejected) for part in wanted)
    outcome = _Outcome(served.manifest, total, progress)
    moved = {"scaling": scaling, "storage": storage}
    config = served.config.model_copy(update=moved)
    with ray_session(config, debug=debug), _written(target, served.manifest) as write:
        for part in wanted:
            outcome.reject(part.rejected)
            for table in _predicted(part, found, served, config, conflict):
                write(outcome.take(table))
        outcome.close(target)
    seconds = time.monotonic() - began
    return {
        **outcome.result(),
        "output": str(target),
        "model": found.where,
        "rows_per_second": total / seconds,
        "seconds": seconds,
    }


def _target(output: str) -> Path:
    target = Path(output).expanduser().absolute()
    if not target.parent.is_dir():
        raise ConfigError(f"--output {output}: {target.parent} is not a folder; make it first")
    return target


def _predicted(
    part: Requests, found: models.TrainedModel, served: Served, config: RunConfig, conflict: float
) -> Iterator[pa.Table]:
    from data.pipeline import Workers, map_parts

    gpu, threads = uses_gpu_now(config.scaling), config.scaling.cpus_per_worker
    device = "cuda" if gpu else "cpu"
    make = Predictor(found.files, found.where, device, threads, part.split, conflict)
    count = config.scaling.max_workers
    workers = Workers(
        count,
        threads,
        int(gpu),
        readers=max(1, total_cpus() - count * threads),
        max_restarts=-1 if environment()["RAY_ADDRESS"] else 0,  # a node of a cluster may go
    )
    row_nbytes = served.manifest.row_nbytes(part.split)
    yield from map_parts(
        *(part.read, part.shared, part.items, part.rows, row_nbytes, make, workers)
    )


@contextlib.contextmanager
def _written(target: Path, manifest: Manifest) -> Iterator[Callable[[pa.Table], None]]:
    """A function that adds rows to the file, which appears when the body ends well."""
    schema = prediction_schema(manifest)
    schema = schema.remove(schema.get_field_index("reason"))
    schema = schema.with_metadata({"classes": json.dumps(manifest.classes)})
    part = target.with_name(f".{target.name}.part")
    try:
        with pq.ParquetWriter(part, schema) as writer:
            yield lambda table: writer.write_table(table.cast(schema))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


class _Outcome:
    """Counts of what came back; samples that were rejected are kept."""

    def __init__(self, manifest: Manifest, total: int, progress: Callable[[int, int], None]):
        self._manifest = manifest
        self._total = total
        self._progress = progress
        self._rejected: list[Rejection] = []
        self._predicted = self._conflicts = 0
        self._hits: Counter[str] = Counter()
        self._labelled: Counter[str] = Counter()

    def reject(self, rejections: Any) -> None:
        """Take in samples that no actor has seen."""
        self._rejected += rejections
        self._progress(len(self._rejected) + self._predicted, self._total)

    def take(self, table: pa.Table) -> pa.Table:
        """Rows that were predicted, without `reason`."""
        reason = table.column("reason")
        for row in table.filter(reason.is_valid()).select(["key", "reason"]).to_pylist():
            self._rejected.append(Rejection(row["key"], "test", row["reason"]))
        good = table.filter(reason.is_null())
        self._predicted += good.num_rows
        self._conflicts += sum(good.column("conflict").to_pylist())
        self._count(good)
        self._progress(len(self._rejected) + self._predicted, self._total)
        return good.drop_columns(["reason"])

    def _count(self, good: pa.Table) -> None:
        labels = good.column("label").to_pylist()
        for name in ("", *(f"/{m.name}" for m in self._manifest.modalities)):
            said = good.column(f"predicted{name}").to_pylist()
            pairs = [
                (class_name, label)
                for class_name, label in zip(said, labels, strict=True)
                if class_name is not None and label in self._manifest.classes
            ]
            self._hits[name] += sum(class_name == label for class_name, label in pairs)
            self._labelled[name] += len(pairs)

    def close(self, target: Path) -> None:
        """Write the list of what was rejected, and check that nothing was lost.

        Raises:
            DataError: all samples were rejected.
        """
        listed = target.with_name(f"{target.name}.rejected.jsonl")
        lines = [
            json.dumps({k: v for k, v in asdict(r).items() if k != "split"}) + "\n"
            for r in self._rejected
        ]
        if lines:
            listed.write_text("".join(lines))
        else:
            listed.unlink(missing_ok=True)
        if not self._predicted:
            first = self._rejected[0]
            raise DataError(
                f"all {self._total} samples were rejected; the first is {first.key}: "
                f"{first.reason}; all are listed in {listed}"
            )
        if self._predicted + len(self._rejected) != self._total:
            raise RuntimeError(
                f"{self._total} rows went in, {self._predicted} came out and {len(self._rejected)} "
                "were rejected; the sums must be equal"
            )

    def result(self) -> dict[str, Any]:
        """Flat numbers."""
        accuracies = {
            f"accuracy{name}": self._hits[name] / count
            for name, count in self._labelled.items()
            if count
        }
        counts = {"rows": self._total, "predicted": self._predicted}
        first = {f"rejected/{r.key}": r.reason for r in self._rejected[:SHOWN]}
        return {
            **counts,
            "rejected": len(self._rejected),
            **first,
            "conflicts": self._conflicts,
            "labelled": self._labelled[""],
            **accuracies,
        }

"""A sweep in MLflow: its run, and one inside it for every trial."""

import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.schema import Manifest
from service import study, tracking
from service.config import RunConfig
from service.environment import environment
from service.files import REPORT_NAME
from service.record import Entry, sweep_folder
from service.study import OBJECTIVE

log = logging.getLogger(__name__)


class SweepRuns:
    """The MLflow runs of a sweep; what MLflow does not have yet is in their folders.

    Attributes:
        uri: of the store.
    """

    def __init__(self, config: RunConfig, manifest: Manifest):
        self._config = config
        self._manifest = manifest
        storage = Path(config.storage)
        self.uri = tracking.tracking_uri(storage, environment()["MLFLOW_TRACKING_URI"])
        self._folder = sweep_folder(config)
        self._logger: tracking.RunLogger | None = None

    @property
    def run_id(self) -> str:
        """MLflow's id of the sweep's own run; empty until MLflow has made it."""
        return tracking.run_id(self._folder)

    def open(self, run_id: str | None) -> None:
        """Open the run of the sweep, a new one for None.

        Raises:
            ConfigError: the store cannot be used.
        """
        search = self._config.search.model_dump(mode="json")
        params = {"search": search, **self._config.resolved()}
        if page := tracking.run_page(self.uri, self._open(self._folder, params, {}, run_id)):
            log.info("MLflow: %s", page)
        self._logger = tracking.RunLogger(self.uri, self._folder)

    def open_trial(self, entry: Entry, config: RunConfig, run_id: str | None) -> str:
        """Open a trial's run, a new one for None; returns its id."""
        tags = {
            "trial": str(entry.number),
            "state": "running",
            "run_folder": f"{config.storage}/{config.name}",
        }
        if entry.reseed:
            tags["reseed"] = str(entry.reseed)
        return self._open(self._folder / entry.name, config.resolved(), tags, run_id)

    def _open(
        self, folder: Path, params: dict[str, Any], tags: dict[str, str], run_id: str | None
    ) -> str:
        manifest = self._manifest
        return tracking.open_run(
            self.uri,
            folder,
            Path(self._config.storage),
            self._config.experiment,
            folder.name,
            params=params,
            tags={
                "method": self._config.method,
                "data": manifest.name,
                "data_digest": manifest.digest,
                "split": manifest.split_rule,
                "sweep": self._config.name or "",
                **tags,
            },
            dataset=tracking.DatasetInfo(manifest.name, manifest.digest, manifest.rows("train")),
            run_id=run_id or None,
            parent=self._folder if folder != self._folder else None,
        )

    def settle(self) -> None:
        """Send what the sweep's run still has, so that the ends of trials find it."""
        assert self._logger
        self._logger.close()

    def new_generation(self, entry: Entry) -> None:
        """Note from which trial one goes on."""
        donor = f"from trial {entry.donor}: {study.flat_values(entry.values)}"
        tags = {f"generation/{entry.generation}": donor}
        tracking.set_tags(self.uri, self._folder / entry.name, tags)

    def log_best(self, score: float, ended: int) -> None:
        """Log the best score after so many trials."""
        if self._logger:
            self._logger.log({f"best/{OBJECTIVE}": score}, step=ended, seconds=time.time())

    def end_trial(
        self, entry: Entry, status: tracking.Status, metrics: Mapping[str, float]
    ) -> None:
        """End a trial's run, with its state as a tag."""
        reached = {"trial_seconds": entry.seconds}
        if entry.score is not None:
            reached[f"best/{OBJECTIVE}"] = entry.score
        state = f"{entry.state}: {entry.reason}" if entry.reason else entry.state
        tracking.set_tags(self.uri, self._folder / entry.name, {"state": state[:500]})
        tracking.finish_run(
            self.uri,
            self._folder / entry.name,
            status,
            metrics=reached | {k: v for k, v in metrics.items() if not k.startswith("val/")},
            figures=dict,
            artifacts={},
            patience=0.0,
        )

    def mark(self, best: Entry, entries: Iterable[Entry]) -> None:
        """Mark the best trial, and name it in the sweep's run."""
        for entry in entries:
            is_best = {"best": "true" if entry is best else "false"}
            tracking.set_tags(self.uri, self._folder / entry.name, is_best)
        values = study.flat_values(best.values)
        note = f"Best: **{best.name}**, {OBJECTIVE} {best.score or 0.0:.4f}, {values}. Figures and"
        tags = {
            "best_trial": best.name,
            "mlflow.note.content": f"{note} tables: `{REPORT_NAME}` among the artifacts.",
            **{f"best/{name}": str(value) for name, value in best.values.items()},
        }
        tracking.set_tags(self.uri, self._folder, tags)

    def close(
        self, status: tracking.Status, result: Mapping[str, Any], artifacts: dict[str, Path | str]
    ) -> None:
        """End the sweep's run."""
        numbers = {k: v for k, v in result.items() if isinstance(v, int | float)}
        tracking.finish_run(
            self.uri, self._folder, status, metrics=numbers, figures=dict, artifacts=artifacts
        )

"""The driver's half of a sweep: what it asks of its trials, its MLflow runs, and what it leaves.
See service/record.py for its files.
"""

import json
import logging
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from data.folder import Folder
from data.schema import Manifest
from service import population, study
from service.capacity import trial_scaling
from service.config import ConfigError, RunConfig, RunError, config_yaml, with_values
from service.files import (
    ATTEMPT_NAME,
    BEST_NAME,
    CONFIG_NAME,
    PAYLOAD_NAME,
    REPORT_NAME,
    RESULT_NAME,
    RUN_NAME,
    SWEEP_NAME,
    TRIALS_NAME,
    append_line,
    read_history,
    read_json,
    write_text,
)
from service.launch import base_payload, checkpoint_store, checkpoints_uri
from service.record import Entry, Record, is_complete, summary, sweep_folder, sweep_table
from service.redaction import redact
from service.search import Value
from service.study import OBJECTIVE
from service.sweep_page import page
from service.sweep_runs import SweepRuns
from service.tracking import for_workers

log = logging.getLogger(__name__)

# A suggestion looks at trials this many times the number of trials at a time before it.
LAG_PER_SLOT = 2


class Sweep:
    """The driver's half of a sweep; Ray Tune asks it what to do. See `service/tuner.py`.

    Args:
        config: from `resolve`, with the sweep's name.
        slots: trials at a time.
        on_gpu: whether each has a GPU.
    """

    def __init__(
        self,
        config: RunConfig,
        manifest: Manifest,
        data_folder: Folder,
        *,
        slots: int,
        on_gpu: bool,
    ):
        self.config = config
        self.stopping = False
        self._manifest = manifest
        self._data_folder = data_folder
        self._folder = sweep_folder(config)
        self.slots = slots
        self.on_gpu = on_gpu
        self._attempt = uuid.uuid4().hex
        self._runs = SweepRuns(config, manifest)
        self.record = Record(self._folder)
        begun = (entry for entry in self.record.all() if entry.state == "running")
        self._waiting = [entry for entry in begun if not entry.paused]
        self._running: dict[str, Entry] = {}
        self._lag = self.record.fixed.get("lag", LAG_PER_SLOT * slots)

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return self._folder

    @property
    def num_trials(self) -> int:
        """Trials of the whole sweep."""
        return study.num_trials(self.config.search)

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to run."""
        return is_complete(self.config, self.record)

    def open(self, began: float) -> None:
        """Begin or continue; opens the MLflow run of the sweep.

        Args:
            began: when the command began, since 1970.

        Raises:
            ConfigError: the MLflow store cannot be used, or the data has changed.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        digest, fixed = self._manifest.digest, self.record.fixed
        if fixed.get("data_digest", digest) != digest:
            raise ConfigError(
                f"sweep {self.config.name} was begun on data with digest "
                f"{fixed['data_digest'][:12]}, {self._data_folder} now has {digest[:12]}; take "
                "another --name, or restore the data"
            )
        self._runs.open(fixed.get("mlflow_run_id"))
        self.record.fixed = fixed or {
            "lag": self._lag,
            "mlflow_run_id": self._runs.run_id,
            "data_digest": digest,
            "data_folder": str(self._data_folder),
        }
        values = self.config.model_dump(mode="json")
        write_text(self._folder / CONFIG_NAME, yaml.safe_dump(values, sort_keys=False))
        write_text(self._folder / SWEEP_NAME, json.dumps(self.record.fixed, indent=2) + "\n")
        events = read_history(self._folder / TRIALS_NAME)  # a last line that was cut off goes
        text = "".join(json.dumps(event, sort_keys=True) + "\n" for event in events)
        write_text(self._folder / TRIALS_NAME, text)
        self._write({"event": "session", "slots": self.slots, "trials": self.num_trials}, began)
        for entry in list(self._waiting):  # the last command was lost before it could end it
            if entry.scores and self._prune(entry):
                self._waiting.remove(entry)

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Write what the sweep leaves, and end its MLflow run."""
        self._runs.settle()
        for entry in self.record.all():
            if entry.state == "running":
                self._runs.end_trial(entry, "KILLED", {})
        names = [CONFIG_NAME, REPORT_NAME, RESULT_NAME, TRIALS_NAME]
        if best := study.best(self.record.entries):
            write_text(self._folder / BEST_NAME, self._best_yaml(best))
            names.append(BEST_NAME)
            self._runs.mark(best, self.record.all())
        result = self.result()
        write_text(self._folder / REPORT_NAME, page(self.config.search, self.record, result))
        text = json.dumps(result, indent=2, sort_keys=True) + "\n"
        write_text(self._folder / RESULT_NAME, text)
        self._runs.close(status, result, {name: self._folder / name for name in names})

    def next(self) -> tuple[str, Path] | Literal["wait", "done"]:
        """Name and folder of the trial to start now."""
        if self.stopping:
            return "done"
        if not self._waiting:
            self._find()
        if self._waiting:
            entry = self._waiting.pop(0)
            return entry.name, self._prepare(entry)
        return "done" if self.is_complete else "wait"

    def _find(self) -> None:
        """Put on the waiting list what can begin now."""
        search, record = self.config.search, self.record
        entries, number = record.entries, len(record.entries)
        if number < self.num_trials:
            # A population begins at once: no trial looks at another.
            lag = number + 1 if search.scheduler == "pbt" else self._lag
            seen = study.visible(entries, number, lag)
            if all(entry.state != "running" for entry in seen):
                if number >= self._lag:
                    self.check_hope()
                self._begin(number, study.suggest(search, number, entries, lag), 0)
        elif record.num_ended < number:
            alive = [entry for entry in entries if entry.state == "running"]
            if all(entry.paused for entry in alive):
                self._advance(alive)
        elif due := record.due_reseeds(search.num_reseeds):
            entry, reseed = due[0]
            self._begin(entry.number, entry.values, reseed)

    def _begin(self, number: int, values: Mapping[str, Value], reseed: int) -> None:
        entry = Entry(number, dict(values), reseed=reseed)
        run_id = self._runs.open_trial(entry, self._trial_config(entry), None)
        self._write(
            {
                "event": "begin",
                "number": number,
                "reseed": reseed,
                "values": values,
                "run_id": run_id,
            }
        )
        self._waiting.append(self.record.named(entry.name))

    def _advance(self, alive: list[Entry]) -> None:
        """Begin the next generation of a population."""
        generation = alive[0].generation + 1
        members = population.next_generation(self.config.search, generation, alive)
        values = {str(number): member._asdict() for number, member in members.items()}
        self._write({"event": "generation", "generation": generation, "members": values})
        self._waiting += alive
        for entry in alive:
            if entry.donor != entry.number:
                log.info(
                    "trial %d goes on from trial %d (%s), generation %d",
                    *(entry.number, entry.donor, study.flat_values(entry.values), generation),
                )
                self._runs.new_generation(entry)
        shutil.rmtree(self._generations / str(generation - 2), ignore_errors=True)

    @property
    def _generations(self) -> Path:
        return self._folder / "generations"

    def check_hope(self) -> None:
        """Raise a RunError if all trials so far have failed."""
        entries = self.record.entries
        if entries and all(entry.state == "failed" for entry in entries):
            raise RunError(
                f"all {len(entries)} trials so far failed, so the sweep stops; the first of them: "
                f"{entries[0].reason}; --debug shows the whole trace; settings that need more "
                "memory or time than there is want a smaller search.space"
            )

    def _prepare(self, entry: Entry) -> Path:
        """Write what the trial's process needs."""
        config = self._trial_config(entry)
        folder = self._folder / entry.name
        folder.mkdir(exist_ok=True)
        if (folder / RUN_NAME).exists():  # it goes on
            self._runs.open_trial(entry, config, entry.run_id)
        about = {
            "mlflow_run_id": entry.run_id,
            "mlflow_uri": redact(self._runs.uri),
            "data_folder": str(self._data_folder),
            "data_digest": self._manifest.digest,
        }
        payload = base_payload(config, self._manifest, self._data_folder) | {
            "run_folder": str(folder),
            "tracking": for_workers(self._runs.uri),
            "attempt": self._attempt,
            "warmups": str(self._folder / "warmups") if config.search.share_warmup else None,
            "generation": self._generation(entry),
            "on_gpu": self.on_gpu,
            "slots": self.slots,
        }
        write_text(folder / CONFIG_NAME, config_yaml(config))
        write_text(folder / RUN_NAME, json.dumps(about, indent=2) + "\n")
        write_text(folder / PAYLOAD_NAME, json.dumps(payload))
        write_text(folder / ATTEMPT_NAME, self._attempt)
        self._running[entry.name] = entry
        return folder

    def _generation(self, entry: Entry) -> dict[str, Any] | None:
        """What a trial has to know of its generation."""
        if self.config.search.scheduler != "pbt":
            return None
        epochs = self.config.search.grace_epochs
        donor = f"{self._generations}/{entry.generation - 1}/{entry.donor}"
        return {
            "number": entry.generation,
            "from": donor if entry.donor != entry.number else None,
            "to": f"{self._generations}/{entry.generation}/{entry.number}",
            "since": epochs * entry.generation,
            "until": epochs * (entry.generation + 1),
        }

    def _trial_config(self, entry: Entry) -> RunConfig:
        config = with_values(self.config, entry.values)
        kept = config.checkpoint.storage and checkpoints_uri(self.config)
        checkpoint = config.checkpoint.model_copy(update={"keep": 1, "storage": kept})
        return config.model_copy(
            update={
                "name": entry.name,
                "storage": str(self._folder),
                "checkpoint": checkpoint,
                "scaling": trial_scaling(config),
                "train": config.train.model_copy(update={"seed": config.train.seed + entry.reseed}),
            }
        )

    def report(self, name: str, report: Mapping[str, Any]) -> bool:
        """Take in a trial's report; returns whether the scheduler ends the trial."""
        entry = self.record.named(name)
        known = ("main_epochs", "score", "began", "seconds", "setup_seconds")
        known += ("forked_epochs", "forked_seconds")
        values = {name: report[name] for name in known if name in report}
        event = "pause" if report.get("end") == "paused" else "score"
        self._write({"event": event, "trial": name, **values})
        if "end" in report:
            self._take_end(entry, report)
            return False
        return self._prune(entry)

    def _prune(self, entry: Entry) -> bool:
        """End a trial after its newest score if it is hopeless; returns whether it is."""
        search = self.config.search
        if entry.reseed or not study.is_hopeless(search, entry, self.record.entries, self._lag):
            return False
        reason = f"{search.scheduler} after main-phase epoch {entry.epochs}"
        self._end(entry, "pruned", reason, {})
        return True

    def _take_end(self, entry: Entry, report: Mapping[str, Any]) -> None:
        end, reason = report["end"], report.get("reason", "")
        if end == "paused":
            self._running.pop(entry.name, None)
        elif end == "stopped":
            self._running.pop(entry.name, None)
            self._runs.end_trial(entry, "KILLED", {})
        elif end == "complete":
            self._leave_result(entry, report)
            self._end(entry, "complete", "", report["metrics"])
        else:
            self._end(entry, end, reason, {})

    def lost(self, name: str, reason: str) -> None:
        """A trial's process has failed more often than is allowed."""
        if name in self._running:
            self._end(self._running[name], "failed", reason, {})

    def _end(
        self,
        entry: Entry,
        state: study.State,
        reason: str,
        metrics: Mapping[str, float],
    ) -> None:
        self._running.pop(entry.name, None)
        event = {"event": "end", "trial": entry.name, "state": state, "reason": reason}
        self._write(event)
        self._remove_checkpoints(entry)
        self._runs.end_trial(entry, "FAILED" if state == "failed" else "FINISHED", metrics)
        number = self.record.num_ended
        best = study.best(self.record.entries)
        if best and not entry.reseed:
            self._runs.log_best(best.score or 0.0, number)
        score = "" if entry.score is None else f", {OBJECTIVE} {entry.score:.4f}"
        values = study.flat_values(entry.values)
        log.info(
            "%s %s%s (%s), %d of %d ended",
            entry.name, reason and f"{state}: {reason}" or state, score, values,
            number, self.num_trials,
        )  # fmt: skip

    def _leave_result(self, entry: Entry, report: Mapping[str, Any]) -> None:
        folder = self._folder / entry.name
        result = {
            **report["metrics"],
            **{k: report[k] for k in ("checkpoint", "precision", "order_chain", "loss_chain")},
            "name": folder.name,
            "method": self.config.method,
            "data_digest": self._manifest.digest,
            "split": self._manifest.split_rule,
        }
        write_text(folder / RESULT_NAME, json.dumps(result, indent=2, sort_keys=True) + "\n")

    def _remove_checkpoints(self, entry: Entry) -> None:
        """Leave a finished trial its best checkpoint, others none."""
        store = checkpoint_store(self._trial_config(entry))
        folder = self._folder / entry.name
        kept = (read_json(folder / RESULT_NAME) or {}).get("checkpoint")
        try:
            for name in store.folders():
                if name != kept:
                    store.remove(name)
        except OSError as error:
            log.warning("checkpoints of %s could not be removed: %s", entry.name, error)

    def ask_to_stop(self) -> None:
        """Have the trials that run save and end; no other starts."""
        self.stopping = True
        for name in self._running:
            write_text(self._folder / name / ATTEMPT_NAME, "")

    def progress(self) -> dict[str, Any]:
        """What a person wants to see while it runs; see `sweep_table`."""
        return sweep_table(self.config, self.record, self._folder)

    def result(self) -> dict[str, Any]:
        """Flat summary of the sweep so far."""
        return summary(self.config, self.record, self._folder) | {
            "mlflow_run_id": self._runs.run_id,
            "mlflow_uri": redact(self._runs.uri),
        }

    def _best_yaml(self, best: Entry) -> str:
        config = with_values(self.config, best.values).model_copy(update={"name": None})
        lines = [
            f"Best of sweep {self.config.name}: {best.name}, {OBJECTIVE} {best.score or 0.0:.4f}",
            study.flat_values(best.values),
        ]
        if self.config.search.scheduler == "pbt":
            lines.append("These are its last settings; trials.jsonl has those on its way there.")
        lines.append(f"Command: midas train {self._folder / BEST_NAME}")
        header = "".join(f"# {line}\n" for line in lines)
        return header + config_yaml(config)

    def _write(self, event: dict[str, Any], at: float | None = None) -> None:
        event["time"] = at or time.time()
        append_line(self._folder / TRIALS_NAME, json.dumps(event, sort_keys=True))
        self.record.take(event)

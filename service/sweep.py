"""A sweep: its record, what it asks of its trials, its MLflow runs, and what it leaves.

<storage>/<name>/config.yaml     the config, with its search block
                 sweep.json      what stays as it was at the beginning
                 trials.jsonl    the record: a line per event, from which all else follows
                 trial-0000/     a run folder per trial
                 warmups/        see service/warmup.py
                 best.yaml       for `midas train`
                 report.html     figures and table
                 result.json     the last summary
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from data.folder import Folder
from data.schema import Manifest
from service import study, tracking
from service.cluster import RunError
from service.config import ConfigError, RunConfig, config_yaml, difference, with_values
from service.environment import environment
from service.files import (
    ATTEMPT_NAME,
    BEST_NAME,
    CONFIG_NAME,
    PAYLOAD_NAME,
    PROGRESS_NAME,
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
from service.launch import FREE, base_payload, checkpoint_store, checkpoints_uri
from service.search import Value
from service.study import OBJECTIVE, Trial

log = logging.getLogger(__name__)

# A suggestion looks at trials this many times the number of trials at a time before it.
LAG_PER_SLOT = 2
# Settings that may change when a sweep is continued.
FREE_SEARCH = ("trials", "hours", "concurrent", "share_warmup")


@dataclass
class Entry(Trial):
    """A trial and what it took.

    Attributes:
        run_id: of its MLflow run.
        seconds: spent training, over all its attempts.
        setup_seconds: spent before training, in its process.
        began: time of its first report's process start; 0 before.
        forked_epochs, forked_seconds: of the warm-up that it took over.
        reason: why it ended early.
        epochs: main-phase epochs done.
    """

    run_id: str = ""
    seconds: float = 0.0
    setup_seconds: float = 0.0
    began: float = 0.0
    forked_epochs: int = 0
    forked_seconds: float = 0.0
    reason: str = ""

    @property
    def epochs(self) -> int:
        return max(self.scores, default=0)


class Record:
    """The record of a sweep, read from its folder."""

    def __init__(self, folder: Path):
        self.entries: list[Entry] = []
        self.fixed: dict[str, Any] = read_json(folder / SWEEP_NAME) or {}
        self.sessions: list[dict[str, Any]] = []
        for event in read_history(folder / TRIALS_NAME):
            self.take(event)

    def take(self, event: Mapping[str, Any]) -> None:
        """Take in one event."""
        kind = event["event"]
        if kind == "session":
            self.sessions.append({**event, "last": event["time"]})
            return
        self.sessions[-1]["last"] = event["time"]
        if kind == "begin":
            self.entries.append(Entry(event["trial"], event["values"], run_id=event["run_id"]))
            return
        entry = self.entries[event["trial"]]
        if "score" in event:
            entry.scores[event["main_epochs"]] = event["score"]
        entry.seconds += event.get("seconds", 0.0)
        entry.setup_seconds += event.get("setup_seconds", 0.0)
        entry.began = entry.began or event.get("began", 0.0)
        if event.get("forked_epochs"):
            entry.forked_epochs = event["forked_epochs"]
            entry.forked_seconds = event["forked_seconds"]
        if kind == "end":
            entry.state, entry.reason = event["state"], event.get("reason", "")

    @property
    def wall_seconds(self) -> float:
        """Time of all sessions."""
        return sum(session["last"] - session["time"] for session in self.sessions)


def is_sweep(config: RunConfig) -> bool:
    """Whether there is a sweep of this name."""
    return (sweep_folder(config) / SWEEP_NAME).is_file()


def sweep_folder(config: RunConfig) -> Path:
    """Folder of the sweep; `resolve` names it."""
    assert config.name
    return Path(config.storage) / config.name


def ended_result(config: RunConfig) -> dict[str, Any] | None:
    """The summary of a sweep of which every trial has ended; None if there is something to do."""
    folder = sweep_folder(config)
    ended = sum(entry.state != "running" for entry in Record(folder).entries)
    result = read_json(folder / RESULT_NAME) or {}
    written = result.get("trials_running") == 0 and result.get("trials") == ended
    return result if written and ended >= study.num_trials(config.search) else None


def stored_config(name: str, storage: str) -> RunConfig:
    """The config of a sweep.

    Raises:
        ConfigError: there is no such sweep.
    """
    folder = Path(storage) / name
    if not (folder / SWEEP_NAME).is_file():
        found = sorted(path.parent.name for path in Path(storage).glob(f"*/{SWEEP_NAME}"))
        raise ConfigError(
            f"there is no sweep {name} in {storage}; sweeps there are "
            f"{', '.join(found) or 'none'}; give one of them, or --storage"
        )
    config = RunConfig.model_validate(yaml.safe_load((folder / CONFIG_NAME).read_text()))
    return config.model_copy(update={"storage": str(folder.parent.resolve()), "name": name})


def check_same(config: RunConfig) -> None:
    """A sweep that goes on must have the settings that it began with.

    Raises:
        ConfigError: it has others.
    """
    old = stored_config(config.name or "", config.storage)
    changed = difference(_deciding(old), _deciding(config))
    if changed:
        raise ConfigError(
            f"sweep {config.name} exists in {config.storage} with other settings "
            f"({'; '.join(changed)}); its trials must be comparable; take another --name, or "
            f"midas tune --resume {config.name}"
        )


def _deciding(config: RunConfig) -> dict[str, Any]:
    values = {k: v for k, v in config.resolved().items() if k not in FREE}
    search = config.search.model_dump(mode="json")
    return values | {"search": {k: v for k, v in search.items() if k not in FREE_SEARCH}}


class Sweep:
    """The driver's half of a sweep; Ray Tune asks it what to do. See `service/tuner.py`.

    Args:
        config: from `resolve`, with the sweep's name.
        slots: trials at a time.
        on_gpu: whether each has a GPU.
        variables: environment of processes on other machines.
    """

    def __init__(
        self,
        config: RunConfig,
        manifest: Manifest,
        data_folder: Folder,
        *,
        slots: int,
        on_gpu: bool,
        variables: Mapping[str, str],
    ):
        self.config = config
        self.stopping = False
        self._manifest = manifest
        self._data_folder = data_folder
        self._folder = sweep_folder(config)
        self.slots = slots
        self.on_gpu = on_gpu
        self._variables = dict(variables)
        self._attempt = uuid.uuid4().hex
        self._uri = tracking.tracking_uri(
            Path(config.storage), environment()["MLFLOW_TRACKING_URI"]
        )
        self.record = Record(self._folder)
        self._waiting = [e.number for e in self.record.entries if e.state == "running"]
        self._running: set[int] = set()
        self._lag = self.record.fixed.get("lag", LAG_PER_SLOT * slots)
        self._logger: tracking.RunLogger | None = None

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return self._folder

    @property
    def num_trials(self) -> int:
        """Trials of the whole sweep."""
        return study.num_trials(self.config.search)

    @property
    def num_ended(self) -> int:
        """Trials that have ended, in whatever way."""
        return sum(entry.state != "running" for entry in self.record.entries)

    @property
    def is_complete(self) -> bool:
        """Whether every trial has ended."""
        return self.num_ended >= self.num_trials

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
        params = {"search": self.config.search.model_dump(mode="json"), **self.config.resolved()}
        run_id = self._open_run(self.config.name or "", params, {}, fixed.get("mlflow_run_id"))
        self.record.fixed = fixed or {
            "lag": self._lag,
            "mlflow_run_id": run_id,
            "data_digest": digest,
            "data_folder": str(self._data_folder),
        }
        values = self.config.model_dump(mode="json")
        write_text(self._folder / CONFIG_NAME, yaml.safe_dump(values, sort_keys=False))
        write_text(self._folder / SWEEP_NAME, json.dumps(self.record.fixed, indent=2) + "\n")
        events = read_history(self._folder / TRIALS_NAME)  # a last line that was cut off goes
        text = "".join(json.dumps(event, sort_keys=True) + "\n" for event in events)
        write_text(self._folder / TRIALS_NAME, text)
        self._logger = tracking.RunLogger(self._uri, run_id)
        self._write({"event": "session", "slots": self.slots, "trials": self.num_trials}, began)

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Write what the sweep leaves, and end its MLflow run."""
        assert self._logger
        for number in self._running:
            self._end_run(self.record.entries[number], "KILLED", {})
        best = study.best(self.record.entries)
        texts: dict[str, Path | str] = {CONFIG_NAME: self._folder / CONFIG_NAME}
        if best:
            write_text(self._folder / BEST_NAME, self._best_yaml(best))
            texts[BEST_NAME] = self._folder / BEST_NAME
            for entry in self.record.entries:
                is_best = {"best": "true" if entry is best else "false"}
                tracking.set_tags(self._uri, entry.run_id, is_best)
            tags = {"best_trial": f"trial-{best.number:04d}", **_texts(best.values)}
            tracking.set_tags(self._uri, self.record.fixed["mlflow_run_id"], tags)
        page = study.report(self.config.search, self.record.entries)
        write_text(self._folder / REPORT_NAME, page)
        result = self.result()
        text = json.dumps(result, indent=2, sort_keys=True) + "\n"
        write_text(self._folder / RESULT_NAME, text)
        self._logger.close()
        tracking.finish_run(
            self._uri,
            self.record.fixed["mlflow_run_id"],
            status,
            metrics={k: v for k, v in result.items() if isinstance(v, int | float)},
            figures=dict,
            artifacts={
                **texts,
                REPORT_NAME: self._folder / REPORT_NAME,
                RESULT_NAME: self._folder / RESULT_NAME,
                TRIALS_NAME: self._folder / TRIALS_NAME,
            },
        )

    def next(self) -> tuple[int, Path] | Literal["wait", "done"]:
        """Number and folder of the trial to start now."""
        if self.stopping:
            return "done"
        if self._waiting:
            number = self._waiting.pop(0)
            entry = self.record.entries[number]
            return number, self._prepare(entry.number, entry.values, entry.run_id)
        number = len(self.record.entries)
        if number >= self.num_trials:
            return "done"
        entries = self.record.entries
        if any(entry.state == "running" for entry in study.visible(entries, number, self._lag)):
            return "wait"
        if len(entries) >= self._lag:
            self.check_hope()
        values = study.suggest(self.config.search, number, entries, self._lag)
        folder = self._prepare(number, values, None)
        return number, folder

    def check_hope(self) -> None:
        """Raise a RunError if all trials so far have failed."""
        entries = self.record.entries
        if entries and all(entry.state == "failed" for entry in entries):
            raise RunError(
                f"all {len(entries)} trials so far failed, so the sweep stops; the first of them: "
                f"{entries[0].reason}; --debug shows the whole trace; settings that need more "
                "memory or time than there is want a smaller search.space"
            )

    def _prepare(self, number: int, values: Mapping[str, Value], run_id: str | None) -> Path:
        """Open the trial's MLflow run, and write what its process needs."""
        config = self._trial_config(number, values)
        folder = self._folder / str(config.name)
        folder.mkdir(exist_ok=True)
        tags = {
            "mlflow.parentRunId": self.record.fixed["mlflow_run_id"],
            "trial": str(number),
            "state": "running",
            "run_folder": str(folder),
        }
        name = f"{self.config.name}/{config.name}"
        opened = self._open_run(name, config.resolved(), tags, run_id)
        if run_id is None:
            event = {"event": "begin", "trial": number, "values": values, "run_id": opened}
            self._write(event)
        about = {
            "mlflow_run_id": opened,
            "mlflow_uri": self._uri,
            "data_folder": str(self._data_folder),
            "data_digest": self._manifest.digest,
        }
        payload = base_payload(config, self._manifest, self._data_folder) | {
            "run_folder": str(folder),
            "tracking": {"uri": self._uri, "run_id": opened},
            "faults": {"faults": [], "driver": os.getpid()},
            "attempt": self._attempt,
            "warmups": str(self._folder / "warmups") if config.search.share_warmup else None,
            "environment": self._variables,
            "on_gpu": self.on_gpu,
            "slots": self.slots,
        }
        write_text(folder / CONFIG_NAME, config_yaml(config))
        write_text(folder / RUN_NAME, json.dumps(about, indent=2) + "\n")
        write_text(folder / PAYLOAD_NAME, json.dumps(payload))
        write_text(folder / ATTEMPT_NAME, self._attempt)
        self._running.add(number)
        return folder

    def _trial_config(self, number: int, values: Mapping[str, Value]) -> RunConfig:
        config = with_values(self.config, values)
        kept = config.checkpoint.storage and checkpoints_uri(self.config)
        checkpoint = config.checkpoint.model_copy(update={"keep": 1, "storage": kept})
        return config.model_copy(
            update={
                "name": f"trial-{number:04d}",
                "storage": str(self._folder),
                "checkpoint": checkpoint,
                "scaling": config.scaling.model_copy(update={"num_workers": 1}),
            }
        )

    def report(self, number: int, report: Mapping[str, Any]) -> bool:
        """Take in a trial's report; returns whether the scheduler ends the trial."""
        entry = self.record.entries[number]
        known = ("main_epochs", "score", "began", "seconds", "setup_seconds")
        known += ("forked_epochs", "forked_seconds")
        values = {name: report[name] for name in known if name in report}
        self._write({"event": "score", "trial": number, **values})
        if "end" in report:
            self._take_end(entry, report)
            return False
        search = self.config.search
        if study.is_hopeless(search, entry, self.record.entries, self._lag):
            reason = f"{search.scheduler} after main-phase epoch {entry.epochs}"
            self._end(entry, "pruned", reason, {})
            return True
        return False

    def _take_end(self, entry: Entry, report: Mapping[str, Any]) -> None:
        end, reason = report["end"], report.get("reason", "")
        if end == "stopped":
            self._running.discard(entry.number)
            self._end_run(entry, "KILLED", {})
        elif end == "complete":
            self._leave_result(entry, report)
            self._end(entry, "complete", "", report["metrics"])
        else:
            self._end(entry, end, reason, {})

    def lost(self, number: int, reason: str) -> None:
        """A trial's process has failed more often than is allowed."""
        if number in self._running:
            self._end(self.record.entries[number], "failed", reason, {})

    def _end(
        self,
        entry: Entry,
        state: study.State,
        reason: str,
        metrics: Mapping[str, float],
    ) -> None:
        self._running.discard(entry.number)
        event = {"event": "end", "trial": entry.number, "state": state, "reason": reason}
        self._write(event)
        self._remove_checkpoints(entry)
        self._end_run(entry, "FAILED" if state == "failed" else "FINISHED", metrics)
        number = self.num_ended
        best = study.best(self.record.entries)
        if best and self._logger:
            score = {f"best/{OBJECTIVE}": best.score or 0.0}
            self._logger.log(score, step=number, seconds=time.time())
        score = "" if entry.score is None else f", {OBJECTIVE} {entry.score:.4f}"
        values = study.flat_values(entry.values)
        log.info(
            "trial %d %s%s (%s), %d of %d ended",
            entry.number, reason and f"{state}: {reason}" or state, score, values,
            number, self.num_trials,
        )  # fmt: skip

    def _leave_result(self, entry: Entry, report: Mapping[str, Any]) -> None:
        folder = self._folder / f"trial-{entry.number:04d}"
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
        store = checkpoint_store(self._trial_config(entry.number, entry.values))
        folder = self._folder / f"trial-{entry.number:04d}"
        kept = (read_json(folder / RESULT_NAME) or {}).get("checkpoint")
        try:
            for name in store.folders():
                if name != kept:
                    store.remove(name)
        except OSError as error:
            log.warning("checkpoints of trial %d could not be removed: %s", entry.number, error)

    def ask_to_stop(self) -> None:
        """Have the trials that run save and end; no other starts."""
        self.stopping = True
        for number in self._running:
            write_text(self._folder / f"trial-{number:04d}" / ATTEMPT_NAME, "")

    def progress(self) -> dict[str, Any]:
        """What a person wants to see while it runs; see `sweep_table`."""
        return sweep_table(self.config, self.record, self._folder)

    def result(self) -> dict[str, Any]:
        """Flat summary of the sweep so far."""
        return summary(self.config, self.record, self._folder) | {
            "mlflow_run_id": self.record.fixed["mlflow_run_id"],
            "mlflow_uri": self._uri,
        }

    def _best_yaml(self, best: Trial) -> str:
        config = with_values(self.config, best.values).model_copy(update={"name": None})
        header = (
            f"# Best of sweep {self.config.name}: trial {best.number}, {OBJECTIVE} "
            f"{best.score or 0.0:.4f}\n# {study.flat_values(best.values)}\n"
            f"# Command: midas train {self._folder / BEST_NAME}\n"
        )
        return header + config_yaml(config)

    def _open_run(
        self, name: str, params: dict[str, Any], tags: dict[str, str], run_id: str | None
    ) -> str:
        manifest = self._manifest
        return tracking.open_run(
            self._uri,
            Path(self.config.storage),
            self.config.experiment,
            name,
            params=params,
            tags={
                "method": self.config.method,
                "data": manifest.name,
                "data_digest": manifest.digest,
                "split": manifest.split_rule,
                "sweep": self.config.name or "",
                **tags,
            },
            dataset=tracking.DatasetInfo(manifest.name, manifest.digest, manifest.rows("train")),
            run_id=run_id,
        )

    def _end_run(self, entry: Entry, status: tracking.Status, metrics: Mapping[str, float]) -> None:
        reached = {"trial_seconds": entry.seconds}
        if entry.score is not None:
            reached[f"best/{OBJECTIVE}"] = entry.score
        state = f"{entry.state}: {entry.reason}" if entry.reason else entry.state
        tracking.set_tags(self._uri, entry.run_id, {"state": state[:500]})
        tracking.finish_run(
            self._uri,
            entry.run_id,
            status,
            metrics=reached | {k: v for k, v in metrics.items() if not k.startswith("val/")},
            figures=dict,
            artifacts={},
        )

    def _write(self, event: dict[str, Any], at: float | None = None) -> None:
        event["time"] = at or time.time()
        append_line(self._folder / TRIALS_NAME, json.dumps(event, sort_keys=True))
        self.record.take(event)


def summary(config: RunConfig, record: Record, folder: Path) -> dict[str, Any]:
    """Flat summary of a sweep: what it tried, what is best, and where its time went.

    `trials_finished` have come to an end: they are complete, pruned or diverged. `wall_over_ideal`
    is the time of all sessions over the sum of the trials' training times divided by how many ran
    at a time. `pruned_share` is the part of the ended trials' main-phase epochs that was spared.
    """
    entries, best = record.entries, study.best(record.entries)
    counts = {
        state: sum(entry.state == state for entry in entries)
        for state in ("complete", "pruned", "diverged", "failed", "running")
    }
    slots = record.sessions[-1]["slots"] if record.sessions else 1
    trained = sum(entry.seconds for entry in entries)
    setup = sum(entry.setup_seconds for entry in entries)
    wall = record.wall_seconds
    first = min((entry.began for entry in entries if entry.began), default=None)
    start = max(0.0, first - record.sessions[0]["time"]) if first else 0.0
    planned = {
        entry.number: config.optim.epochs - with_values(config, entry.values).warmup_epochs
        for entry in entries
        if entry.state != "running"
    }
    done = sum(entry.epochs for entry in entries if entry.number in planned)
    result: dict[str, Any] = {
        "name": config.name,
        "folder": str(folder),
        "trials_asked": study.num_trials(config.search),
        "trials": len(entries),
        "trials_finished": counts["complete"] + counts["pruned"] + counts["diverged"],
        **{f"trials_{state}": count for state, count in counts.items()},
        "concurrent": slots,
        "wall_seconds": wall,
        "train_seconds": trained,
        "wall_over_ideal": wall / (trained / slots) if trained else None,
        "overhead/start_seconds": start,
        "overhead/setup_seconds_per_trial": setup / len(entries) if entries else 0.0,
        "overhead/idle_seconds_per_slot": max(0.0, wall - start - (trained + setup) / slots),
        "pruned_share": 1 - done / sum(planned.values()) if planned else 0.0,
        "warmup/forked_trials": sum(entry.forked_epochs > 0 for entry in entries),
        "warmup/saved_seconds": sum(entry.forked_seconds for entry in entries),
    }
    if best:
        result |= {
            f"best/{OBJECTIVE}": best.score,
            "best_trial": best.number,
            "best_config": str(folder / BEST_NAME),
            **{f"best/{name}": value for name, value in best.values.items()},
        }
    return result


def sweep_table(config: RunConfig, record: Record, folder: Path) -> dict[str, Any]:
    """Rows of a sweep's trials, the running ones first and then the best, and when it may end.

    Returns:
        `rows` with trial, state, epochs, score and values; `ended`, `trials`, `best`, and `eta`,
        in seconds, or None while no trial has ended.
    """
    entries, asked = list(record.entries), study.num_trials(config.search)
    ended = [entry for entry in entries if entry.state != "running"]
    order = sorted(entries, key=lambda e: (e.state != "running", -(e.score or 0.0), e.number))
    rows = []
    for entry in order:
        state = entry.state
        if state == "running":
            now = read_json(folder / f"trial-{entry.number:04d}" / PROGRESS_NAME) or {}
            state = f"{now.get('phase', 'start')} {now.get('epoch', -1) + 1}/{config.optim.epochs}"
        score = "" if entry.score is None else f"{entry.score:.4f}"
        values = study.flat_values(entry.values)
        rows.append((str(entry.number), state, str(entry.epochs), score, values))
    eta = None
    if ended:
        mean = sum(entry.seconds + entry.setup_seconds for entry in ended) / len(ended)
        begun = sum(entry.seconds for entry in entries if entry.state == "running")
        left = max(0.0, (asked - len(ended)) * mean - begun)
        eta = left / record.sessions[-1]["slots"]
    best = study.best(entries)
    return {
        "rows": rows,
        "ended": len(ended),
        "trials": asked,
        "best": best.score if best else None,
        "eta": eta,
    }


def _texts(values: Mapping[str, Value]) -> dict[str, str]:
    return {f"best/{name}": str(value) for name, value in values.items()}

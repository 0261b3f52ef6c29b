"""The record of a sweep, from which all else follows, and what it says.

<storage>/<name>/config.yaml    the config, with its search block
                 sweep.json     what stays as it was at the beginning
                 trials.jsonl   the record: a line per event
                 trial-0000/    a run folder per trial; trial-0000-seed1/ with another seed
                 warmups/       see service/warmup.py
                 generations/   see service/population.py
                 best.yaml      for `midas train`
                 report.html    figures and tables
                 result.json    the last summary
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from service import study
from service.config import ConfigError, RunConfig, difference, with_values
from service.files import (
    BEST_NAME,
    CONFIG_NAME,
    PROGRESS_NAME,
    RESULT_NAME,
    SWEEP_NAME,
    TRIALS_NAME,
    read_history,
    read_json,
)
from service.launch import FREE
from service.study import OBJECTIVE, Trial

# Settings that may change when a sweep is continued.
FREE_SEARCH = ("trials", "hours", "concurrent", "share_warmup", "reseeds")
# So many of the best are trained again with other seeds.
TOP = 5


@dataclass
class Entry(Trial):
    """A trial and what it took.

    Attributes:
        reseed: how many seeds after the sweep's own it is trained with; 0 for the search.
        run_id: of its MLflow run.
        seconds: spent training, over all its attempts.
        setup_seconds: spent before training, in its process.
        began: time of its first report's process start; 0 before.
        forked_epochs, forked_seconds: of the warm-up that it took over.
        reason: why it ended early.
        generation: of a population, that it is in.
        donor: trial whose state it took over at the begin of the generation; itself mostly.
        paused: it has come to the end of its generation.
    """

    reseed: int = 0
    run_id: str = ""
    seconds: float = 0.0
    setup_seconds: float = 0.0
    began: float = 0.0
    forked_epochs: int = 0
    forked_seconds: float = 0.0
    reason: str = ""
    generation: int = 0
    donor: int = -1
    paused: bool = False

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"trial-{self.number:04d}" + (f"-seed{self.reseed}" if self.reseed else "")

    @property
    def epochs(self) -> int:
        """Main-phase epochs done."""
        return max(self.scores, default=0)


class Record:
    """The record of a sweep, read from its folder.

    Attributes:
        entries: trials of the search, by number.
        reseeded: the best of them, with other seeds.
        fixed: what stays as it was at the beginning.
        sessions: commands that ran it.
    """

    def __init__(self, folder: Path):
        self.entries: list[Entry] = []
        self.reseeded: list[Entry] = []
        self.fixed: dict[str, Any] = read_json(folder / SWEEP_NAME) or {}
        self.sessions: list[dict[str, Any]] = []
        for event in read_history(folder / TRIALS_NAME):
            self.take(event)

    def all(self) -> Iterator[Entry]:
        """Trials of the search, then those with other seeds."""
        yield from self.entries
        yield from self.reseeded

    def named(self, name: str) -> Entry:
        """The entry of this name."""
        return next(entry for entry in self.all() if entry.name == name)

    def take(self, event: Mapping[str, Any]) -> None:
        """Take in one event."""
        kind = event["event"]
        if kind == "session":
            self.sessions.append({**event, "last": event["time"]})
            return
        self.sessions[-1]["last"] = event["time"]
        if kind == "begin":
            self._begin(event)
        elif kind == "generation":
            for number, member in event["members"].items():
                entry = self.entries[int(number)]
                entry.generation, entry.paused = event["generation"], False
                entry.donor, entry.values = member["donor"], member["values"]
        else:
            self._report(self.named(event["trial"]), event)

    def _begin(self, event: Mapping[str, Any]) -> None:
        entry = Entry(
            event["number"], event["values"], reseed=event["reseed"], run_id=event["run_id"]
        )
        entry.donor = entry.number
        (self.reseeded if entry.reseed else self.entries).append(entry)

    def _report(self, entry: Entry, event: Mapping[str, Any]) -> None:
        if "score" in event:
            entry.scores[event["main_epochs"]] = event["score"]
        entry.seconds += event.get("seconds", 0.0)
        entry.setup_seconds += event.get("setup_seconds", 0.0)
        entry.began = entry.began or event.get("began", 0.0)
        if event.get("forked_epochs"):
            entry.forked_epochs = event["forked_epochs"]
            entry.forked_seconds = event["forked_seconds"]
        if event["event"] == "pause":
            entry.paused = True
        if event["event"] == "end":
            entry.state, entry.reason = event["state"], event.get("reason", "")

    @property
    def wall_seconds(self) -> float:
        """Time of all sessions."""
        return sum(session["last"] - session["time"] for session in self.sessions)

    @property
    def num_ended(self) -> int:
        """Trials of the search that have ended, in whatever way."""
        return sum(entry.state != "running" for entry in self.entries)

    def top(self) -> list[Entry]:
        """The best complete trials of the search, best first."""
        found = [entry for entry in self.entries if entry.state == "complete"]
        return sorted(found, key=lambda entry: (-(entry.score or 0.0), entry.number))[:TOP]

    def due_reseeds(self, count: int) -> list[tuple[Entry, int]]:
        """Trials that are to be trained with other seeds, and which of `count`, and are not."""
        there = {(entry.number, entry.reseed) for entry in self.reseeded}
        wanted = [(entry, reseed) for reseed in range(1, count + 1) for entry in self.top()]
        return [(entry, reseed) for entry, reseed in wanted if (entry.number, reseed) not in there]

    def over_seeds(self) -> list[tuple[Entry, list[float]]]:
        """The best, and their scores over seeds, that of the search first."""
        return [
            (
                entry,
                [entry.score or 0.0]
                + [e.score for e in self.reseeded if e.number == entry.number and e.score],
            )
            for entry in self.top()
        ]


def sweep_folder(config: RunConfig) -> Path:
    """Folder of the sweep; `resolve` names it."""
    assert config.name
    return Path(config.storage) / config.name


def is_sweep(config: RunConfig) -> bool:
    """Whether there is a sweep of this name."""
    return (sweep_folder(config) / SWEEP_NAME).is_file()


def is_complete(config: RunConfig, record: Record) -> bool:
    """Whether there is nothing left to run."""
    if record.num_ended < study.num_trials(config.search):
        return False
    running = any(entry.state == "running" for entry in record.reseeded)
    return not running and not record.due_reseeds(config.search.num_reseeds)


def ended_result(config: RunConfig) -> dict[str, Any] | None:
    """The summary of a sweep that is complete; None if there is something to do."""
    folder = sweep_folder(config)
    record, result = Record(folder), read_json(folder / RESULT_NAME) or {}
    written = result.get("trials") == len(record.entries) and result.get("trials_reseeded") == len(
        record.reseeded
    )
    return result if written and is_complete(config, record) else None


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
    if config.search.scheduler == "pbt" and config.search.trials != old.search.trials:
        changed.append(f"search.trials: {old.search.trials} -> {config.search.trials}")
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


def summary(config: RunConfig, record: Record, folder: Path) -> dict[str, Any]:
    """Flat summary of a sweep: what it tried, what is best, and where its time went.

    `trials_finished` have come to an end: they are complete, pruned or diverged. `wall_over_ideal`
    is the time of all sessions over the sum of all training times divided by how many ran at a
    time. `pruned_share` is the part of the ended trials' main-phase epochs that was spared. `top/`
    is about the best trials over seeds.
    """
    entries, best = record.entries, study.best(record.entries)
    counts = {
        state: sum(entry.state == state for entry in entries)
        for state in ("complete", "pruned", "diverged", "failed", "running")
    }
    slots = record.sessions[-1]["slots"] if record.sessions else 1
    trained = sum(entry.seconds for entry in record.all())
    setup = sum(entry.setup_seconds for entry in record.all())
    wall = record.wall_seconds
    first = min((entry.began for entry in entries if entry.began), default=None)
    start = max(0.0, first - record.sessions[0]["time"]) if first else 0.0
    planned = {
        entry.number: config.optim.epochs - with_values(config, entry.values).warmup_epochs
        for entry in entries
        if entry.state != "running"
    }
    done = sum(entry.epochs for entry in entries if entry.number in planned)
    count = len(entries) + len(record.reseeded)
    result: dict[str, Any] = {
        "name": config.name,
        "folder": str(folder),
        "trials_asked": study.num_trials(config.search),
        "trials": len(entries),
        "trials_finished": counts["complete"] + counts["pruned"] + counts["diverged"],
        **{f"trials_{state}": number for state, number in counts.items()},
        "trials_reseeded": len(record.reseeded),
        "concurrent": slots,
        "wall_seconds": wall,
        "train_seconds": trained,
        "wall_over_ideal": wall / (trained / slots) if trained else None,
        "overhead/start_seconds": start,
        "overhead/setup_seconds_per_trial": setup / count if count else 0.0,
        "overhead/idle_seconds_per_slot": max(0.0, wall - start - (trained + setup) / slots),
        "pruned_share": 1 - done / sum(planned.values()) if planned else 0.0,
        "warmup/forked_trials": sum(entry.forked_epochs > 0 for entry in record.all()),
        "warmup/saved_seconds": sum(entry.forked_seconds for entry in record.all()),
    }
    if best:
        result |= {
            f"best/{OBJECTIVE}": best.score,
            "best_trial": best.number,
            "best_config": str(folder / BEST_NAME),
            **{f"best/{name}": value for name, value in best.values.items()},
        }
    spreads = [scores for _, scores in record.over_seeds() if len(scores) > 1]
    if spreads:
        result |= {
            "top/seeds": max(map(len, spreads)),
            "top/best_mean": mean(spreads[0]),
            "top/best_of_means": max(map(mean, spreads)),
            "top/std_over_seeds": mean(map(stdev, spreads)),
        }
    return result


def sweep_table(config: RunConfig, record: Record, folder: Path) -> dict[str, Any]:
    """Rows of a sweep's trials, the running ones first and then the best, and when it may end.

    Returns:
        `rows` with trial, state, epochs, score and values; `ended`, `trials`, `best`, and `eta`,
        in seconds, or None while no trial has ended.
    """
    entries = list(record.all())
    ended = [entry for entry in entries if entry.state != "running"]
    order = sorted(entries, key=lambda e: (e.state != "running", -(e.score or 0.0), e.number))
    rows = []
    for entry in order:
        state = "paused" if entry.paused and entry.state == "running" else entry.state
        if state == "running":
            now = read_json(folder / entry.name / PROGRESS_NAME) or {}
            state = f"{now.get('phase', 'start')} {now.get('epoch', -1) + 1}/{config.optim.epochs}"
        score = "" if entry.score is None else f"{entry.score:.4f}"
        values = study.flat_values(entry.values)
        rows.append((entry.name, state, str(entry.epochs), score, values))
    asked = study.num_trials(config.search)
    reseeds = config.search.num_reseeds * min(TOP, asked)
    eta = None
    if ended:
        each = sum(entry.seconds + entry.setup_seconds for entry in ended) / len(ended)
        begun = sum(entry.seconds for entry in entries if entry.state == "running")
        left = max(0.0, (asked + reseeds - len(ended)) * each - begun)
        eta = left / record.sessions[-1]["slots"]
    best = study.best(record.entries)
    return {
        "rows": rows,
        "ended": record.num_ended,
        "trials": asked,
        "best": best.score if best else None,
        "eta": eta,
    }

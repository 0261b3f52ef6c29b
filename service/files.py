"""The files of a run folder, by name, and how they are written: whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.yaml"
RESULT_NAME = "result.json"
RUN_NAME = "run.json"
PROGRESS_NAME = "progress.json"
HISTORY_NAME = "history.jsonl"
# Which attempt at the run may go on: its id, or nothing when it is to stop.
ATTEMPT_NAME = "attempt"
PAYLOAD_NAME = "payload.json"
# Of a sweep.
SWEEP_NAME = "sweep.json"
TRIALS_NAME = "trials.jsonl"
BEST_NAME = "best.yaml"
REPORT_NAME = "report.html"
FAULTS_NAME = "faults"
CHECKPOINTS_NAME = "checkpoints"

TRAINING_PHASES = ("warm-up", "main")
VALIDATION_PHASE = "validate"


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else None


def write_text(path: Path, text: str) -> None:
    """Replace a file's content; readers see the old content or the new, never a part."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    os.replace(part, path)


def read_history(path: Path) -> list[dict[str, float]]:
    """Rows of a history file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def append_line(path: Path, line: str) -> None:
    """Add a line that outlives a power cut."""
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())

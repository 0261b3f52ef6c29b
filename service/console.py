"""What a person sees: progress while a run trains, results at its end, errors, one JSON line.

This file and `service/__main__.py` are the only ones that write to the terminal. Progress, logs
and errors go to stderr. Results go to stdout, or to stderr in JSON mode, where stdout holds one
line of JSON and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

import rich.console
import rich.progress
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from service.redaction import RedactedStream, redact
from service.tracking import run_page

if TYPE_CHECKING:
    from data.prepare import PrepareReport
    from service.doctor import Finding
    from service.jobs import Job
    from service.launch import RunOutcome

logger = logging.getLogger(__name__)

LOG_SECONDS = 60.0
POLL_SECONDS = 0.5
# Before this much progress was seen, the start of the first step would dominate an estimate.
MIN_ETA_STEPS = 5
MIN_ETA_SECONDS = 3.0
SPLITS = ("train", "val", "test")
RESULT_ROWS = {
    "accuracy": "accuracy",
    "f1_macro": "macro-F1",
    "head_accuracy": "head accuracy",
    "zero_out_accuracy": "zero-out accuracy",
}

FINDING_MARKS = {"ok": ("ok", "green"), "warn": ("note", "yellow"), "fix": ("FIX", "bold red")}
CHAOS_COLUMNS = ("seconds_to_first_new_step", "steps_replayed")

# "phase", "epoch" (0-based), "num_epochs", "step" (done in this epoch), "steps_per_epoch" and,
# once they are known, "train/loss", "val/accuracy", "alpha" (by modality), "notes" (lines to show).
Progress = Mapping[str, Any]


class Console:
    """The terminal of one command; the streams are arguments for tests.

    Secrets are hidden in all that it writes.
    """

    def __init__(
        self, json_mode: bool, stdout: TextIO | None = None, stderr: TextIO | None = None
    ) -> None:
        self._stdout = cast(TextIO, RedactedStream(stdout or sys.stdout))
        self._stderr = cast(TextIO, RedactedStream(stderr or sys.stderr))
        self.err = rich.console.Console(file=self._stderr, highlight=False)
        self.out = rich.console.Console(file=self._stdout, highlight=False)
        if json_mode:
            self.out = self.err

    def setup_logging(self) -> None:
        """Sends warnings of everyone, and news of this project, to stderr; once per command."""
        root = logging.getLogger()
        for old in [handler for handler in root.handlers if isinstance(handler, _LogHandler)]:
            root.removeHandler(old)
        root.addHandler(_LogHandler(self.err))
        for room in ("service", "training", "data"):
            logging.getLogger(room).setLevel(logging.INFO)

    def status(self, text: str) -> None:
        """Says what happens now."""
        self.err.print(Text(text, "dim"), soft_wrap=True)

    @contextlib.contextmanager
    def counter(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """Yields a function to call with (done, total); nothing shows before its first call."""
        if not self.err.is_terminal:
            yield _LoggedCounter(label)
            return
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            _RateColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=self.err, transient=True) as bar:
            task = bar.add_task(label, visible=False)
            yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)

    def progress(self, read: Callable[[], Progress | None]) -> ProgressView:
        """The view of a running training, for a `with` block."""
        return ProgressView(self, read)

    def plan(self, plan: Mapping[str, Any]) -> None:
        """Prints the plan of a run."""
        self.out.print(_two_columns((key, str(value)) for key, value in plan.items()))

    def prepared(self, report: PrepareReport) -> None:
        """Prints what preparing data did, and the first reasons for leaving samples out."""
        text = f"{report.written} of {report.read} samples written in {_clock(report.seconds)}"
        if report.reused:
            text = "already prepared, every shard verified"
        self.out.print(Text(f"{report.manifest.name}: {text}"))
        self.out.print(Text(f"  split: {report.manifest.split_rule}"))
        for m in report.manifest.modalities:
            size = " x ".join(map(str, m.shape))
            self.out.print(Text(f"  {m.name}: {m.kind}, {m.dtype} {size} {m.about}".rstrip()))
        for rejection in report.rejected[:5]:
            line = f"  left out {rejection.key}: {rejection.reason}"
            self.out.print(Text(line), soft_wrap=True)
        if len(report.rejected) > 5:
            self.out.print(Text(f"  and {len(report.rejected) - 5} more, see rejected.jsonl"))
        for line in report.findings:
            self.out.print(Text(f"  {line}"), soft_wrap=True)
        card = f"{report.folder}/card.html"
        self._places({"folder": str(report.folder), "data card": card})

    def bench(self, result: Mapping[str, Any]) -> None:
        """Prints what was measured, and what limits it."""
        spread = {name for name in result if f"{name}_min" in result}
        ends = {f"{name}_{end}" for name in spread for end in ("min", "max")}
        rows = []
        for name, value in result.items():
            text = f"{value:,.4g}" if isinstance(value, float) else str(value)
            if name in spread:
                text += f"  ({result[f'{name}_min']:,.4g} to {result[f'{name}_max']:,.4g})"
            if name != "limit" and name not in ends:
                rows.append((name.replace("_", " "), text))
        self.out.print(_two_columns(rows))
        self.out.print(Text(f"limited by {result['limit']}"), soft_wrap=True)

    def sweep(self, result: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Prints a sweep: its trials, and its numbers.

        Args:
            result: see `record.summary`.
            found: see `record.sweep_table`.
        """
        self.out.print(self._sweep_table(found, len(found["rows"])))
        numbers = {k: v for k, v in result.items() if v is not None}
        self.out.print(
            _two_columns(
                (name, f"{value:,.4g}" if isinstance(value, float) else str(value))
                for name, value in numbers.items()
            )
        )

    @contextlib.contextmanager
    def sweep_view(self, read: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """A live table of a sweep's trials on a terminal, for as long as the body runs."""
        if not self.err.is_terminal:
            yield
            return
        with Live(
            console=self.err,
            get_renderable=lambda: self._sweep_table(read(), max(4, self.err.height - 4)),
            refresh_per_second=2,
            transient=True,
        ):
            yield

    def _sweep_table(self, found: Mapping[str, Any], most: int) -> Table:
        best = "" if found["best"] is None else f", best {found['best']:.4f}"
        eta = "-:--:--" if found["eta"] is None else _clock(found["eta"])
        title = f"{found['ended']} of {found['trials']} trials ended{best}, eta {eta}"
        table = _new_table("trial", "state", "main epochs", "val/accuracy", "settings")
        table.title, table.title_justify = title, "left"
        for row in found["rows"][:most]:
            table.add_row(*row)
        return table

    def summary(self, outcome: RunOutcome) -> None:
        """Prints the end of a training: its results and where to look."""
        if outcome.finished_before:
            self.status("this run had finished before; nothing was trained")
        uri, folder = outcome.result["mlflow_uri"], outcome.folder
        default_storage = Path("runs").resolve()
        storage = "" if folder.parent == default_storage else f" --storage {folder.parent}"
        tracking = run_page(uri, outcome.result["mlflow_run_id"]) or f"midas ui{storage}"
        evaluate = f"midas evaluate {folder.name} --split val{storage}"
        self.summary_table(outcome.result, folder, tracking, evaluate)

    def summary_table(
        self, result: Mapping[str, Any], run_folder: Path, tracking: str, next_command: str
    ) -> None:
        """Prints the results of a run, where its files and curves are, and what to type next.

        `tracking` is the run's page on the MLflow server, or the command that starts one.
        """
        self.metrics_table(result)
        self.out.print()
        self._places({"run folder": str(run_folder), "MLflow": tracking, "next": next_command})

    def metrics_table(self, result: Mapping[str, Any]) -> None:
        """Prints accuracies and macro-F1, one column per split, and the time it took."""
        cells = _cells(result)
        splits = [split for split in SPLITS if any(split in row for row in cells.values())]
        table = _new_table("", *splits)
        for label, row in cells.items():
            table.add_row(label, *(f"{row[s]:.4f}" if s in row else "" for s in splits))
        self.out.print(table)
        if "seconds" in result:
            split = {"split": result["split"]} if "split" in result else {}
            self._places({"time": _clock(result["seconds"]), **split})

    def comparison(
        self, summary: Mapping[str, float], methods: Sequence[str], num_seeds: int
    ) -> None:
        """Prints test metrics of several methods, one column per method."""
        mean, spread = (
            {method: _cells(_statistic(summary, method, name)) for method in methods}
            for name in ("mean", "std")
        )
        table = _new_table("test", *methods)
        for label in dict.fromkeys(label for rows in mean.values() for label in rows):
            pairs = [
                (mean[m][label]["test"], spread[m][label]["test"]) if label in mean[m] else None
                for m in methods
            ]
            table.add_row(
                label, *(f"{pair[0]:.4f} ± {pair[1]:.4f}" if pair else "" for pair in pairs)
            )
        self.out.print(table)
        self.out.print(Text(f"mean ± sample standard deviation over {num_seeds} runs each", "dim"))

    def verified(self, result: Mapping[str, Any]) -> None:
        """Prints whether steps of a run came out the same again."""
        steps, start = result["verify/steps"], result["verify/from"]
        text = f"{steps} steps taken again from {start} by {result['verify/workers']} workers: "
        if result["verify/equal"]:
            spread = f"{result['verify/max_loss_difference']:.1g}"
            rounding = f"same rows, losses in double precision differ by at most {spread}"
            answer = "equal in every bit" if result["verify/exact"] else f"equal: {rounding}"
            self.out.print(Text.assemble(text, (answer, "bold green")), soft_wrap=True)
            return
        difference = (
            f"step {result['verify/first_difference']} differs in {result['verify/differs_in']}: "
            f"{result['verify/expected']} then, {result['verify/got']} now"
        )
        self.out.print(Text.assemble(text, (difference, "bold red")), soft_wrap=True)

    def chaos(self, report: Mapping[str, Any]) -> None:
        """Prints the card of a run that was broken on purpose."""
        table = _new_table("fault", "recovered", "s to first new step", "steps replayed")
        for key in report:
            head, _, tail = key.rpartition("/")
            if tail == "recovered" and head != "chaos":
                cells = [report.get(f"{head}/{n}") for n in CHAOS_COLUMNS]
                shown = ["" if cell is None else f"{cell:.3g}" for cell in cells]
                answer = "yes" if report[key] else "no"
                table.add_row(head.removeprefix("chaos/"), answer, *shown)
        self.out.print(table)
        spread = report["chaos/max_weight_difference"]
        equal = report["chaos/final_weights_equal"]
        weights = "equal in every bit" if spread == 0 else f"differ by up to {spread}"
        weights = f"equal: {weights}" if equal and spread else weights
        order = "equal" if report["chaos/order_equal"] else "different"
        self._places({"weights": f"{weights} (final, against the unbroken run)", "order": order})

    def findings(self, findings: Sequence[Finding]) -> None:
        """Prints what was found on this machine, one line each, and what to do."""
        for finding in findings:
            mark, style = FINDING_MARKS[finding.state]
            line = Text.assemble((f"{mark:<5}", style), (finding.name, "bold"), "  ", finding.found)
            self.out.print(line, soft_wrap=True)
            if finding.remedy:
                self.out.print(Text(f"     -> {finding.remedy}", style), soft_wrap=True)
        states = [finding.state for finding in findings]
        counts = f"{states.count('fix')} to fix, {states.count('warn')} to know about"
        self.out.print(Text(f"{len(findings)} checks: {counts}", "bold"))

    def submitted(self, job: str, address: str | None) -> None:
        """Prints the id of a job that was submitted, and what to type next."""
        place = f" --address {address}" if address else ""
        self._places(
            {
                "job": job,
                "follow": f"midas logs {job} --follow{place}",
                "stop": f"midas stop {job}{place}",
            }
        )

    def jobs(self, jobs: Sequence[Job]) -> None:
        """Prints the jobs of a cluster, the newest last."""
        table = _new_table("job", "state", "exit code", "submitted", "time")
        table.columns[0].overflow = "fold"  # it is copied into the next command
        for job in jobs:
            since = datetime.fromtimestamp(job.submitted).strftime("%m-%d %H:%M:%S")
            code = "" if job.exit_code is None else str(job.exit_code)
            cells = (job.id, job.state, code, since, _clock(job.seconds))
            table.add_row(*(Text(cell) for cell in cells))
        self.out.print(table)

    def job_ended(self, job: str, state: str, code: int | None, reason: str) -> None:
        """Says how a job ended, or that it has not."""
        text = f"job {job}: {state}" + ("" if code is None else f", exit code {code}")
        if state == "PENDING":
            text += "; it waits for a place and ends when it gets one"
        elif code is None:
            text += "; it has not ended yet"
        self.status(f"{text}; {reason}" if reason else text)

    def raw(self, text: str) -> None:
        """Passes on what a job has written."""
        self.out.file.write(text)
        self.out.file.flush()

    def error_panel(self, message: str) -> None:
        """Prints one paragraph in red on stderr."""
        paragraph = Text.assemble(("Error: ", "bold red"), (redact(message), "red"))
        self.err.print(paragraph, soft_wrap=not self.err.is_terminal)

    def trace(self, error: BaseException) -> None:
        """Prints where an error happened."""
        self._stderr.write("".join(traceback.format_exception(error)))

    def json_line(self, values: Mapping[str, float | int | str | bool | None]) -> None:
        """Prints one flat JSON object on stdout: the last thing a command writes there."""
        self._stdout.write(
            json.dumps({k: _json_value(v) for k, v in values.items()}, sort_keys=True)
        )
        self._stdout.write("\n")
        self._stdout.flush()

    def _places(self, places: Mapping[str, str]) -> None:
        """One place a line, never wrapped, so that it can be copied."""
        for label, place in places.items():
            self.out.print(Text.assemble((f"{label:<12}", "bold"), place), soft_wrap=True)


class ProgressView:
    """Shows how far a run is while the body of its `with` block waits for it.

    A thread asks `read` for the latest record twice a second. On a terminal there is one line
    that changes in place; elsewhere one log line at the start, every minute and at the end. The
    record that is there at the beginning was left by an earlier attempt and is not shown.
    """

    def __init__(
        self,
        console: Console,
        read: Callable[[], Progress | None],
        poll_seconds: float = POLL_SECONDS,
        log_seconds: float = LOG_SECONDS,
    ) -> None:
        self._console = console.err
        self._read = read
        self._poll_seconds = poll_seconds
        self._log_seconds = log_seconds
        self._stale: Progress | None = None
        self._record: Progress | None = None
        self._noted: list[str] = []
        self._eta = Eta()
        self._remaining: float | None = None
        self._started = self._logged = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self.line, auto_refresh=False)

    def __enter__(self) -> Self:
        self._started = self._logged = time.monotonic()
        self._stale = self._latest()
        if self._live:
            self._live.start()
        else:
            logger.info("%s", self._plain())
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._poll()
        if self._live:
            self._live.stop()
        else:
            logger.info("%s: %s", "stopped" if kind else "done", self._plain())

    def line(self) -> Table:
        """The live line; what matters least stands last, where a narrow terminal cuts."""
        words = self._words()
        fraction = _fraction(self._record) if self._record else 0.0
        bar_width = min(30, max(6, self._console.width - 74))  # 74: a common line of words
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(width=bar_width)
        table.add_column()
        text = Text(" ".join(words[1:]), no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=1.0, completed=fraction, width=bar_width)
        table.add_row(Text(words[0], "bold"), bar, text)
        return table

    def _run(self) -> None:
        while not self._stop.wait(self._poll_seconds):
            self._poll()
            if self._live:
                self._live.refresh()
            elif time.monotonic() - self._logged >= self._log_seconds:
                self._logged = time.monotonic()
                logger.info("%s", self._plain())

    def _latest(self) -> Progress | None:
        try:
            return self._read()
        except (OSError, ValueError):  # the file is being replaced: the next poll will do
            return None

    def _poll(self) -> None:
        record = self._latest()
        if record is None or record in (self._stale, self._record):
            return
        self._record = record
        for note in record.get("notes", ()):
            if note not in self._noted:
                self._noted.append(note)
                logger.info("%s", note)
        total = record["num_epochs"] * record["steps_per_epoch"]
        self._remaining = self._eta.update(_fraction(record), time.monotonic(), total)

    def _plain(self) -> str:
        return "  ".join(self._words())

    def _words(self) -> list[str]:
        record = self._record
        if record is None:
            return ["start", f"waiting for workers, {_clock(time.monotonic() - self._started)}"]
        words = [record["phase"], f"epoch {record['epoch'] + 1}/{record['num_epochs']}"]
        words.append(f"eta {_clock(self._remaining) if self._remaining is not None else '-:--:--'}")
        if "train/loss" in record:
            words.append(f"loss {record['train/loss']:.3f}")
        if "val/accuracy" in record:
            words.append(f"acc {record['val/accuracy']:.3f}")
        if record.get("alpha"):
            parts = (f"{modality} {value:.2f}" for modality, value in record["alpha"].items())
            words.append("α " + " ".join(parts))
        return words


class Eta:
    """Remaining seconds from the progress seen so far, measured from the first record.

    The first record may come from the middle of a run that continues, and a restarted worker may
    fall back to an earlier step: both begin a new measurement.
    """

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._last = 0.0

    def update(self, fraction: float, seconds: float, total_steps: int) -> float | None:
        """Takes the share of all steps done and a clock; None while it is too early to say."""
        if self._first is None or fraction < self._last:
            self._first = (fraction, seconds)
        self._last = fraction
        done, elapsed = fraction - self._first[0], seconds - self._first[1]
        if done * total_steps < MIN_ETA_STEPS - 0.5 or elapsed < MIN_ETA_SECONDS:
            return None
        return elapsed / done * max(0.0, 1.0 - fraction)


class _RateColumn(rich.progress.ProgressColumn):
    """Items a second, lately."""

    def render(self, task: rich.progress.Task) -> Text:
        return Text(f"{task.speed:.0f}/s" if task.speed else "", "dim")


class _LoggedCounter:
    """A counter without a terminal: a log line a minute, and the last."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._began = self._logged = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._first is None:
            self._first, self._began = done, time.monotonic()
        if done == total or time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            rate = (done - self._first) / max(self._logged - self._began, 1e-3)
            left = _clock((total - done) / rate) if rate else "-:--:--"
            text = "%s: %d of %d, %.0f/s, eta %s"
            logger.info(text, self._label, done, total, rate, left)


class _LogHandler(logging.Handler):
    """Writes through rich, which lifts the live line, and never wraps a log line."""

    def __init__(self, console: rich.console.Console) -> None:
        super().__init__()
        self._console = console
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        self.setFormatter(logging.Formatter(form, datefmt="%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.print(Text(self.format(record)), soft_wrap=True)
        except Exception:  # what the logging module asks of every handler
            self.handleError(record)


def _fraction(record: Progress) -> float:
    """Share of all steps done; evaluation and start hold the value of the last step."""
    total = record["num_epochs"] * record["steps_per_epoch"]
    done = record["epoch"] * record["steps_per_epoch"] + record["step"]
    return min(1.0, done / total) if total else 0.0


def _cells(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Values by row label and split, in reading order; keys look like `test/accuracy/audio`."""
    cells: dict[str, dict[str, float]] = {}
    for name, label in RESULT_ROWS.items():
        for key, value in result.items():
            split, _, rest = key.partition("/")
            metric, _, modality = rest.partition("/")
            if split in SPLITS and metric == name:
                row = f"{modality} {label}".lstrip()
                cells.setdefault(row, {})[split] = value
    return cells


def _statistic(summary: Mapping[str, float], method: str, name: str) -> dict[str, float]:
    """The entries `<method>/<metric>/<name>`, by metric."""
    start, end = f"{method}/", f"/{name}"
    found = {k: v for k, v in summary.items() if k.startswith(start) and k.endswith(end)}
    return {key.removeprefix(start).removesuffix(end): value for key, value in found.items()}


def _new_table(corner: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(Text(corner))
    for column in columns:
        table.add_column(Text(column), justify="right", no_wrap=True)
    return table


def _two_columns(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(Text(key, "bold"), Text(value))
    return table


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:12:34."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _json_value(value: float | int | str | bool | None) -> float | int | str | bool | None:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value

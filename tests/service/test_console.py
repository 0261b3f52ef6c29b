"""The terminal: one live line, plain log lines without a terminal, results, JSON."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import rich.console

from service.console import Console, Eta, ProgressView
from service.jobs import Job
from service.launch import RunOutcome

RECORD: dict[str, Any] = {
    "phase": "main",
    "epoch": 2,
    "num_epochs": 10,
    "step": 20,
    "steps_per_epoch": 40,
    "train/loss": 1.23456,
    "val/accuracy": 0.6123,
    "alpha": {"audio": 1.124, "visual": 1.0},
}


def make_console(json_mode: bool = False) -> tuple[Console, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Console(json_mode, out, err), out, err


def as_terminal(console: Console, err: io.StringIO, width: int) -> Console:
    console.err = rich.console.Console(
        file=err, force_terminal=True, width=width, highlight=False, legacy_windows=False
    )
    return console


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def records(*items: dict[str, Any] | None) -> Any:
    """A reader that hands out the records one by one and then repeats the last."""
    left = list(items)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


@pytest.mark.parametrize("width", [80, 120])
def test_live_line_shows_the_run_on_one_line(width: int) -> None:
    console, out, err = make_console()
    as_terminal(console, err, width)
    with ProgressView(console, records(None, RECORD), poll_seconds=0.02):
        time.sleep(0.1)
    last = plain(err.getvalue()).rstrip("\n").splitlines()[-1].split("\r")[-1]
    assert len(last) <= width
    assert "main" in last
    assert "epoch 3/10" in last
    assert "eta -:--:--" in last
    assert "loss 1.235" in last
    assert "α audio 1.12 visual 1.00" in last
    assert last.split()[1].strip("━╸╺") == ""
    assert out.getvalue() == ""


def test_live_line_before_the_first_record() -> None:
    console, _, err = make_console()
    as_terminal(console, err, 80)
    with ProgressView(console, lambda: None, poll_seconds=0.02):
        time.sleep(0.05)
    assert "waiting for workers, 0:00:00" in plain(err.getvalue())


def test_log_lines_do_not_break_the_live_line() -> None:
    console, _, err = make_console()
    as_terminal(console, err, 60)
    root = logging.getLogger()
    before = list(root.handlers)
    console.setup_logging()
    try:
        with ProgressView(console, records(None, RECORD), poll_seconds=0.02):
            time.sleep(0.05)
            logging.getLogger("test.live").warning("a [bold] word %s", "x" * 80)
    finally:
        root.handlers[:] = before
    lines = [line for line in plain(err.getvalue()).splitlines() if "WARNING" in line]
    assert len(lines) == 1
    assert lines[0].endswith("test.live: a [bold] word " + "x" * 80)


def test_without_a_terminal_progress_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    console, out, err = make_console()
    caplog.set_level(logging.INFO, "service.console")
    with ProgressView(console, records(None, RECORD), poll_seconds=0.01, log_seconds=0.1):
        time.sleep(0.25)
    lines = [record.getMessage() for record in caplog.records]
    assert "waiting for workers" in lines[0]
    assert lines[-1].startswith("done: main  epoch 3/10  eta -:--:--  loss 1.235  acc 0.612")
    assert lines[-1].endswith("α audio 1.12 visual 1.00")
    assert 3 <= len(lines) <= 4
    assert out.getvalue() == err.getvalue() == ""


def test_notes_of_a_run_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    console, _, _ = make_console()
    caplog.set_level(logging.INFO, "service.console")
    first = RECORD | {"notes": ["workers: 2"]}
    second = RECORD | {"step": 21, "notes": ["workers: 2", "feed: 1 reader"]}
    with ProgressView(console, records(None, first, second), poll_seconds=0.01):
        time.sleep(0.2)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[1:3] == ["workers: 2", "feed: 1 reader"]
    assert len(lines) == 4  # with the first line and the last


def test_progress_ends_with_the_body(caplog: pytest.LogCaptureFixture) -> None:
    console, _, _ = make_console()
    caplog.set_level(logging.INFO, "service.console")
    view = ProgressView(console, records(None, RECORD), poll_seconds=0.01)
    with pytest.raises(KeyError, match="boom"), view:
        raise KeyError("boom")
    assert caplog.records[-1].getMessage().startswith("stopped: main")
    assert not view._thread.is_alive()


def test_unreadable_progress_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    def read() -> None:
        json.loads("{")

    console, _, _ = make_console()
    caplog.set_level(logging.INFO, "service.console")
    with ProgressView(console, read, poll_seconds=0.01):
        time.sleep(0.05)
    assert "waiting for workers" in caplog.records[-1].getMessage()


def test_eta_is_elapsed_over_done_times_left() -> None:
    eta = Eta()
    assert eta.update(0.0, 4.0, 1000) is None
    assert eta.update(0.001, 30.0, 1000) is None  # one slow first step says nothing
    assert eta.update(0.25, 104.0, 1000) == pytest.approx(300.0)
    assert eta.update(1.0, 404.0, 1000) == pytest.approx(0.0)


def test_eta_of_a_continued_run_counts_only_its_own_progress() -> None:
    eta = Eta()
    assert eta.update(0.5, 10.0, 1000) is None
    assert eta.update(0.6, 30.0, 1000) == pytest.approx(80.0)
    assert eta.update(0.55, 35.0, 1000) is None  # a worker restarted from its checkpoint
    assert eta.update(0.65, 45.0, 1000) == pytest.approx(35.0)


def test_eta_of_a_short_run_appears() -> None:
    eta = Eta()
    eta.update(0.0, 0.0, 8)
    assert eta.update(5 / 8, 5.0, 8) == pytest.approx(3.0)


def test_eta_reaches_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.console.MIN_ETA_SECONDS", 0.05)
    console, _, err = make_console()
    as_terminal(console, err, 80)
    # 10 of 400 steps take about 0.1 s, 290 steps are left
    reads = records(None, *[RECORD] * 5, RECORD | {"step": 30})
    with ProgressView(console, reads, poll_seconds=0.02):
        time.sleep(0.3)
    assert re.search(r"eta 0:00:0[1-9]", plain(err.getvalue()))


def test_a_record_of_an_earlier_attempt_is_not_shown() -> None:
    console, _, err = make_console()
    as_terminal(console, err, 80)
    with ProgressView(console, records(RECORD), poll_seconds=0.01):
        time.sleep(0.05)
    assert "epoch" not in err.getvalue()


RESULT: dict[str, float | str] = {
    "seconds": 754.2,
    "test/zero_out_accuracy/audio": 0.3,
    "test/head_accuracy/audio": 0.5,
    "test/f1_macro": 0.61,
    "test/accuracy": 0.62346,
    "val/accuracy": 0.7,
    "method": "midas",
    "split": "grouped, seed 2",
    "speed/samples_per_second": 1234.0,
    "mlflow_uri": "sqlite:////runs/mlflow.db",
    "mlflow_run_id": "0a1b",
}


def compact(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_summary_has_rows_in_reading_order_and_unbroken_paths() -> None:
    console, out, err = make_console()
    folder = Path("/store") / ("long" * 30)
    console.summary(RunOutcome(folder, RESULT, finished_before=False))
    assert compact(out.getvalue()) == [
        "val test",
        "accuracy 0.7000 0.6235",
        "macro-F1 0.6100",
        "audio head accuracy 0.5000",
        "audio zero-out accuracy 0.3000",
        "time 0:12:34",
        "split grouped, seed 2",
        "",
        f"run folder {folder}",
        "MLflow midas ui --storage /store",
        f"next midas evaluate {folder.name} --split val --storage /store",
    ]
    assert err.getvalue() == ""


def test_summary_of_a_run_on_a_server_in_the_default_storage() -> None:
    console, out, _ = make_console()
    outcome = RunOutcome(Path("runs/r").resolve(), RESULT | {"mlflow_uri": "http://h:5000"}, True)
    console.summary(outcome)
    assert compact(out.getvalue())[-2:] == [
        "MLflow http://h:5000/#/runs/0a1b",
        "next midas evaluate r --split val",
    ]


def test_comparison_has_a_column_per_method() -> None:
    console, out, _ = make_console()
    summary = {
        f"{method}/test/{metric}/{statistic}": value
        for method in ("joint", "joint_uni")
        for metric in ("accuracy", "loss")
        for statistic, value in (("mean", 0.5), ("std", 0.01))
    }
    summary |= {"joint_uni/test/f1_macro/mean": 0.4, "joint_uni/test/f1_macro/std": 0.0}
    console.comparison(summary, ["joint", "joint_uni"], 3)
    assert compact(out.getvalue())[:3] == [
        "test joint joint_uni",
        "accuracy 0.5000 ± 0.0100 0.5000 ± 0.0100",
        "macro-F1 0.4000 ± 0.0000",
    ]


def test_counter_on_a_terminal_shows_nothing_before_its_first_call() -> None:
    console, _, err = make_console()
    as_terminal(console, err, 80)
    with console.counter("preparing"):
        pass
    assert "preparing" not in err.getvalue()
    with console.counter("preparing") as count:
        count(3, 12)
        time.sleep(0.15)
    assert " 3/12" in plain(err.getvalue())


def test_counter_without_a_terminal_logs_its_end(caplog: pytest.LogCaptureFixture) -> None:
    console, _, _ = make_console()
    caplog.set_level(logging.INFO, "service.console")
    with console.counter("preparing") as count:
        for done in range(13):
            count(done, 12)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert re.fullmatch(r"preparing: 12 of 12, \d+/s, eta 0:00:00", messages[0])


def test_logging_is_set_up_once_and_goes_to_stderr() -> None:
    first, _, old = make_console()
    second, out, err = make_console()
    root = logging.getLogger()
    before = list(root.handlers)
    first.setup_logging()
    second.setup_logging()
    try:
        logging.getLogger("service.x").info("news [b] %s", "y" * 100)
        logging.getLogger("elsewhere").info("no news")
    finally:
        root.handlers[:] = before
    assert old.getvalue() == out.getvalue() == ""
    assert err.getvalue().endswith("INFO service.x: news [b] " + "y" * 100 + "\n")
    assert "no news" not in err.getvalue()


def test_plan_prints_every_entry() -> None:
    console, out, _ = make_console()
    console.plan({"rows/train": 100, "storage": "/s"})
    assert compact(out.getvalue()) == ["rows/train 100", "storage /s"]


def test_a_bench_shows_medians_with_their_range_and_the_limit() -> None:
    console, out, _ = make_console()
    spread = {"scaling": 1.64, "scaling_min": 1.5, "scaling_max": 1.8}
    console.bench({**spread, "workers": 2, "limit": "the model"})
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert lines == ["scaling 1.64 (1.5 to 1.8)", "workers 2", "limited by the model"]


def test_json_mode_leaves_stdout_to_one_json_line() -> None:
    console, out, err = make_console(json_mode=True)
    console.metrics_table(RESULT)
    console.error_panel("no [red] data")
    console.json_line(
        {"b": math.nan, "a": 0.123456789, "n": 3, "ok": True, "s": "x", "i": math.inf}
    )
    assert out.getvalue() == '{"a": 0.123457, "b": null, "i": null, "n": 3, "ok": true, "s": "x"}\n'
    assert "macro-F1" in err.getvalue()
    assert err.getvalue().endswith("Error: no [red] data\n")


def test_error_is_one_red_paragraph_on_stderr() -> None:
    console, out, err = make_console()
    as_terminal(console, err, 40)
    console.error_panel("global_batch_size=100 is not divisible by num_workers=8; use 96")
    assert "\x1b[31m" in err.getvalue()
    assert "divisible" in plain(err.getvalue())
    assert out.getvalue() == ""


SWEPT: dict[str, Any] = {
    "rows": [
        ("trial-0001", "main 7/30", "2", "0.4100", "optim.lr=0.02"),
        ("trial-0000", "complete", "25", "0.9832", "optim.lr=0.01"),
    ],
    "ended": 1,
    "trials": 16,
    "best": 0.9832,
    "eta": 62.0,
}


def test_a_sweep_is_a_table_of_its_trials_and_its_numbers() -> None:
    console, out, _ = make_console()
    console.sweep({"best_trial": 0, "wall_seconds": 12.3456}, SWEPT)
    text = out.getvalue()
    assert "1 of 16 trials ended, best 0.9832, eta 0:01:02" in text
    assert re.search(r"trial-0001 +main 7/30 +2 +0\.4100 +optim\.lr=0\.02", text)
    assert re.search(r"wall_seconds +12\.35", text)


def test_a_running_sweep_is_a_live_table_on_a_terminal_only() -> None:
    for terminal in (False, True):
        console, _, err = make_console()
        if terminal:
            as_terminal(console, err, 120)
        with console.sweep_view(lambda: SWEPT):
            time.sleep(0.7)
        assert ("trial-0001" in plain(err.getvalue())) == terminal


def test_jobs_are_listed_with_ids_to_copy() -> None:
    console, out, _ = make_console()
    long = "train-" + "long-" * 8 + "123456"
    console.jobs(
        [
            Job("train-digits-123456", "RUNNING", "train digits", "", 0.0, 65.0, None),
            Job(long, "FAILED", "train digits", "", 0.0, 3.0, 137),
        ]
    )
    said = out.getvalue()
    assert re.search(r"^train-digits-123456 +RUNNING .* 0:01:05$", said, re.MULTILINE)
    first, second = said.splitlines()[-2:]
    assert first.split()[0] + second.strip() == long
    assert first.split()[1:3] == ["FAILED", "137"]

"""Cores that do not sleep: processes of idle priority that end with the one that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from service import awake

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="not Linux")
START = "from service import awake; awake.keep_awake(2); awake.keep_awake(2); input()"


def test_they_are_idle_by_priority_one_a_core_and_end_with_their_process():
    with subprocess.Popen([sys.executable, "-c", START], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 20
        spinning: list[psutil.Process] = []
        while time.monotonic() < deadline and len(spinning) < 2:
            children = psutil.Process(process.pid).children()
            spinning = [c for c in children if os.sched_getscheduler(c.pid) == os.SCHED_IDLE]
        assert len(spinning) == 2
        process.send_signal(signal.SIGKILL)
        gone, alive = psutil.wait_procs(spinning, timeout=20)
        assert (len(gone), alive) == (2, [])


@pytest.mark.parametrize(("limit", "expected"), [("max 100000", False), ("50000 100000", True)])
def test_a_limit_of_cpu_time_is_seen(
    limit: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(awake, "QUOTA", tmp_path / "cpu.max")
    assert not awake.has_quota()
    awake.QUOTA.write_text(f"{limit}\n")
    assert awake.has_quota() == expected


def test_where_cpu_time_is_limited_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(awake, "QUOTA", tmp_path / "cpu.max")
    awake.QUOTA.write_text("50000 100000\n")
    awake.keep_awake(2)
    assert not awake._spinning
    assert "limits the CPU time" in caplog.text

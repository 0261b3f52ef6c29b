"""Keeping the cores of CPU workers awake while they wait for each other.

A virtual machine gives a core that sleeps away, and gets it back late and cold; workers sleep at
every exchange. Where the core has something to do, be it of idle priority, that does not happen.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

log = logging.getLogger(__name__)

# Ends within a second of the process that started it.
SPIN = """
import os, sys
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == int(sys.argv[1]):
    for _ in range(10_000_000):
        pass
"""
QUOTA = Path("/sys/fs/cgroup/cpu.max")
_spinning: list[subprocess.Popen[bytes]] = []


def keep_awake(cores: int) -> None:
    """Spin with idle priority on so many cores, for as long as this process lives.

    Nothing happens, but for a warning, on systems other than Linux, and in a container whose CPU
    time is limited: spinning would use it up.
    """
    if _spinning:
        return
    if not hasattr(os, "SCHED_IDLE"):
        log.warning("scaling.awake does nothing here: it needs Linux")
    elif has_quota():
        log.warning("scaling.awake does nothing here: %s limits the CPU time", QUOTA)
    else:
        command = [sys.executable, "-I", "-S", "-c", SPIN, str(os.getpid())]
        _spinning.extend(subprocess.Popen(command) for _ in range(cores))


def has_quota() -> bool:
    """Whether this container's CPU time is limited (cgroup v2)."""
    return QUOTA.is_file() and not QUOTA.read_text().startswith("max")

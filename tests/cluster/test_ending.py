"""docker/processes.py leaves no process behind."""

from pathlib import Path

import psutil
import pytest

from tests.cluster.topology import running

pytestmark = [pytest.mark.ray, pytest.mark.cluster]


def runs(process: psutil.Process) -> bool:
    """Whether it does; one that has ended may still be listed until its parent asks for it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_signal_ends_all():
    with running("postgres", "bucket") as topology:
        family = [psutil.Process(pid) for pid in topology.pids.values()]
        family += [child for process in family for child in process.children(recursive=True)]
        assert set(topology.pids) == {"postgres", "store"}
        assert len(family) > 4
        secret = Path(topology.environment["RAY_AUTH_TOKEN_PATH"])
        assert secret.stat().st_mode & 0o777 == 0o600
    assert not any(runs(process) for process in family)

"""docker/processes.py leaves no process behind."""

from pathlib import Path

import psutil
import pytest

from tests.cluster.topology import running

pytestmark = [pytest.mark.ray, pytest.mark.cluster]


def test_a_signal_ends_all():
    with running("bucket") as topology:
        family = [psutil.Process(pid) for pid in topology.pids.values()]
        family += [child for process in family for child in process.children(recursive=True)]
        assert set(topology.pids) == {"postgres", "store"}
        assert len(family) > 4
        secret = Path(topology.environment["RAY_AUTH_TOKEN_PATH"])
        assert secret.stat().st_mode & 0o777 == 0o600
    assert not any(process.is_running() for process in family)

"""What the whole service takes before anybody uses it."""

import json
import time

import pytest

from tests.bench.footprint import measure, total
from tests.cluster.topology import Topology

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.timeout(900)]
REST_SECONDS, SECONDS = 15.0, 30.0


def test_idle_it_takes_little(topology: Topology):
    time.sleep(REST_SECONDS)
    found = measure(topology.pids, SECONDS)
    print(json.dumps({"services": found, "total": total(found)}))  # noqa: T201
    assert set(found) == {
        *("postgres", "store", "mlflow", "ray-head", "ray-worker-1", "ray-worker-2")
    }
    assert all(part["processes"] >= 1 for part in found.values())
    assert total(found)["pss_mib"] < 4096
    assert total(found)["cores"] < 0.5

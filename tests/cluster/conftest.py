"""The one topology that all tests in this folder use."""

from collections.abc import Iterator

import pytest

from tests.cluster.topology import Topology, running


@pytest.fixture(scope="session")
def topology() -> Iterator[Topology]:
    with running() as found:
        yield found

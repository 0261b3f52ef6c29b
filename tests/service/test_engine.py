"""What a process of a run says."""

import pytest
import torch

from service.engine import idle_cores

CPU = torch.device("cpu")


@pytest.fixture
def two_local_workers(monkeypatch: pytest.MonkeyPatch):
    """Of one thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_local_workers")
def test_workers_that_leave_most_of_a_machine_idle_are_told():
    assert idle_cores(CPU, 16) == (
        "this node has 16 cores, its workers train on 2; scaling.cpus_per_worker=7 gives them more "
        "and leaves 2 to readers"
    )


@pytest.mark.usefixtures("two_local_workers")
@pytest.mark.parametrize(("device", "cores"), [(CPU, 2), (CPU, 5), (torch.device("cuda"), 16)])
def test_nothing_is_said_where_cores_are_few_or_gpus_train(device: torch.device, cores: int):
    assert idle_cores(device, cores) is None

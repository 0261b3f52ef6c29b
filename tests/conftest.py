"""One thread, Ray's environment as the command sets it, and where the shared real data may be."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from service.environment import configure_ray

configure_ray()
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests press Ctrl-C


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data, where it is present."""
    folder = Path(os.environ.get("MIDAS_SHARED_DATA", Path(__file__).parents[2] / "shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}")
    return folder


@pytest.fixture(scope="module")
def one_cpu_ray() -> Iterator[None]:
    """A small local Ray in this process: one logical CPU, 256 MiB of object store."""
    import ray

    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=256 << 20,
        log_to_driver=False,
    )
    yield
    ray.shutdown()

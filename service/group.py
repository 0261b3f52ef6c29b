"""The worker group of a run, as Ray Train starts it, and faster.

The controller process needs no torch: it only sends functions, which the workers import. Without a
cluster, all processes of a session inherit the command's environment, so they need no runtime
environment of their own (Ray would start Python twice for each, and could not use idle ones), and
nothing has to clean up after a lost controller.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer as ClusterTrainer

UNNEEDED = (DatasetsCallback, PlacementGroupCleanerCallback)


@dataclass
class TorchGroup(BackendConfig):
    """A torch process group over the workers, which save and leave when they get SIGTERM.

    Attributes:
        timeout_seconds: of a collective.
        secrets: environment variables for the workers, which Ray is not to list.
    """

    timeout_seconds: float
    secrets: dict[str, str] = field(repr=False)

    @property
    def backend_cls(self) -> type[Backend]:
        return _TorchBackend

    @property
    def train_func_context(self) -> Any:
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager


class _TorchBackend(Backend):
    """The set-up of torch workers.

    At the end the process group is left as it is: the processes are about to be killed. Torch's
    would be destroyed under a loop that is still training, for which every rank would then be
    rank 0 of 1 and write checkpoints.
    """

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_set_variables, backend_config.secrets)
        size = len(worker_group)
        address, port = worker_group.execute_single(0, get_address_and_port)
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        options = (backend, address, port, size, backend_config.timeout_seconds)
        ray.get(
            [worker_group.execute_single_async(rank, _join, rank, *options) for rank in range(size)]
        )

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_watch_termination)


def _set_variables(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def _join(
    rank: int, backend: str, address: str, port: int, size: int, timeout_seconds: float
) -> None:
    from ray.train.torch import config

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, size, "env://", int(timeout_seconds))


def _watch_termination() -> None:
    """In the worker's main thread; the loop runs in another, which may set no signal handler."""
    from service import worker

    worker.watch_termination()


class _LocalGroup(WorkerGroup):
    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        return {}


class _LocalController(TrainController):
    worker_group_cls = _LocalGroup


class LocalTrainer(ClusterTrainer):
    """Ray Train's trainer for a session that lives and dies with its command."""

    def _create_default_callbacks(self) -> list[Any]:
        found = super()._create_default_callbacks()
        return [callback for callback in found if not isinstance(callback, UNNEEDED)]

    def _initialize_and_run_controller(self, **controller_init_kwargs: Any) -> Any:
        controller: Any = ray.remote(num_cpus=0)(_LocalController)
        running = controller.remote(**controller_init_kwargs)
        ray.get(running.run.remote())
        return ray.get(running.get_result.remote())

"""What fits: workers on this machine, or on the nodes of a cluster, each on one of them; and the
object store in the memory."""

import os
from collections.abc import Mapping, Sequence

from service.config import RunConfig, RunError, ScalingConfig
from service.environment import environment

# What each node has, by name: CPU, GPU and others.
Nodes = Sequence[Mapping[str, float]]


def trial_scaling(config: RunConfig) -> ScalingConfig:
    """The workers of one trial."""
    return config.scaling.model_copy(update={"num_workers": config.search.workers_per_trial})


def check_local_capacity(scaling: ScalingConfig) -> None:
    """Without a cluster address, the workers must fit this machine.

    Raises:
        RunError: they do not.
    """
    if environment()["RAY_ADDRESS"]:
        return
    cores, wanted = num_cores(), scaling.min_workers * scaling.cpus_per_worker
    if wanted > cores:
        raise RunError(
            f"scaling.num_workers={scaling.num_workers} with scaling.cpus_per_worker="
            f"{scaling.cpus_per_worker} need {wanted} cores; this machine has {cores}; use fewer "
            "workers, or point RAY_ADDRESS at a cluster"
        )


def check_cluster_capacity(scaling: ScalingConfig, nodes: Nodes) -> None:
    """The workers must fit a cluster.

    Raises:
        RunError: they do not.
    """
    if lacking := missing(scaling, nodes):
        raise RunError(f"{lacking}; use fewer workers, add nodes, or take scaling.device=cpu")


def missing(scaling: ScalingConfig, nodes: Nodes) -> str | None:
    """What a cluster lacks for the fewest workers of a run; None if it has enough."""
    have, workers, each = total(nodes), scaling.min_workers, scaling.cpus_per_worker
    if have["CPU"] < workers * each:
        return (
            f"the Ray cluster has {have['CPU']:g} CPUs; {workers} workers with {each} each need "
            f"{workers * each}"
        )
    if scaling.device == "gpu" and have["GPU"] < workers:
        return (
            f"scaling.device=gpu needs one GPU a worker, {workers}; the Ray cluster has "
            f"{have['GPU']:g}"
        )
    if (fitting := places(scaling, nodes)) < workers:
        gpu = " and a GPU" if uses_gpu(scaling, have) else ""
        return (
            f"the nodes of the Ray cluster have room for {fitting} workers with {each} CPUs{gpu} "
            f"each, and {workers} are asked for; a worker is on one node"
        )
    return None


def places(scaling: ScalingConfig, nodes: Nodes) -> int:
    """How many workers of this kind the nodes hold."""
    fitting = [int(node.get("CPU", 0)) // scaling.cpus_per_worker for node in nodes]
    if uses_gpu(scaling, total(nodes)):
        gpus = [int(node.get("GPU", 0)) for node in nodes]
        fitting = [min(both) for both in zip(fitting, gpus, strict=True)]
    return sum(fitting)


def total(nodes: Nodes) -> dict[str, float]:
    """CPUs and GPUs of all nodes."""
    return {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}


def uses_gpu(scaling: ScalingConfig, have: Mapping[str, float]) -> bool:
    """Whether each worker gets a GPU of a cluster that has these resources."""
    enough = have.get("GPU", 0) >= scaling.min_workers
    return scaling.device == "gpu" or (scaling.device == "auto" and enough)


def num_cores() -> int:
    """Cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def store_share(shm: int, memory: int) -> int:
    """Bytes for the object store, on which depends how many readers there may be (feed.choose).

    An eighth of the memory, but not more than three quarters of what is free in /dev/shm: beyond it
    Ray takes slow files. At least a quarter of that up to 4 GiB, and 256 MiB.
    """
    return max(256 << 20, min(4 << 30, shm // 4), min(memory // 8, 3 * shm // 4))

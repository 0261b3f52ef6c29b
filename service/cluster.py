"""The Ray session of a command, and running a worker function on a worker group."""

import contextlib
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from service.capacity import (
    check_cluster_capacity,
    check_local_capacity,
    missing,
    num_cores,
    store_share,
    uses_gpu,
)
from service.config import RunConfig, RunError, ScalingConfig
from service.environment import configure_ray, environment, worker_environment
from service.files import (
    ATTEMPT_NAME,
    PROGRESS_NAME,
    TRAINING_PHASES,
    VALIDATION_PHASE,
    read_json,
    write_text,
)

# After a node is lost, Ray counts on it for half a minute; `watch` bounds the time, not this.
START_ATTEMPTS = 10
# Longer than rank 0 may wait for its storage.
COLLECTIVE_SECONDS = 900
RESIZE_SECONDS = 10.0
RESOURCE_POLL_SECONDS = 2.0
# Ray itself ends this process, without a word to the user, when its head is away for 60 s.
HEAD_SECONDS = 20.0
# What an interrupted driver gives the workers for a checkpoint; a second signal ends the wait.
STOP_SECONDS = 20.0
# A signal to a process and to the one that started it, which passes it on, is one signal.
SAME_SIGNAL_SECONDS = 1.0
CONNECTION_WORDS = ("connection", "peer", "socket", "timed out", "timeout", "barrier")


class HeadLostError(RunError):
    """The head of the Ray cluster is gone, and the cluster with it."""


class Session:
    """Ray for one command: joins RAY_ADDRESS, or starts a local cluster and ends it.

    Nothing is started before `start` or `ready`. Inside the session of another, it does nothing.

    Args:
        scaling: size of the worker groups to come.
        debug: show Ray's own output.
    """

    def __init__(self, scaling: ScalingConfig, *, debug: bool):
        self._scaling = scaling
        self._debug = debug
        self._is_inner = "ray" in sys.modules and sys.modules["ray"].is_initialized()
        self._address = environment()["RAY_ADDRESS"]
        self._thread: threading.Thread | None = None
        self._started, self._may_end, self._ended = (threading.Event() for _ in range(3))
        self._error: Exception | None = None

    def start(self) -> None:
        """Begin to start Ray, beside what the caller does next.

        Raises:
            RunError: the machine cannot hold the workers.
        """
        if self._thread is None and not self._is_inner:
            check_local_capacity(self._scaling)
            _import_ray()
            self._thread = threading.Thread(target=self._run, name="ray", daemon=True)
            self._thread.start()

    def ready(self) -> None:
        """Wait until Ray runs.

        Raises:
            RunError: Ray did not start, or the machine or cluster cannot hold the workers.
        """
        self.start()
        if self._thread:
            _wait_for(self._started)
        if self._error:
            raise self._error

        check_cluster_capacity(self._scaling, node_resources())

    def end(self) -> None:
        """Begin to end Ray, beside what the caller does next."""
        self._may_end.set()

    def close(self) -> None:
        """End Ray, also in the middle of its start."""
        self.end()
        if self._thread:
            _wait_for(self._ended)

    def _run(self) -> None:
        """Start Ray and end it: one thread, since Linux ends its processes with their thread."""
        import ray

        os.environ |= {
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(self._scaling.start_timeout_seconds),
            # Nodes of a cluster may be taken away with a notice; this machine is not.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": str(int(self._address is not None)),
        }
        try:
            _start_ray(self._address, debug=self._debug)
        except Exception as error:  # handed to the main thread
            self._error = error
        self._started.set()
        self._may_end.wait()
        ray.shutdown()
        self._ended.set()


@contextlib.contextmanager
def lazy_session(config: RunConfig, *, debug: bool) -> Iterator[Session]:
    """A session that starts when it is asked to, and ends with the body.

    In the body, SIGINT and SIGTERM raise KeyboardInterrupt in the main thread.
    """
    configure_ray()
    session = Session(config.scaling, debug=debug)
    with _interrupts():
        try:
            yield session
        finally:
            session.close()


@contextlib.contextmanager
def ray_session(config: RunConfig, *, debug: bool) -> Iterator[Session]:
    """A session that is ready when the body begins; see `lazy_session`."""
    with lazy_session(config, debug=debug) as session:
        session.ready()
        yield session


def _import_ray() -> None:
    """What `ray.init` imports; packages with cycles break where two threads import them at once."""
    import ray._common.usage.usage_lib
    import ray.dashboard.optional_deps  # noqa: F401


def _wait_for(event: threading.Event) -> None:
    while not event.wait(timeout=0.2):  # without timeout, signals would not interrupt it
        pass


def _start_ray(address: str | None, *, debug: bool) -> None:
    """Join the cluster at `address`, or start one that has the cores of this machine."""
    import ray

    cluster: dict[str, Any] = {
        "address": "local",
        "num_cpus": num_cores(),
        "include_dashboard": False,
        "object_store_memory": object_store_bytes(),
    }
    what = "start on this machine"
    remedy = (
        "its folder (RAY_TMPDIR, else /tmp) must be writable and have a short path; a busy machine "
        "can make the start time out, so try again"
    )
    if address:
        cluster = {"address": address}
        what = f"join the cluster at RAY_ADDRESS={address}"
        remedy = (
            "the head of a running cluster must answer there; start it with `ray start --head`, "
            "correct RAY_ADDRESS, or unset it to train on this machine; if the cluster asks for a "
            "token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        )
    level = logging.INFO if debug else logging.ERROR
    logging.getLogger("ray").setLevel(level)
    try:
        ray.init(**cluster, log_to_driver=debug, logging_level=level)  # pyright: ignore[reportArgumentType]
    except Exception as error:  # Ray raises all kinds here, ValueError and bare Exception too
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise RunError(
            f"Ray could not {what}: {reason}; {remedy}; --debug shows the trace and Ray's own log"
        ) from error


def load_workers() -> None:
    """Import what `run_workers` needs, which takes seconds that may pass while Ray starts."""
    from service import group, worker  # noqa: F401


def run_workers(
    loop: str, scaling: ScalingConfig, folder: Path, payload: dict[str, Any]
) -> dict[str, Any]:
    """Run function `loop` of service/worker.py on a worker group; returns what rank 0 returned.

    Args:
        loop: name of the function.
        scaling: size of the group.
        folder: Ray keeps its snapshot and the checkpoints here; the same folder continues.
        payload: JSON values for the function.

    Raises:
        RunError: a worker failed, or the workers agreed that the run cannot go on.
        KeyboardInterrupt: a signal arrived; the caller ends the session.
    """
    import ray
    import ray.train

    from service import worker
    from service.group import ClusterTrainer, LocalTrainer, TorchGroup

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    use_gpu = uses_gpu(scaling, ray.cluster_resources())
    remote = environment()["RAY_ADDRESS"] is not None
    variables, hidden = worker_environment() if remote else (None, {})
    resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    trainer = (ClusterTrainer if remote else LocalTrainer)(
        getattr(worker, loop),
        train_loop_config=payload,
        backend_config=TorchGroup(COLLECTIVE_SECONDS, hidden),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=ray.train.FailureConfig(
                max_failures=scaling.max_failures, controller_failure_limit=START_ATTEMPTS
            ),
            worker_runtime_env={"env_vars": variables} if remote else None,
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        returned = _fit_in_thread(trainer, folder, scaling)
    except ray.train.TrainingFailedError as error:
        raise RunError(
            f"training failed on a worker: {_root_cause(error)}; the same command with --name "
            f"{folder.name} continues at the last checkpoint; --debug shows the whole trace"
        ) from error
    assert isinstance(returned, dict)
    if "error" in returned:
        raise RunError(returned["error"])
    if "stopped" in returned:
        raise KeyboardInterrupt(returned["stopped"])
    return returned


def on_a_worker(scaling: ScalingConfig, function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in the place of a worker of the open session's cluster."""
    import ray

    use_gpu = uses_gpu(scaling, ray.cluster_resources())
    task: Any = ray.remote(num_cpus=scaling.cpus_per_worker, num_gpus=int(use_gpu))(function)
    return ray.get(task.remote(*args))


class Nodes:
    """A Ray cluster of several nodes on this machine: a head without CPUs, and one per worker.

    Args:
        count: nodes beside the head.
        cpus: logical CPUs of each; the machine's cores are shared among all.
    """

    def __init__(self, count: int, cpus: int):
        from ray.cluster_utils import Cluster

        self._store = object_store_bytes() // (count + 1)
        self._cpus = cpus
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": self._store}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(count):
            self.replace()

    @property
    def environment(self) -> dict[str, str]:
        """Environment of commands that join."""
        return {**os.environ, "RAY_ADDRESS": str(self._cluster.address)}

    def replace(self) -> None:
        """Add a node in the place of a lost one."""
        self._cluster.add_node(num_cpus=self._cpus, object_store_memory=self._store)

    def lose(self) -> None:
        """Take a node away without a word."""
        self._cluster.remove_node(self._cluster.list_all_nodes()[-1], allow_graceful=False)

    def kill_head(self) -> None:
        """SIGKILL to the process that the cluster cannot do without."""
        head = self._cluster.head_node
        assert head, "it was started with the cluster"
        head.kill_gcs_server()

    def close(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


@contextlib.contextmanager
def local_nodes(count: int, cpus: int) -> Iterator[Nodes]:
    """Nodes for as long as the body runs."""
    configure_ray()
    nodes = Nodes(count, cpus)
    try:
        yield nodes
    finally:
        nodes.close()


def uses_gpu_now(scaling: ScalingConfig) -> bool:
    """Whether each worker gets a GPU of the cluster of the open session."""
    import ray

    return uses_gpu(scaling, ray.cluster_resources())


def total_cpus() -> int:
    """CPUs of the cluster of the open session."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def node_resources() -> list[Mapping[str, float]]:
    """What each node of the cluster of the open session has, by name: CPU, GPU and others."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def object_store_bytes() -> int:
    """Size of the object store of a local run; see `store_share`."""
    from ray._common.utils import get_system_memory

    shm = Path("/dev/shm")
    if not shm.is_dir():
        return 1 << 30
    stats = os.statvfs(shm)
    return store_share(stats.f_bavail * stats.f_frsize, get_system_memory())


def _fit_in_thread(trainer: Any, folder: Path, scaling: ScalingConfig) -> object:
    """Run `fit` beside the main thread, where Ray would install a SIGINT handler that exits 0."""
    outcome: dict[str, Any] = {}
    # Not Thread.join: Python 3.11 takes a thread for ended when a signal interrupts that.
    ended = threading.Event()

    def fit() -> None:
        try:
            outcome["value"] = trainer.fit().return_value
        except BaseException as error:  # handed to the main thread, which decides
            outcome["error"] = error
        finally:
            ended.set()

    threading.Thread(target=fit, name="fit", daemon=True).start()
    try:
        watch(ended, scaling)
    except HeadLostError:
        write_text(folder / ATTEMPT_NAME, "")  # workers elsewhere may still be training
        raise
    except KeyboardInterrupt:
        _ask_to_stop(ended, folder)
        if "value" not in outcome:
            raise
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def watch(ended: threading.Event, scaling: ScalingConfig, until: float | None = None) -> None:
    """Wait for the run to end, as long as the cluster could hold it.

    Args:
        until: `time.monotonic()` at which to return in any case.

    Raises:
        HeadLostError: the head has not answered for HEAD_SECONDS.
        RunError: resources have been missing for `scaling.start_timeout_seconds`. Ray itself would
            wait for them without limit.
    """
    import ray

    head = ray.get_runtime_context().gcs_address
    missing_since, checked = None, time.monotonic()
    answered = checked
    while not ended.wait(timeout=0.2):  # without timeout, signals would not interrupt it
        if until and time.monotonic() > until:
            return
        if time.monotonic() - checked < RESOURCE_POLL_SECONDS:
            continue
        checked = time.monotonic()
        if not _answers(head):
            if checked - answered > HEAD_SECONDS:
                raise HeadLostError(
                    f"the head of the Ray cluster, {head}, has not answered for {HEAD_SECONDS:g} s "
                    "and is lost with its cluster; start a cluster, then the same command "
                    "continues at the last checkpoint"
                )
            continue
        answered = checked
        lacking = missing(scaling, node_resources())
        missing_since = (missing_since or checked) if lacking else None
        if missing_since and checked - missing_since > scaling.start_timeout_seconds:
            raise RunError(
                f"{lacking}, for {scaling.start_timeout_seconds:g} s now: a node was lost and not "
                "replaced; add nodes, or set scaling.num_workers to two numbers to go on with "
                "fewer workers; then the same command continues at the last checkpoint"
            )


def _answers(address: str) -> bool:
    """Whether something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _ask_to_stop(ended: threading.Event, folder: Path) -> None:
    """Let workers that are training save and end; others have nothing that is not saved."""
    progress = read_json(folder / PROGRESS_NAME) or {}
    if progress.get("phase") in (*TRAINING_PHASES, VALIDATION_PHASE):
        write_text(folder / ATTEMPT_NAME, "")
        ended.wait(timeout=STOP_SECONDS)


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt; earlier handlers come back at the end."""
    with _handlers(_interrupt):
        yield


def _interrupt(signum: int, frame: object) -> None:
    """Raise, but not for the echo of a signal: Ray stops a job by a signal to all its processes,
    and `uv run` passes on what it gets."""
    now = time.monotonic()
    is_echo = now - _signalled.get(signum, -math.inf) < SAME_SIGNAL_SECONDS
    _signalled[signum] = now
    if not is_echo:
        raise KeyboardInterrupt(f"signal {signum}")


_signalled: dict[int, float] = {}


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """SIGINT and SIGTERM do nothing: for the few seconds in which results are recorded."""
    with _handlers(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handlers(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only it is interrupted
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _root_cause(error: BaseException) -> str:
    """What went wrong first: a lost connection on one rank is the echo of a failure on another."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    lines = {rank: _last_line(failure) for rank, failure in sorted(failures.items())}
    causes = {
        rank: line
        for rank, line in lines.items()
        if not any(word in line.lower() for word in CONNECTION_WORDS)
    }
    rank, line = next(iter((causes or lines).items()))
    return f"rank {rank}: {line}"


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)

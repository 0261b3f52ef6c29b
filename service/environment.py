"""Environment variables: the ones the service reads, and the ones it sets for Ray."""

import os
import secrets
from importlib.metadata import version
from pathlib import Path

from service.redaction import has_credentials, is_secret_name

RAY_ENVIRONMENT = {
    # One report costs up to one poll interval; the default of 2 s would dominate short epochs.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # A notice that a node will be taken away may be short.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Blocks that were read are freed once a second otherwise, and the object store fills meanwhile.
    "RAY_free_objects_period_milliseconds": "50",
    # Ray workers run at nice 15 otherwise and starve beside anything else.
    "RAY_worker_niceness": "0",
    # The driver's environment is the workers'; uv must not build it again.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
# Freed memory is kept: mapping fresh pages takes much of the time of a training step on CPUs.
# Workers train in a thread, whose own arenas would not keep it: there is one.
MEMORY_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}
# For a cluster on this machine.
LOCAL_ENVIRONMENT = {
    **MEMORY_ENVIRONMENT,
    # Processes that read one split wait for the next stream, instead of one second.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    # Whatever a process is for, it needs this; some start while the command does other things.
    "RAY_preload_python_modules": "ray.data",
}
# A cluster that does not answer is given up after 20 s (one attempt, 5 + 5 + 10 s) instead of 14
# minutes (20 attempts of 40 s). Not for local starts, where more attempts help a busy machine.
JOIN_ENVIRONMENT = {
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_py_gcs_connect_timeout_s": "10",
}


# The version of midas that submitted this command as a job.
SUBMITTER_VARIABLE = "MIDAS_SUBMITTER"


def configure_ray() -> None:
    """Set Ray's environment variables, keeping what the user has set.

    Some are read when Ray is imported, so this must come before the first import of ray. A local
    cluster gets a token of its own; otherwise Ray would leave one in the home directory.
    """
    joins = os.environ.get("RAY_ADDRESS")
    kind = MEMORY_ENVIRONMENT | JOIN_ENVIRONMENT if joins else LOCAL_ENVIRONMENT
    defaults = RAY_ENVIRONMENT | kind
    os.environ.update({k: os.environ.get(k, v) for k, v in defaults.items()})
    has_token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    if not joins or has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not joins and not has_token and os.environ["RAY_AUTH_MODE"].lower() == "token":
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def configure_client() -> None:
    """Set what a client of another cluster needs: no cluster of its own, and no token of its own.

    Where there is a token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, or Ray's file in the home
    directory), it is used, unless RAY_AUTH_MODE says otherwise. Must come before the first import
    of ray.
    """
    defaults = RAY_ENVIRONMENT | MEMORY_ENVIRONMENT
    os.environ.update({k: os.environ.get(k, v) for k, v in defaults.items()})
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def check_submitter() -> None:
    """Compare the midas that submitted this command as a job with that of this node.

    Raises:
        ConfigError: their versions differ.
    """
    theirs = os.environ.get(SUBMITTER_VARIABLE)
    if theirs and theirs != (ours := version("midas")):
        from service.config import ConfigError

        raise ConfigError(
            f"this job was submitted by midas {theirs}, its node has midas {ours}; they must be "
            f"equal, since the code comes from there and its environment from here: install {ours} "
            f"there, start the nodes from an image of {theirs}, or submit with --uv"
        )


def environment() -> dict[str, str | None]:
    """Environment values the service reads: where Ray and MLflow are."""
    return {name: os.environ.get(name) for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}


def worker_environment() -> tuple[dict[str, str], dict[str, str]]:
    """Variables that workers on other machines need: Ray's settings and MLflow's access.

    Returns:
        Those that everyone may see, and those that hold a secret. Ray lists and logs the
        environments that it is told to make, and keeps no arguments of functions: secrets go to
        workers as arguments.
    """
    mlflow = (name for name in os.environ if name.startswith("MLFLOW_"))
    names = [*RAY_ENVIRONMENT, *MEMORY_ENVIRONMENT, *mlflow]
    needed = {name: os.environ[name] for name in names if name in os.environ}
    hidden = {k: v for k, v in needed.items() if is_secret_name(k) or has_credentials(v)}
    return {k: v for k, v in needed.items() if k not in hidden}, hidden

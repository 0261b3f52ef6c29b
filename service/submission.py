"""What a job is given: its command line, working directory, environment, and place in the queue.

All of it is decided, and refused where it cannot work, before anything is sent.
"""

import contextlib
import logging
import math
import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from service.capacity import uses_gpu
from service.config import ConfigError, ScalingConfig
from service.environment import SUBMITTER_VARIABLE
from service.redaction import redact

# Left out beside what .gitignore and .rayignore name: results, environments, what looks secret.
EXCLUDES = (
    *("/runs", "/dist", "mlruns", "mlartifacts", "mlflow.db", ".git", ".venv", "venv"),
    *("__pycache__", "*.egg-info", ".pytest_cache", ".ruff_cache", ".hypothesis", "node_modules"),
    *(".env", ".env.*", "*.pem", "*.key", ".netrc", ".ssh", ".aws", "auth_token"),
)
MAX_PACKAGE_BYTES = 50 << 20
LARGEST_SHOWN = 3
# Every head node has one of it; Ray's own services may hold a little.
HEAD_RESOURCE, HEAD_SHARE = "node:__internal_head__", 0.99
MAX_DRIVERS = 8
# Ray reads it in a job's environment.
STOP_VARIABLE, STOP_SECONDS = "RAY_JOB_STOP_WAIT_TIME_S", 120


def check_arguments(command: Sequence[str]) -> None:
    """A job's command can be read by everyone who may see the cluster.

    Raises:
        ConfigError: it holds a secret.
    """
    for word in command:
        if (shown := redact(word)) != word:
            raise ConfigError(
                f"the argument {shown} holds a secret, and the command of a job can be read by "
                "everyone who may see the cluster; take it out and give the nodes the credentials "
                "in their environment (AWS_SHARED_CREDENTIALS_FILE, ...)"
            )


def check_paths(paths: Mapping[str, str | None]) -> None:
    """Refuse folders that would be inside a job's own copy of the working directory.

    Args:
        paths: by the flag that sets them.

    Raises:
        ConfigError: one is relative.
    """
    for flag, path in paths.items():
        if path and "://" not in path and not Path(path).is_absolute():
            raise ConfigError(
                f"{flag} {path} is relative: on the cluster it would be inside the job's copy of "
                "this folder, which Ray removes; give the path of a folder that all nodes share, "
                f"as in {flag} /mnt/midas"
            )


def entrypoint(command: Sequence[str], *, uv: bool) -> str:
    """The shell command that runs `midas` COMMAND in the unpacked working directory."""
    python = ["uv", "run", "--no-dev", "python"] if uv else ["python"]
    return shlex.join([*python, "-m", "service", *command])


def job_environment(
    settings: Mapping[str, str], secrets: Mapping[str, str], *, uv: bool, with_secrets: bool
) -> tuple[dict[str, str], list[str]]:
    """The variables a job gets, and the names of those that are left out because they are secret.

    Args:
        settings, secrets: candidates; see `worker_environment`.
    """
    found = dict(settings) | (dict(secrets) if with_secrets else {})
    if uv:  # the workers' environment is that of the driver, which uv makes
        found["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "1"
    found[STOP_VARIABLE] = str(STOP_SECONDS)
    found[SUBMITTER_VARIABLE] = version("midas")
    return found, [] if with_secrets else sorted(secrets)


def head_share(
    scaling: ScalingConfig | None, have: Mapping[str, float], *, all_of_it: bool
) -> float:
    """How much of the head's resource a job takes while it runs.

    Args:
        scaling: its workers; None if it needs few.
        have: CPUs and GPUs of the cluster.
        all_of_it: whether it takes what there is, as a sweep does.
    """
    part = 1.0 if all_of_it else 0.0
    if scaling and not all_of_it:
        cpus = scaling.max_workers * scaling.cpus_per_worker
        part = cpus / have["CPU"] if have.get("CPU") else 1.0
        if uses_gpu(scaling, have) and have.get("GPU"):
            part = max(part, scaling.max_workers / have["GPU"])
    share = HEAD_SHARE * min(1.0, max(part, 1 / MAX_DRIVERS))
    return math.floor(share * 1e4) / 1e4


def job_id(command: Sequence[str], name: str) -> str:
    """A new id that says what the job is."""
    words = [command[0], name or next((w for w in command[1:2] if not w.startswith("-")), "")]
    text = "-".join(re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(word).stem) for word in words if word)
    return f"{text[:60]}-{secrets.token_hex(3)}"


def package_sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files of a working directory that would be sent, by relative path.

    Looking ends at several times the limit: the folder may be a home directory.
    """
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: dict[str, int] = {}
    total = 0

    def add(path: Path) -> None:
        nonlocal total
        if path.is_file():
            size = path.stat().st_size
            sizes[str(path.relative_to(folder))] = size
            total += size
        if total > 4 * MAX_PACKAGE_BYTES:
            raise _EnoughError

    quiet = logging.getLogger(f"{__name__}.quiet")
    quiet.setLevel(logging.CRITICAL)
    excludes = [_get_excludes(folder, list(EXCLUDES))]
    with contextlib.suppress(_EnoughError):
        _dir_travel(folder, excludes, add, include_gitignore=True, logger=quiet)
    return sizes


class _EnoughError(Exception):
    """There is more than would ever be sent."""


def check_package(folder: Path, sizes: Mapping[str, int], limit: int = MAX_PACKAGE_BYTES) -> None:
    """Refuse to send a working directory with data in it.

    Raises:
        ConfigError: it is larger than the limit, in bytes.
    """
    total = sum(sizes.values())
    if total <= limit:
        return
    parts: dict[str, int] = {}
    for name, size in sizes.items():
        top = name.partition("/")[0]
        parts[top] = parts.get(top, 0) + size
    names = sorted(parts, key=lambda name: -parts[name])[:LARGEST_SHOWN]
    largest = ", ".join(f"{name} {_mib(parts[name])}" for name in names)
    raise ConfigError(
        f"{folder} has at least {_mib(total)} in {len(sizes)} files to send to the cluster, the "
        f"limit is {_mib(limit)}; the largest: {largest}; name "
        "what a job does not need in .gitignore or .rayignore; data belongs into a folder that the "
        "nodes share"
    )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"

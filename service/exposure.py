"""`midas doctor --security`: what Ray and MLflow have open on this machine, and to whom."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from service.doctor import Finding, answer, authentication, token_files
from service.mlflow_server import is_loopback
from service.redaction import secret_names

RAY_PROGRAMS = (
    *("gcs_server", "raylet", "ray::", "ray/dashboard", "ray/_private", "ray/core"),
    *("bin/midas", "-m service"),  # a driver listens to its workers
)
MLFLOW_PROGRAMS = ("mlflow.server", "mlflow server", "-m mlflow", "bin/mlflow")
# What answers 200 to whoever asks, unless there is a login.
PROBES = {"MLflow": "/api/2.0/mlflow/experiments/search?max_results=1", "Ray": "/api/jobs/"}
ANY_ADDRESS = ("0.0.0.0", "::")
# These of Ray also serve Prometheus metrics: on a port that asks nobody and answers any path.
METRICS_SERVERS = ("dashboard", "ray::DashboardAgent", "monitor.py")
METRICS, NO_PATH = "/metrics", "/no-such-path"


class Listener(NamedTuple):
    """A listening socket of Ray or MLflow."""

    program: str
    name: str
    pid: int
    host: str
    port: int


def exposure(storage: Path) -> list[Finding]:
    """What is open, whether it asks who is there, and who can read secrets.

    Args:
        storage: folder of the runs.
    """
    import psutil

    listeners = sorted(_listeners(), key=lambda one: (is_loopback(one.host), one.program, one.port))
    findings = []
    for listener in listeners:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
            findings.append(_judged(listener))
    if not findings:
        findings.append(Finding("sockets", "ok", "nothing of Ray or MLflow listens here"))
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        findings.append(
            Finding(
                "sockets of others", "ok", "only processes of this user are seen; root sees all"
            )
        )
    return [*findings, *authentication(), *token_files(), *_secrets(), *_writers(storage)]


def _listeners() -> Iterator[Listener]:
    import psutil

    seen = set()
    for connection in psutil.net_connections(kind="inet"):
        if connection.status != psutil.CONN_LISTEN or not connection.pid:
            continue
        try:
            command = psutil.Process(connection.pid).cmdline()
        except psutil.Error:  # it ended, or is another user's
            continue
        program = _program(" ".join(command))
        host, port = _place(connection.laddr)
        if program and (program, host, port) not in seen:
            seen.add((program, host, port))
            name = _name(program, command)
            yield Listener(program, name, connection.pid, host, port)


def _place(address: Any) -> tuple[str, int]:
    return address.ip, address.port


def _program(command: str) -> str | None:
    if any(word in command for word in MLFLOW_PROGRAMS):
        return "MLflow"
    if any(word in command for word in RAY_PROGRAMS):
        return "Ray"
    return None


def _name(program: str, command: list[str]) -> str:
    """A short name of a process; never its arguments, which may hold secrets."""
    if program == "MLflow":
        return "server"
    scripts = [Path(word.split()[0]).name for word in command[:3] if word.split()]
    if "dashboard.py" in scripts:
        return "dashboard"
    named = [name for name in scripts if not name.startswith(("python", "-"))]
    return named[0] if named else "worker"


def _judged(listener: Listener) -> Finding:
    name = f"{listener.program} {listener.name}, port {listener.port}"
    found = f"{listener.host}:{listener.port} (pid {listener.pid}), open to {_whom(listener.host)}"
    if listener.name in METRICS_SERVERS and _is_metrics(listener):
        state = "ok" if is_loopback(listener.host) else "warn"
        remedy = "let only the Prometheus server reach it (firewall, NetworkPolicy)"
        found = f"{found}; tells metrics to whoever connects, also in token mode"
        return Finding(name, state, found, "" if state == "ok" else remedy)
    asks, how = _asks(listener)
    if asks:
        clear = "" if is_loopback(listener.host) else "; not encrypted unless RAY_USE_TLS=1 is set"
        return Finding(name, "ok", f"{found}; {how}{clear if listener.program == 'Ray' else ''}")
    if is_loopback(listener.host):
        return Finding(name, "ok" if listener.program == "MLflow" else "warn", f"{found}; {how}")
    remedy = (
        "start it with --host 127.0.0.1, or with --app-name basic-auth"
        if listener.program == "MLflow"
        else "stop it; start it again with RAY_AUTH_MODE=token and a token in RAY_AUTH_TOKEN_PATH"
    )
    return Finding(name, "fix", f"{found}; {how}", remedy)


def _asks(listener: Listener) -> tuple[bool, str]:
    """Whether a process asks for a token or login, and how that is known."""
    if listener.program == "MLflow" or listener.name == "dashboard":
        status = answer(f"http://{_reachable(listener)}{PROBES[listener.program]}")
        if status in (401, 403):
            return True, "asks for a login"
        if status == 200:
            return False, "answers whoever connects"
    return has_token_mode(listener.pid)


def _is_metrics(listener: Listener) -> bool:
    url = f"http://{_reachable(listener)}"
    return all(answer(f"{url}{path}") == 200 for path in (METRICS, NO_PATH))


def _reachable(listener: Listener) -> str:
    host = "127.0.0.1" if listener.host in ANY_ADDRESS else listener.host
    return f"[{host}]:{listener.port}" if ":" in host else f"{host}:{listener.port}"


def has_token_mode(pid: int) -> tuple[bool, str]:
    """Whether a process of Ray was started in token mode, and that as a sentence.

    A process that gives itself a name, as Ray's agents do, writes over its environment; then that
    of the process which started it is looked at.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        for one in (process, *process.parents()):
            environment = one.environ()
            if "PATH" in environment:
                if environment.get("RAY_AUTH_MODE", "").lower() == "token":
                    return True, "asks for a token"
                return False, "asks nobody for a token"
    except psutil.AccessDenied:
        pass
    return False, "whether it asks for a token cannot be seen"


def _whom(host: str) -> str:
    if is_loopback(host):
        return "this machine only"
    if host not in ANY_ADDRESS:
        return f"whoever reaches {host}"
    return f"whoever reaches {', '.join(_addresses()) or 'this machine'}"


def _addresses() -> list[str]:
    """Addresses of this machine that others may reach."""
    import psutil

    found = (a for interface in psutil.net_if_addrs().values() for a in interface)
    inet = (a.address for a in found if a.family in (socket.AF_INET, socket.AF_INET6))
    return [address for address in inet if not is_loopback(address.partition("%")[0])]


def _secrets() -> Iterator[Finding]:
    names = secret_names()
    found = f"in the environment, hidden in what midas writes: {', '.join(names) or 'none'}"
    yield Finding("secrets", "ok", found)


def _writers(storage: Path) -> Iterator[Finding]:
    """Who can write checkpoints can have runs load what they wrote."""
    if not storage.is_dir():
        return
    mode = storage.stat().st_mode & 0o777
    found = f"{storage.resolve()} has mode {mode:04o}"
    if mode & 0o002:
        remedy = f"everyone on this machine can change runs: chmod o-w {storage}"
        yield Finding("storage", "fix", found, remedy)
    else:
        yield Finding("storage", "ok", found)

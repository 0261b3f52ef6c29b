"""`midas doctor`: is this machine fit for a run; what was found, and what to do about it."""

import contextlib
import fcntl
import http.client
import os
import shutil
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from service.mlflow_server import is_loopback
from service.redaction import has_credentials, redact

GIB = 1 << 30
MIN_PYTHON = (3, 11)
# Package -> oldest version in which its known holes are closed, and what they were.
MINIMUM_VERSIONS = {
    "ray": (
        "2.58",
        "jobs API reached from a browser (CVE-2025-62593, 2.52), code in Parquet tensor metadata "
        "(CVE-2026-41486, 2.55) and WebDataset pickles (CVE-2026-57516, 2.56)",
    ),
    "mlflow": (
        "3.17",
        "path traversal (CVE-2025-11201; CVE-2026-2033, 3.8), skipped login (CVE-2026-2652, 3.10), "
        "open jobs API (CVE-2026-0545), webhooks into the cloud's metadata (CVE-2026-64849)",
    ),
    "torch": ("2.10", "code in weights-only files (CVE-2025-32434, 2.6; CVE-2026-24747)"),
}
MIN_SHM = GIB
MIN_MEMORY = 4 * GIB
MIN_DISK, GOOD_DISK = GIB, 10 * GIB
PORTS = {5000: "midas ui", 6379: "the head of a Ray cluster", 8265: "Ray's dashboard and jobs"}
MAX_CLOCK_SECONDS = 5.0
ANSWER_SECONDS = 5.0


class Finding(NamedTuple):
    """What a check found.

    Attributes:
        state: `fix` is for what must be put right before the machine is used.
        remedy: what to do, where something is to be done.
    """

    name: str
    state: Literal["ok", "warn", "fix"]
    found: str
    remedy: str = ""


def examine(storage: Path) -> list[Finding]:
    """Check everything that a run needs; takes seconds.

    Args:
        storage: folder of the runs.
    """
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        versions,
        processor,
        gpus,
        shared_memory,
        ports,
        authentication,
        token_files,
        lambda: tracking_server(storage),
        lambda: clock(storage),
        lambda: disk(storage),
    )
    return [finding for check in checks for finding in check()]


def summary(findings: list[Finding]) -> dict[str, str | int | bool]:
    """Findings as one flat mapping; `doctor/ok` is False if something must be put right."""
    states = [finding.state for finding in findings]
    counts = {f"doctor/{state}": states.count(state) for state in ("warn", "fix")}
    return {
        "doctor/ok": "fix" not in states,
        **counts,
        **{f.name: f"{f.state}: {f.found}{'; ' * bool(f.remedy)}{f.remedy}" for f in findings},
    }


def versions() -> Iterator[Finding]:
    """Python, and the packages that have had holes."""
    from packaging.version import Version

    python = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < MIN_PYTHON:
        yield Finding("python", "fix", python, "take 3.11 or newer")
    else:
        yield Finding("python", "ok", python)
    for name, (minimum, holes) in MINIMUM_VERSIONS.items():
        version = metadata.version(name)
        if Version(version).release < Version(minimum).release:
            remedy = f"take {minimum} or newer: uv sync; older ones have {holes}"
            yield Finding(name, "fix", version, remedy)
        else:
            yield Finding(name, "ok", f"{version} (at least {minimum})")


def processor() -> Iterator[Finding]:
    """Cores and memory."""
    import psutil

    memory = psutil.virtual_memory()
    found = f"{os.cpu_count()} cores, {_gib(memory.available)} of {_gib(memory.total)} memory free"
    few = memory.available < MIN_MEMORY
    remedy = "a small run of two workers takes about 4 GiB; end other programs" if few else ""
    yield Finding("processor", "warn" if few else "ok", found, remedy)


def gpus() -> Iterator[Finding]:
    """GPUs that torch can use."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(count):
        about = torch.cuda.get_device_properties(number)
        yield Finding(f"gpu {number}", "ok", f"{about.name}, {_gib(about.total_memory)}")
    present = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    if present and not count:
        remedy = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda or 'no GPU'}; "
            "install the driver that nvidia-smi asks for, or the torch of that CUDA"
        )
        yield Finding("gpus", "fix", f"{', '.join(present)}, but torch can use none", remedy)
    elif not count:
        yield Finding("gpus", "ok", "none; runs train on the processor")


def shared_memory() -> Iterator[Finding]:
    """What there is for Ray's object store."""
    from service.cluster import object_store_bytes

    shm = Path("/dev/shm")
    if not shm.is_dir():
        remedy = "Ray then uses files, which is slow; mount a tmpfs there"
        yield Finding("shared memory", "warn", "there is no /dev/shm", remedy)
        return
    total, _, free = shutil.disk_usage(shm)
    found = f"{_gib(free)} of {_gib(total)} free in /dev/shm"
    if free < MIN_SHM:
        remedy = (
            f"Ray uses slow files instead where it needs more, and runs want {_gib(MIN_SHM)}; in a "
            "container give --shm-size=2g, on Kubernetes an emptyDir with medium: Memory; else end "
            "what fills it"
        )
        yield Finding("shared memory", "warn", found, remedy)
    else:
        yield Finding("shared memory", "ok", found)
    store = object_store_bytes()
    yield Finding("object store", "ok", f"a local run will take {_gib(store)} for it")


def ports() -> Iterator[Finding]:
    """Whether a socket can be opened, and whether the usual ports are free."""
    for port, use in PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                remedy = f"that is where {use} would be; if it is not it already, give another port"
                yield Finding(f"port {port}", "warn", f"not free ({error.strerror})", remedy)
            else:
                yield Finding(f"port {port}", "ok", f"free for {use}")


def authentication() -> Iterator[Finding]:
    """Whether Ray asks for a token, and where it would come from."""
    address = os.environ.get("RAY_ADDRESS")
    asks = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    token = _token_source()
    if not address and asks:
        yield Finding("ray token", "ok", "clusters that midas starts here ask for a token")
    elif not address:
        remedy = "unset RAY_AUTH_MODE, or set it to token"
        yield Finding("ray token", "fix", "clusters started here ask nobody for a token", remedy)
    elif not asks:
        remedy = (
            "whoever reaches a cluster without a token runs code on it: start it with "
            "RAY_AUTH_MODE=token, and set that and RAY_AUTH_TOKEN_PATH here"
        )
        state = "warn" if _is_local(address) else "fix"
        yield Finding("ray token", state, f"RAY_ADDRESS={redact(address)} without a token", remedy)
    elif not token:
        remedy = "put the cluster's token into a file of mode 0600 and name it: RAY_AUTH_TOKEN_PATH"
        yield Finding("ray token", "fix", "RAY_AUTH_MODE=token, and no token is there", remedy)
    elif not _is_local(address) and os.environ.get("RAY_USE_TLS") != "1":
        remedy = "use a private network, an SSH tunnel, or RAY_USE_TLS=1 on all nodes"
        found = f"from {token}; it travels in clear to {redact(address)}"
        yield Finding("ray token", "warn", found, remedy)
    else:
        yield Finding("ray token", "ok", f"from {token}")


def token_files() -> Iterator[Finding]:
    """Whether only their owner can read files with secrets."""
    named = ("RAY_AUTH_TOKEN_PATH", "MLFLOW_AUTH_CONFIG_PATH", "AWS_SHARED_CREDENTIALS_FILE")
    paths = [Path(os.environ[name]) for name in named if os.environ.get(name)]
    home = Path.home()
    paths += [home / ".ray/auth_token", home / ".mlflow/credentials", home / ".aws/credentials"]
    for path in dict.fromkeys(path.expanduser() for path in paths):
        if not path.is_file():
            continue
        mode = path.stat().st_mode & 0o777
        if mode & 0o077 and path.parent.stat().st_mode & 0o011:  # others may enter its folder
            remedy = f"others on this machine can read it: chmod 600 {path}"
            yield Finding(f"file {path.name}", "fix", f"{path} has mode {mode:04o}", remedy)
        else:
            yield Finding(f"file {path.name}", "ok", f"{path} has mode {mode:04o}")


def tracking_server(storage: Path) -> Iterator[Finding]:
    """Whether MLflow answers, whom, and what it missed."""
    from service import tracking

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if has_credentials(uri):
        remedy = "put the name and password into MLFLOW_TRACKING_USERNAME and _PASSWORD"
        if not uri.startswith(tracking.SERVERS):
            remedy = "give runs the address of an mlflow server instead; only it needs the password"
        found = f"MLFLOW_TRACKING_URI={redact(uri)} holds a password"
        yield Finding("mlflow address", "warn", found, remedy)
    if uri.startswith(tracking.SERVERS):
        yield from _mlflow_server(uri)
    else:
        yield Finding("mlflow", "ok", f"a file: {redact(tracking.tracking_uri(storage, uri))}")
    if missed := tracking.unsent(storage):
        names = ", ".join(folder.name for folder in missed[:3])
        found = f"{len(missed)} runs have more to say than MLflow took ({names} ...)"
        yield Finding("mlflow outbox", "warn", found, f"midas sync --storage {storage}")


def _mlflow_server(uri: str) -> Iterator[Finding]:
    began = time.monotonic()
    base = _base(uri)
    status = answer(f"{base}/health")
    if status is None or status >= 500:
        remedy = "runs go on without it and catch up later (midas sync); start it, or check the URI"
        found = f"{redact(uri)} does not answer within {ANSWER_SECONDS:g} s"
        yield Finding("mlflow", "warn", found if status is None else f"status {status}", remedy)
        return
    found = f"{redact(uri)} answers in {1000 * (time.monotonic() - began):.0f} ms"
    yield Finding("mlflow", "ok", found)
    if _is_local(uri):
        return
    if uri.startswith("http://"):
        remedy = "put it behind TLS (https), or reach it through an SSH tunnel"
        found = "passwords and results travel in clear"
        yield Finding("mlflow in clear", "warn", found, remedy)
    if answer(f"{base}/api/2.0/mlflow/experiments/search?max_results=1") == 200:
        remedy = "start it with --app-name basic-auth, see MLflow server in the README"
        found = "whoever reaches it reads and changes every run, without a login"
        yield Finding("mlflow login", "fix", found, remedy)
    else:
        yield Finding("mlflow login", "ok", "asks for a login")


def clock(storage: Path) -> Iterator[Finding]:
    """This machine's clock against those of the storage and of MLflow."""
    from service import tracking

    differences = {}
    with (
        contextlib.suppress(OSError),  # `disk` says so
        _present(storage) as folder,
        tempfile.NamedTemporaryFile(dir=folder) as file,
    ):
        before = time.time()
        file.write(b"0")
        file.flush()
        written = os.stat(file.name).st_mtime
        differences["the storage"] = max(0.0, before - written, written - time.time())
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith(tracking.SERVERS) and (at := _date(f"{_base(uri)}/health")):
        differences["MLflow"] = max(0.0, abs(time.time() - at) - 1.0)  # it says whole seconds
    for whose, seconds in differences.items():
        found = f"differs from that of {whose} by {seconds:.1f} s"
        if seconds > MAX_CLOCK_SECONDS:
            remedy = "checkpoints and metrics come in the wrong order; synchronise both with NTP"
            yield Finding(f"clock, {whose}", "fix", found, remedy)
        else:
            yield Finding(f"clock, {whose}", "ok", found)


def disk(storage: Path) -> Iterator[Finding]:
    """Whether the storage can be written, replaces files at once, locks, and has space."""
    try:
        with _present(storage) as folder:
            _exercise(folder)
            free = shutil.disk_usage(folder).free
    except OSError as error:
        remedy = "give a folder that you may write, on a file system with rename and flock"
        found = f"{storage} cannot be used: {error.strerror or error}"
        yield Finding("storage", "fix", found, f"{remedy}: --storage DIR")
        return
    yield Finding("storage", "ok", f"{storage.resolve()} can be written, replaced and locked")
    state: Literal["ok", "warn", "fix"] = "ok"
    if free < GOOD_DISK:
        state = "fix" if free < MIN_DISK else "warn"
    remedy = f"data and checkpoints want {_gib(GOOD_DISK)}; free some, or take another --storage"
    yield Finding("free space", state, _gib(free), remedy if state != "ok" else "")


@contextlib.contextmanager
def _present(folder: Path) -> Iterator[Path]:
    """The folder, for the body; where it is not there it is made, and removed again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        for path in missing:
            path.rmdir()


def _exercise(folder: Path) -> None:
    """Do what runs do in their storage.

    Raises:
        OSError: it cannot be done there.
    """
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        old, new = Path(inner) / "old", Path(inner) / "new"
        old.write_text("old")
        with new.open("w") as file:
            file.write("new")
            file.flush()
            os.fsync(file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with old.open() as reader:
            os.replace(new, old)
            if reader.read() != "old" or old.read_text() != "new" or new.exists():
                raise OSError("a file that is replaced is not replaced at once")


def answer(url: str, headers: dict[str, str] | None = None) -> int | None:
    """The status with which a server answers; None if it does not."""
    request = urllib.request.Request(url, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError, http.client.HTTPException):  # the last: it does not speak HTTP
        return None


def _date(url: str) -> float | None:
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as response:
            return parsedate_to_datetime(response.headers["Date"]).timestamp()
    except (OSError, ValueError, TypeError, http.client.HTTPException):
        return None


def _base(uri: str) -> str:
    """The address of a server, without a name and password in it."""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


def _token_source() -> str | None:
    """Where Ray would take its token from."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path.home() / ".ray/auth_token"
    return str(path) if path.is_file() else None


def _is_local(address: str) -> bool:
    host = urlsplit(address if "://" in address else f"//{address}").hostname
    return address in ("auto", "local") or is_loopback(host or "")


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"

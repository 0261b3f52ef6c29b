"""Jobs: commands of this command line that run on a cluster, through Ray's Jobs API.

The cluster holds the queue. Every job takes the share of the head node's own resource that its
workers are of the cluster, so that Ray starts a driver when there is room for its workers and
keeps the others waiting, without a process each. A job may take `STOP_SECONDS` to save its state
when it is stopped: Ray reads that time in the job's environment, where `submit` puts it.
"""

import asyncio
import contextlib
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from service.config import ConfigError, RunError
from service.environment import worker_environment
from service.mlflow_server import is_loopback
from service.submission import (
    EXCLUDES,
    HEAD_RESOURCE,
    STOP_SECONDS,
    STOP_VARIABLE,
    check_package,
    entrypoint,
    job_environment,
    job_id,
    package_sizes,
)

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

log = logging.getLogger(__name__)

DEFAULT_URL = "http://127.0.0.1:8265"
ANSWER_SECONDS = 10.0
# How long a cluster may be away before following ends; the job is not touched.
AWAY_SECONDS = 60.0
POLL_SECONDS = 0.5
# A connection that was cut is as quiet as a job may be: after this time it is made again.
QUIET_SECONDS = 60.0
STOPPED_CODE = 130
TOKEN_REMEDY = (
    "put the cluster's token into a file of yours alone (chmod 600) and the file's path into "
    "RAY_AUTH_TOKEN_PATH, or the token into RAY_AUTH_TOKEN"
)
PYTHON_HEADER = re.compile(r"Python/(\d+\.\d+)")


@dataclass(frozen=True)
class Cluster:
    """What a cluster says of itself.

    Attributes:
        ray: version.
        python: major and minor version of its head, where it is told.
    """

    url: str
    ray: str
    python: str | None


@dataclass(frozen=True)
class Job:
    """A job, as a person wants to see it.

    Attributes:
        state: PENDING (in the queue), RUNNING, SUCCEEDED, FAILED or STOPPED.
        submitted: seconds since 1970.
        seconds: since then, until its end or now.
        exit_code: of its command; None before the end.
        reason: why it failed, if its command never ran.
    """

    id: str
    state: str
    command: str
    name: str
    submitted: float
    seconds: float
    exit_code: int | None
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.exit_code is not None


def jobs_url(given: str | None, environ: Mapping[str, str]) -> str:
    """The cluster's address for jobs: given, RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this machine.

    Raises:
        ConfigError: it is not the address of a dashboard.
    """
    places = (
        ("--address", given),
        *((name, environ.get(name)) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")),
    )
    source, value = next(((name, text) for name, text in places if text), ("", DEFAULT_URL))
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        host = parts.hostname or value.partition(":")[0] or "HEAD"
        raise ConfigError(
            f"{source}={value} is no address for jobs, which go to the head's dashboard: "
            f"--address http://{host}:8265, or https:// where it has TLS"
        )
    if parts.username or parts.password:
        raise ConfigError(
            f"{source} holds a user or password; addresses end up in logs; take it out, and give "
            "the cluster's token in RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        )
    return value.rstrip("/")


def check_clear_text(url: str, has_token: bool, *, insecure: bool) -> None:
    """Refuse to send a token in clear beyond this machine.

    Raises:
        ConfigError: it would be.
    """
    parts = urlsplit(url)
    if insecure or not has_token or parts.scheme == "https" or is_loopback(parts.hostname or ""):
        return
    raise ConfigError(
        f"{url} is another machine without TLS: everyone on the way could read the token, and who "
        "has it can run anything on the cluster; use https://, a tunnel (ssh -L 8265:localhost:8265"
        f" {parts.hostname}, then --address {DEFAULT_URL}), or --insecure in a network you trust"
    )


def check_versions(cluster: Cluster, ray_version: str, python: str) -> None:
    """Compare the cluster's versions with those of this side.

    Raises:
        RunError: they differ.
    """
    for name, theirs, ours, remedy in (
        ("Ray", cluster.ray, ray_version, f'uv pip install "ray=={cluster.ray}"'),
        ("Python", cluster.python, python, f"uv python install {cluster.python}"),
    ):
        if theirs and theirs != ours:
            raise RunError(
                f"the cluster at {cluster.url} runs {name} {theirs}, this command {name} {ours}; "
                f"they must be equal; here: {remedy}, or start the cluster from an image that has "
                f"{name} {ours}"
            )


class Jobs:
    """The jobs of one cluster.

    Args:
        address: see `jobs_url`.
        insecure: allow a token in clear beyond this machine.

    Raises:
        ConfigError: the address cannot be used.
        RunError: nothing answers there, the token is refused, or versions differ.
    """

    def __init__(self, address: str | None, *, insecure: bool):
        self.url = jobs_url(address, os.environ)
        has_token = os.environ.get("RAY_AUTH_MODE", "disabled") != "disabled"
        check_clear_text(self.url, has_token, insecure=insecure)
        _silence()
        import ray

        cluster = _ask(self.url)
        check_versions(cluster, ray.__version__, ".".join(platform.python_version_tuple()[:2]))
        if cluster.python is None:
            log.info("%s does not tell its Python version: it was not compared", self.url)
        self._client = _client(self.url)

    def nodes(self) -> list[Mapping[str, float]]:
        """What each node of the cluster has, by name: CPU, GPU and others."""
        with _answered(self.url):
            answer = self._client._do_request("GET", "/api/v0/nodes?detail=1&limit=10000")
            answer.raise_for_status()
        numbers = int | float  # memory comes as text
        return [
            {k: v for k, v in node["resources_total"].items() if isinstance(v, numbers)}
            for node in answer.json()["data"]["result"]["result"]
            if node["state"] == "ALIVE"
        ]

    def submit(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        name: str = "",
        share: float,
        uv: bool = False,
        with_secrets: bool = False,
    ) -> str:
        """Send a working directory and run a command in it; returns the job's id at once.

        Args:
            command: verb and arguments of `midas`.
            name: of the run, for `list`.
            share: see `head_share`.
            uv: run in the environment that `uv run` makes of the working directory.
            with_secrets: send passwords of this environment too.

        Raises:
            ConfigError: the folder is too large.
            RunError: the cluster did not take it.
        """
        check_package(folder, package_sizes(folder))
        self._warn_of_loopback(os.environ.get("MLFLOW_TRACKING_URI", ""))
        variables, hidden = job_environment(*worker_environment(), uv=uv, with_secrets=with_secrets)
        if hidden:
            log.warning(
                "not sent: %s; a job's environment can be read by everyone with the cluster's "
                "token; set it on the nodes, or add --with-secrets",
                ", ".join(hidden),
            )
        subject = next((word for word in command[1:2] if not word.startswith("-")), "")
        with _answered(self.url):
            return self._client.submit_job(
                entrypoint=entrypoint(command, uv=uv),
                submission_id=job_id(command, name),
                runtime_env={
                    "working_dir": str(folder),
                    "excludes": list(EXCLUDES),
                    "env_vars": variables,
                },
                metadata={"verb": command[0], "preset": subject, "name": name},
                entrypoint_resources={HEAD_RESOURCE: share},
            )

    def all(self) -> list[Job]:
        """All jobs that were submitted, the oldest first."""
        with _answered(self.url):
            found = self._client.list_jobs()
        jobs = [_job(details) for details in found if details.submission_id]
        return sorted(jobs, key=lambda job: job.submitted)

    def get(self, job: str) -> Job:
        """One job.

        Raises:
            RunError: there is none of this id.
        """
        return _job(self._details(job))

    def logs(self, job: str) -> str:
        """What a job has written so far."""
        self.get(job)
        with _answered(self.url):
            return self._client.get_job_logs(job)

    def follow(self, job: str, write: Callable[[str], None]) -> Job:
        """Write what a job writes until it ends, each character once, however often the connection
        breaks.

        Raises:
            RunError: there is none of this id, or the cluster was away for AWAY_SECONDS.
        """
        seen, answered = 0, time.monotonic()
        while True:
            try:
                if (found := self.get(job)).ended:
                    write(self.logs(job)[seen:])
                    return found
                answered = time.monotonic()
            except AwayError as error:
                if time.monotonic() - answered > AWAY_SECONDS:
                    raise RunError(
                        f"the cluster at {self.url} has not answered for {AWAY_SECONDS:g} s; job "
                        f"{job} may go on; midas logs {job} --follow follows it again"
                    ) from error
            position = 0
            for text in self._stream(job):
                write(text[max(0, seen - position) :])
                position += len(text)
                seen = max(seen, position)
            time.sleep(POLL_SECONDS)

    def _stream(self, job: str) -> Iterator[str]:
        """What a job has written and writes, until it ends or the connection breaks."""
        import aiohttp

        chunks = self._client.tail_job_logs(job)
        with asyncio.Runner() as runner:
            while True:
                try:
                    text = runner.run(asyncio.wait_for(anext(chunks, None), QUIET_SECONDS))
                except (OSError, RuntimeError, aiohttp.ClientError):  # a timeout is an OSError
                    return
                if text is None:
                    return
                yield text

    def stop(self, job: str) -> Job:
        """Stop a job and wait for its end; a training saves its state and can be continued.

        Ray gives a job 3 s, or what STOP_VARIABLE of its environment says. Where that says
        nothing, the driver is asked by a signal first. A job that is still in the queue stays
        there until it gets a place, and ends then.

        Raises:
            RunError: there is none of this id, or it goes on.
        """
        details = self._details(job)
        if (found := _job(details)).ended:
            return found
        variables = (details.runtime_env or {}).get("env_vars") or {}
        if STOP_VARIABLE not in variables and details.driver_info:
            self._signal(details)
            found = self._wait(job, STOP_SECONDS)
        if not found.ended:
            with _answered(self.url):
                self._client.stop_job(job)
            found = self._wait(job, ANSWER_SECONDS)
        if found.state == "RUNNING":
            found = self._wait(job, STOP_SECONDS)
        if found.state == "RUNNING":
            raise RunError(
                f"job {job} has been asked to stop and still runs; midas logs {job} shows why"
            )
        return found

    def _warn_of_loopback(self, tracking: str) -> None:
        places = [urlsplit(uri).hostname or "" for uri in (self.url, tracking)]
        if "://" in tracking and [is_loopback(place) for place in places] == [False, True]:
            log.warning("MLFLOW_TRACKING_URI=%s: on the cluster that is another machine", tracking)

    def _details(self, job: str) -> "JobDetails":
        with _answered(self.url):
            try:
                return self._client.get_job_info(job)
            except RuntimeError as error:
                if "status code 404" not in str(error):
                    raise
                raise RunError(
                    f"{self.url} knows no job {job!r}; midas jobs lists those it knows (they are "
                    "forgotten when the head starts anew)"
                ) from error

    def _wait(self, job: str, seconds: float) -> Job:
        deadline = time.monotonic() + seconds
        while not (found := self.get(job)).ended and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return found

    def _signal(self, details: "JobDetails") -> None:
        """SIGTERM to the driver of a job, from a small job on the same node."""
        assert details.driver_info
        pid = int(details.driver_info.pid)
        place = {"ray.io/node-id": details.driver_node_id} if details.driver_node_id else None
        with _answered(self.url):
            helper = self._client.submit_job(
                entrypoint=f"kill -TERM {pid}", entrypoint_label_selector=place
            )
            self._wait(helper, ANSWER_SECONDS)
            with contextlib.suppress(RuntimeError):
                self._client.delete_job(helper)


class AwayError(RunError):
    """The cluster does not answer."""


def exit_code(state: str, code: int | None) -> int | None:
    """The exit code of a job's command, as a shell would give it; None before the end."""
    if state == "STOPPED":
        return STOPPED_CODE
    if state == "FAILED":
        return 1 if code is None else code if code >= 0 else 128 - code
    return 0 if state == "SUCCEEDED" else None


def jobs_record(jobs: Sequence[Job]) -> dict[str, Any]:
    """Flat: `<id>/<field>`, and the number of jobs."""
    fields = {f"{job.id}/{k}": v for job in jobs for k, v in asdict(job).items() if k != "id"}
    return {"jobs": len(jobs), **fields}


def _job(details: "JobDetails") -> Job:
    metadata = details.metadata or {}
    state = str(details.status.value)
    code = exit_code(state, details.driver_exit_code)
    if code == STOPPED_CODE:  # it stopped by itself, asked by a signal
        state = "STOPPED"
    began = (details.start_time or 0) / 1000
    ended = details.end_time / 1000 if details.end_time else time.time()
    command = " ".join(w for w in (metadata.get("verb"), metadata.get("preset")) if w)
    return Job(
        id=details.submission_id or "",
        state=state,
        command=command or details.entrypoint,
        name=metadata.get("name", ""),
        submitted=began,
        seconds=max(0.0, ended - began),
        exit_code=code,
        reason=_reason(details) if state == "FAILED" else "",
    )


def _reason(details: "JobDetails") -> str:
    """Why a job failed whose command never ran, or was killed; its own output says the rest."""
    if details.driver_exit_code is not None and details.driver_exit_code >= 0:
        return ""
    text = (details.message or "").strip()
    if details.error_type == "JOB_SUPERVISOR_ACTOR_START_TIMEOUT":
        return (
            "it found no place in time: Ray lets a job wait for 15 minutes, or for "
            "RAY_JOB_START_TIMEOUT_SECONDS of the head's environment; start the head with more, "
            "then submit again"
        )
    if details.driver_exit_code is not None:
        return (
            f"its command was killed by signal {-details.driver_exit_code}; 9 is often the system "
            "being out of memory; the same command continues at the last checkpoint"
        )
    return text.splitlines()[-1] if text else ""


def _ask(url: str) -> Cluster:
    """Greet a cluster, with the token."""
    import requests
    from ray._private.authentication.http_token_authentication import (
        get_auth_headers_if_auth_enabled,
    )
    from ray.exceptions import AuthenticationError

    try:
        headers = get_auth_headers_if_auth_enabled({})
    except AuthenticationError as error:  # a sentence, then Ray's documentation
        reason = str(error).partition(". ")[0]
        raise ConfigError(f"there is no token for {url}: {reason}; {TOKEN_REMEDY}") from error
    try:
        answer = requests.get(
            f"{url}/api/version",
            headers=headers,
            timeout=ANSWER_SECONDS,
            verify=_certificates(),
            allow_redirects=False,
        )
    except requests.RequestException as error:
        raise AwayError(
            f"no Ray answers jobs at {url}: {type(error).__name__}; its head must run (`ray start "
            "--head`, which shows the dashboard's address) and be reachable from here; correct "
            "--address or RAY_API_SERVER_ADDRESS"
        ) from error
    if answer.status_code in (401, 403):
        raise _refused(url, answer.status_code)
    try:
        found = answer.json()["ray_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{url} answers, but not as Ray's dashboard does ({answer.status_code}); correct "
            "--address or RAY_API_SERVER_ADDRESS"
        ) from error
    python = PYTHON_HEADER.search(answer.headers.get("Server", ""))
    return Cluster(url, found, python[1] if python else None)


def _refused(url: str, status: int) -> RunError:
    what = "wants a token, and none was sent" if status == 401 else "refused the token"
    return RunError(f"the cluster at {url} {what}; {TOKEN_REMEDY}")


def _certificates() -> str | bool:
    """A file of certificates to trust, or the system's."""
    return os.environ.get("SSL_CERT_FILE") or True


def _client(url: str) -> "JobSubmissionClient":
    """Ray's client for this address, which its environment variables would replace."""
    from ray.job_submission import JobSubmissionClient

    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        return JobSubmissionClient(url, verify=_certificates())
    finally:
        os.environ.update(kept)


@contextlib.contextmanager
def _answered(url: str) -> Iterator[None]:
    """Raise RunErrors for what Ray's client raises."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise _refused(url, 401 if "required" in str(error) else 403) from error
    except (requests.RequestException, ConnectionError) as error:
        raise AwayError(f"the cluster at {url} does not answer: {type(error).__name__}") from error
    except RunError:
        raise
    except RuntimeError as error:
        away = "status code 5" in str(error)  # of a proxy, or of a head that starts
        what = AwayError if away else RunError
        raise what(f"the cluster at {url} refused: {str(error).splitlines()[0]}") from error


def _silence() -> None:
    """Ray's client tells what it packs and where it connects."""
    import ray.dashboard.modules.job.sdk  # noqa: F401

    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    logging.getLogger("ray._private").setLevel(logging.ERROR)

"""compose.yaml as processes of this machine, for where there is no container engine:

    uv run python docker/processes.py FOLDER [SERVICE ...]

Starts PostgreSQL, an S3-compatible store, MLflow with accounts, a Ray head and two worker nodes,
with the commands, environments and secrets of compose.yaml, on loopback (but for Ray's inner ports,
which Ray opens on all addresses). Waits until each is healthy, says what to type in another shell,
and ends all on Ctrl-C or SIGTERM, or when one ends. With names of services it starts these and what
they depend on.

A playground: the store is moto, which keeps objects in memory and checks no keys, and every start
begins anew in a folder of its own. FOLDER/runs, the storage of the jobs, and all logs stay there.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

DOCKER = Path(__file__).resolve().parent
PYTHON = Path(sys.executable).parent
ENTRYPOINT = str(DOCKER / "runtime/entrypoint.sh")
CHECK = ["python", str(DOCKER / "runtime/health.py")]
START_SECONDS = 300.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.5
MAX_FOLDER_CHARACTERS = 30  # Ray's sockets lie in it, and their paths have at most 107
DATABASE_PORT, STORE_PORT = 5432, 8333
FOREIGN = ("RAY_", "MLFLOW_", "AWS_", "PG")


class StartError(RuntimeError):
    """A service did not start; the message says why and what to do."""


@dataclass(frozen=True)
class Service:
    """One process.

    Attributes:
        name: as in compose.yaml, with a number where there are several.
        health: command that ends with 0 when it is healthy; None if its end is what is waited for.
        prepare, finish: commands that are run before its start, and once it is healthy.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    health: Sequence[str] | None
    prepare: Sequence[Sequence[str]] = ()
    finish: Sequence[Sequence[str]] = ()


class Plan:
    """What compose.yaml describes, translated to this machine.

    Args:
        folder: for everything that the services write.
        cpus: logical CPUs of each worker node.
        store_bytes: object store of each Ray node.

    Attributes:
        ports: of this machine, by those of compose.yaml.

    Raises:
        StartError: the machine lacks something.
    """

    def __init__(self, folder: Path, cpus: int, store_bytes: int):
        self.folder = folder
        self._cpus, self._store_bytes = cpus, store_bytes
        self.compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
        self._hosts = "|".join([*self.compose["services"], "localhost", r"127\.0\.0\.1"])
        self.ports = {port: free_port(port) for port in self._container_ports()}

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs, as the right sides of shell assignments."""
        return {
            "RAY_API_SERVER_ADDRESS": self._here("http://127.0.0.1:8265"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self._here("/run/secrets/ray_token"),
            "MLFLOW_TRACKING_URI": self._here("http://127.0.0.1:5000"),
            "MLFLOW_TRACKING_USERNAME": "midas",
            "MLFLOW_TRACKING_PASSWORD": f"$(cat {self._here('/run/secrets/mlflow_password')})",
            "RUNS": str(self.folder / "runs"),
        }

    def waves(self, names: Sequence[str]) -> Iterator[list[Service]]:
        """The services of these names and what they depend on; each wave needs those before it.

        Raises:
            StartError: there is none of a name.
        """
        described = self.compose["services"]
        if unknown := set(names) - set(described):
            raise StartError(
                f"compose.yaml has no service {', '.join(sorted(unknown))}; it has "
                f"{', '.join(described)}"
            )
        left, done = set(names), set()
        for _ in described:
            left |= {need for name in left for need in described[name].get("depends_on", {})}
        while left:
            ready = {name for name in left if set(described[name].get("depends_on", {})) <= done}
            yield [service for name in sorted(ready) for service in self._services(name)]
            left, done = left - ready, done | ready

    def _container_ports(self) -> set[int]:
        text = (DOCKER / "compose.yaml").read_text()
        found = re.findall(rf"(?:\b(?:{self._hosts}):|--port=)(\d{{4,5}})\b", text)
        return {DATABASE_PORT, *map(int, found)}

    def _here(self, text: str) -> str:
        """A value of compose.yaml with the places that its containers see."""
        secrets = self.compose["secrets"]
        text = re.sub(
            r"/run/secrets/(\w+)", lambda name: str(self.folder / secrets[name[1]]["file"]), text
        )
        text = re.sub(
            rf"\b({self._hosts}):(\d+)",
            lambda place: f"{_local(place[1])}:{self.ports.get(int(place[2]), place[2])}",
            text,
        )
        text = re.sub(r"--port=(\d+)", lambda port: f"--port={self.ports[int(port[1])]}", text)
        return text.replace("/opt/runtime", str(DOCKER / "runtime")).replace("0.0.0.0", "127.0.0.1")

    def _services(self, name: str) -> list[Service]:
        if name == "postgres":
            return [self._postgres()]
        if name == "store":
            return [self._store()]
        described = self.compose["services"][name]
        environment = self._own_environment(described.get("environment", {}))
        command = [self._here(word) for word in described["command"]]
        if name in ("ray-head", "ray-worker"):
            count = described["deploy"].get("replicas", 1)
            names = [name] if count == 1 else [f"{name}-{n}" for n in range(1, count + 1)]
            return [self._ray(name, command, environment) for name in names]
        health = described["healthcheck"].get("test", [None])[1:]
        return [
            Service(
                name,
                [ENTRYPOINT, *command],
                environment,
                [self._here(word) for word in health] or None,
            )
        ]

    def _own_environment(self, described: Mapping[str, str]) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        own = {name: self._here(value) for name, value in described.items()}
        if "PGHOST" in own:
            own |= {"PGHOST": "127.0.0.1", "PGPORT": str(self.ports[DATABASE_PORT])}
        path = f"{PYTHON}{os.pathsep}{os.environ['PATH']}"
        image = {name: self._here(value) for name, value in image_environment().items()}
        return {**kept, **image, "PATH": path, **own}

    def _ray(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Service:
        agent = free_port(0)
        changed: dict[str, Any] = {
            "node-ip-address": "127.0.0.1",
            "temp-dir": self.folder
            / name,  # nodes that start at once in one take each other's sockets
            "object-store-memory": self._store_bytes,
            "dashboard-agent-listen-port": agent,
            "min-worker-port": 0,  # any that is free; else every node would begin at 10002
            "max-worker-port": 0,
        }
        if name == "ray-head":
            port = self._here("127.0.0.1:8265").rpartition(":")[2]
            changed |= {"dashboard-port": port, "ray-client-server-port": free_port(10001)}
        else:
            changed["num-cpus"] = self._cpus
        kept = [word for word in command if word[2:].partition("=")[0] not in changed]
        return Service(
            name,
            [
                ENTRYPOINT,
                *kept,
                *(f"--{flag}={value}" for flag, value in changed.items()),
            ],
            {**environment, "HEALTH_URL": f"http://127.0.0.1:{agent}/api/healthz"},
            CHECK,
        )

    def _store(self) -> Service:
        port = str(self.ports[STORE_PORT])
        environment = self._own_environment({"HEALTH_URL": f"http://127.0.0.1:{port}/moto-api/"})
        command = ["python", "-m", "moto.server", "--host=127.0.0.1", f"--port={port}"]
        return Service("store", command, environment, CHECK)

    def _postgres(self) -> Service:
        """The server of the distribution, set up as the image's entrypoint does it."""
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        if not found:
            raise StartError(
                "there is no PostgreSQL in /usr/lib/postgresql: apt install postgresql"
            )
        described = self.compose["services"]["postgres"]
        settings, folder = described["environment"], self.folder / "postgres"
        data, password, port = folder / "data", folder / "password", self.ports[DATABASE_PORT]
        account: list[str] = []
        prepare = [["install", "-d", "-m", "700", str(folder)]]
        prepare.append(["cp", self._here(settings["POSTGRES_PASSWORD_FILE"]), str(password)])
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            account = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            prepare.append(["chown", "-R", "postgres", str(folder)])
        user, name = settings["POSTGRES_USER"], settings["POSTGRES_DB"]
        initdb = [f"--username={user}", f"--pgdata={data}", f"--pwfile={password}"]
        initdb += settings["POSTGRES_INITDB_ARGS"].split()
        prepare.append([*account, str(found[-1] / "initdb"), *initdb])
        command = [*account, str(found[-1] / "postgres"), "-D", str(data), "-p", str(port)]
        command += ["-k", str(folder), "-c", "listen_addresses=127.0.0.1"]
        place = ["-h", "127.0.0.1", "-p", str(port)]
        return Service(
            "postgres",
            command,
            self._own_environment({"PGPASSWORD_FILE": settings["POSTGRES_PASSWORD_FILE"]}),
            [str(found[-1] / "pg_isready"), *place, "-U", user],
            prepare,
            [[ENTRYPOINT, str(found[-1] / "createdb"), *place, "-U", user, name]],
        )


def image_environment() -> dict[str, str]:
    """What the Dockerfile sets for all that runs in its images, but what is each machine's."""
    stage = (DOCKER / "Dockerfile").read_text().partition(" AS runtime\n")[2].partition("\nFROM")[0]
    words = re.findall(r"^ENV (.*)$", stage.replace("\\\n", " "), re.MULTILINE)
    found = dict(word.split("=", 1) for line in words for word in shlex.split(line))
    return {name: value for name, value in found.items() if name not in ("PATH", "HEALTH_URL")}


def _local(host: str) -> str:
    return host if host == "localhost" else "127.0.0.1"


def free_port(wanted: int) -> int:
    """This port of the loopback, or another where somebody listens."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as server:
            return server.getsockname()[1]
    raise StartError("no port of 127.0.0.1 is free")


class Processes:
    """The services that run.

    Args:
        folder: of the plan.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def pids(self) -> dict[str, int]:
        """The first process of each service."""
        return {name: process.pid for name, process in self._running.items()}

    def start(self, services: Sequence[Service]) -> None:
        """Start these and wait until they are healthy.

        Raises:
            StartError: one is not.
        """
        for service in services:
            for command in service.prepare:
                self._run(service, command)
            with self._log(service.name).open("ab") as log:
                self._running[service.name] = subprocess.Popen(
                    service.command,
                    env=dict(service.environment),
                    cwd=self._folder,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for this script
                )
        for service in services:
            self._wait(service)
            for command in service.finish:
                self._run(service, command)

    def ended(self) -> str | None:
        """The name of a service that has ended."""
        return next((name for name, p in self._running.items() if p.poll() is not None), None)

    def stop(self) -> None:
        """End all, with what they have started."""
        processes = list(self._running.values())
        family = [member for process in processes for member in _descendants(process.pid)]
        for process in reversed(processes):
            process.terminate()
        _, left = psutil.wait_procs(family, timeout=STOP_SECONDS)
        for member in left:  # Ray's nodes take half a minute to end by themselves
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _wait(self, service: Service) -> None:
        process, deadline = self._running[service.name], time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            code = process.poll()
            if code is not None and (code or service.health):
                raise StartError(f"{service.name} ended with {code}; {self._last_words(service)}")
            if code == 0:
                del self._running[service.name]
            if code == 0 or (service.health and self._is_healthy(service)):
                return
            time.sleep(POLL_SECONDS)
        raise StartError(
            f"{service.name} is not healthy after {START_SECONDS:g} s; {self._last_words(service)}"
        )

    def _is_healthy(self, service: Service) -> bool:
        assert service.health
        environment = dict(service.environment)
        check = subprocess.run(service.health, env=environment, capture_output=True, check=False)
        return check.returncode == 0

    def _run(self, service: Service, command: Sequence[str]) -> None:
        with self._log(service.name).open("ab") as log:
            done = subprocess.run(
                command,
                env=dict(service.environment),
                cwd="/",
                stdout=log,
                stderr=log,
                check=False,
            )
        if done.returncode:
            raise StartError(
                f"{service.name}: {Path(command[0]).name} ended with {done.returncode}; "
                f"{self._last_words(service)}"
            )

    def _log(self, name: str) -> Path:
        return self._folder / "logs" / f"{name}.log"

    def _last_words(self, service: Service) -> str:
        log = self._log(service.name)
        lines = log.read_text(errors="replace").splitlines()[-20:]
        return "\n".join([f"the end of {log}:", *lines])


def _descendants(pid: int) -> list[psutil.Process]:
    """A process and all that it started, some of which are in sessions of their own."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def make_folder(folder: Path) -> None:
    """Make the folder with new secrets in it.

    Raises:
        StartError: it cannot be used.
    """
    if len(str(folder)) > MAX_FOLDER_CHARACTERS:
        raise StartError(
            f"{folder} has more than {MAX_FOLDER_CHARACTERS} characters, too many for the paths of "
            "Ray's sockets; take a shorter one, as /tmp/midas"
        )
    try:
        folder.mkdir(mode=0o755, parents=True)
    except FileExistsError:
        raise StartError(
            f"{folder} exists; every start takes a new folder: remove it or name another"
        ) from None
    for name in ("logs", "runs"):
        (folder / name).mkdir(mode=0o700)
    subprocess.run([DOCKER / "secrets.sh", folder / "secrets"], check=True)
    for path in (folder / "secrets").rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)


def run(folder: Path, services: Sequence[str], cpus: int, store_bytes: int) -> None:
    """Start services, and return when a signal raises KeyboardInterrupt or one of them ends.

    Raises:
        StartError: one did not start, or ended.
    """
    make_folder(folder)
    plan, processes = Plan(folder, cpus, store_bytes), Processes(folder)
    try:
        for wave in plan.waves(services or list(plan.compose["services"])):
            print(f"starting {', '.join(service.name for service in wave)}", flush=True)
            processes.start(wave)
        state = {"pids": processes.pids, "ports": plan.ports}
        (folder / "processes.json").write_text(json.dumps(state))
        lines = [f"export {name}={value}" for name, value in plan.environment.items()]
        (folder / "environment").write_text("\n".join(lines) + "\n")
        print("\n".join(["", *lines, ""]))
        print(f"all run; in another shell: . {folder}/environment; Ctrl-C ends them", flush=True)
        while not (name := processes.ended()):
            time.sleep(POLL_SECONDS)
        raise StartError(f"{name} has ended; see {folder}/logs/{name}.log")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        print("ending all", flush=True)
        processes.stop()
        (folder / "environment").unlink(missing_ok=True)
        shutil.rmtree(folder / "secrets", ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="new folder with a short path, as /tmp/midas")
    parser.add_argument("services", nargs="*", help="default: all of compose.yaml")
    parser.add_argument(
        "--cpus",
        type=int,
        default=max(1, len(os.sched_getaffinity(0)) // 2),
        help="logical CPUs of each worker node (default: half of this machine's)",
    )
    parser.add_argument(
        "--object-store-mib", type=int, default=200, help="of each Ray node (default: 200)"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(args.folder.absolute(), args.services, args.cpus, args.object_store_mib << 20)
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs the stages of a Dockerfile without a container engine.

A stage is an overlay over its parent, down to a minimal Debian of the release of the base image,
which debootstrap makes, with Debian's Python in place of the image's. Steps run in it by chroot, in
namespaces of their own that end with them. Needs root, and a kernel that gives overlays to it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
# pip as in the image: in /usr/local, and free to install there.
PREPARE = (
    "rm -f /usr/lib/python3*/EXTERNALLY-MANAGED; ln -sf python3 /usr/bin/python; "
    "pip install --quiet --root-user-action=ignore --ignore-installed pip setuptools wheel; "
    "rm -rf /usr/bin/pip*"
)
# What tells this machine's clients where and how to get packages.
FETCHING = re.compile(r"(PIP|UV|SSL|REQUESTS|CURL)_|\w+_proxy$", re.IGNORECASE)
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENTER = """
set -eu
root=$1 lower=$2 upper=$3 work=$4; shift 4
if [ -n "$upper" ]; then
    mount -t overlay overlay -o "lowerdir=$lower,upperdir=$upper,workdir=$work" "$root"
else
    mount -t overlay overlay -o "lowerdir=$lower" "$root"
fi
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
while [ "$1" != -- ]; do
    case $1 in
    tmpfs) mount -t tmpfs -o "mode=1777" tmpfs "$root$2"; shift 2 ;;
    bind) mkdir -p "$root$3"; mount --bind "$2" "$root$3"; shift 3 ;;
    file) mount --bind "$2" "$root$3"; shift 3 ;;
    esac
done
shift
if [ -n "${NO_NETWORK:-}" ]; then ip link set lo up; fi
exec chroot "$@"
"""


@dataclass
class Stage:
    """A stage as its instructions leave it."""

    parent: "Stage | None"
    upper: Path
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0:0"
    health: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def layers(self) -> list[Path]:
        """Its folders, the uppermost first."""
        return [self.upper, *(self.parent.layers() if self.parent else [])]

    def path(self, inside: str) -> Path:
        """The file on this machine that lies at an absolute path in the stage."""
        for layer in self.layers():
            if (found := layer / inside.lstrip("/")).exists():
                return found
        raise FileNotFoundError(inside)


class Builder:
    """Builds stages in a folder.

    Attributes:
        ran: the RUN steps that ran, as (stage, command).
    """

    def __init__(self, dockerfile: Path, context: Path, folder: Path):
        self._context, self._folder = context, folder
        self._names: dict[str, list[tuple[str, str]]] = {}
        self._stages: dict[str, Stage] = {}
        self._parents: dict[str, str] = {}
        self.ran: list[tuple[str, str]] = []
        name = ""
        for step in DockerfileParser(path=str(dockerfile)).structure:
            instruction, value = step["instruction"], step["value"]
            if instruction == "FROM":
                parent, _, name = value.split()
                self._parents[name], self._names[name] = parent, []
            elif name:
                self._names[name].append((instruction, value))

    @property
    def steps(self) -> set[tuple[str, str]]:
        """All RUN steps of the file."""
        return {
            (stage, value)
            for stage, steps in self._names.items()
            for instruction, value in steps
            if instruction == "RUN"
        }

    def build(self, name: str) -> Stage:
        """A stage, after those it needs."""
        if name.startswith("${"):
            return self._base()
        if name not in self._stages:
            parent = self.build(self._parents[name])
            stage = Stage(
                parent,
                self._new(name),
                dict(parent.environment),
                *(parent.folder, parent.user, parent.health, parent.entrypoint, parent.command),
            )
            for instruction, value in self._names[name]:
                if instruction != "COMMENT":
                    getattr(self, f"_{instruction.lower()}")(name, stage, value)
            self._stages[name] = stage
        return self._stages[name]

    def run(
        self,
        stage: Stage,
        command: list[str],
        *,
        binds: dict[Path, str] | None = None,
        tmpfs: tuple[str, ...] = (),
        sealed: bool = False,
        timeout: float = 3000,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a stage.

        Args:
            stage: where.
            command: words of the command.
            binds: files and folders of this machine by where they are in the stage.
            tmpfs: folders that are empty and writable.
            sealed: its root may not be written, and it has no network but its own loopback.
            timeout: seconds it may take.
            environment: what it has beside the environment of the stage.
        """
        root, work = self._folder / "root", self._folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        for folder in (root, work):
            folder.mkdir(exist_ok=True)
        layers = stage.layers()
        lower = layers if sealed else layers[1:]
        mounts = [str(root), ":".join(map(str, lower))]
        mounts += ["", ""] if sealed else [str(stage.upper), str(work)]
        for folder in ("/dev/shm", *tmpfs):
            mounts += ["tmpfs", folder]
        for here, there in (binds or {}).items():
            mounts += ["file" if here.is_file() else "bind", str(here), there]
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        unshare += ["--net", "--ipc"] if sealed else []
        inside = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', stage.folder, *command]
        return subprocess.run(
            [*unshare, "sh", "-c", ENTER, "enter", *mounts, "--"]
            + [f"--userspec={stage.user}", str(root), *inside],
            env={
                "PATH": PATH,
                **stage.environment,
                "HOME": "/root" if stage.user.startswith("0") else "/home/midas",
                **({"NO_NETWORK": "1"} if sealed else {}),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def _new(self, name: str) -> Path:
        folder = self._folder / "stages" / name
        folder.mkdir(parents=True)
        return folder

    def _base(self) -> Stage:
        if "base" not in self._stages:
            folder = self._new("base")
            command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm"]
            done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            stage = Stage(None, folder)
            self._stages["base"] = Stage(stage, self._new("python"))
            self._fetching("base", self._stages["base"], PREPARE, {})
        return self._stages["base"]

    def _fetching(self, name: str, stage: Stage, script: str, binds: dict[Path, str]) -> None:
        """Run a step, which may get packages the way this machine does."""
        ours = {key: value for key, value in os.environ.items() if FETCHING.match(key)}
        files = [Path("/etc/resolv.conf"), CERTIFICATES, Path("/etc/pip.conf")]
        for file in (file for file in files if file.exists()):
            binds = {**binds, file.resolve(): str(file)}
        (stage.upper / "etc").mkdir(exist_ok=True)
        for file in ("resolv.conf", "pip.conf"):
            (stage.upper / "etc" / file).touch()
        done = self.run(
            stage, ["sh", "-c", script], binds=binds, **{"SSL_CERT_FILE": str(CERTIFICATES)} | ours
        )
        assert done.returncode == 0, f"{name}: {script}\n{done.stdout}\n{done.stderr}"

    def _run(self, name: str, stage: Stage, value: str) -> None:
        binds = {}
        script = value
        while script.startswith("--"):
            option, _, script = script.partition(" ")
            script = script.lstrip()
            [target] = re.findall(r"--mount=type=cache,target=(\S+)", option)
            cache = subprocess.run(["uv", "cache", "dir"], capture_output=True, text=True)
            binds[Path(cache.stdout.strip())] = target
        self._fetching(name, stage, script, binds)
        self.ran.append((name, value))

    def _copy(self, name: str, stage: Stage, value: str) -> None:
        words = value.split()
        origin = None
        if words[0].startswith("--from="):
            origin = self.build(words.pop(0).removeprefix("--from="))
        *sources, target = words
        into = target.endswith("/")
        there = stage.upper / os.path.join(stage.folder, target).lstrip("/")
        for source in sources:
            here = origin.path(source) if origin else self._context / source
            if here.is_dir():
                ignore = shutil.ignore_patterns("__pycache__") if not origin else None
                shutil.copytree(here, there, symlinks=True, dirs_exist_ok=True, ignore=ignore)
            else:
                at = there / here.name if into else there
                at.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(here, at)

    def _env(self, name: str, stage: Stage, value: str) -> None:
        for word in shlex.split(value):
            key, _, setting = word.partition("=")
            earlier = stage.environment.get(key, PATH if key == "PATH" else "")
            stage.environment[key] = setting.replace(f"${key}", earlier)

    def _workdir(self, name: str, stage: Stage, value: str) -> None:
        stage.folder = value
        (stage.upper / value.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _user(self, name: str, stage: Stage, value: str) -> None:
        stage.user = value

    def _healthcheck(self, name: str, stage: Stage, value: str) -> None:
        stage.health = json.loads(value.partition("CMD")[2])

    def _entrypoint(self, name: str, stage: Stage, value: str) -> None:
        stage.entrypoint = json.loads(value)

    def _cmd(self, name: str, stage: Stage, value: str) -> None:
        stage.command = json.loads(value)

"""Two nodes with a network between them that is cut in mid-training, and healed."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from service.files import read_history
from tests.service.cli import SMALL, finish, until, weights

IP = shutil.which("ip")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]
PYTHON = Path(sys.executable).parent
HEAD, OTHER = "10.77.0.11", "10.77.0.12"
PORT = 6400
NAMESPACES = {"midas1": HEAD, "midas2": OTHER}
TRAIN = ["train", "digits", *SMALL, "--optim.epochs", "40", "--checkpoint.every-steps", "20"]
ROOM = ["--scaling.start-timeout-seconds", "15"]


def ip(words: str) -> None:
    done = subprocess.run([str(IP), *words.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {words}: {done.stderr}"


@contextlib.contextmanager
def network() -> Iterator[None]:
    """A bridge, and a namespace with an address of its own at each of its two ports."""
    try:
        ip("link add midasbr type bridge")
        ip("link set midasbr up")
        for number, (name, address) in enumerate(NAMESPACES.items(), 1):
            ip(f"netns add {name}")
            ip(f"link add midasv{number} type veth peer name eth0 netns {name}")
            ip(f"link set midasv{number} master midasbr")
            ip(f"link set midasv{number} up")
            for words in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                ip(f"-n {name} {words}")
        yield
    finally:
        for words in ("link del midasbr", *(f"netns del {name}" for name in NAMESPACES)):
            subprocess.run([str(IP), *words.split()], capture_output=True, check=False)


@dataclass
class Cluster:
    """A Ray node in each namespace; the file system is one.

    Attributes:
        folder: of Ray, and storage of the runs in it.
        nodes: `ray start` of each namespace.
    """

    folder: Path
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        return kept | {
            "PATH": f"{PYTHON}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "GLOO_SOCKET_IFNAME": "eth0",  # else gloo takes an address of the loopback
        }

    def start(self, name: str) -> None:
        """Start the node of a namespace."""
        where = ["--head", f"--port={PORT}"] if name == "midas1" else [f"--address={HEAD}:{PORT}"]
        self.nodes[name] = subprocess.Popen(
            [
                *(str(IP), "netns", "exec", name, "ray", "start", "--block", *where),
                *(f"--node-ip-address={NAMESPACES[name]}", "--num-cpus=1"),
                *("--object-store-memory=200000000", "--disable-usage-stats"),
                f"--temp-dir={self.folder / name}",
            ],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until(lambda: self.num_cpus() == len(self.nodes), 60)

    def end(self, name: str) -> None:
        """End the node of a namespace, with all that runs there."""
        process = self.nodes.pop(name)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        listed = subprocess.check_output([str(IP), "netns", "pids", name], text=True)
        subprocess.run(["kill", "-KILL", *listed.split()], check=False, capture_output=True)
        process.wait()

    def num_cpus(self) -> int:
        """CPUs of the nodes that the head counts on."""
        code = "import ray; ray.init(logging_level='ERROR', log_to_driver=False)\n"
        code += "print(int(ray.cluster_resources().get('CPU', 0)))"
        asked = subprocess.run(
            self._on_head("python", "-c", code),
            env=self.environment | {"RAY_ADDRESS": f"{HEAD}:{PORT}"},
            capture_output=True,
            text=True,
            check=False,
        )
        return int(asked.stdout.split()[-1]) if asked.returncode == 0 else 0

    def midas(self, *args: str) -> subprocess.Popen[str]:
        """Start a command beside the head."""
        return subprocess.Popen(
            self._on_head("python", "-m", "service", *args, "--storage", str(self.storage)),
            env=self.environment | {"RAY_ADDRESS": f"{HEAD}:{PORT}"},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _on_head(self, *words: str) -> list[str]:
        return [str(IP), "netns", "exec", "midas1", *words]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    if not IP or os.geteuid() != 0:
        pytest.skip("network namespaces need root and `ip`")
    folder = Path(tempfile.mkdtemp(prefix="mnet", dir="/tmp"))
    (folder / "token").touch(0o600)
    (folder / "token").write_text(secrets.token_hex(32))
    found = Cluster(folder)
    with network():
        try:
            for name in NAMESPACES:
                found.start(name)
            yield found
        finally:
            for name in list(found.nodes):
                found.end(name)
            shutil.rmtree(folder, ignore_errors=True)


def test_a_cut_link_ends_a_run_that_ends_equal_after_it_is_healed(cluster: Cluster):
    whole = finish(cluster.midas(*TRAIN, *ROOM, "--name", "whole"))
    assert whole.returncode == 0, whole.stderr

    training = cluster.midas(*TRAIN, *ROOM, "--name", "cut")
    history = cluster.storage / "cut" / "history.jsonl"
    until(lambda: len(read_history(history)) >= 3)
    ip("link set midasv2 down")
    ended = finish(training)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "a node was lost and not replaced" in ended.stderr
    assert 3 <= len(read_history(history)) < 40

    ip("link set midasv2 up")
    cluster.end("midas2")  # a node that was given up does not come back by itself
    cluster.start("midas2")
    resumed = finish(cluster.midas(*TRAIN, *ROOM, "--name", "cut", "--json"))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert json.loads(resumed.stdout.splitlines()[-1])["test/accuracy"] > 0.5
    assert len(read_history(history)) == 40
    for name, value in weights(cluster.storage, "whole").items():
        assert (value == weights(cluster.storage, "cut")[name]).all(), name

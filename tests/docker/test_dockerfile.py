"""The images: linted, pinned, small in rights; every RUN step runs, and what it made works."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

from tests.docker.manifests import DOCKER, PINNED, ROOT
from tests.docker.stages import Builder, Stage

DOCKERFILE = DOCKER / "Dockerfile"
TARGETS = ("cpu", "gpu")
# What a training, the MLflow server and the bucket's script load; each has libraries of its own.
LOADED = (
    "av, boto3, cv2, flask_wtf, imagehash, matplotlib, mlflow, numpy, optuna, pandas, psycopg2, "
    "pyarrow, ray, safetensors, scipy, sklearn, soundfile, tokenizers, torch, torchaudio, "
    "torchvision, transformers, tyro"
)
CHECK_RAY = """
ray start --head --num-cpus=1 --object-store-memory=200000000 --dashboard-host=127.0.0.1 \
    --disable-usage-stats >/tmp/start.txt 2>&1 || { cat /tmp/start.txt; exit 3; }
for attempt in $(seq 30); do
    if "$@"; then echo healthy; break; fi
    sleep 1
done
python -c "
import urllib.request, urllib.error
try:
    urllib.request.urlopen('http://127.0.0.1:8265/api/jobs/')
except urllib.error.HTTPError as error:
    print('no token:', error.code)
"
ray job submit --address http://127.0.0.1:8265 -- python -c \
    "import ray; ray.init(); print('cpus:', int(ray.cluster_resources()['CPU']))"
"""


def instructions(name: str) -> list[str]:
    steps = DockerfileParser(path=str(DOCKERFILE)).structure
    return [step["value"] for step in steps if step["instruction"] == name]


def last_stage(target: str) -> dict[str, list[str]]:
    """Instructions of a target and of the stages under it, the latest last."""
    stages: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for step in DockerfileParser(path=str(DOCKERFILE)).structure:
        if step["instruction"] == "FROM":
            parent, _, name = step["value"].split()
            stages[name] = (parent, [])
        elif stages and step["instruction"] != "COMMENT":
            stages[name][1].append((step["instruction"], step["value"]))
    found: dict[str, list[str]] = {}
    while target in stages:
        parent, steps = stages[target]
        for instruction, value in reversed(steps):
            found.setdefault(instruction, []).insert(0, value)
        target = parent
    return found


def test_hadolint_finds_nothing():
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_bases_are_pinned_by_tag_and_digest():
    [base] = instructions("ARG")
    assert re.fullmatch(f"BASE={PINNED}", base)
    known = {"${BASE}"}
    for value in instructions("FROM"):
        parent, _, name = value.split()
        assert parent in known, value
        known.add(name)
    assert set(TARGETS) <= known


@pytest.mark.parametrize("target", TARGETS)
def test_targets_run_as_a_user_with_a_health_check(target: str):
    stage = last_stage(target)
    assert stage["USER"][-1] == "1000:1000"
    assert "/opt/runtime/health.py" in stage["HEALTHCHECK"][-1]
    environment = " ".join(stage["ENV"])
    for setting in (
        *("RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0", "MLFLOW_DISABLE_TELEMETRY=true"),
        *("MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", "RAY_JOB_START_TIMEOUT_SECONDS=604800"),
        "RAY_JOB_STOP_WAIT_TIME_S=120",
    ):
        assert setting in environment


def test_only_the_build_has_tools():
    """The targets take the finished environment and nothing of what made it."""
    for target in TARGETS:
        stage = last_stage(target)
        environment = f"--from=environment-{target} /opt/midas /opt/midas"
        assert stage["COPY"] == ["docker/runtime /opt/runtime", environment]
        assert not any(re.search(r"pip install|apt|uv ", run) for run in stage["RUN"])


def test_no_host_of_a_package_index_and_no_secret_in_any_file():
    for path in [ROOT / ".dockerignore", *DOCKER.rglob("*")]:
        if path.is_file() and "secrets" not in path.relative_to(DOCKER.parent).parts[1:-1]:
            text = path.read_text()
            hosts = set(re.findall(r"https?://([\w.-]+)", text))
            assert hosts <= {"127.0.0.1", "mlflow", "store"}, f"{path}: {hosts}"
            assert not re.search(r"(index-url|find-links|trusted-host)", text), path


def test_the_context_has_what_is_copied_and_no_more():
    first, *rest = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    allowed = {line.removeprefix("!") for line in rest if line.startswith("!")}
    copied = {
        source
        for value in instructions("COPY")
        if not value.startswith("--from")
        for source in value.split()[:-1]
    }
    assert first == "*"
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)
    assert "**/__pycache__" in rest


@pytest.mark.parametrize(
    ("target", "options"),
    [("cpu", ["--torch-backend cpu", "--exclude-newer-package torch=false"]), ("gpu", [])],
)
def test_targets_differ_in_the_builds_of_torch(target: str, options: list[str], tmp_path: Path):
    """Compared with the words that uv gets, which a stand-in on the path writes down."""
    (tmp_path / "bin").mkdir()
    words = tmp_path / "words.txt"
    uv = tmp_path / "bin" / "uv"
    uv.write_text(f'#!/bin/sh\necho "$@" >>{words}\n')
    uv.chmod(0o755)
    venv = tmp_path / "venv"
    venv.mkdir()
    subprocess.run(
        [DOCKER / "install.sh", target, venv],
        env={"PATH": f"{uv.parent}:{os.environ['PATH']}"},
        check=True,
        cwd=ROOT,
    )
    made, installed, listed = words.read_text().splitlines()
    assert made == f"venv {venv}"
    assert listed == f"pip freeze --python {venv}"
    assert "--compile-bytecode" in installed
    assert installed.endswith("--requirements pyproject.toml --group server")
    assert ("--torch-backend" in installed) == bool(options)
    assert all(option in installed for option in options)


def test_the_real_uv_takes_the_options_for_cpu_builds():
    """Without PyTorch's own index this is as far as the CPU target can be tried."""
    uv = shutil.which("uv")
    assert uv
    done = subprocess.run(
        [uv, "pip", "install", "--dry-run", "--offline", "--python", sys.executable, "pip>=1"]
        + ["--torch-backend", "cpu", "--exclude-newer-package", "torch=false"],
        capture_output=True,
        text=True,
    )
    assert "error: unexpected argument" not in done.stderr
    assert "invalid value" not in done.stderr, done.stderr


def test_an_unknown_target_is_refused(tmp_path: Path):
    command = [DOCKER / "install.sh", "tpu", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'tpu' is not one of: cpu, gpu" in done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Builder, Stage]:
    """The GPU target, whose packages come from the index that this machine has."""
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        pytest.skip("stages need root and debootstrap (a package of Debian)")
    builder = Builder(DOCKERFILE, ROOT, tmp_path_factory.mktemp("stages"))
    return builder, builder.build("gpu")


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestBuilt:
    """What the RUN steps made: a root folder, entered as the user of the image, sealed."""

    def run(self, built: tuple[Builder, Stage], *command: str, **environment: str) -> str:
        builder, stage = built
        done = builder.run(
            stage,
            [*stage.entrypoint, *command],
            tmpfs=("/tmp", "/home/midas", "/run"),
            sealed=True,
            **environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def test_every_run_step_ran(self, built: tuple[Builder, Stage]):
        builder, _ = built
        assert builder.steps - set(builder.ran) == {
            (stage, step) for stage, step in builder.steps if stage == "environment-cpu"
        }

    def test_everything_loads_on_a_minimal_debian(self, built: tuple[Builder, Stage]):
        said = self.run(built, "python", "-c", f"import {LOADED}; print(torch.__version__)")
        assert said.startswith("2.11.0")

    def test_the_command_works_as_the_user(self, built: tuple[Builder, Stage]):
        assert "usage: midas" in self.run(built, *built[1].command)
        assert self.run(built, "id", "--user", "--name").strip() == "midas"
        shown = self.run(built, "midas", "train", "digits", "--dry-run", "--storage", "/tmp/runs")
        assert "digits" in shown

    def test_no_tools_are_left(self, built: tuple[Builder, Stage]):
        tools = ("pip", "pip3", "uv", "gcc", "cc", "git", "curl", "wget", "pytest", "ruff")
        found = self.run(built, "sh", "-c", "for t; do command -v $t || true; done", "sh", *tools)
        assert found == ""

    def test_packages_are_compiled_and_as_pinned(self, built: tuple[Builder, Stage]):
        site = built[1].path("/opt/midas/lib/python3.11/site-packages")
        for package in ("ray", "torch", "mlflow", "service"):
            assert any((site / package / "__pycache__").glob("__init__.*.pyc")), package
        listed = built[1].path("/opt/midas/requirements.txt").read_text().splitlines()
        assert {"ray==2.60.0", "mlflow==3.17.2"} <= set(listed)

    def test_ray_starts_asks_for_the_token_and_is_healthy(
        self, built: tuple[Builder, Stage], tmp_path: Path
    ):
        health = json.loads(json.dumps(built[1].health))
        script = ["sh", "-c", CHECK_RAY, "sh", *health]
        said = self.run(built, *script, RAY_AUTH_TOKEN="0" * 64)
        assert "healthy" in said
        assert "no token: 401" in said
        assert "cpus: 1" in said

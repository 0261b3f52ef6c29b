"""The commands of the README's section on containers, as far as they can run here."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.docker.manifests import BASE, ROOT, resource

SECTION = (ROOT / "README.md").read_text().partition("\n## Containers and Kubernetes\n")[2]
COMMANDS = [
    shlex.split(line, comments=True)
    for block in SECTION.partition("\n## ")[0].split("```sh\n")[1:]
    for line in block.partition("```")[0].splitlines()
]


def commands(*start: str) -> list[list[str]]:
    return [command for command in COMMANDS if command[: len(start)] == list(start)]


def test_files_and_folders_in_commands_exist():
    words = {word.partition("=")[2] or word for command in COMMANDS for word in command}
    named = {word for word in words if word.startswith("docker/") and "secrets/" not in word}
    assert named == {
        *("docker/secrets.sh", "docker/compose.yaml"),
        *("docker/kuberay", "docker/kuberay/namespace.yaml"),
    }
    assert all((ROOT / name).exists() for name in named)


def test_kubectl_makes_the_secrets(tmp_path: Path):
    kubectl = shutil.which("kubectl")
    if not kubectl:
        pytest.skip("no kubectl")
    [make] = commands("docker/secrets.sh")
    subprocess.run([ROOT / make[0], tmp_path], check=True)
    made = {}
    for command in commands("kubectl", "--namespace", "midas", "create", "secret"):
        words = [word.replace("docker/secrets", str(tmp_path)) for word in command[1:]]
        dry = [kubectl, *words, "--dry-run=client", "--output=yaml"]
        secret = yaml.safe_load(subprocess.check_output(dry, timeout=60))
        made[secret["metadata"]["name"]] = set(secret["data"])
    assert made == {
        "midas-ray": {"auth_token"},
        "midas-mlflow": {"password", "flask_key"},
        "midas-postgres": {"password"},
    }


def test_the_base_is_applied_and_its_job_let_go():
    assert commands("kubectl", "apply", "--kustomize")[0][3:] == [str(BASE.relative_to(ROOT))]
    [patch] = commands("kubectl", "--namespace", "midas", "patch")
    assert patch[4:6] == ["rayjob", resource("RayJob", "midas")["metadata"]["name"]]
    assert yaml.safe_load(patch[-1]) == {"spec": {"suspend": False}}


def test_the_job_is_submitted_where_compose_publishes_ray():
    [submit] = commands("ray", "job", "submit")
    assert "http://127.0.0.1:8265" in submit
    assert submit[submit.index("--") + 1 :][:3] == ["midas", "train", "digits"]

"""Who may import whom, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("service", "training", "data")
# import -> files that may have it (a folder ends with a slash)
ALLOWED = {
    "ray.data": ("data/pipeline.py",),
    "ray": (
        *("service/cluster.py", "service/group.py", "service/worker.py"),
        *("service/trial.py", "service/tuner.py", "service/jobs.py", "service/submission.py"),
        "data/pipeline.py",
    ),
    "optuna": ("service/study.py", "service/sweep_page.py"),
    "mlflow": (
        "service/tracking.py",
        "service/sending.py",
        "service/registry.py",
        "service/pyfunc_model.py",
    ),
    "torch.distributed": ("training/distributed.py",),
    "torch": (
        *("training/", "service/worker.py", "service/rows.py", "service/keeper.py"),
        *("service/plan.py", "service/stepper.py", "service/contest.py"),
        *("service/engine.py", "service/trial.py", "service/cost.py"),
        *("service/doctor.py", "service/served.py", "service/export.py", "service/pyfunc_model.py"),
        "data/features.py",
    ),
    "torchaudio": ("data/features.py",),
    "rich": ("service/console.py",),
    "tyro": ("service/verbs/arguments.py",),
    "argparse": ("service/verbs/", "service/__main__.py"),
    "yaml": (
        *("service/config.py", "service/launch.py", "service/inspection.py"),
        *("service/sweep.py", "service/record.py", "service/registry.py"),
    ),
}
ROOM_IMPORTS = {"training": ("training",), "data": ("data",), "service": ROOMS}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def violations(where: str, names: set[str]) -> list[str]:
    found = []
    for name in sorted(names):
        rule = next((r for r in ALLOWED if name == r or name.startswith(r + ".")), None)
        if rule and not where.startswith(ALLOWED[rule]):
            found.append(f"{where} imports {name}; only {', '.join(ALLOWED[rule])} may")
        room = name.split(".")[0]
        if room in ROOMS and room not in ROOM_IMPORTS[where.split("/")[0]]:
            found.append(f"{where} imports {name}; {where.split('/')[0]} may not import {room}")
    return found


def test_import_rules():
    found = []
    for path in sources():
        found += violations(str(path.relative_to(ROOT)), set(imports(path)))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("training/loop.py", "ray.train"),
        ("data/order.py", "training.batch"),
        ("service/launch.py", "mlflow"),
        ("training/methods/midas.py", "torch.distributed"),
    ],
)
def test_the_rules_catch(where: str, name: str):
    assert violations(where, {name})


def test_every_file_says_what_it_is():
    missing = [
        str(p)
        for p in sources()
        if p.name != "__init__.py" and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not missing

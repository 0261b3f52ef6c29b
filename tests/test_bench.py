"""The bench scripts run and print what they promise; nothing here judges a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"

pytestmark = pytest.mark.ray  # another process, not Ray; the fast part stays fast


@pytest.mark.parametrize(
    ("script", "flags", "number"),
    [
        ("reading.py", ("--clips", "16", "--rounds", "1"), "shards_over_files_0"),
        ("decode.py", ("--clips", "2", "--rounds", "1"), "ratio_jpg"),
        ("storage.py", ("--clips", "16", "--rounds", "1"), "forms"),
        ("augment.py", ("--clips", "2", "--rounds", "1"), "train_batched_over_bytes"),
        (
            "ordered_stream.py",
            ("--files", "4", "--epochs", "1", "--rounds", "1", "--window-mib", "32"),
            "ordered_over_pyarrow",
        ),
        pytest.param(
            "memory.py",
            ("--files", "2", "--rounds", "1", "--window-mib", "8"),
            "microseconds_per_row_ratio_16x",
            marks=pytest.mark.slow,
        ),
        ("batchnorm.py", ("--seconds", "1", "--rows", "2"), "in_turns_over_local"),
        ("precision.py", ("--rows", "2", "--rounds", "1", "--scale", "0.3"), "fp32_over_bf16"),
        ("cores.py", ("--seconds", "2"), "bfloat16"),
        ("startup.py", ("--rounds", "1", "--epochs", "2"), "warm/first_step"),
        pytest.param(
            "train_speed.py",
            ("--clips", "48", "--rows", "4", "--seconds", "1"),
            "ray_over_bare",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_benches_print_one_json_line(script: str, flags: tuple[str, ...], number: str):
    done = subprocess.run(
        [sys.executable, str(BENCH / script), *flags], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result[number]
    assert result["machine"]["cores"] > 0


def test_method_step_prints_one_json_line():
    config = {"encoder": "small_cnn", "rows": 4, "size": 16, "steps": 2, "rounds": 2}
    flags = [text for name, value in config.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(BENCH / "method_step.py"), *flags],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    result = json.loads(done.stdout)
    assert {"bf16", "commit", "cores", "cpu", "load_average", "threads", "torch"} == set(
        result["machine"]
    )
    assert result["config"] == config
    assert set(result["step_seconds"]) == {"midas", "joint_uni", "joint"}
    assert all(seconds > 0 for seconds in result["step_seconds"].values())
    assert result["pairs"] == 4
    low, middle, high = (result[f"midas_over_joint_uni{end}"] for end in ("_min", "", "_max"))
    assert 0 < low <= middle <= high
    assert result["midas_over_joint"] > 0

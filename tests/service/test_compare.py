"""`midas compare` without training: its configs and its statistics."""

import json
import math
from pathlib import Path

import pytest

from service.compare import compare_runs, summarize, variants
from service.config import ConfigError, RunConfig, load_preset
from service.console import Console


def test_variants_are_methods_times_seeds():
    base = load_preset("digits")
    runs = variants(base, ["joint", "midas"], [0, 3])
    assert [(run.name, run.method, run.train.seed) for run in runs] == [
        ("digits-joint-seed0", "joint", 0),
        ("digits-joint-seed3", "joint", 3),
        ("digits-midas-seed0", "midas", 0),
        ("digits-midas-seed3", "midas", 3),
    ]
    for run in runs:
        assert run.data == base.data
        assert run.midas == base.midas
        assert run.train.model_copy(update={"seed": base.train.seed}) == base.train


def test_a_name_replaces_the_data_set_in_the_run_names():
    base = RunConfig(name="study")
    assert [run.name for run in variants(base, ["joint"], [1])] == ["study-joint-seed1"]


def test_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="cannot compare mides: method='mides': .*'joint'"):
        variants(RunConfig(), ["joint", "mides"], [0])


def test_negative_seed_is_refused():
    with pytest.raises(ConfigError, match=r"train\.seed=-1: .*greater than or equal to 0"):
        variants(RunConfig(), ["joint"], [-1])


def test_setting_that_does_not_fit_one_of_the_methods_is_refused():
    base = RunConfig.model_validate({"method": "joint", "midas": {"pair_groups": 3}})
    assert len(variants(base, ["joint"], [0])) == 1
    with pytest.raises(ConfigError, match=r"midas\.pair_groups=3 must divide"):
        variants(base, ["joint", "midas"], [0])


def result(method: str, accuracy: float, **more: float | str) -> dict[str, float | str]:
    return {"method": method, "test/accuracy": accuracy, "val/accuracy": 0.1, "seconds": 2.0} | more


def test_summary_is_mean_and_sample_standard_deviation():
    summary = summarize(
        [result("joint", value) for value in (0.5, 0.6, 0.8)]
        + [result("midas", value) for value in (0.9, 0.7)]
    )
    mean = 1.9 / 3
    spread = math.sqrt(((0.5 - mean) ** 2 + (0.6 - mean) ** 2 + (0.8 - mean) ** 2) / 2)
    assert summary == pytest.approx(
        {
            "joint/test/accuracy/mean": mean,
            "joint/test/accuracy/std": spread,
            "midas/test/accuracy/mean": 0.8,
            "midas/test/accuracy/std": math.sqrt(0.02),
        }
    )


def test_one_seed_has_no_spread():
    summary = summarize([result("joint", 0.5)])
    assert summary == {"joint/test/accuracy/mean": 0.5, "joint/test/accuracy/std": 0.0}


def test_a_metric_that_some_runs_lack_is_left_out():
    summary = summarize([result("joint", 0.5, **{"test/f1_macro": 0.4}), result("joint", 0.7)])
    assert set(summary) == {"joint/test/accuracy/mean", "joint/test/accuracy/std"}


def finish(storage: Path, name: str, digest: str, split: str, accuracy: float = 0.5) -> None:
    """Write the result of a finished run."""
    more = {"name": name, "data_digest": digest, "split": split}
    (storage / name).mkdir()
    (storage / name / "result.json").write_text(json.dumps(result("midas", accuracy, **more)))


def test_finished_runs_are_compared_by_method(tmp_path: Path):
    for name, accuracy in (("a", 0.5), ("b", 0.7)):
        finish(tmp_path, name, "d" * 64, "official", accuracy)
    found = compare_runs(["a", "b"], str(tmp_path), Console(json_mode=True))
    assert found["midas/test/accuracy/mean"] == pytest.approx(0.6)
    assert (found["runs"], found["split"]) == (2, "official")


def test_runs_over_different_splits_are_not_compared(tmp_path: Path):
    finish(tmp_path, "a", "d" * 64, "official")
    finish(tmp_path, "b", "e" * 64, "grouped, seed 2")
    message = r"run b \(split grouped, seed 2, data e{12}\) cannot be compared with a \(split offi"
    with pytest.raises(ConfigError, match=message):
        compare_runs(["a", "b"], str(tmp_path), Console(json_mode=True))
